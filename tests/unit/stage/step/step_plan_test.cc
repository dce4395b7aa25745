// Goal: a plan that came over the wire is refused, field by field, before anything indexes with it.
#include <gtest/gtest.h>

#include <functional>

#include "stage/step/step_plan.h"

namespace qwen::step {
namespace {

PlanLimits Limits() {
  return {.block_tokens = 4, .block_count = 8, .max_slots = 2, .max_batch_tokens = 8, .max_sequence_tokens = 16, .vocab_size = 40};
}

StepPlan Valid() {
  StepPlan plan;
  plan.starts = {{.sequence = 1, .slot = 0, .tokens = {1, 2, 3, 4, 5, 6}, .prompt_tokens = 6}};
  plan.spans = {{.sequence = 1, .slot = 0, .begin = 3, .tokens = {4, 5, 6}, .positions = {{3, 3, 3}, {4, 4, 4}, {5, 5, 5}},
                 .blocks = {7, 0}, .vision = {{.id = 1, .feature_begin = 0, .span_offset = 1, .count = 2}}, .sample = true}};
  return plan;
}

TEST(ValidatePlan, AcceptsAValidPlanAndCounts) {
  const StepPlan plan = Valid();
  EXPECT_TRUE(ValidatePlan(plan, Limits()).ok()) << ValidatePlan(plan, Limits()).ToString();
  EXPECT_EQ(plan.token_count(), 3);
  EXPECT_EQ(plan.vision_token_count(), 2);
  EXPECT_EQ(plan.sample_count(), 1);
}

TEST(ValidatePlan, NamesTheFieldThatIsWrong) {
  const struct {
    const char* field;
    std::function<void(StepPlan&)> spoil;
  } cases[] = {
      {"spans: empty", [](StepPlan& p) { p.spans.clear(); }},
      {"tokens: empty", [](StepPlan& p) { p.spans[0].tokens.clear(); }},
      {"positions", [](StepPlan& p) { p.spans[0].positions.pop_back(); }},
      {"positions: negative", [](StepPlan& p) { p.spans[0].positions[0].h = -1; }},
      {"begin: negative", [](StepPlan& p) { p.spans[0].begin = -1; }},
      {"begin: past", [](StepPlan& p) { p.spans[0].begin = 2147483640; }},
      {"blocks: 1, expected 2", [](StepPlan& p) { p.spans[0].blocks.pop_back(); }},
      {"blocks: 4, expected 2", [](StepPlan& p) { p.spans[0].blocks.insert(p.spans[0].blocks.end(), {5, 6}); }},
      {"blocks: id 8", [](StepPlan& p) { p.spans[0].blocks[1] = 8; }},
      {"slot: out of range", [](StepPlan& p) { p.spans[0].slot = 2; }},
      {"slot: used twice", [](StepPlan& p) { p.spans.push_back(p.spans[0]); }},
      {"id 40", [](StepPlan& p) { p.spans[0].tokens[0] = 40; }},
      {"vision: past", [](StepPlan& p) { p.spans[0].vision[0].count = 3; }},
      {"vision: not ascending", [](StepPlan& p) { p.spans[0].vision[0].span_offset = -1; }},
      {"allowed", [](StepPlan& p) { p.spans[0].allowed = {1}; }},
      {"max_batch_tokens", [](StepPlan& p) { p.spans[0].tokens.resize(9, 1); }},
      {"starts[0].slot", [](StepPlan& p) { p.starts[0].slot = -1; }},
      {"starts[0].prompt_tokens", [](StepPlan& p) { p.starts[0].prompt_tokens = 7; }},
      {"starts[0].tokens", [](StepPlan& p) { p.starts[0].tokens[0] = -1; }},
      {"logit_bias", [](StepPlan& p) { p.starts[0].params.logit_bias = {{40, 1.0f}}; }},
      {"stop_tokens", [](StepPlan& p) { p.starts[0].params.stop_tokens = {-2}; }},
  };
  for (const auto& c : cases) {
    StepPlan plan = Valid();
    c.spoil(plan);
    const Status status = ValidatePlan(plan, Limits());
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << c.field;
    EXPECT_NE(status.message().find(c.field), std::string::npos) << c.field << " not in: " << status.message();
  }
}

}  // namespace
}  // namespace qwen::step
