#include "stage/worker/kv_sizing.h"

#include <algorithm>
#include <limits>
#include <string>

namespace qwen::worker {
namespace {

int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }
std::string Mib(int64_t bytes) { return std::to_string(bytes >> 20) + " MiB"; }

}  // namespace

Result<KvSizing> SizeKv(const KvSizingInput& input) {
  QP_CHECK(input.kv_bytes_per_token > 0 && input.block_tokens > 0 && input.max_positions > 0);
  const int64_t length = input.max_model_len > 0 ? input.max_model_len : input.max_positions;
  int64_t blocks = input.kv_blocks;
  if (input.free_bytes >= 0 && input.weight_bytes > input.free_bytes) {
    return ResourceExhaustedError("weights need " + Mib(input.weight_bytes) + ", free are " + Mib(input.free_bytes) + ": plan more stages");
  }
  if (blocks == 0) {
    // More than every sequence at its full length can never be used.
    blocks = std::min<int64_t>(CeilDivide(length, input.block_tokens) * input.max_sequences, std::numeric_limits<int32_t>::max() / 2);
    if (input.free_bytes >= 0) {
      const auto for_kv = static_cast<int64_t>(static_cast<double>(input.free_bytes - input.weight_bytes) * input.memory_share);
      blocks = std::min(blocks, for_kv / (input.kv_bytes_per_token * input.block_tokens));
    }
  }
  const int64_t room = blocks * input.block_tokens;
  if (blocks <= 0 || (input.max_model_len > 0 && room < length)) {
    return ResourceExhaustedError("one sequence of " + std::to_string(length) + " tokens needs " + Mib(length * input.kv_bytes_per_token) +
                                  " of KV cache, there is room for " + std::to_string(room) +
                                  " tokens: plan more stages or a smaller --max-model-len");
  }
  return KvSizing{.blocks = static_cast<int32_t>(blocks), .max_sequence_tokens = static_cast<int32_t>(std::min(length, room))};
}

}  // namespace qwen::worker
