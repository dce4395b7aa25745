// tests/kernels/harness.h — what every kernel test needs: device buffers, random bf16, timing by graph replay, result rows.
//
// A test checks the value against an oracle on the host (double precision, plain loops, no code shared with the kernel),
// then times the kernel and prints one JSON row: µs, GB/s and the share of the copy bandwidth measured in the same run.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

namespace qwen::kernels::testing {

#define CUDA_OK(expression) ASSERT_EQ(cudaSuccess, (expression)) << cudaGetErrorString(cudaGetLastError())
#define CUDA_MUST(expression)                                                                         \
  do {                                                                                                \
    cudaError_t e_ = (expression);                                                                    \
    if (e_ != cudaSuccess) {                                                                          \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(e_));                \
      std::abort();                                                                                   \
    }                                                                                                 \
  } while (false)

template <typename T>
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(size_t count) : count_(count) { CUDA_MUST(cudaMalloc(&data_, std::max<size_t>(count, 1) * sizeof(T))); }
  explicit DeviceBuffer(const std::vector<T>& host) : DeviceBuffer(host.size()) { CUDA_MUST(cudaMemcpy(data_, host.data(), count_ * sizeof(T), cudaMemcpyHostToDevice)); }
  DeviceBuffer(DeviceBuffer&& o) noexcept : data_(o.data_), count_(o.count_) { o.data_ = nullptr; }
  DeviceBuffer& operator=(DeviceBuffer&& o) noexcept {
    std::swap(data_, o.data_);
    std::swap(count_, o.count_);
    return *this;
  }
  ~DeviceBuffer() { cudaFree(data_); }
  T* get() const { return data_; }
  size_t count() const { return count_; }
  std::vector<T> Download() const {
    std::vector<T> host(count_);
    CUDA_MUST(cudaMemcpy(host.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }
  void Poison() { CUDA_MUST(cudaMemset(data_, 0xFF, count_ * sizeof(T))); }  // bf16 NaN: an element that nobody writes shows

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

inline float ToFloat(__nv_bfloat16 v) { return __bfloat162float(v); }
inline double RoundToBf16(double v) { return ToFloat(__float2bfloat16_rn(static_cast<float>(v))); }

inline std::vector<__nv_bfloat16> RandomBf16(size_t count, double scale, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, static_cast<float>(scale));
  std::vector<__nv_bfloat16> v(count);
  for (auto& x : v) x = __float2bfloat16_rn(normal(generator));
  return v;
}

// Fills device memory with normal-ish bf16 noise of the given scale without a host copy (defined in noise.cu).
void FillNoise(__nv_bfloat16* data, size_t count, float scale, uint64_t seed, cudaStream_t stream);

struct Difference {
  double max_abs = 0, rms = 0, reference_rms = 0;
  size_t nan = 0;
  double relative() const { return reference_rms > 0 ? rms / reference_rms : rms; }
};
template <typename Reference>
Difference Compare(const std::vector<__nv_bfloat16>& got, const std::vector<Reference>& want) {
  Difference d;
  double e2 = 0, r2 = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    const double g = ToFloat(got[i]), w = static_cast<double>(want[i]);
    if (std::isnan(g)) ++d.nan;
    d.max_abs = std::max(d.max_abs, std::abs(g - w));
    e2 += (g - w) * (g - w);
    r2 += w * w;
  }
  d.rms = std::sqrt(e2 / std::max<size_t>(want.size(), 1));
  d.reference_rms = std::sqrt(r2 / std::max<size_t>(want.size(), 1));
  return d;
}

// Median seconds of one call. `enqueue(i)` enqueues call i on the stream; calls rotate over inputs larger than the L2 cache
// (the caller's duty). `calls` calls are captured in one graph, so launch gaps are those of a decode step.
double TimeGraph(const std::function<void(int, cudaStream_t)>& enqueue, int calls, int replays = 9);
double CopyBandwidth();  // bytes/s, read + written, measured once per process
// One row: {"suite":"kernels","case":...,"us":...,"GBps":...,"share":...}
void PrintRow(const std::string& name, double seconds, double bytes);
// The same for a product that many tokens make: "share" is of the larger bound, bytes at copy bandwidth or `flop` at the 750
// TFLOP/s that cuBLAS reaches on an H200 in bf16; "TFLOPs" is said too.
void PrintProductRow(const std::string& name, double seconds, double bytes, double flop);

}  // namespace qwen::kernels::testing
