// stage/sampling/weights.h — the integer weights of a whole row (stage/kernels/common/sampling_weight.h says what a weight is).
#pragma once
#include <cstdint>
#include <span>

namespace qwen::sampling {

// weights[i] = SamplingWeight(scaled[i], maximum). With a processor's fused multiply-add where it has one; without, the same bits
// out of the C library's fma, some ten times slower. REQUIRES: equal lengths; what SamplingWeight requires.
void WeighRow(std::span<const float> scaled, float maximum, std::span<uint64_t> weights);

}  // namespace qwen::sampling
