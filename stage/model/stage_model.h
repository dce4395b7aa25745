// stage/model/stage_model.h — the layers [a, b) of a model on one device: a StepPlan and the previous stage's activations
// in, the next stage's activations or logits out. Written once for qwen3_vl_moe, qwen3_vl, qwen3_moe and qwen3.
//
// Stage 0 also holds the embedding (and, through VisionEncoder, the vision tower), the last stage the final norm and
// lm_head. Reference backend: ATen operators, in transformers' order of rounding (docs/numerics.md); the result of a
// sequence does not depend on how the layers are split, and with RowGrouping::kPerSpan not on the rest of the batch either.
// Another backend (stage_backend.h) may be given: then the layers run on it.
//
// State: the KV cache (addressed only through the plan's blocks) and, on stage 0, vision features until they are released.
// Thread safety: none; one thread. Errors: a plan or activations that do not fit are kInvalidArgument, a library failure is
// kInternal, memory that does not suffice kResourceExhausted.
#pragma once
#include <ATen/core/Tensor.h>

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "stage/base/status.h"
#include "stage/contract/layer_plan.h"
#include "stage/contract/model_shape.h"
#include "stage/model/batch.h"
#include "stage/model/decoder_layer.h"
#include "stage/model/run_ahead.h"
#include "stage/model/stage_backend.h"
#include "stage/model/stage_types.h"
#include "stage/step/activation_shape.h"
#include "stage/step/step_plan.h"
#include "stage/weights/loader.h"

namespace qwen::model {

// Pixels to features, one tensor for each input: (1 + taps, tokens, H), the merged features first, then one DeepStack tap each.
using VisionEncoder = std::function<Result<std::vector<at::Tensor>>(std::span<const step::VisionInput> inputs)>;
// Makes the encoder out of the stage's loaded tensors ("visual.*"): vision::MakeEncoderFactory gives one.
using VisionEncoderFactory = std::function<Result<VisionEncoder>(const weights::TensorMap&)>;

struct StageModelOptions {
  contract::LayerRange layers;
  int32_t stage = 0, stages = 1;
  at::Device device = at::kCPU;
  at::ScalarType dtype = at::kBFloat16;  // of weights, activations and KV
  int32_t block_tokens = 16;
  int32_t block_count = 0;               // KV blocks, allocated by Load
  RowGrouping grouping = RowGrouping::kPerSpan;
  ops::RouterTies router_ties = ops::RouterTies::kLowestExpert;
  int32_t load_threads = 4;
  weights::LoadMethod load_method = weights::LoadMethod::kOverlapped;
  bool keep_fp8 = false;                 // FP8 weights stay FP8: only with a backend that takes them (kFailedPrecondition else)
  int64_t vision_tokens_max = 131072;    // merged tokens kept at once (at H = 4096 in bf16 with 3 taps 4.3 GB)
  StageBackendFactory backend;           // empty: the reference (ATen operators)
  int32_t max_batch_tokens = 2048;       // of one plan; what a backend prepares for
  int32_t max_sequence_tokens = 0;       // of one sequence; 0: the shape's max_positions
  VisionEncoderFactory vision;           // stage 0 of a vision model; empty: AddVision is kFailedPrecondition
  // For tests and parity dumps: called with the residual stream before each layer of the range, and with `layer` == the
  // model's layer count before the final norm. Empty: no cost.
  std::function<void(int32_t layer, const at::Tensor& hidden)> on_hidden;
};

class StageModel {
 public:
  using Progress = weights::LoadProgress;
  static Result<std::unique_ptr<StageModel>> Load(weights::Checkpoint& checkpoint, const contract::ModelShape& shape,
                                                  const StageModelOptions& options, const Progress& progress = {});
  // The same from tensors that are in memory already (tests, generated weights). Takes what it needs by slot name.
  static Result<std::unique_ptr<StageModel>> Create(const contract::ModelShape& shape, const StageModelOptions& options,
                                                    const weights::TensorMap& tensors);
  // REQUIRES: ValidatePlan(plan) is OK under limits that agree with the options; stage 0 gets empty activations.
  Result<StageOutput> Forward(const step::StepPlan& plan, const StageActivations& input);
  // A step that was begun before it was asked for.
  struct Ahead {
    step::StepPlan plan;
    at::Tensor logits;  // (spans, vocab), written when the backend's stream gets there
  };
  // After a step whose `samples` are known: begins the step that will probably follow, on a backend that computes beside the
  // caller, with one stage alone; nothing (null) otherwise. The next Forward takes its result when that is what it is asked for; until then
  // what is returned stays valid.
  const Ahead* RunAhead(const step::StepPlan& done, std::span<const step::SampledToken> samples);
  // Runs the vision tower on inputs with different ids and keeps their features until a plan's vision_released names them. An id that
  // is there already is replaced. kResourceExhausted beyond vision_tokens_max: then none of them is added.
  Status AddVision(std::span<const step::VisionInput> inputs);
  Status AddVision(const step::VisionInput& input) { return AddVision(std::span<const step::VisionInput>(&input, 1)); }
  // Forgets all vision features; KV content is void from the caller's side anyway. For a new epoch.
  void Reset();

  bool first() const { return options_.stage == 0; }
  bool last() const { return options_.stage == options_.stages - 1; }
  const StageModelOptions& options() const { return options_; }
  const contract::ModelShape& shape() const { return shape_; }
  step::ActivationSizes activation_sizes() const;
  int64_t vision_tokens() const { return vision_tokens_; }
  bool fused() const { return backend_ != nullptr; }  // runs on options().backend
  void* stream() const { return backend_ ? backend_->stream() : nullptr; }  // of the device; null: its default one

 private:
  StageModel(const contract::ModelShape& shape, const StageModelOptions& options);
  Status Bind(const weights::TensorMap& tensors);
  Result<StageActivations> Embed(const step::StepPlan& plan, const Batch& batch);
  void Release(const step::StepPlan& plan);  // vision features that the plan gives back
  Status CheckInput(const step::StepPlan& plan, const StageActivations& input) const;
  std::optional<StageOutput> TakeAhead(const step::StepPlan& plan);
  Result<StageOutput> ForwardOrThrow(const step::StepPlan& plan, const StageActivations& input);

  const contract::ModelShape shape_;
  const StageModelOptions options_;
  at::Tensor embedding_;         // (vocab, H), stage 0
  at::Tensor norm_, lm_head_;    // (H), (vocab, H), last stage
  std::vector<DecoderLayer> layers_;
  std::vector<ops::PagedKv> cache_;  // one per layer
  ops::RotaryFrequencies rotary_;
  std::unique_ptr<StageBackend> backend_;  // null: layers_ compute
  std::optional<Ahead> ahead_;
  RunAheadPolicy ahead_policy_;
  VisionEncoder encoder_;
  std::map<step::VisionId, at::Tensor> features_;  // (1 + taps, tokens, H)
  int64_t vision_tokens_ = 0;                      // rows of all features_
};

}  // namespace qwen::model
