// stage/kernels/common/reduce.cuh — sums and maxima over a warp or a block, in one fixed order (so results repeat bit for bit).
#pragma once
#include <cuda_runtime.h>

namespace qwen::kernels {

__device__ __forceinline__ float WarpSum(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}
__device__ __forceinline__ float WarpMax(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, offset));
  return v;
}
// All threads get the sum. `scratch` holds kWarps floats; ends with a barrier, so it may be used again at once.
template <int kWarps>
__device__ __forceinline__ float BlockSum(float v, float* scratch) {
  v = WarpSum(v);
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = v;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += scratch[i];
  __syncthreads();
  return sum;
}

}  // namespace qwen::kernels
