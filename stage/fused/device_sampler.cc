#include "stage/fused/device_sampler.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAStream.h>

#include <bit>
#include <cstring>

#include "stage/base/check.h"
#include "stage/fused/launch.h"
#include "stage/kernels/sampler.h"
#include "stage/weights/guarded.h"

namespace qwen::fused {
namespace {

constexpr int64_t kWord = sizeof(int32_t);

int64_t ListWords(const ops::RowToSample& row) {
  return static_cast<int64_t>(2 * row.bias.size() + row.bans.size() + (row.row.mask_words >= 0 ? row.mask.size() : 0));
}

at::TensorOptions Bytes() { return at::TensorOptions().dtype(at::kByte); }

}  // namespace

Result<std::unique_ptr<ops::RowSampler>> DeviceSampler::Create(const ops::RowSamplerOptions& options) {
  if (options.max_slots < 1 || options.vocab > (1 << 24) || !kernels::SamplerTakes(static_cast<int>(options.vocab))) {
    return UnimplementedError("no sampler kernel for " + std::to_string(options.vocab) + " ids");
  }
  std::unique_ptr<DeviceSampler> sampler(new DeviceSampler(options));
  RETURN_IF_ERROR(weights::Guarded("sampler", [&]() -> Status {
    Must(cudaEventCreateWithFlags(&sampler->done_, cudaEventDisableTiming), "event");
    sampler->results_ = at::empty({options.max_slots * static_cast<int64_t>(sizeof(kernels::SamplerResult))}, Bytes().pinned_memory(true));
    sampler->Reserve(options.max_slots * static_cast<int64_t>(sizeof(kernels::SamplerRow)));
    return OkStatus();
  }));
  return std::unique_ptr<ops::RowSampler>(std::move(sampler));
}

DeviceSampler::DeviceSampler(const ops::RowSamplerOptions& options) : options_(options) {}

DeviceSampler::~DeviceSampler() {
  if (done_ == nullptr) return;
  cudaEventSynchronize(done_);  // the kernel writes into pinned memory of ours
  cudaEventDestroy(done_);
}

void DeviceSampler::Reserve(int64_t bytes) {
  if (host_.defined() && host_.numel() >= bytes) return;
  const auto size = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(bytes)));
  host_ = at::empty({size}, Bytes().pinned_memory(true));
  device_ = at::empty({size}, Bytes().device(at::kCUDA));
}

bool DeviceSampler::Takes(const at::Tensor& logits) const {
  return logits.defined() && logits.is_cuda() && logits.scalar_type() == at::kBFloat16 && logits.dim() == 2 && logits.size(1) == options_.vocab && logits.is_contiguous();
}

Status DeviceSampler::SetState(int32_t slot, std::span<const int32_t> tokens, int64_t prompt_tokens) {
  QP_CHECK(slot >= 0 && slot < options_.max_slots) << slot;
  return weights::Guarded("sampler", [&]() -> Status {
    const auto device = at::TensorOptions().device(at::kCUDA);
    if (!states_.defined()) states_ = at::empty({options_.max_slots, options_.vocab}, device.dtype(at::kShort));
    const at::Tensor ids = at::tensor(at::ArrayRef<int32_t>(tokens.data(), tokens.size()), at::kInt).to(at::kCUDA);
    auto* state = static_cast<uint16_t*>(states_.data_ptr()) + slot * options_.vocab;
    KERNEL(FillSamplerState(state, ids.const_data_ptr<int32_t>(), static_cast<int>(tokens.size()), static_cast<int>(prompt_tokens), static_cast<int>(options_.vocab),
                            c10::cuda::getCurrentCUDAStream()));
    return OkStatus();
  });
}

Status DeviceSampler::Enqueue(const at::Tensor& logits, std::span<const ops::RowToSample> rows) {
  QP_CHECK(!rows.empty() && static_cast<int64_t>(rows.size()) <= options_.max_slots) << rows.size();
  return weights::Guarded("sampler", [&]() -> Status {
    Must(cudaEventSynchronize(done_), "copy and event");  // of the call before: its copy has read the host's buffer, its kernel has written results
    begun_ = 0;
    const int64_t row_bytes = static_cast<int64_t>(rows.size() * sizeof(kernels::SamplerRow));
    int64_t words = 0;
    for (const ops::RowToSample& row : rows) words += ListWords(row);
    Reserve(row_bytes + words * kWord);
    auto* row = static_cast<kernels::SamplerRow*>(host_.data_ptr());
    auto* lists = reinterpret_cast<int32_t*>(row + rows.size());
    int32_t at = 0;
    const auto put = [&](const void* data, size_t count) {
      if (count > 0) std::memcpy(lists + at, data, count * kWord);
      const int32_t begin = at;
      at += static_cast<int32_t>(count);
      return begin;
    };
    for (const ops::RowToSample& given : rows) {
      *row = given.row;
      row->bias_count = static_cast<int32_t>(given.bias.size());
      row->bias_begin = at;
      for (const auto& [id, bias] : given.bias) {
        const int32_t pair[2] = {id, std::bit_cast<int32_t>(bias)};
        put(pair, 2);
      }
      row->ban_count = static_cast<int32_t>(given.bans.size());
      row->ban_begin = put(given.bans.data(), given.bans.size());
      if (given.row.mask_words >= 0) {
        row->mask_words = static_cast<int32_t>(given.mask.size());
        row->mask_begin = put(given.mask.data(), given.mask.size());
      }
      ++row;
    }
    QP_CHECK_EQ(int64_t{at}, words);
    const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
    auto* device_rows = static_cast<kernels::SamplerRow*>(device_.data_ptr());
    Must(cudaMemcpyAsync(device_rows, host_.data_ptr(), static_cast<size_t>(row_bytes + words * kWord), cudaMemcpyHostToDevice, stream), "copy and event");
    KERNEL(Sample({.logits = Bf16(logits),
                   .rows = device_rows,
                   .extra = reinterpret_cast<const int32_t*>(device_rows + rows.size()),
                   .state = states_.defined() ? static_cast<uint16_t*>(states_.data_ptr()) : nullptr,
                   .results = static_cast<kernels::SamplerResult*>(results_.data_ptr()),
                   .count = static_cast<int>(rows.size()),
                   .vocab = static_cast<int>(options_.vocab)},
                  stream));
    Must(cudaEventRecord(done_, stream), "copy and event");
    begun_ = rows.size();
    return OkStatus();
  });
}

Result<std::span<const kernels::SamplerResult>> DeviceSampler::Wait() {
  QP_CHECK(begun_ > 0);
  RETURN_IF_ERROR(weights::Guarded("sampler", [&]() -> Status {
    Must(cudaEventSynchronize(done_), "copy and event");
    return OkStatus();
  }));
  return std::span<const kernels::SamplerResult>(static_cast<const kernels::SamplerResult*>(results_.data_ptr()), begun_);
}

}  // namespace qwen::fused

// What the stage finds after opening the library.
extern "C" __attribute__((visibility("default"))) const qwen::ops::RowSamplerFactory* qwen_fused_sampler() {
  static const qwen::ops::RowSamplerFactory factory = qwen::fused::DeviceSampler::Create;
  return &factory;
}
