#include "stage/model/stage_model.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include "stage/ops/norm.h"
#include "stage/weights/guarded.h"

namespace qwen::model {
namespace {

ops::RotaryOptions Rotary(const contract::ModelShape& shape) {
  ops::RotaryOptions options{.head_dim = shape.head_dim, .theta = shape.rope_theta, .mrope_section = shape.mrope_section};
  if (shape.rope_type == "yarn") {
    options.yarn = {.factor = shape.rope_factor,
                    .attention_factor = shape.rope_attention_factor,
                    .beta_fast = shape.rope_beta_fast,
                    .beta_slow = shape.rope_beta_slow,
                    .original_max_positions = shape.rope_original_max_positions};
  }
  return options;
}

Status CheckOptions(const contract::ModelShape& shape, const StageModelOptions& options) {
  if (options.stage < 0 || options.stage >= options.stages) return InvalidArgumentError("stage: out of range");
  if (options.layers.begin < 0 || options.layers.end > shape.layers || options.layers.count() <= 0) {
    return InvalidArgumentError("layers: " + contract::ToString(options.layers) + " of " + std::to_string(shape.layers));
  }
  if ((options.stage == 0) != (options.layers.begin == 0)) return InvalidArgumentError("layers: stage 0 starts at layer 0");
  if ((options.stage == options.stages - 1) != (options.layers.end == shape.layers)) {
    return InvalidArgumentError("layers: the last stage ends at layer " + std::to_string(shape.layers));
  }
  if (options.block_tokens <= 0 || options.block_count <= 0) return InvalidArgumentError("block_tokens, block_count: must be positive");
  if (options.dtype != at::kFloat && options.dtype != at::kBFloat16) return InvalidArgumentError("dtype: float32 or bfloat16");
  return OkStatus();
}

std::string Sizes(const at::Tensor& tensor) {
  if (!tensor.defined()) return "nothing";
  std::string text = "(";
  for (int64_t size : tensor.sizes()) text += std::to_string(size) + ",";
  return text + ") " + c10::toString(tensor.scalar_type());
}

}  // namespace

StageModel::StageModel(const contract::ModelShape& shape, const StageModelOptions& options)
    : shape_(shape), options_(options) {}

Result<std::unique_ptr<StageModel>> StageModel::Load(weights::Checkpoint& checkpoint, const contract::ModelShape& shape,
                                                     const StageModelOptions& options, const Progress& progress) {
  RETURN_IF_ERROR(CheckOptions(shape, options));
  ASSIGN_OR_RETURN(const weights::TensorMap tensors,
                   weights::LoadTensors(checkpoint, shape,
                                        {.spec = {.layers = options.layers, .index = options.stage, .stages = options.stages},
                                         .device = options.device,
                                         .dtype = options.dtype,
                                         .threads = options.load_threads,
                                         .progress = progress,
                                         .method = options.load_method,
                                         .keep_fp8 = options.keep_fp8}));
  return Create(shape, options, tensors);
}

Result<std::unique_ptr<StageModel>> StageModel::Create(const contract::ModelShape& shape, const StageModelOptions& options,
                                                       const weights::TensorMap& tensors) {
  RETURN_IF_ERROR(CheckOptions(shape, options));
  std::unique_ptr<StageModel> model(new StageModel(shape, options));
  RETURN_IF_ERROR(weights::Guarded("binding weights and KV cache", [&]() -> Status {
    c10::InferenceMode inference;
    return model->Bind(tensors);
  }));
  if (model->first() && shape.vision && options.vision) {
    ASSIGN_OR_RETURN(model->encoder_, options.vision(tensors));
  }
  return model;
}

Status StageModel::Bind(const weights::TensorMap& given) {
  weights::TensorMap tensors = given;  // handles: the backend may put views of merged tensors into their place
  if (first()) embedding_ = tensors.at("embed_tokens.weight");
  if (last()) {
    norm_ = tensors.at("norm.weight");
    lm_head_ = tensors.at("lm_head.weight");
  }
  const auto kv_options = at::TensorOptions().dtype(options_.dtype).device(options_.device);
  for (int32_t layer = options_.layers.begin; layer < options_.layers.end; ++layer) {
    // Not zeroed: a row is read only after it was written, and untouched pages cost no memory on a CPU.
    const std::vector<int64_t> sizes = {options_.block_count, options_.block_tokens, shape_.kv_heads, shape_.head_dim};
    cache_.push_back({at::empty(sizes, kv_options), at::empty(sizes, kv_options)});
  }
  rotary_ = ops::MakeRotaryFrequencies(Rotary(shape_), options_.device);
  std::string refused;  // why the backend did not take the model
  if (options_.backend) {
    auto backend = options_.backend(shape_, options_, tensors, cache_, rotary_);
    if (backend.ok()) {
      backend_ = std::move(backend).value();
      return OkStatus();
    }
    if (backend.status().code() != StatusCode::kUnimplemented) return backend.status();
    refused = ": " + backend.status().message();
  }
  for (const auto& [slot, tensor] : tensors) {
    if (tensor.scalar_type() == at::kFloat8_e4m3fn) return FailedPreconditionError("weights are kept in FP8, which the reference does not compute with" + refused);
  }
  for (int32_t layer = options_.layers.begin; layer < options_.layers.end; ++layer) {
    layers_.emplace_back(shape_, DecoderLayer::Options{.layer = layer, .ties = options_.router_ties}, tensors);
  }
  return OkStatus();
}

step::ActivationSizes StageModel::activation_sizes() const {
  return {.hidden = shape_.hidden,
          .deepstack_taps = shape_.deepstack_count(),
          .element_bytes = static_cast<int64_t>(c10::elementSize(options_.dtype))};
}

Status StageModel::AddVision(std::span<const step::VisionInput> inputs) {
  if (!encoder_) return FailedPreconditionError("vision input for a stage without a vision tower");
  const int merge = shape_.vision->merge;
  int64_t kept = vision_tokens_;  // when all of them are there
  for (const step::VisionInput& input : inputs) {
    const auto old = features_.find(input.id);
    kept += input.token_count(merge) - (old == features_.end() ? 0 : old->second.size(1));
  }
  if (kept > options_.vision_tokens_max) {
    return ResourceExhaustedError("vision features: more than " + std::to_string(options_.vision_tokens_max) + " tokens");
  }
  return weights::Guarded("vision tower", [&]() -> Status {
    c10::InferenceMode inference;
    ASSIGN_OR_RETURN(std::vector<at::Tensor> encoded, encoder_(inputs));
    QP_CHECK_EQ(encoded.size(), inputs.size());
    for (size_t i = 0; i < inputs.size(); ++i) {
      QP_CHECK(encoded[i].dim() == 3 && encoded[i].size(0) == 1 + shape_.deepstack_count() && encoded[i].size(1) == inputs[i].token_count(merge) &&
               encoded[i].size(2) == shape_.hidden)
          << Sizes(encoded[i]);
      at::Tensor& features = features_[inputs[i].id];
      vision_tokens_ += encoded[i].size(1) - (features.defined() ? features.size(1) : 0);
      features = std::move(encoded[i]);
    }
    return OkStatus();
  });
}

void StageModel::Reset() {
  ahead_.reset();
  features_.clear();
  vision_tokens_ = 0;
}

// Token embeddings with the visual rows replaced; the taps go along for the first layers.
Result<StageActivations> StageModel::Embed(const step::StepPlan& plan, const Batch& batch) {
  StageActivations result;
  result.hidden = embedding_.index_select(0, batch.token_ids);
  std::vector<at::Tensor> parts;
  for (const step::SequenceSpan& span : plan.spans) {
    for (const step::VisionSlice& slice : span.vision) {
      const auto found = features_.find(slice.id);
      if (found == features_.end()) return InvalidArgumentError("plan names unknown vision input " + std::to_string(slice.id));
      if (int64_t{slice.feature_begin} + slice.count > found->second.size(1)) {
        return InvalidArgumentError("plan names features past the end of vision input " + std::to_string(slice.id));
      }
      parts.push_back(found->second.narrow(1, slice.feature_begin, slice.count));
    }
  }
  if (!parts.empty()) {
    const at::Tensor features = at::cat(parts, 1);  // (1 + taps, visual tokens, H)
    result.hidden.index_copy_(0, batch.visual_rows, features[0]);
    if (features.size(0) > 1) result.deepstack = features.narrow(0, 1, features.size(0) - 1);
  }
  return result;
}

Status StageModel::CheckInput(const step::StepPlan& plan, const StageActivations& input) const {
  const step::ActivationShape expected = step::ActivationsBefore(options_.layers.begin, plan, activation_sizes());
  const auto fits = [&](const at::Tensor& tensor, at::IntArrayRef sizes) {
    return tensor.defined() && tensor.sizes() == sizes && tensor.scalar_type() == options_.dtype;
  };
  if (!fits(input.hidden, {expected.tokens, shape_.hidden})) {
    return InvalidArgumentError("activations: hidden is " + Sizes(input.hidden));
  }
  const bool owed = expected.deepstack_bytes > 0;
  if (owed ? !fits(input.deepstack, {expected.taps, expected.visual_tokens, shape_.hidden}) : input.deepstack.defined()) {
    return InvalidArgumentError("activations: deepstack is " + Sizes(input.deepstack));
  }
  return OkStatus();
}

Result<StageOutput> StageModel::Forward(const step::StepPlan& plan, const StageActivations& input) {
  if (!first()) RETURN_IF_ERROR(CheckInput(plan, input));
  return weights::Guarded("forward", [&]() -> Result<StageOutput> {
    c10::InferenceMode inference;
    return ForwardOrThrow(plan, input);
  });
}

void StageModel::Release(const step::StepPlan& plan) {
  for (step::VisionId id : plan.vision_released) {
    const auto found = features_.find(id);
    if (found == features_.end()) continue;
    vision_tokens_ -= found->second.size(1);
    features_.erase(found);
  }
}

const StageModel::Ahead* StageModel::RunAhead(const step::StepPlan& done, std::span<const step::SampledToken> samples) {
  if (!backend_ || !first() || !last() || !backend_->TakesDecode(done) || !ahead_policy_.Tries()) return nullptr;
  const int32_t most = options_.max_sequence_tokens > 0 ? options_.max_sequence_tokens : shape_.max_positions;
  std::optional<step::StepPlan> next = NextDecode(done, samples, options_.block_tokens, most);
  if (!next) return nullptr;
  // A fault of the device is the next Forward's to report.
  (void)weights::Guarded("run ahead", [&]() -> Status {
    c10::InferenceMode inference;
    ASSIGN_OR_RETURN(StageOutput output, backend_->Decode(*next, {}));
    ahead_ = Ahead{std::move(*next), std::move(output.logits)};
    return OkStatus();
  });
  return ahead_ ? &*ahead_ : nullptr;
}

std::optional<StageOutput> StageModel::TakeAhead(const step::StepPlan& plan) {
  if (!ahead_) return std::nullopt;
  const Ahead ahead = *std::exchange(ahead_, std::nullopt);
  const std::optional<std::vector<int64_t>> rows = RowsOf(ahead.plan, plan);
  if (!rows) {
    ahead_policy_.Wrong();
    return std::nullopt;
  }
  ahead_policy_.Right();
  StageOutput output;
  output.logits = ahead.logits;
  output.begun = true;
  if (rows->size() < ahead.plan.spans.size()) {
    const at::Tensor index = at::tensor(*rows, at::TensorOptions().dtype(at::kLong));
    output.logits = ahead.logits.index_select(0, index.to(options_.device));
  }
  return output;
}

Result<StageOutput> StageModel::ForwardOrThrow(const step::StepPlan& plan, const StageActivations& input) {
  if (std::optional<StageOutput> ahead = TakeAhead(plan)) {
    Release(plan);
    return std::move(*ahead);
  }
  if (backend_ && backend_->TakesDecode(plan)) {
    Release(plan);
    return backend_->Decode(plan, input);
  }
  const Batch batch = MakeBatch(plan, {.block_tokens = options_.block_tokens,
                                       .grouping = options_.grouping,
                                       .device = options_.device,
                                       .attention = backend_ == nullptr});
  StageActivations state = input;
  if (first()) {
    ASSIGN_OR_RETURN(state, Embed(plan, batch));
  }
  if (backend_) {
    Result<StageOutput> output = backend_->Prefill(plan, std::move(state), batch.visual_rows);
    Release(plan);
    return output;
  }
  const ops::RotaryTable rotary = ops::MakeRotaryTable(rotary_, batch.positions, options_.dtype, batch.groups);
  for (size_t i = 0; i < layers_.size(); ++i) {
    const int32_t layer = options_.layers.begin + static_cast<int32_t>(i);
    if (options_.on_hidden) options_.on_hidden(layer, state.hidden);
    state.hidden = layers_[i].Forward(state.hidden, batch, rotary, cache_[i]);
    if (state.deepstack.defined()) {  // tap `layer` is the first one still owed
      const at::Tensor rows = state.hidden.index_select(0, batch.visual_rows) + state.deepstack[0];
      state.hidden.index_copy_(0, batch.visual_rows, rows);
      const int64_t left = state.deepstack.size(0) - 1;
      state.deepstack = left > 0 ? state.deepstack.narrow(0, 1, left) : at::Tensor();
    }
  }
  Release(plan);
  StageOutput output;
  if (!last()) {
    output.activations = std::move(state);
    return output;
  }
  if (options_.on_hidden) options_.on_hidden(shape_.layers, state.hidden);
  if (batch.sample_rows.defined()) {
    const at::Tensor rows = ops::RmsNorm(state.hidden.index_select(0, batch.sample_rows), norm_, shape_.rms_eps);
    output.logits = ops::Linear(rows, lm_head_, at::Tensor(), batch.sample_groups);
  }
  return output;
}

}  // namespace qwen::model
