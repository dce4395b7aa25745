// stage/worker/kv_sizing.h — how many KV blocks a stage gets, and how long a sequence may then be. Pure.
#pragma once
#include <cstdint>

#include "stage/base/status.h"

namespace qwen::worker {

struct KvSizingInput {
  int64_t free_bytes = -1;         // of the device, before loading; negative: not known
  int64_t weight_bytes = 0;        // of the stage
  int64_t kv_bytes_per_token = 0;  // of the stage's layers
  int32_t max_positions = 0;       // of the model
  int32_t block_tokens = 16;
  int32_t kv_blocks = 0;           // 0: as many as max_sequences could use, or as fit
  int32_t max_sequences = 256;
  int32_t max_model_len = 0;       // 0: max_positions, or less when the KV cache cannot hold one sequence of it
  double memory_share = 0.85;      // of what is free beside the weights; the rest is for activations
};
struct KvSizing {
  int32_t blocks = 0;
  int32_t max_sequence_tokens = 0;
};
// kResourceExhausted when the weights, or one sequence of an explicit max_model_len, do not fit.
Result<KvSizing> SizeKv(const KvSizingInput& input);

}  // namespace qwen::worker
