#include "stage/step/activation_shape.h"

#include <algorithm>

#include "stage/base/check.h"

namespace qwen::step {
namespace {

ActivationShape Shape(int32_t layer, int64_t tokens, int64_t visual_tokens, const ActivationSizes& sizes) {
  QP_CHECK(layer > 0 && sizes.hidden > 0 && sizes.element_bytes > 0);
  ActivationShape shape;
  shape.tokens = tokens;
  shape.visual_tokens = visual_tokens;
  shape.taps = std::max<int64_t>(0, sizes.deepstack_taps - layer);
  if (shape.taps == 0 || shape.visual_tokens == 0) shape.taps = shape.visual_tokens = 0;
  shape.hidden_bytes = tokens * sizes.hidden * sizes.element_bytes;
  shape.deepstack_bytes = shape.taps * shape.visual_tokens * sizes.hidden * sizes.element_bytes;
  return shape;
}

}  // namespace

ActivationShape ActivationsBefore(int32_t layer, const StepPlan& plan, const ActivationSizes& sizes) {
  return Shape(layer, plan.token_count(), plan.vision_token_count(), sizes);
}

ActivationShape ActivationsMax(int32_t layer, int64_t batch_tokens, const ActivationSizes& sizes) {
  return Shape(layer, batch_tokens, batch_tokens, sizes);
}

}  // namespace qwen::step
