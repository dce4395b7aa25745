#include "controller/plan/sizing.h"

#include <algorithm>

namespace qwen::plan {
namespace {

using contract::Dtype;

Dtype WeightDtype(const api::Spec& spec, const contract::ModelShape& shape) {
  switch (spec.model.dtype) {
    case api::DtypeChoice::kFloat32: return Dtype::kFloat32;
    case api::DtypeChoice::kBFloat16: return Dtype::kBFloat16;
    case api::DtypeChoice::kAuto: break;
  }
  return shape.quantization ? Dtype::kFloat8E4M3 : shape.dtype;
}

Result<std::vector<contract::LayerRange>> Ranges(const api::Stages& stages, const contract::ModelShape& shape) {
  if (stages.count) {
    auto planned = contract::PlanLayers(shape, *stages.count, stages.balance);
    if (!planned.ok()) return planned.status().WithContext("spec.stages.count");
    return planned;
  }
  std::vector<contract::LayerRange> ranges;
  for (const api::StageItem& item : stages.list) ranges.push_back(item.layers);
  RETURN_IF_ERROR(contract::ValidateLayers(shape, ranges).WithContext("spec.stages.list"));
  return ranges;
}

int64_t BlocksOf(int64_t tokens, int32_t block_tokens) { return (tokens + block_tokens - 1) / block_tokens; }

}  // namespace

bool PipelineSize::fits() const {
  return std::all_of(stages.begin(), stages.end(), [](const StageSize& stage) { return stage.fits; });
}

Result<PipelineSize> SizePipeline(const api::Spec& spec, const contract::ModelShape& shape, std::optional<int64_t> stage_memory) {
  PipelineSize size;
  size.weight_dtype = WeightDtype(spec, shape);
  size.kv_dtype = size.weight_dtype == Dtype::kFloat32 ? Dtype::kFloat32 : Dtype::kBFloat16;
  size.block_tokens = spec.engine.block_tokens;
  size.max_model_len = spec.model.max_model_len.value_or(std::min(shape.max_positions, kDefaultModelLen));
  if (size.max_model_len > shape.max_positions)
    return InvalidArgumentError("spec.model.maxModelLen: the model has " + std::to_string(shape.max_positions) + " positions, found " +
                                std::to_string(size.max_model_len));
  ASSIGN_OR_RETURN(const std::vector<contract::LayerRange> ranges, Ranges(spec.stages, shape));

  const int64_t sequence_blocks = BlocksOf(size.max_model_len, size.block_tokens);
  const int64_t useful_blocks = sequence_blocks * spec.engine.max_sequences;  // more could never be used
  int64_t capacity_blocks = useful_blocks;
  for (size_t k = 0; k < ranges.size(); ++k) {
    StageSize stage{.layers = ranges[k], .weights = contract::WeightBytes(shape, ranges[k], size.weight_dtype)};
    stage.kv_bytes_per_token = contract::KvBytesPerToken(shape, ranges[k], size.kv_dtype);
    stage.work_bytes = int64_t{spec.engine.max_batch_tokens} * shape.hidden * 64;
    if (k + 1 == ranges.size()) stage.work_bytes += int64_t{spec.engine.max_sequences} * shape.vocab * 12;
    const int64_t block_bytes = stage.kv_bytes_per_token * size.block_tokens;
    if (stage_memory) {
      const int64_t kv_bytes = static_cast<int64_t>(kUsableShare * static_cast<double>(*stage_memory)) - stage.weights.total() - stage.work_bytes;
      const int64_t blocks = kv_bytes < 0 ? -1 : kv_bytes / block_bytes;
      stage.kv_capacity_tokens = blocks < 0 ? -1 : blocks * size.block_tokens;
      stage.fits = blocks >= sequence_blocks;
      capacity_blocks = std::min(capacity_blocks, std::max<int64_t>(blocks, 0));
    } else if (spec.engine.device == api::Device::kCpu) {
      // One sequence must fit in any case: on a CPU memory is what one is willing to give.
      capacity_blocks = std::min(capacity_blocks, std::max(sequence_blocks, kCpuKvBytes / block_bytes));
    }
    size.stages.push_back(std::move(stage));
  }
  if (spec.engine.kv_cache_tokens) {
    const int64_t wanted = BlocksOf(*spec.engine.kv_cache_tokens, size.block_tokens);
    if (wanted < sequence_blocks)
      return InvalidArgumentError("spec.engine.kvCacheTokens: one sequence of " + std::to_string(size.max_model_len) + " tokens (maxModelLen) does not fit into " +
                                  std::to_string(*spec.engine.kv_cache_tokens));
    if (stage_memory)
      for (StageSize& stage : size.stages) stage.fits = *stage.kv_capacity_tokens >= wanted * size.block_tokens;
    size.kv_blocks = wanted;
  } else if (stage_memory || spec.engine.device == api::Device::kCpu) {
    size.kv_blocks = capacity_blocks;
  }
  if (size.kv_blocks > INT32_MAX) return InvalidArgumentError("spec.engine.kvCacheTokens: more than 2^31 blocks");
  return size;
}

Result<PipelineSize> UnsizedPipeline(const api::Spec& spec) {
  if (spec.stages.count && spec.stages.balance != contract::BalancePolicy::kTime)
    return InvalidArgumentError("spec.stages.balance: in a cluster only Time shares out a count; name model.shape, or give stages.list its layers");
  PipelineSize size;
  size.block_tokens = spec.engine.block_tokens;
  size.max_model_len = spec.model.max_model_len.value_or(0);
  size.stages.resize(static_cast<size_t>(spec.stages.size()));
  for (size_t k = 0; k < spec.stages.list.size(); ++k) size.stages[k].layers = spec.stages.list[k].layers;
  if (spec.engine.kv_cache_tokens) size.kv_blocks = BlocksOf(*spec.engine.kv_cache_tokens, size.block_tokens);
  if (size.kv_blocks > INT32_MAX) return InvalidArgumentError("spec.engine.kvCacheTokens: more than 2^31 blocks");
  return size;
}

Result<PipelineSize> ClusterSize(const api::Spec& spec) {
  if (spec.model.shape.empty()) {
    if (spec.stages.gpu_memory_gb) return InvalidArgumentError("spec.stages.gpuMemoryGB: needs spec.model.shape, because the operator does not read the checkpoint");
    return UnsizedPipeline(spec);
  }
  const Result<contract::ModelShape> shape = contract::NamedModelShape(spec.model.shape);
  if (!shape.ok()) return InvalidArgumentError("spec.model.shape: " + shape.status().message());
  std::optional<int64_t> memory;
  if (spec.stages.gpu_memory_gb) memory = int64_t{*spec.stages.gpu_memory_gb} * 1'000'000'000 * spec.stages.gpus_per_stage;
  ASSIGN_OR_RETURN(PipelineSize size, SizePipeline(spec, *shape, memory));
  for (size_t k = 0; k < size.stages.size(); ++k) {
    const StageSize& stage = size.stages[k];
    if (!stage.fits)
      return InvalidArgumentError("spec.stages: stage " + std::to_string(k) + " of " + std::to_string(size.stages.size()) + " (layers " + ToString(stage.layers) +
                                  ") does not fit: weights and work are " + std::to_string((stage.weights.total() + stage.work_bytes) / 1'000'000'000) +
                                  " GB and one sequence of maxModelLen must fit beside them; a stage has " + std::to_string(*memory / 1'000'000'000) + " GB");
  }
  if (spec.engine.device == api::Device::kCuda && !spec.engine.kv_cache_tokens) size.kv_blocks = 0;  // each stage measures what is left
  return size;
}

int64_t StartupSeconds(const api::Spec& spec) {
  constexpr int64_t kBase = 600, kUnknown = 7200;
  if (spec.restart.startup_timeout_seconds) return *spec.restart.startup_timeout_seconds;
  if (spec.model.shape.empty()) return kUnknown;
  const Result<PipelineSize> size = ClusterSize(spec);
  if (!size.ok()) return kUnknown;
  int64_t largest = 0;
  for (const StageSize& stage : size->stages) largest = std::max(largest, stage.weights.total());
  return kBase + largest / kSlowVolumeBytesPerSecond;
}

}  // namespace qwen::plan
