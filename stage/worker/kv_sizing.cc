#include <algorithm>
#include <limits>

#include "stage/worker/model_compute.h"

namespace qwen::worker {
namespace {

int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }
std::string Mib(int64_t bytes) { return std::to_string(bytes >> 20) + " MiB"; }

}  // namespace

Result<KvSizing> SizeKv(const ModelComputeOptions& options, const KvSizingInput& input) {
  const int64_t length = options.max_model_len > 0 ? options.max_model_len : input.max_positions;
  const int64_t block_bytes = input.kv_bytes_per_token * options.block_tokens;
  int64_t blocks = options.kv_blocks;
  if (input.free_bytes >= 0 && input.weight_bytes > input.free_bytes) {
    return ResourceExhaustedError("weights need " + Mib(input.weight_bytes) + ", free are " + Mib(input.free_bytes) + ": plan more stages");
  }
  if (blocks == 0) {
    // More than every sequence at its full length can never be used.
    blocks = std::min<int64_t>(CeilDivide(length, options.block_tokens) * options.max_sequences, std::numeric_limits<int32_t>::max() / 2);
    if (input.free_bytes >= 0) {
      const auto for_kv = static_cast<int64_t>(static_cast<double>(input.free_bytes - input.weight_bytes) * options.kv_memory_share);
      blocks = std::min(blocks, for_kv / block_bytes);
    }
  }
  if (blocks <= 0 || (options.max_model_len > 0 && blocks * options.block_tokens < length)) {
    return ResourceExhaustedError("one sequence of " + std::to_string(length) + " tokens needs " + Mib(length * input.kv_bytes_per_token) +
                                  " of KV cache, there is room for " + std::to_string(blocks * options.block_tokens) +
                                  " tokens: plan more stages or a smaller --max-model-len");
  }
  return KvSizing{.blocks = static_cast<int32_t>(blocks),
                  .max_sequence_tokens = static_cast<int32_t>(std::min(length, blocks * options.block_tokens))};
}

}  // namespace qwen::worker
