// stage/model/stage_types.h — what goes into a stage and comes out of it. Thread safety: values.
#pragma once
#include <ATen/core/Tensor.h>

namespace qwen::model {

// What travels between stages (step/activation_shape.h gives the exact sizes).
struct StageActivations {
  at::Tensor hidden;     // (tokens, H) in the model's dtype
  at::Tensor deepstack;  // (taps still owed, visual tokens in plan order, H); undefined when there are none
};

struct StageOutput {
  StageActivations activations;  // hidden undefined on the last stage
  at::Tensor logits;             // last stage: (samples, vocab) in the model's dtype, span order; undefined without samples
  bool begun = false;            // the logits are rows of those of the step that RunAhead began
};

}  // namespace qwen::model
