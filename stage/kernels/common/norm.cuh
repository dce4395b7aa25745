// stage/kernels/common/norm.cuh — RMSNorm of eight neighbouring bf16 values, in the reference's two roundings (rms_norm.h).
#pragma once
#include "stage/kernels/common/ptx.cuh"

namespace qwen::kernels {

// Adds the eight squares to `sum`, in order.
__device__ __forceinline__ void AddSquares(float& sum, const uint4& values) {
  const uint32_t words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 f = UnpackBf16(words[i]);
    sum += f.x * f.x + f.y * f.y;
  }
}
// weight * bf16(values * scale), `scale` being one over the root mean square of the row.
__device__ __forceinline__ uint4 NormedBf16(const uint4& values, float scale, const uint4& weight) {
  const uint32_t words[4] = {values.x, values.y, values.z, values.w}, weights[4] = {weight.x, weight.y, weight.z, weight.w};
  uint32_t result[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 f = UnpackBf16(words[i]), w = UnpackBf16(weights[i]);
    result[i] = PackBf16(RoundBf16(f.x * scale) * w.x, RoundBf16(f.y * scale) * w.y);
  }
  return make_uint4(result[0], result[1], result[2], result[3]);
}

}  // namespace qwen::kernels
