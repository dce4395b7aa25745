// stage/fused/device_sampler.h — kernel `sampler` as an ops::RowSampler: its parameters, its states, its results.
//
// A step costs one copy to the device (128 bytes a row, and masks, biases and bans where there are any) and one kernel, which writes the
// tokens into pinned memory; Wait waits for an event behind it. Memory: two bytes an id for each slot, from the first row with penalties on
// (256 slots of 151,936 ids: 78 MB); buffers grow with what rows bring, at most max_slots masks and full lists (6 MB).
// Thread safety: none; one thread, on its current stream.
#pragma once
#include <ATen/core/Tensor.h>
#include <cuda_runtime.h>

#include <memory>
#include <span>

#include "stage/ops/row_sampler.h"

namespace qwen::fused {

class DeviceSampler final : public ops::RowSampler {
 public:
  static Result<std::unique_ptr<ops::RowSampler>> Create(const ops::RowSamplerOptions& options);
  ~DeviceSampler() override;

  bool Takes(const at::Tensor& logits) const override;
  Status SetState(int32_t slot, std::span<const int32_t> tokens, int64_t prompt_tokens) override;
  Status Enqueue(const at::Tensor& logits, std::span<const ops::RowToSample> rows) override;
  Result<std::span<const kernels::SamplerResult>> Wait() override;

 private:
  explicit DeviceSampler(const ops::RowSamplerOptions& options);
  // Pinned and device bytes for one upload, at least `bytes` of them.
  void Reserve(int64_t bytes);

  const ops::RowSamplerOptions options_;
  at::Tensor host_, device_;  // rows, then lists
  at::Tensor results_;        // pinned
  at::Tensor states_;         // (slots, vocab) int16; undefined before the first row with penalties
  cudaEvent_t done_ = nullptr;
  size_t begun_ = 0;          // rows of the last Enqueue
};

}  // namespace qwen::fused
