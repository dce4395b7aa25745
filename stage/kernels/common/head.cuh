// stage/kernels/common/head.cuh — a head of 128 values in one warp: RMS-norm and RoPE of halves in the reference's rounding.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "stage/kernels/common/limits.h"
#include "stage/kernels/common/ptx.cuh"
#include "stage/kernels/common/reduce.cuh"

namespace qwen::kernels {

constexpr int kHalf = kHeadDim / 2;

// A lane's share of one head: values 2*lane, 2*lane+1 and the two 64 later, which RoPE of halves pairs with them.
struct HeadPart {
  uint32_t low, high;
};
__device__ __forceinline__ HeadPart LoadHead(const __nv_bfloat16* head) {
  const int lane = threadIdx.x & 31;
  return {*reinterpret_cast<const uint32_t*>(head + 2 * lane), *reinterpret_cast<const uint32_t*>(head + kHalf + 2 * lane)};
}
__device__ __forceinline__ void StoreHead(__nv_bfloat16* head, const HeadPart& part) {
  const int lane = threadIdx.x & 31;
  *reinterpret_cast<uint32_t*>(head + 2 * lane) = part.low;
  *reinterpret_cast<uint32_t*>(head + kHalf + 2 * lane) = part.high;
}
// RMS-norm over the head, then q*cos + rotate_half(q)*sin, in the reference's roundings (each product and the sum to bf16).
__device__ __forceinline__ HeadPart NormRope(const HeadPart& head, const HeadPart& weight, const HeadPart& cos_sin, float eps) {
  const float2 low = UnpackBf16(head.low), high = UnpackBf16(head.high), wl = UnpackBf16(weight.low), wh = UnpackBf16(weight.high);
  const float2 c = UnpackBf16(cos_sin.low), s = UnpackBf16(cos_sin.high);
  const float scale = rsqrtf(WarpSum(low.x * low.x + low.y * low.y + high.x * high.x + high.y * high.y) / kHeadDim + eps);
  const float l0 = RoundBf16(RoundBf16(low.x * scale) * wl.x), l1 = RoundBf16(RoundBf16(low.y * scale) * wl.y);
  const float h0 = RoundBf16(RoundBf16(high.x * scale) * wh.x), h1 = RoundBf16(RoundBf16(high.y * scale) * wh.y);
  return {PackBf16(RoundBf16(l0 * c.x) - RoundBf16(h0 * s.x), RoundBf16(l1 * c.y) - RoundBf16(h1 * s.y)),
          PackBf16(RoundBf16(h0 * c.x) + RoundBf16(l0 * s.x), RoundBf16(h1 * c.y) + RoundBf16(l1 * s.y))};
}

}  // namespace qwen::kernels
