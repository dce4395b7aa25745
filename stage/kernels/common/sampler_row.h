// stage/kernels/common/sampler_row.h — one row of logits to be sampled, as the host writes it and kernel `sampler` reads it, and what
// comes back. Plain values for both; no CUDA header.
#pragma once
#include <cstdint>

namespace qwen::kernels {

constexpr int kSamplerLogprobsMax = 20;    // of one row
constexpr int kSamplerBiasMax = 256;       // logit_bias entries of one row
constexpr int kSamplerBanMax = 64;         // single banned tokens of one row
constexpr int kSamplerCountMax = 0x7FFF;   // how often a row's output may hold one token, with penalties

// Positions are in int32 words of SamplerArgs::extra.
struct SamplerRow {
  uint64_t draw = 0;          // 53 random bits
  uint64_t top_p = 0;         // TopPFraction (sampling_weight.h)
  uint64_t min_p = 0;         // MinPWeight
  float temperature = 0;      // 0: the lowest id among the maxima
  int32_t top_k = 0;          // 0: off
  float repetition = 1, presence = 0, frequency = 0;
  int32_t state = -1;         // row of SamplerArgs::state with this sequence's tokens; -1: no penalties
  int32_t append = -1;        // an output token that is counted into the state first; -1: none
  int32_t token_limit = 0;    // ids >= this are banned; 0: none
  int32_t logits_row = 0;     // row of SamplerArgs::logits
  int32_t bias_begin = 0, bias_count = 0;  // pairs (id, float32's bits), each id once
  int32_t ban_begin = 0, ban_count = 0;    // ids
  int32_t mask_begin = 0, mask_words = -1; // bit i % 32 of word i / 32: id i is allowed; ids beyond are not; -1: no mask
  int32_t logprobs = -1;      // -1: none; n: of the token and of the n most likely, n <= kSamplerLogprobsMax
};

enum SamplerStatus : int32_t { kSamplerDone = 0, kSamplerNan = 1, kSamplerNothingAllowed = 2 };

struct SamplerResult {
  int32_t token;   // 0 when nothing was sampled
  int32_t status;  // SamplerStatus
  float logprob;   // with SamplerRow::logprobs >= 0
  int32_t top_token[kSamplerLogprobsMax];    // the first `logprobs` are written, most likely first
  float top_logprob[kSamplerLogprobsMax];
};

}  // namespace qwen::kernels
