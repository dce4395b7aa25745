#include "stage/kernels/common/launch.cuh"
#include "stage/kernels/common/ptx.cuh"
#include "stage/kernels/common/reduce.cuh"
#include "stage/kernels/vision.h"

namespace qwen::kernels {
namespace {

constexpr int kPositionThreads = 160;  // of 8 values each: one round for the released 1,152 (144) and 1,024 (128)
constexpr int kRopeThreads = 288;      // of 4 pairs each: one round for 2 * 16 heads of 72
constexpr int kQuarterMax = 64;
constexpr int64_t kGridMax = 0x7fffffff;

struct Tap {
  int index;
  float weight;
};
// Explicit roundings, so that no product is fused with a sum: the reference rounds each of them.
__device__ __forceinline__ Tap AxisTap(int at, int size, int side, int offset) {
  const float source = __fdiv_rn(__fmul_rn(static_cast<float>(at), static_cast<float>(side - 1)), static_cast<float>(max(size - 1, 1)));
  const float base = floorf(source);
  const float weight = __fsub_rn(1.0f, fabsf(__fsub_rn(__fsub_rn(source, base), static_cast<float>(offset))));
  return {min(max(static_cast<int>(base) + offset, 0), side - 1), fmaxf(weight, 0.0f)};
}

// One block a patch.
__global__ void __launch_bounds__(kPositionThreads) VisionPositionKernel(const VisionPositionArgs args) {
  GridDependencyWait();
  GridDependencyLaunch();
  const int64_t patch = blockIdx.x;
  const PatchPlace place = args.places[patch];
  const __nv_bfloat16* rows[4];
  float weights[4];
#pragma unroll
  for (int tap = 0; tap < 4; ++tap) {
    const Tap y = AxisTap(place.row, place.height, args.side, tap >> 1), x = AxisTap(place.column, place.width, args.side, tap & 1);
    rows[tap] = args.table + static_cast<size_t>(y.index * args.side + x.index) * args.width;
    weights[tap] = __fmul_rn(y.weight, x.weight);
  }
  __nv_bfloat16* out = args.hidden + static_cast<size_t>(patch) * args.width;
  for (int at = static_cast<int>(threadIdx.x) * 8; at < args.width; at += kPositionThreads * 8) {
    uint4 words[4];
#pragma unroll
    for (int tap = 0; tap < 4; ++tap) words[tap] = *reinterpret_cast<const uint4*>(rows[tap] + at);
    uint4 value = *reinterpret_cast<const uint4*>(out + at);
    uint32_t* pairs = &value.x;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      float2 sum = {0.0f, 0.0f};
#pragma unroll
      for (int tap = 0; tap < 4; ++tap) {
        const float2 entry = UnpackBf16((&words[tap].x)[pair]);
        sum = {__fadd_rn(sum.x, __fmul_rn(weights[tap], entry.x)), __fadd_rn(sum.y, __fmul_rn(weights[tap], entry.y))};
      }
      const float2 before = UnpackBf16(pairs[pair]);
      pairs[pair] = PackBf16(before.x + RoundBf16(sum.x), before.y + RoundBf16(sum.y));
    }
    *reinterpret_cast<uint4*>(out + at) = value;
  }
}

// One block a patch; its cosines and sines once in shared memory, then four pairs a thread.
__global__ void __launch_bounds__(kRopeThreads) VisionRopeKernel(const VisionRopeArgs args) {
  __shared__ float cosines[2 * kQuarterMax], sines[2 * kQuarterMax];
  GridDependencyWait();
  GridDependencyLaunch();
  const int half = args.head_dim / 2, quarter = half / 2;
  const int64_t patch = blockIdx.x;
  const PatchPlace place = args.places[patch];
  if (threadIdx.x < half) {
    const int i = threadIdx.x;
    const size_t entry = i < quarter ? static_cast<size_t>(place.row) * quarter + i : static_cast<size_t>(place.column) * quarter + i - quarter;
    cosines[i] = args.cosines[entry];
    sines[i] = args.sines[entry];
  }
  __syncthreads();
  __nv_bfloat16* row = args.qkv + static_cast<size_t>(patch) * 3 * args.heads * args.head_dim;
  const int groups = half / 4;  // of four pairs
  for (int item = threadIdx.x; item < 2 * args.heads * groups; item += kRopeThreads) {
    const int head = item / groups, first = item % groups * 4;
    uint2* low_at = reinterpret_cast<uint2*>(row + head * args.head_dim + first);
    uint2* high_at = reinterpret_cast<uint2*>(row + head * args.head_dim + half + first);
    uint2 low = *low_at, high = *high_at;
    const auto turn = [&](uint32_t& low_pair, uint32_t& high_pair, int i) {
      const float2 a = UnpackBf16(low_pair), b = UnpackBf16(high_pair);
      const float c0 = cosines[i], c1 = cosines[i + 1], s0 = sines[i], s1 = sines[i + 1];
      low_pair = PackBf16(__fsub_rn(__fmul_rn(a.x, c0), __fmul_rn(b.x, s0)), __fsub_rn(__fmul_rn(a.y, c1), __fmul_rn(b.y, s1)));
      high_pair = PackBf16(__fadd_rn(__fmul_rn(b.x, c0), __fmul_rn(a.x, s0)), __fadd_rn(__fmul_rn(b.y, c1), __fmul_rn(a.y, s1)));
    };
    turn(low.x, high.x, first);
    turn(low.y, high.y, first + 2);
    *low_at = low;
    *high_at = high;
  }
}

}  // namespace

cudaError_t VisionPosition(const VisionPositionArgs& args, cudaStream_t stream) {
  if (args.patches < 1 || args.patches > kGridMax || args.side < 1 || args.width < 8 || args.width % 8 != 0) return cudaErrorInvalidValue;
  return Launch(VisionPositionKernel, {.grid = dim3(static_cast<unsigned>(args.patches)), .block = dim3(kPositionThreads)}, stream, args);
}

cudaError_t VisionRope(const VisionRopeArgs& args, cudaStream_t stream) {
  if (args.patches < 1 || args.patches > kGridMax || args.heads < 1 || args.head_dim < 8 || args.head_dim % 8 != 0 || args.head_dim > 4 * kQuarterMax) {
    return cudaErrorInvalidValue;
  }
  return Launch(VisionRopeKernel, {.grid = dim3(static_cast<unsigned>(args.patches)), .block = dim3(kRopeThreads)}, stream, args);
}

}  // namespace qwen::kernels
