#include "stage/sampling/weights.h"

#include "stage/base/check.h"
#include "stage/kernels/common/sampling_weight.h"

namespace qwen::sampling {
namespace {

using Weigh = void (*)(const float* scaled, float maximum, uint64_t* weights, size_t count);

#if defined(__x86_64__)
// The build's baseline has no fma instruction, and a call of std::fma for each step of the polynomial costs milliseconds a row.
// flatten: the polynomial is compiled into this function, for these instructions.
__attribute__((target("avx2,fma"), flatten)) void WeighFused(const float* scaled, float maximum, uint64_t* weights, size_t count) {
  for (size_t i = 0; i < count; ++i) weights[i] = kernels::SamplingWeight(scaled[i], maximum);
}
#endif

void WeighPlain(const float* scaled, float maximum, uint64_t* weights, size_t count) {
  for (size_t i = 0; i < count; ++i) weights[i] = kernels::SamplingWeight(scaled[i], maximum);
}

Weigh Best() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return WeighFused;
#endif
  return WeighPlain;
}

}  // namespace

void WeighRow(std::span<const float> scaled, float maximum, std::span<uint64_t> weights) {
  QP_CHECK_EQ(scaled.size(), weights.size());
  static const Weigh weigh = Best();
  weigh(scaled.data(), maximum, weights.data(), scaled.size());
}

}  // namespace qwen::sampling
