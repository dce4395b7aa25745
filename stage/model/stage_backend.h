// stage/model/stage_backend.h — another way to run a stage's decoder layers than decoder_layer.h: kernels of one kind of
// device. StageModel keeps what is the same everywhere (vision features, embedding of prompts, checks of the input).
//
// Ownership: a backend belongs to its StageModel and uses that model's KV cache. Thread safety: none, the model's thread.
// Results equal the reference's within the tolerances of docs/numerics.md; a sequence's tokens may differ in the last bit
// with batch company.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "stage/base/status.h"
#include "stage/contract/model_shape.h"
#include "stage/model/stage_types.h"
#include "stage/ops/attention.h"
#include "stage/ops/rotary.h"
#include "stage/step/step_plan.h"
#include "stage/weights/loader.h"

namespace qwen::model {

class StageBackend {
 public:
  virtual ~StageBackend() = default;

  // The stream on which it computes (a cudaStream_t).
  virtual void* stream() const = 0;
  // Whether Decode takes the plan: one token of each sequence, each sampled, no pictures.
  virtual bool TakesDecode(const step::StepPlan& plan) const = 0;
  // The whole step: on stage 0 `input` is empty and the backend embeds; on the last stage the output is logits
  // (samples, vocab). What is returned stays valid until the next call. May throw what LibTorch throws.
  virtual Result<StageOutput> Decode(const step::StepPlan& plan, const StageActivations& input) = 0;
  // Any plan, after embedding. `visual_rows`: (visual tokens) int64 rows of hidden, undefined when there are none.
  virtual Result<StageOutput> Prefill(const step::StepPlan& plan, StageActivations state, const at::Tensor& visual_rows) = 0;
};

struct StageModelOptions;
// Called by StageModel::Create. May replace tensors by views of merged ones (q, k, v of a layer), and reorders FP8 codes where they lie. kUnimplemented when the
// shape, dtype or device is none that the backend has kernels for: the model then runs on the reference.
using StageBackendFactory = std::function<Result<std::unique_ptr<StageBackend>>(
    const contract::ModelShape& shape, const StageModelOptions& options, weights::TensorMap& tensors,
    const std::vector<ops::PagedKv>& cache, const ops::RotaryFrequencies& rotary)>;

// Whether the backend takes the shape's weights in block FP8: what first stands in the way, empty when nothing does. Asked before loading.
using StageFp8Check = std::function<std::string(const contract::ModelShape& shape, const StageModelOptions& options)>;

}  // namespace qwen::model
