// stage/ops/row_sampler.h — a device that samples rows of logits where they are, for stage/sampling: what a row asks for goes there, a
// token comes back. stage/fused has the one for CUDA (kernel `sampler`).
//
// Tokens are those of stage/sampling/logits_pipeline.h, bit for bit; log-probabilities within 1e-6.
// Thread safety: none; one thread, on its current stream.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "stage/base/status.h"
#include "stage/kernels/common/sampler_row.h"

namespace qwen::ops {

// One row; what the spans refer to is read by Enqueue and not kept.
struct RowToSample {
  kernels::SamplerRow row;                             // the begins and counts of lists are filled in by Enqueue; mask_words: -1 when there is no mask
  std::span<const std::pair<int32_t, float>> bias;     // at most kernels::kSamplerBiasMax, each id once
  std::span<const int32_t> bans;                       // at most kernels::kSamplerBanMax
  std::span<const uint32_t> mask;                      // with row.mask_words >= 0
};

class RowSampler {
 public:
  virtual ~RowSampler() = default;

  // Whether it can sample rows of these logits, (rows, vocab).
  virtual bool Takes(const at::Tensor& logits) const = 0;
  // What `tokens` (prompt, then output) leave in the penalties' state of `slot`. kResourceExhausted when there is no memory for states.
  virtual Status SetState(int32_t slot, std::span<const int32_t> tokens, int64_t prompt_tokens) = 0;
  // Begins sampling behind what the stream has to do; what was begun before and not waited for is given up, but what it appended to
  // states stays. REQUIRES: at least one row, at most max_slots; Takes(logits).
  virtual Status Enqueue(const at::Tensor& logits, std::span<const RowToSample> rows) = 0;
  // Waits for what was begun last. One result a row, in order, valid until the next Enqueue. REQUIRES: something was begun.
  virtual Result<std::span<const kernels::SamplerResult>> Wait() = 0;
};

struct RowSamplerOptions {
  int64_t vocab = 0;
  int32_t max_slots = 256;
};
// kUnimplemented when no kernel is made for the vocabulary.
using RowSamplerFactory = std::function<Result<std::unique_ptr<RowSampler>>(const RowSamplerOptions& options)>;

}  // namespace qwen::ops
