// stage/contract/layer_plan.h — who gets which layers, and what that weighs. One arithmetic with two users: the operator and
// the stages. Pure.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "stage/base/status.h"
#include "stage/contract/model_shape.h"

namespace qwen::contract {

struct LayerRange {  // [begin, end)
  int32_t begin = 0, end = 0;
  int32_t count() const { return end - begin; }
  bool operator==(const LayerRange&) const = default;
};
std::string ToString(const LayerRange& range);            // "0:24"
Result<LayerRange> ParseLayerRange(std::string_view text);  // "0:24"

enum class BalancePolicy {
  kTime,       // default: equal bytes read by a decode step of 8 tokens; ViT counts on stage 0, lm_head on the last
  kEvenLayers  // the first L mod S stages get one more
};
// REQUIRES (else kInvalidArgument): 1 <= stages <= shape.layers, and what ValidateLayers asks for can be met.
Result<std::vector<LayerRange>> PlanLayers(const ModelShape& shape, int32_t stages, BalancePolicy policy);
// Contiguous, ascending, covering [0, layers), none empty, and the first deepstack_count() layers on stage 0 (the features
// of the vision tower are added after them and do not travel); else kInvalidArgument saying which stage is wrong.
Status ValidateLayers(const ModelShape& shape, const std::vector<LayerRange>& ranges);

// Exact bytes of the tensors that a stage loads, in the dtype given. kFloat8E4M3: linear weights of the layers in FP8 with bf16
// block scales, everything else in bf16.
struct StageWeights {
  int64_t layer_bytes = 0, embedding_bytes = 0, vision_bytes = 0, head_bytes = 0;
  int64_t total() const { return layer_bytes + embedding_bytes + vision_bytes + head_bytes; }
};
StageWeights WeightBytes(const ModelShape& shape, const LayerRange& range, Dtype dtype);
int64_t KvBytesPerToken(const ModelShape& shape, const LayerRange& range, Dtype kv_dtype);  // K and V of all its layers

}  // namespace qwen::contract
