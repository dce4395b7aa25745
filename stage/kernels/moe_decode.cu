#include <cfloat>

#include "stage/kernels/common/launch.cuh"
#include "stage/kernels/common/limits.h"
#include "stage/kernels/common/ptx.cuh"
#include "stage/kernels/common/reduce.cuh"
#include "stage/kernels/moe_decode.h"

namespace qwen::kernels {
namespace {

constexpr int kRouteWarps = 16;
constexpr int kAssignmentsMax = 4096;

// One block. Each warp routes every kRouteWarps-th token; then the block counts, scans and lists by expert.
__global__ void __launch_bounds__(kRouteWarps * 32) MoeRouteKernel(MoeShapeArgs shape, const __nv_bfloat16* logits, MoeRouting routing, bool normalise) {
  __shared__ int count[kMaxExperts + 1];
  __shared__ int16_t chosen[kAssignmentsMax];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  GridDependencyWait();
  GridDependencyLaunch();
  constexpr int kPerLane = kMaxExperts / 32;
  for (int token = warp; token < shape.tokens; token += kRouteWarps) {
    float value[kPerLane];
    float top = -FLT_MAX;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int expert = i * 32 + lane;
      value[i] = expert < shape.experts ? __bfloat162float(logits[static_cast<size_t>(token) * shape.experts + expert]) : -FLT_MAX;
      top = fmaxf(top, value[i]);
    }
    top = WarpMax(top);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      value[i] = i * 32 + lane < shape.experts ? expf(value[i] - top) : -1.0f;
      sum += fmaxf(value[i], 0.0f);
    }
    sum = WarpSum(sum);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) value[i] = value[i] < 0.0f ? -1.0f : value[i] / sum;
    // top_k rounds of arg-max; among equals the lowest expert id wins.
    float picked_weight = 0.0f, total = 0.0f;
    for (int rank = 0; rank < shape.top_k; ++rank) {
      float best = -1.0f;
      int best_expert = kMaxExperts;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (value[i] > best) {
          best = value[i];
          best_expert = i * 32 + lane;
        }
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset >>= 1) {
        const float other = __shfl_xor_sync(0xffffffffu, best, offset);
        const int other_expert = __shfl_xor_sync(0xffffffffu, best_expert, offset);
        if (other > best || (other == best && other_expert < best_expert)) {
          best = other;
          best_expert = other_expert;
        }
      }
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (i * 32 + lane == best_expert) value[i] = -1.0f;
      }
      if (lane == rank) picked_weight = best;
      total += best;
      if (lane == 0) {
        routing.expert_of[token * shape.top_k + rank] = best_expert;
        chosen[token * shape.top_k + rank] = static_cast<int16_t>(best_expert);
      }
    }
    if (lane < shape.top_k) {
      routing.weight_of[token * shape.top_k + lane] = __float2bfloat16_rn(normalise ? picked_weight / total : picked_weight);
    }
  }
  __syncthreads();
  // One thread per expert walks the choices in order: stable lists without atomics. The choices are in shared memory, and
  // all threads read the same one at a time, so this is a broadcast; 2,048 assignments take about 3 us.
  const int assignments = shape.tokens * shape.top_k;
  int mine = 0;
  if (threadIdx.x < shape.experts) {
    for (int a = 0; a < assignments; ++a) mine += chosen[a] == static_cast<int>(threadIdx.x);
    count[threadIdx.x] = mine;
  }
  __syncthreads();
  if (threadIdx.x < shape.experts) {
    int begin = 0, index = 0;
    for (int e = 0; e < static_cast<int>(threadIdx.x); ++e) {
      begin += count[e];
      index += count[e] > 0;
    }
    routing.begin[threadIdx.x] = begin;
    if (threadIdx.x == shape.experts - 1) {
      routing.begin[shape.experts] = begin + mine;
      routing.active[0] = index + (mine > 0);
    }
    if (mine > 0) {
      routing.active[1 + index] = threadIdx.x;
      for (int a = 0; a < assignments; ++a) {
        if (chosen[a] == static_cast<int>(threadIdx.x)) routing.order[begin++] = a;
      }
    }
  }
}

constexpr int kWarps = 8;
constexpr int kGateUpUnroll = 2;  // 4 weight rows * 16 B * 2 = 128 B a thread in flight
constexpr int kDownUnroll = 3;

// One block: 16 gate rows and 16 up rows of one active expert, for all its tokens, 8 * kTiles at a time. Eight warps split k.
template <int kTiles>
__global__ void __launch_bounds__(kWarps * 32) MoeGateUpKernel(MoeShapeArgs shape, const __nv_bfloat16* x, const __nv_bfloat16* gate_up, MoeRouting routing,
                                                               __nv_bfloat16* h) {
  constexpr int kColumns = kTiles * 8;
  __shared__ float partial[kWarps][2][kColumns][16 + 1];
  GridDependencyWait();
  GridDependencyLaunch();
  if (static_cast<int>(blockIdx.y) >= routing.active[0]) return;
  const int expert = routing.active[1 + blockIdx.y];
  const int first = routing.begin[expert], last = routing.begin[expert + 1];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int row = blockIdx.x * 16;
  const int k_begin = warp * (shape.hidden / kWarps), steps = shape.hidden / kWarps / 32;
  const __nv_bfloat16* gate = gate_up + (static_cast<size_t>(expert) * 2 * shape.inter + row + g) * shape.hidden + k_begin + t * 8;
  const __nv_bfloat16* up = gate + static_cast<size_t>(shape.inter) * shape.hidden;
  const size_t eight = static_cast<size_t>(8) * shape.hidden;

  for (int base = first; base < last; base += kColumns) {
    const __nv_bfloat16* xb[kTiles];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int at = base + i * 8 + g;
      xb[i] = at < last ? x + static_cast<size_t>(routing.order[at] / shape.top_k) * shape.hidden + k_begin + t * 8 : nullptr;
    }
    float acc[2][kTiles][4] = {};
    for (int step = 0; step < steps; step += kGateUpUnroll) {
      uint4 a[kGateUpUnroll][4], b[kGateUpUnroll][kTiles];
#pragma unroll
      for (int u = 0; u < kGateUpUnroll; ++u) {
        const int k = (step + u) * 32;
        a[u][0] = LoadStream(gate + k);
        a[u][1] = LoadStream(gate + eight + k);
        a[u][2] = LoadStream(up + k);
        a[u][3] = LoadStream(up + eight + k);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) b[u][i] = xb[i] ? LoadActivation(xb[i] + k) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int u = 0; u < kGateUpUnroll; ++u) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          MmaK32(acc[0][i], a[u][0], a[u][1], b[u][i]);
          MmaK32(acc[1][i], a[u][2], a[u][3], b[u][i]);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        partial[warp][half][i * 8 + 2 * t][g] = acc[half][i][0];
        partial[warp][half][i * 8 + 2 * t + 1][g] = acc[half][i][1];
        partial[warp][half][i * 8 + 2 * t][g + 8] = acc[half][i][2];
        partial[warp][half][i * 8 + 2 * t + 1][g + 8] = acc[half][i][3];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kColumns * 16; i += blockDim.x) {
      const int column = i / 16, r = i % 16;
      if (base + column < last) {
        float gate_sum = 0.0f, up_sum = 0.0f;
#pragma unroll
        for (int s = 0; s < kWarps; ++s) {
          gate_sum += partial[s][0][column][r];
          up_sum += partial[s][1][column][r];
        }
        gate_sum = RoundBf16(gate_sum);
        const float silu = RoundBf16(gate_sum / (1.0f + expf(-gate_sum)));
        h[static_cast<size_t>(routing.order[base + column]) * shape.inter + row + r] = __float2bfloat16_rn(silu * RoundBf16(up_sum));
      }
    }
    __syncthreads();
  }
}

// One block: 32 rows of the down projection of one active expert. Four warps split k, two halves take 16 rows each.
template <int kTiles>
__global__ void __launch_bounds__(kWarps * 32) MoeDownKernel(MoeShapeArgs shape, const __nv_bfloat16* h, const __nv_bfloat16* down, MoeRouting routing,
                                                             __nv_bfloat16* out) {
  constexpr int kColumns = kTiles * 8, kSplits = kWarps / 2;
  __shared__ float partial[kSplits][kColumns][32 + 1];
  GridDependencyWait();
  GridDependencyLaunch();
  if (static_cast<int>(blockIdx.y) >= routing.active[0]) return;
  const int expert = routing.active[1 + blockIdx.y];
  const int first = routing.begin[expert], last = routing.begin[expert + 1];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int half = warp & 1, split = warp >> 1;
  const int row = blockIdx.x * 32 + half * 16;
  const int k_begin = split * (shape.inter / kSplits), steps = shape.inter / kSplits / 32;
  const __nv_bfloat16* w0 = down + (static_cast<size_t>(expert) * shape.hidden + row + g) * shape.inter + k_begin + t * 8;
  const __nv_bfloat16* w8 = w0 + static_cast<size_t>(8) * shape.inter;

  for (int base = first; base < last; base += kColumns) {
    const __nv_bfloat16* hb[kTiles];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int at = base + i * 8 + g;
      hb[i] = at < last ? h + static_cast<size_t>(routing.order[at]) * shape.inter + k_begin + t * 8 : nullptr;
    }
    float acc[kTiles][4] = {};
    for (int step = 0; step < steps; step += kDownUnroll) {
      uint4 a[kDownUnroll][2], b[kDownUnroll][kTiles];
#pragma unroll
      for (int u = 0; u < kDownUnroll; ++u) {
        const int k = (step + u) * 32;
        const bool in = step + u < steps;
        a[u][0] = in ? LoadStream(w0 + k) : make_uint4(0, 0, 0, 0);
        a[u][1] = in ? LoadStream(w8 + k) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) b[u][i] = in && hb[i] ? LoadActivation(hb[i] + k) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int u = 0; u < kDownUnroll; ++u) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) MmaK32(acc[i], a[u][0], a[u][1], b[u][i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      float* p = &partial[split][i * 8 + 2 * t][half * 16];
      p[g] = acc[i][0];
      p[33 + g] = acc[i][1];
      p[g + 8] = acc[i][2];
      p[33 + g + 8] = acc[i][3];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kColumns * 32; i += blockDim.x) {
      const int column = i / 32, r = i % 32;
      if (base + column < last) {
        float sum = 0.0f;
#pragma unroll
        for (int s = 0; s < kSplits; ++s) sum += partial[s][column][r];
        const int a = routing.order[base + column];
        const float weight = __bfloat162float(routing.weight_of[a]);
        out[static_cast<size_t>(a) * shape.hidden + blockIdx.x * 32 + r] = __float2bfloat16_rn(RoundBf16(sum) * weight);
      }
    }
    __syncthreads();
  }
}

// One thread: 8 values of hidden of one token.
__global__ void MoeCombineKernel(MoeShapeArgs shape, const __nv_bfloat16* partial, const __nv_bfloat16* residual, __nv_bfloat16* y) {
  GridDependencyWait();
  GridDependencyLaunch();
  const int vectors = shape.hidden / 8;
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= shape.tokens * vectors) return;
  const int token = i / vectors, v = i % vectors;
  float sum[8] = {};
  for (int rank = 0; rank < shape.top_k; ++rank) {
    const uint4 p = LoadActivation(partial + (static_cast<size_t>(token) * shape.top_k + rank) * shape.hidden + v * 8);
    const uint32_t words[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 f = UnpackBf16(words[j]);
      sum[2 * j] += f.x;
      sum[2 * j + 1] += f.y;
    }
  }
  const uint4 r = LoadActivation(residual + static_cast<size_t>(token) * shape.hidden + v * 8);
  const uint32_t words[4] = {r.x, r.y, r.z, r.w};
  uint32_t result[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 f = UnpackBf16(words[j]);
    result[j] = PackBf16(f.x + RoundBf16(sum[2 * j]), f.y + RoundBf16(sum[2 * j + 1]));
  }
  *reinterpret_cast<uint4*>(y + static_cast<size_t>(token) * shape.hidden + v * 8) = make_uint4(result[0], result[1], result[2], result[3]);
}

bool Valid(const MoeShapeArgs& s) {
  return s.tokens >= 1 && s.experts >= 1 && s.experts <= kMaxExperts && s.top_k >= 1 && s.top_k <= kMaxExpertsPerToken && s.top_k <= s.experts &&
         s.tokens * s.top_k <= kAssignmentsMax;
}
// Experts that can have work: the grid has to be known without asking the device.
unsigned ActiveMax(const MoeShapeArgs& s) {
  const int assignments = s.tokens * s.top_k;
  return static_cast<unsigned>(assignments < s.experts ? assignments : s.experts);
}

}  // namespace

cudaError_t MoeRoute(const MoeShapeArgs& shape, const __nv_bfloat16* logits, const MoeRouting& routing, bool normalise, cudaStream_t stream) {
  if (!Valid(shape) || shape.experts % 32 != 0) return cudaErrorInvalidValue;
  return Launch(MoeRouteKernel, {.grid = dim3(1), .block = dim3(kRouteWarps * 32)}, stream, shape, logits, routing, normalise);
}

cudaError_t MoeGateUp(const MoeShapeArgs& shape, const __nv_bfloat16* x, const __nv_bfloat16* gate_up, const MoeRouting& routing, __nv_bfloat16* h,
                      cudaStream_t stream) {
  if (!Valid(shape) || shape.hidden % (kWarps * 32 * kGateUpUnroll) != 0 || shape.inter % 16 != 0) return cudaErrorInvalidValue;
  const LaunchShape launch = {.grid = dim3(shape.inter / 16, ActiveMax(shape)), .block = dim3(kWarps * 32)};
  // Mean tokens per active expert decides how many share one pass over the weights.
  return shape.tokens <= 16 ? Launch(MoeGateUpKernel<1>, launch, stream, shape, x, gate_up, routing, h)
                            : Launch(MoeGateUpKernel<2>, launch, stream, shape, x, gate_up, routing, h);
}

cudaError_t MoeDown(const MoeShapeArgs& shape, const __nv_bfloat16* h, const __nv_bfloat16* down, const MoeRouting& routing, __nv_bfloat16* partial,
                    cudaStream_t stream) {
  if (!Valid(shape) || shape.inter % 128 != 0 || shape.hidden % 32 != 0) return cudaErrorInvalidValue;
  const LaunchShape launch = {.grid = dim3(shape.hidden / 32, ActiveMax(shape)), .block = dim3(kWarps * 32)};
  return shape.tokens <= 16 ? Launch(MoeDownKernel<1>, launch, stream, shape, h, down, routing, partial)
                            : Launch(MoeDownKernel<2>, launch, stream, shape, h, down, routing, partial);
}

cudaError_t MoeCombine(const MoeShapeArgs& shape, const __nv_bfloat16* partial, const __nv_bfloat16* residual, __nv_bfloat16* y, cudaStream_t stream) {
  if (!Valid(shape) || shape.hidden % 8 != 0) return cudaErrorInvalidValue;
  const int threads = shape.tokens * (shape.hidden / 8);
  return Launch(MoeCombineKernel, {.grid = dim3((threads + 255) / 256), .block = dim3(256)}, stream, shape, partial, residual, y);
}

}  // namespace qwen::kernels
