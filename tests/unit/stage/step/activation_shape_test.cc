// What crosses a stage boundary, in numbers worked out by hand.
#include "stage/step/activation_shape.h"

#include <gtest/gtest.h>

namespace qwen::step {
namespace {

StepPlan PlanOf(int tokens, int visual) {
  StepPlan plan;
  SequenceSpan span;
  span.tokens.assign(tokens, 1);
  if (visual > 0) span.vision.push_back({.id = 1, .count = visual});
  plan.spans = {span};
  return plan;
}

TEST(ActivationShape, AfterTheTapsOnlyHiddenStatesTravel) {
  const ActivationShape shape = ActivationsBefore(24, PlanOf(10, 4), {.hidden = 4096, .deepstack_taps = 3, .element_bytes = 2});
  EXPECT_EQ(shape.hidden_bytes, 81920);  // 8 KB a token
  EXPECT_EQ(shape.total_bytes(), 81920);
  EXPECT_EQ(shape.taps, 0);
}

TEST(ActivationShape, ABoundaryBeforeLayerOneOwesTapsOneAndTwo) {
  const ActivationShape shape = ActivationsBefore(1, PlanOf(10, 4), {.hidden = 64, .deepstack_taps = 3, .element_bytes = 4});
  EXPECT_EQ(shape.taps, 2);
  EXPECT_EQ(shape.visual_tokens, 4);
  EXPECT_EQ(shape.deepstack_bytes, 2 * 4 * 64 * 4);
  EXPECT_EQ(shape.total_bytes(), 10 * 64 * 4 + 2 * 4 * 64 * 4);
}

TEST(ActivationShape, WithoutVisualTokensNoTapsTravel) {
  const ActivationShape shape = ActivationsBefore(1, PlanOf(10, 0), {.hidden = 64, .deepstack_taps = 3, .element_bytes = 4});
  EXPECT_EQ(shape.taps, 0);
  EXPECT_EQ(shape.deepstack_bytes, 0);
}

TEST(ActivationShape, TheMaximumCoversAPlanOfVisualTokensOnly) {
  const ActivationSizes sizes{.hidden = 64, .deepstack_taps = 3, .element_bytes = 2};
  EXPECT_EQ(ActivationsMax(2, 100, sizes), ActivationsBefore(2, PlanOf(100, 100), sizes));
  EXPECT_EQ(ActivationsMax(2, 100, sizes).total_bytes(), 2 * 100 * 64 * 2);
}

}  // namespace
}  // namespace qwen::step
