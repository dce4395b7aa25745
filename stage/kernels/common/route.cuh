// stage/kernels/common/route.cuh — one token's experts, the same for every kernel that routes.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cfloat>
#include <cstdint>

#include "stage/kernels/common/limits.h"
#include "stage/kernels/common/reduce.cuh"

namespace qwen::kernels {

// One warp: softmax in fp32 and top-k of one token; among equals the lowest expert id wins. Lane r < top_k gets rank r.
__device__ __forceinline__ void RouteToken(int experts, int top_k, const __nv_bfloat16* logits, bool normalise, int& expert, float& weight) {
  constexpr int kPerLane = kMaxExperts / 32;
  const int lane = threadIdx.x & 31;
  float value[kPerLane];
  float top = -FLT_MAX;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    value[i] = i * 32 + lane < experts ? __bfloat162float(logits[i * 32 + lane]) : -FLT_MAX;
    top = fmaxf(top, value[i]);
  }
  top = WarpMax(top);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    value[i] = i * 32 + lane < experts ? expf(value[i] - top) : -1.0f;
    sum += fmaxf(value[i], 0.0f);
  }
  sum = WarpSum(sum);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) value[i] = value[i] < 0.0f ? -1.0f : value[i] / sum;
  float total = 0.0f;
  expert = 0;
  weight = 0.0f;
  for (int rank = 0; rank < top_k; ++rank) {
    // A probability is >= 0, so its bits order as integers do: one 64-bit key of (bits, ~id) finds the maximum, lowest id first.
    uint64_t best = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (value[i] >= 0.0f) {
        const uint64_t key = (static_cast<uint64_t>(__float_as_uint(value[i])) << 32) | static_cast<uint32_t>(~(i * 32 + lane));
        best = key > best ? key : best;
      }
    }
    const uint32_t high = __reduce_max_sync(0xffffffffu, static_cast<uint32_t>(best >> 32));
    const uint32_t low = __reduce_max_sync(0xffffffffu, (best >> 32) == high ? static_cast<uint32_t>(best) : 0u);
    // No candidate (low is never 0 for one) means NaN logits: any expert will do, but it must be one.
    const int picked = low != 0 ? static_cast<int>(~low) : rank;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (i * 32 + lane == picked) value[i] = -1.0f;
    }
    total += __uint_as_float(high);
    if (lane == rank) {
      expert = picked;
      weight = __uint_as_float(high);
    }
  }
  if (normalise) weight /= total;
}

}  // namespace qwen::kernels
