// controller/plan/sizing.h — what a manifest means for a model: which stage gets which layers, what that weighs, and how many
// KV blocks every stage holds. Pure: `qwenctl plan` prints it, desired.h turns it into processes.
//
// Memory of a stage, all in bytes:
//   usable   = kUsableShare * memory                                        (0.92: what CUDA context and fragmentation leave)
//   work     = max_batch_tokens * hidden * 64 + (last stage) max_sequences * vocab * 12
//              an estimate: activations of one layer in bf16 with their temporaries; fp32 logits, sorted copy, probabilities
//   KV       = usable - weights - work;  capacity = KV / KvBytesPerToken, rounded down to blocks
// All stages use the same block ids, so the smallest stage's capacity is the pipeline's.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "controller/api/types.h"
#include "stage/base/status.h"
#include "stage/contract/layer_plan.h"
#include "stage/contract/model_shape.h"

namespace qwen::plan {

inline constexpr double kUsableShare = 0.92;
// KV cache of a stage on a CPU when the manifest does not say: small enough for a laptop with a few stages.
inline constexpr int64_t kCpuKvBytes = int64_t{512} << 20;
// maxModelLen when the manifest does not say: enough for several pictures; the released models could do 262,144, which
// would leave an untuned server room for one sequence.
inline constexpr int32_t kDefaultModelLen = 32768;

struct StageSize {
  contract::LayerRange layers;
  contract::StageWeights weights;
  int64_t kv_bytes_per_token = 0;
  int64_t work_bytes = 0;
  std::optional<int64_t> kv_capacity_tokens;  // when the memory is known; < 0: not even the weights fit
  bool fits = true;                           // weights, work and one sequence of max_model_len
};

struct PipelineSize {
  std::vector<StageSize> stages;
  int32_t max_model_len = 0;
  int32_t block_tokens = 0;
  // KV blocks of every stage; 0: each stage takes what its GPU has left after loading, and the head uses the smallest.
  int64_t kv_blocks = 0;
  contract::Dtype weight_dtype = contract::Dtype::kBFloat16;
  contract::Dtype kv_dtype = contract::Dtype::kBFloat16;
  bool fits() const;
};

// `stage_memory`: bytes of one stage's device; absent: unknown. kInvalidArgument names the manifest's field that does not suit
// the model. What merely does not fit into the memory is a value (fits()).
Result<PipelineSize> SizePipeline(const api::Spec& spec, const contract::ModelShape& shape, std::optional<int64_t> stage_memory);

// The same when the checkpoint is out of sight, as it is for the operator: its pods read config.json themselves. A counted
// stage has no layers here and plans its own (by time); KV blocks are the manifest's, or 0; max_model_len 0 is the model's, or
// what fits. kInvalidArgument names what only somebody who sees the checkpoint could share out.
Result<PipelineSize> UnsizedPipeline(const api::Spec& spec);

// As the operator sees it: sized when spec.model.shape names a released model, and then refused when a stage does not fit into
// spec.stages.gpuMemoryGB; else unsized.
Result<PipelineSize> ClusterSize(const api::Spec& spec);
// From a container's start to ready: spec.restart.startupTimeoutSeconds; else ten minutes and what the largest shard takes at
// kSlowVolumeBytesPerSecond; two hours when nobody knows its size.
inline constexpr int64_t kSlowVolumeBytesPerSecond = 50'000'000;
int64_t StartupSeconds(const api::Spec& spec);

}  // namespace qwen::plan
