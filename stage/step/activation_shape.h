// stage/step/activation_shape.h — what crosses the boundary between two stages for one plan: shapes and exact byte counts.
// Pure arithmetic on plain numbers, so that the transport can bound a read before the first byte of a tensor arrives.
//
// DeepStack tap i is added after text layer i. A boundary before layer b therefore still owes the taps b, b+1, ..: they
// travel with the hidden states, one row per visual token of the plan. With b >= taps (the usual split) nothing extra does.
#pragma once
#include <cstdint>

#include "stage/step/step_plan.h"

namespace qwen::step {

struct ActivationSizes {       // of the model, equal for all boundaries
  int64_t hidden = 0;          // H
  int64_t deepstack_taps = 0;  // of the model (3 for the released ones); 0 without vision
  int64_t element_bytes = 2;   // of the activations' dtype: 2 bfloat16, 4 float32
};

struct ActivationShape {
  int64_t tokens = 0;         // hidden is (tokens, hidden)
  int64_t taps = 0;           // deepstack is (taps, visual_tokens, hidden); absent when either is 0
  int64_t visual_tokens = 0;  // as many as the plan's VisionSlices cover, in plan order
  int64_t hidden_bytes = 0;
  int64_t deepstack_bytes = 0;
  int64_t total_bytes() const { return hidden_bytes + deepstack_bytes; }
  bool operator==(const ActivationShape&) const = default;
};

// Into the stage whose first layer is `layer`, that is out of the stage whose layers end there. Stage 0 (layer 0) receives
// no activations and the last stage sends none: do not ask for those. REQUIRES: layer > 0.
ActivationShape ActivationsBefore(int32_t layer, const StepPlan& plan, const ActivationSizes& sizes);
// The most that any plan of at most `batch_tokens` tokens can need: what a receive buffer must hold.
ActivationShape ActivationsMax(int32_t layer, int64_t batch_tokens, const ActivationSizes& sizes);

}  // namespace qwen::step
