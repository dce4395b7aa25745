#include "stage/kernels/common/launch.cuh"
#include "stage/kernels/common/norm.cuh"
#include "stage/kernels/common/ptx.cuh"
#include "stage/kernels/common/reduce.cuh"
#include "stage/kernels/common/route.cuh"
#include "stage/kernels/moe_prefill.h"

namespace qwen::kernels {
namespace {

constexpr int kRouteWarps = 8;
constexpr int kPlaceThreads = 1024;
constexpr int kFewAssignments = 8192;  // up to here each block of PlaceKernel counts for itself what lies before its expert

template <bool kCount>
__global__ void __launch_bounds__(kRouteWarps * 32) RouteKernel(MoeShapeArgs shape, const __nv_bfloat16* logits, MoePermutation out, bool normalise) {
  __shared__ int count[kMaxExperts];
  if constexpr (kCount) {
    for (int e = threadIdx.x; e < shape.experts; e += blockDim.x) count[e] = 0;
    __syncthreads();
  }
  GridDependencyWait();
  GridDependencyLaunch();
  const int token = static_cast<int>(blockIdx.x) * kRouteWarps + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (token < shape.tokens) {
    int expert;
    float weight;
    RouteToken(shape.experts, shape.top_k, logits + static_cast<size_t>(token) * shape.experts, normalise, expert, weight);
    if (lane < shape.top_k) {
      out.expert_of[token * shape.top_k + lane] = expert;
      out.weight_of[token * shape.top_k + lane] = __float2bfloat16_rn(weight);
      if constexpr (kCount) atomicAdd(&count[expert], 1);
    }
  }
  if constexpr (kCount) {
    __syncthreads();
    for (int e = threadIdx.x; e < shape.experts; e += blockDim.x) {
      if (count[e] > 0) atomicAdd(&out.count[e], count[e]);
    }
  }
}

// Block e finds the assignments of expert e in order. All blocks read all ids: 4 bytes an assignment out of the L2 cache.
// Each warp takes a contiguous part, counts in it, learns what the warps before it found, and places: two passes without a
// barrier inside, so loads overlap.
// kCounted: `out.count` holds how many assignments each expert has.
template <bool kCounted>
__global__ void __launch_bounds__(kPlaceThreads) PlaceKernel(MoeShapeArgs shape, MoePermutation out) {
  constexpr int kWarps = kPlaceThreads / 32;
  __shared__ int warp_count[kWarps], warp_before[kWarps];
  __shared__ int base;
  const int expert = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  GridDependencyWait();
  GridDependencyLaunch();
  const int assignments = shape.tokens * shape.top_k;
  const int share = (assignments + kWarps * 32 - 1) / (kWarps * 32) * 32;
  const int begin = min(warp * share, assignments), end = min(begin + share, assignments);
  int found = 0, smaller = 0;
#pragma unroll 8
  for (int a = begin + lane; a < end; a += 32) {
    const int id = out.expert_of[a];
    found += id == expert;
    if constexpr (!kCounted) smaller += id < expert;
  }
  found = static_cast<int>(__reduce_add_sync(0xffffffffu, static_cast<unsigned>(found)));
  if (lane == 0) warp_count[warp] = found;
  if constexpr (!kCounted) {
    smaller = static_cast<int>(__reduce_add_sync(0xffffffffu, static_cast<unsigned>(smaller)));
    if (lane == 0) warp_before[warp] = smaller;
    __syncthreads();
    if (warp == 0) {
      static_assert(kWarps == 32);
      const int before = static_cast<int>(__reduce_add_sync(0xffffffffu, static_cast<unsigned>(warp_before[lane])));
      const int mine = static_cast<int>(__reduce_add_sync(0xffffffffu, static_cast<unsigned>(warp_count[lane])));
      if (lane == 0) {
        base = before;
        out.end[expert] = before + mine;
      }
    }
  } else if (warp == 0) {
    int before = 0;
    for (int e = lane; e < expert; e += 32) before += out.count[e];
    before = static_cast<int>(__reduce_add_sync(0xffffffffu, static_cast<unsigned>(before)));
    if (lane == 0) {
      base = before;
      out.end[expert] = before + out.count[expert];
    }
  }
  __syncthreads();
  int next = base;
  for (int w = 0; w < warp; ++w) next += warp_count[w];
#pragma unroll 4
  for (int first = begin; first < end; first += 32) {
    const int a = first + lane;
    const bool mine = a < end && out.expert_of[a] == expert;
    const unsigned ballot = __ballot_sync(0xffffffffu, mine);
    if (mine) {
      const int row = next + __popc(ballot & ((1u << lane) - 1));
      out.source[row] = a / shape.top_k;
      out.row_of[a] = row;
    }
    next += __popc(ballot);
  }
}

__global__ void __launch_bounds__(256) SiluMulKernel(const __nv_bfloat16* gate_up, __nv_bfloat16* h, int inter) {
  GridDependencyWait();
  GridDependencyLaunch();
  const uint4* gate = reinterpret_cast<const uint4*>(gate_up + static_cast<size_t>(blockIdx.x) * 2 * inter);
  const uint4* up = gate + inter / 8;
  uint4* to = reinterpret_cast<uint4*>(h + static_cast<size_t>(blockIdx.x) * inter);
  for (int i = threadIdx.x; i < inter / 8; i += blockDim.x) {
    const uint4 g4 = LoadActivation(gate + i), u4 = LoadActivation(up + i);
    const uint32_t gs[4] = {g4.x, g4.y, g4.z, g4.w}, us[4] = {u4.x, u4.y, u4.z, u4.w};
    uint32_t result[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 g = UnpackBf16(gs[j]), u = UnpackBf16(us[j]);
      result[j] = PackBf16(RoundBf16(g.x / (1.0f + expf(-g.x))) * u.x, RoundBf16(g.y / (1.0f + expf(-g.y))) * u.y);
    }
    to[i] = make_uint4(result[0], result[1], result[2], result[3]);
  }
}

constexpr int kCombineThreads = 256;
constexpr int kVectorsMax = 8;  // 16-byte vectors of a thread: hidden <= 8 * 256 * 8

// One block: a token's row. With a weight also its RMSNorm, which the next layer begins with (rms_norm.h); the row is in registers anyway.
template <int kVectors>
__global__ void __launch_bounds__(kCombineThreads) CombineKernel(MoeShapeArgs shape, const __nv_bfloat16* sorted, MoePermutation permutation,
                                                                 const __nv_bfloat16* residual, __nv_bfloat16* y, MoeNextNorm norm) {
  __shared__ int row[kMaxExpertsPerToken];
  __shared__ float weight[kMaxExpertsPerToken];
  __shared__ float scratch[kCombineThreads / 32];
  GridDependencyWait();
  GridDependencyLaunch();
  const size_t token = blockIdx.x;
  if (threadIdx.x < shape.top_k) {
    row[threadIdx.x] = permutation.row_of[token * shape.top_k + threadIdx.x];
    weight[threadIdx.x] = __bfloat162float(permutation.weight_of[token * shape.top_k + threadIdx.x]);
  }
  __syncthreads();
  const int vectors = shape.hidden / 8;
  uint4 kept[kVectors];
  float squares = 0.0f;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int i = j * kCombineThreads + static_cast<int>(threadIdx.x);
    if (i >= vectors) continue;
    float sum[8] = {};
    for (int rank = 0; rank < shape.top_k; ++rank) {
      const uint4 v = LoadActivation(reinterpret_cast<const uint4*>(sorted) + static_cast<size_t>(row[rank]) * vectors + i);
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float2 f = UnpackBf16(words[w]);
        sum[2 * w] += RoundBf16(f.x * weight[rank]);
        sum[2 * w + 1] += RoundBf16(f.y * weight[rank]);
      }
    }
    const uint4 added = make_uint4(PackBf16(sum[0], sum[1]), PackBf16(sum[2], sum[3]), PackBf16(sum[4], sum[5]), PackBf16(sum[6], sum[7]));
    kept[j] = AddBf16(LoadActivation(reinterpret_cast<const uint4*>(residual) + token * vectors + i), added);
    reinterpret_cast<uint4*>(y)[token * vectors + i] = kept[j];
    AddSquares(squares, kept[j]);
  }
  if (norm.weight == nullptr) return;
  const float scale = rsqrtf(BlockSum<kCombineThreads / 32>(squares, scratch) / shape.hidden + norm.eps);
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int i = j * kCombineThreads + static_cast<int>(threadIdx.x);
    if (i >= vectors) continue;
    const uint4 weights = __ldg(reinterpret_cast<const uint4*>(norm.weight) + i);
    reinterpret_cast<uint4*>(norm.y)[token * vectors + i] = NormedBf16(kept[j], scale, weights);
  }
}

}  // namespace

cudaError_t MoePermute(const MoeShapeArgs& shape, const __nv_bfloat16* logits, const MoePermutation& permutation, bool normalise, cudaStream_t stream) {
  if (shape.tokens < 1 || shape.experts > kMaxExperts || shape.top_k < 1 || shape.top_k > kMaxExpertsPerToken || shape.top_k > shape.experts) {
    return cudaErrorInvalidValue;
  }
  const LaunchShape route = {.grid = dim3((shape.tokens + kRouteWarps - 1) / kRouteWarps), .block = dim3(kRouteWarps * 32)};
  const LaunchShape place = {.grid = dim3(shape.experts), .block = dim3(kPlaceThreads)};
  if (shape.tokens * shape.top_k <= kFewAssignments) {  // two kernels that follow each other closely
    if (cudaError_t e = Launch(RouteKernel<false>, route, stream, shape, logits, permutation, normalise); e != cudaSuccess) return e;
    return Launch(PlaceKernel<false>, place, stream, shape, permutation);
  }
  if (cudaError_t e = cudaMemsetAsync(permutation.count, 0, sizeof(int32_t) * shape.experts, stream); e != cudaSuccess) return e;
  if (cudaError_t e = Launch(RouteKernel<true>, route, stream, shape, logits, permutation, normalise); e != cudaSuccess) return e;
  return Launch(PlaceKernel<true>, place, stream, shape, permutation);
}

cudaError_t SiluMul(const __nv_bfloat16* gate_up, __nv_bfloat16* h, int rows, int inter, cudaStream_t stream) {
  if (rows < 1 || inter < 8 || inter % 8 != 0) return cudaErrorInvalidValue;
  return Launch(SiluMulKernel, {.grid = dim3(rows), .block = dim3(inter >= 2048 ? 256 : 128)}, stream, gate_up, h, inter);
}

cudaError_t MoePrefillCombine(const MoeShapeArgs& shape, const __nv_bfloat16* sorted, const MoePermutation& permutation, const __nv_bfloat16* residual,
                              __nv_bfloat16* y, cudaStream_t stream, const MoeNextNorm& norm) {
  const int vectors = (shape.hidden / 8 + kCombineThreads - 1) / kCombineThreads;
  if (shape.tokens < 1 || shape.hidden < 8 || shape.hidden % 8 != 0 || vectors > kVectorsMax || (norm.weight == nullptr) != (norm.y == nullptr)) return cudaErrorInvalidValue;
  const LaunchShape launch = {.grid = dim3(shape.tokens), .block = dim3(kCombineThreads)};
  if (vectors <= 1) return Launch(CombineKernel<1>, launch, stream, shape, sorted, permutation, residual, y, norm);
  if (vectors <= 2) return Launch(CombineKernel<2>, launch, stream, shape, sorted, permutation, residual, y, norm);
  if (vectors <= 4) return Launch(CombineKernel<4>, launch, stream, shape, sorted, permutation, residual, y, norm);
  return Launch(CombineKernel<kVectorsMax>, launch, stream, shape, sorted, permutation, residual, y, norm);
}

}  // namespace qwen::kernels
