// stage/kernels/sampler.h — rows of logits to tokens: penalties, bans, temperature, top-k, top-p, min-p, draw, log-probabilities.
// The order and every operation are those of stage/sampling/logits_pipeline.h, and so is the token, bit for bit: penalties and
// temperature are float32 operations rounded alike, weights are integers (common/sampling_weight.h), whose sums have no order.
// Log-probabilities are sums in double in another order: within 1e-6.
//
//   logits: (any, vocab) bf16          rows: (count) SamplerRow      extra: words that rows point to
//   state: (any, vocab) uint16, bit 15: the token occurred in prompt or output, below: how often in the output
//   results: (count); may be pinned memory of the host, each field is written once
//   bytes moved: 2 * vocab a row, and again as much with penalties or log-probabilities
// REQUIRES: SamplerTakes(vocab); rows 16-byte aligned; two rows of a call never share a state.
//
// Enqueues one kernel on `stream`, never synchronises, safe in graph capture.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "stage/kernels/common/sampler_row.h"

namespace qwen::kernels {

struct SamplerArgs {
  const __nv_bfloat16* logits = nullptr;
  const SamplerRow* rows = nullptr;
  const int32_t* extra = nullptr;  // may be null when no row points there
  uint16_t* state = nullptr;       // may be null when no row has one
  SamplerResult* results = nullptr;
  int count = 0;
  int vocab = 0;
};

// Whether a row fits into the shared memory of a cluster: vocab % 8 == 0, up to some 200,000.
bool SamplerTakes(int vocab);
// `cluster`: blocks that share a row, 1, 2, 4 or 8; 0: as many as are fastest. The token does not depend on it.
cudaError_t Sample(const SamplerArgs& args, cudaStream_t stream, int cluster = 0);

// state[0, vocab) := what `tokens`, of which the first `prompt` are no output, leave there. No token may occur more than
// kSamplerCountMax times in the output; those outside [0, vocab) are left out.
cudaError_t FillSamplerState(uint16_t* state, const int32_t* tokens, int count, int prompt, int vocab, cudaStream_t stream);

}  // namespace qwen::kernels
