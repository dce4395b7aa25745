#include "stage/kernels/common/launch.cuh"
#include "stage/kernels/common/limits.h"
#include "stage/kernels/common/ptx.cuh"
#include "stage/kernels/common/reduce.cuh"
#include "stage/kernels/common/route.cuh"
#include "stage/kernels/common/weight.cuh"
#include "stage/kernels/moe_decode.h"

namespace qwen::kernels {
namespace {

constexpr int kRouteWarps = 8;  // tokens up to which one block routes and groups: 3.7 us; at 32 it took 7.5, and two kernels take 3.9
constexpr int kAssignmentsMax = 4096;

// Groups the assignments by expert: count, scan, scatter. Whole block; `chosen` holds every assignment's expert.
__device__ void GroupByExpert(const MoeShapeArgs& shape, const int16_t* chosen, const MoeRouting& routing) {
  __shared__ int count[kMaxExperts], next[kMaxExperts];
  __shared__ int warp_sum[kMaxExperts / 32], warp_used[kMaxExperts / 32];
  const int assignments = shape.tokens * shape.top_k, thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
  if (thread < kMaxExperts) count[thread] = 0;
  __syncthreads();
  for (int a = thread; a < assignments; a += blockDim.x) atomicAdd(&count[chosen[a]], 1);
  __syncthreads();
  int mine = 0, sum = 0, used = 0;
  if (thread < kMaxExperts) {
    mine = count[thread];
    sum = mine;
    used = mine > 0;
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {  // inclusive scans over the warp
      const int s = __shfl_up_sync(0xffffffffu, sum, offset), u = __shfl_up_sync(0xffffffffu, used, offset);
      if (lane >= offset) {
        sum += s;
        used += u;
      }
    }
    if (lane == 31) {
      warp_sum[warp] = sum;
      warp_used[warp] = used;
    }
  }
  __syncthreads();
  if (thread < kMaxExperts) {
    int all_used = 0;
    for (int w = 0; w < kMaxExperts / 32; ++w) {
      if (w < warp) {
        sum += warp_sum[w];
        used += warp_used[w];
      }
      all_used += warp_used[w];
    }
    next[thread] = sum - mine;
    if (mine > 0) routing.group[used - 1] = make_int4(thread, sum - mine, sum, 0);
    if (thread < shape.experts && thread >= all_used) routing.group[thread] = make_int4(-1, 0, 0, 0);
  }
  __syncthreads();
  for (int a = thread; a < assignments; a += blockDim.x) routing.order[atomicAdd(&next[chosen[a]], 1)] = a;
}

// Up to kRouteWarps tokens: route and group in one block.
__global__ void __launch_bounds__(kRouteWarps * 32) MoeRouteSmallKernel(MoeShapeArgs shape, const __nv_bfloat16* logits, MoeRouting routing, bool normalise) {
  __shared__ int16_t chosen[kRouteWarps * kMaxExpertsPerToken];
  GridDependencyWait();
  GridDependencyLaunch();
  const int token = threadIdx.x >> 5, lane = threadIdx.x & 31;
  if (token < shape.tokens) {
    int expert;
    float weight;
    RouteToken(shape.experts, shape.top_k, logits + static_cast<size_t>(token) * shape.experts, normalise, expert, weight);
    if (lane < shape.top_k) {
      routing.expert_of[token * shape.top_k + lane] = expert;
      routing.weight_of[token * shape.top_k + lane] = __float2bfloat16_rn(weight);
      chosen[token * shape.top_k + lane] = static_cast<int16_t>(expert);
    }
  }
  __syncthreads();
  GroupByExpert(shape, chosen, routing);
}

// More tokens: one warp a token over many blocks, then one block groups.
__global__ void __launch_bounds__(128) MoeRouteTokensKernel(MoeShapeArgs shape, const __nv_bfloat16* logits, MoeRouting routing, bool normalise) {
  GridDependencyWait();
  GridDependencyLaunch();
  const int token = blockIdx.x * 4 + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (token >= shape.tokens) return;
  int expert;
  float weight;
  RouteToken(shape.experts, shape.top_k, logits + static_cast<size_t>(token) * shape.experts, normalise, expert, weight);
  if (lane < shape.top_k) {
    routing.expert_of[token * shape.top_k + lane] = expert;
    routing.weight_of[token * shape.top_k + lane] = __float2bfloat16_rn(weight);
  }
}

__global__ void __launch_bounds__(1024) MoeGroupKernel(MoeShapeArgs shape, MoeRouting routing) {
  __shared__ int16_t chosen[kAssignmentsMax];
  GridDependencyWait();
  GridDependencyLaunch();
  for (int a = threadIdx.x; a < shape.tokens * shape.top_k; a += blockDim.x) chosen[a] = static_cast<int16_t>(routing.expert_of[a]);
  __syncthreads();
  GroupByExpert(shape, chosen, routing);
}

constexpr int kWarps = 8;

// acc += kUnroll steps of weights, of kRows rows of tiles and kHalves matrices (gate and up, or one), times kTiles columns of
// activations. Each weight is prepared once for all columns.
template <typename T, int kUnroll, int kRows, int kHalves, int kTiles>
__device__ __forceinline__ void MultiplySteps(float (&acc)[kRows][kHalves][kTiles][4], const uint4 (&a)[kUnroll][kRows][2 * kHalves], const float (&scale)[kUnroll][kHalves],
                                              const uint4 (&b)[kUnroll][kTiles][T::kVectors]) {
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if constexpr (T::kVectors == 1) {  // bf16: weights are operands as they are
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          MmaK32(acc[r][0][i], a[u][r][0], a[u][r][1], b[u][i][0]);
          if constexpr (kHalves == 2) MmaK32(acc[r][1][i], a[u][r][2], a[u][r][3], b[u][i][0]);
        }
      }
    } else {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          const auto operand = T::Prepare(a[u][r][2 * half], a[u][r][2 * half + 1], scale[u][half]);
#pragma unroll
          for (int i = 0; i < kTiles; ++i) T::Multiply(acc[r][half][i], operand, b[u][i]);
        }
      }
    }
  }
}

// One block: 16 * kRows gate rows and as many up rows of one active expert, for all its tokens, 8 * kTiles at a time. Eight
// warps split k. kUnroll divides the k steps of a warp: 4 rows * kRows * 16 B * kUnroll a thread are in flight. The first
// weights are asked for before it is known which tokens they meet: that is a chain of two loads.
template <int kTiles, int kUnroll, int kRows = 1, int kBlocks = 2, typename W = __nv_bfloat16>
__global__ void __launch_bounds__(kWarps * 32, kBlocks) MoeGateUpKernel(MoeShapeArgs shape, const __nv_bfloat16* x, typename WeightTraits<W>::Matrix gate_up, MoeRouting routing,
                                                               __nv_bfloat16* h) {
  using T = WeightTraits<W>;
  constexpr int kColumns = kTiles * 8, kStep = T::kStepColumns, kLane = kStep / 4;  // columns of a step, and a lane's
  __shared__ float partial[kWarps][2][kColumns][16 + 1];
  GridDependencyWait();
  GridDependencyLaunch();
  const int4 group = routing.group[blockIdx.y];
  const int expert = group.x, first = group.y, last = group.z;
  if (expert < 0) return;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int row = blockIdx.x * 16 * kRows;
  const int k_begin = warp * (shape.hidden / kWarps), steps = shape.hidden / kWarps / kStep;
  const W* gate = T::Values(gate_up) + (static_cast<size_t>(expert) * 2 * shape.inter + row + g) * shape.hidden + k_begin + t * kLane;
  const W* up = gate + static_cast<size_t>(shape.inter) * shape.hidden;
  const size_t eight = static_cast<size_t>(8) * shape.hidden;
  const int scale_stride = Fp8ScaleStride(shape.hidden);
  uint4 a[kUnroll][kRows][4];
  float scale[kUnroll][2];
  auto load_weights = [&](int step) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        scale[u][half] = T::Scale(gate_up, (static_cast<size_t>(expert) * 2 + half) * shape.inter + row, k_begin + (step + u) * kStep, scale_stride);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const size_t k = (step + u) * kStep + 2 * r * eight;
        a[u][r][0] = LoadStream(gate + k);
        a[u][r][1] = LoadStream(gate + eight + k);
        a[u][r][2] = LoadStream(up + k);
        a[u][r][3] = LoadStream(up + eight + k);
      }
    }
  };
  load_weights(0);

  for (int base = first; base < last; base += kColumns) {
    const __nv_bfloat16* xb[kTiles];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int at = min(base + i * 8 + g, last - 1);  // columns past the end repeat the last one; nobody reads theirs
      xb[i] = x + static_cast<size_t>(routing.order[at] / shape.top_k) * shape.hidden + k_begin + t * kLane;
    }
    float acc[kRows][2][kTiles][4] = {};
    for (int step = 0; step < steps; step += kUnroll) {
      uint4 b[kUnroll][kTiles][T::kVectors];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
#pragma unroll
          for (int v = 0; v < T::kVectors; ++v) b[u][i][v] = LoadActivation(xb[i] + (step + u) * kStep + v * 8);
        }
      }
      MultiplySteps<T>(acc, a, scale, b);
      if (step + kUnroll < steps) {
        load_weights(step + kUnroll);
      } else if (base + kColumns < last) {
        load_weights(0);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          partial[warp][half][i * 8 + 2 * t][g] = acc[r][half][i][0];
          partial[warp][half][i * 8 + 2 * t + 1][g] = acc[r][half][i][1];
          partial[warp][half][i * 8 + 2 * t][g + 8] = acc[r][half][i][2];
          partial[warp][half][i * 8 + 2 * t + 1][g + 8] = acc[r][half][i][3];
        }
      }
      __syncthreads();
      for (int i = threadIdx.x; i < kColumns * 16; i += blockDim.x) {
        const int column = i / 16, c = i % 16;
        if (base + column < last) {
          float gate_sum = 0.0f, up_sum = 0.0f;
#pragma unroll
          for (int s = 0; s < kWarps; ++s) {
            gate_sum += partial[s][0][column][c];
            up_sum += partial[s][1][column][c];
          }
          gate_sum = RoundBf16(gate_sum);
          const float silu = RoundBf16(gate_sum / (1.0f + expf(-gate_sum)));
          h[static_cast<size_t>(routing.order[base + column]) * shape.inter + row + r * 16 + c] = __float2bfloat16_rn(silu * RoundBf16(up_sum));
        }
      }
      __syncthreads();
    }
  }
}

// One block: 32 * kRows rows of the down projection of one active expert. Four warps split k, two halves take 16 * kRows rows
// each.
template <int kTiles, int kUnroll, int kRows = 1, int kBlocks = (kTiles == 1 ? 3 : 2), typename W = __nv_bfloat16>
__global__ void __launch_bounds__(kWarps * 32, kBlocks) MoeDownKernel(MoeShapeArgs shape, const __nv_bfloat16* h, typename WeightTraits<W>::Matrix down, MoeRouting routing,
                                                             __nv_bfloat16* out) {
  using T = WeightTraits<W>;
  constexpr int kColumns = kTiles * 8, kSplits = kWarps / 2, kStep = T::kStepColumns, kLane = kStep / 4;
  __shared__ float partial[kSplits][kColumns][32 + 1];
  GridDependencyWait();
  GridDependencyLaunch();
  const int4 group = routing.group[blockIdx.y];
  const int expert = group.x, first = group.y, last = group.z;
  if (expert < 0) return;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int half = warp & 1, split = warp >> 1;
  const int row = blockIdx.x * 32 * kRows;
  const int k_begin = split * (shape.inter / kSplits), steps = shape.inter / kSplits / kStep;
  const W* w0 = T::Values(down) + (static_cast<size_t>(expert) * shape.hidden + row + half * 16 + g) * shape.inter + k_begin + t * kLane;
  const size_t eight = static_cast<size_t>(8) * shape.inter;
  const int scale_stride = Fp8ScaleStride(shape.inter);
  uint4 a[kUnroll][kRows][2];
  float scale[kUnroll][1];
  auto load_weights = [&](int step) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      scale[u][0] = T::Scale(down, static_cast<size_t>(expert) * shape.hidden + row, k_begin + (step + u) * kStep, scale_stride);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const size_t k = (step + u) * kStep + 4 * r * eight;
        a[u][r][0] = LoadStream(w0 + k);
        a[u][r][1] = LoadStream(w0 + eight + k);
      }
    }
  };
  load_weights(0);

  for (int base = first; base < last; base += kColumns) {
    const __nv_bfloat16* hb[kTiles];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int at = min(base + i * 8 + g, last - 1);
      hb[i] = h + static_cast<size_t>(routing.order[at]) * shape.inter + k_begin + t * kLane;
    }
    float acc[kRows][1][kTiles][4] = {};
    for (int step = 0; step < steps; step += kUnroll) {
      uint4 b[kUnroll][kTiles][T::kVectors];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
#pragma unroll
          for (int v = 0; v < T::kVectors; ++v) b[u][i][v] = LoadActivation(hb[i] + (step + u) * kStep + v * 8);
        }
      }
      MultiplySteps<T>(acc, a, scale, b);
      if (step + kUnroll < steps) {
        load_weights(step + kUnroll);
      } else if (base + kColumns < last) {
        load_weights(0);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        float* p = &partial[split][i * 8 + 2 * t][half * 16];
        p[g] = acc[r][0][i][0];
        p[33 + g] = acc[r][0][i][1];
        p[g + 8] = acc[r][0][i][2];
        p[33 + g + 8] = acc[r][0][i][3];
      }
      __syncthreads();
      for (int i = threadIdx.x; i < kColumns * 32; i += blockDim.x) {
        const int column = i / 32, c = i % 32;
        if (base + column < last) {
          float sum = 0.0f;
#pragma unroll
          for (int s = 0; s < kSplits; ++s) sum += partial[s][column][c];
          const int at = routing.order[base + column];
          const float weight = __bfloat162float(routing.weight_of[at]);
          out[static_cast<size_t>(at) * shape.hidden + row + r * 32 + c] = __float2bfloat16_rn(RoundBf16(sum) * weight);
        }
      }
      __syncthreads();
    }
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
  if (shape.tokens <= kRouteWarps) {
    const int threads = shape.tokens * 32 > kMaxExperts ? shape.tokens * 32 : kMaxExperts;  // GroupByExpert wants one thread per expert
    return Launch(MoeRouteSmallKernel, {.grid = dim3(1), .block = dim3(threads)}, stream, shape, logits, routing, normalise);
  }
  if (cudaError_t e = Launch(MoeRouteTokensKernel, {.grid = dim3((shape.tokens + 3) / 4), .block = dim3(128)}, stream, shape, logits, routing, normalise); e != cudaSuccess) return e;
  return Launch(MoeGroupKernel, {.grid = dim3(1), .block = dim3(1024)}, stream, shape, routing);
}

cudaError_t MoeGateUp(const MoeShapeArgs& shape, const __nv_bfloat16* x, const __nv_bfloat16* gate_up, const MoeRouting& routing, __nv_bfloat16* h,
                      cudaStream_t stream) {
  if (!Valid(shape) || shape.hidden % (kWarps * 32) != 0 || shape.inter % 16 != 0) return cudaErrorInvalidValue;
  const LaunchShape launch = {.grid = dim3(shape.inter / 16, ActiveMax(shape)), .block = dim3(kWarps * 32)};
  // Read off MoeVariants.Speed on an H200: with 128 experts and top 8 a token in 16 meets any one expert, so up to 16 tokens
  // one tile of 8 columns holds them, and past 128 an expert has more than 8 on average and wants one pass for up to 32.
  if (shape.hidden / kWarps / 32 % 4 != 0) {
    return shape.tokens <= 16 ? Launch(MoeGateUpKernel<1, 1>, launch, stream, shape, x, gate_up, routing, h) : Launch(MoeGateUpKernel<2, 1>, launch, stream, shape, x, gate_up, routing, h);
  }
  if (shape.tokens <= 16) return Launch(MoeGateUpKernel<1, 4>, launch, stream, shape, x, gate_up, routing, h);
  if (shape.tokens <= 128) return Launch(MoeGateUpKernel<2, 4>, launch, stream, shape, x, gate_up, routing, h);
  return Launch(MoeGateUpKernel<4, 2>, launch, stream, shape, x, gate_up, routing, h);
}

// Of FP8, read off in the same way: three blocks an SM hide the conversion better than more bytes in flight of two.
cudaError_t MoeGateUp(const MoeShapeArgs& shape, const __nv_bfloat16* x, const Fp8Matrix& gate_up, const MoeRouting& routing, __nv_bfloat16* h, cudaStream_t stream) {
  if (!Valid(shape) || shape.hidden % (kWarps * 64) != 0 || shape.inter % kFp8Block != 0) return cudaErrorInvalidValue;
  const LaunchShape launch = {.grid = dim3(shape.inter / 16, ActiveMax(shape)), .block = dim3(kWarps * 32)};
  if (shape.hidden / kWarps / 64 % 4 != 0) {
    return shape.tokens <= 16 ? Launch(MoeGateUpKernel<1, 1, 1, 2, Fp8>, launch, stream, shape, x, gate_up, routing, h)
                              : Launch(MoeGateUpKernel<2, 1, 1, 2, Fp8>, launch, stream, shape, x, gate_up, routing, h);
  }
  if (shape.tokens <= 64) return Launch(MoeGateUpKernel<1, 2, 1, 3, Fp8>, launch, stream, shape, x, gate_up, routing, h);
  if (shape.tokens <= 128) return Launch(MoeGateUpKernel<2, 2, 1, 2, Fp8>, launch, stream, shape, x, gate_up, routing, h);
  return Launch(MoeGateUpKernel<4, 1, 1, 2, Fp8>, launch, stream, shape, x, gate_up, routing, h);
}

cudaError_t MoeDown(const MoeShapeArgs& shape, const __nv_bfloat16* h, const __nv_bfloat16* down, const MoeRouting& routing, __nv_bfloat16* partial,
                    cudaStream_t stream) {
  if (!Valid(shape) || shape.inter % 128 != 0 || shape.hidden % 32 != 0) return cudaErrorInvalidValue;
  const LaunchShape launch = {.grid = dim3(shape.hidden / 32, ActiveMax(shape)), .block = dim3(kWarps * 32)};
  if (shape.inter / (kWarps / 2) / 32 % 6 != 0) {
    return shape.tokens <= 16 ? Launch(MoeDownKernel<1, 1>, launch, stream, shape, h, down, routing, partial) : Launch(MoeDownKernel<2, 1>, launch, stream, shape, h, down, routing, partial);
  }
  if (shape.tokens <= 4) return Launch(MoeDownKernel<1, 6>, launch, stream, shape, h, down, routing, partial);
  if (shape.tokens <= 128) return Launch(MoeDownKernel<2, 3, 1, 3>, launch, stream, shape, h, down, routing, partial);
  return Launch(MoeDownKernel<4, 2, 1, 3>, launch, stream, shape, h, down, routing, partial);
}

cudaError_t MoeDown(const MoeShapeArgs& shape, const __nv_bfloat16* h, const Fp8Matrix& down, const MoeRouting& routing, __nv_bfloat16* partial, cudaStream_t stream) {
  if (!Valid(shape) || shape.inter % (kWarps / 2 * 64) != 0 || shape.hidden % kFp8Block != 0) return cudaErrorInvalidValue;
  const LaunchShape launch = {.grid = dim3(shape.hidden / 32, ActiveMax(shape)), .block = dim3(kWarps * 32)};
  if (shape.inter / (kWarps / 2) / 64 % 3 != 0) {
    return shape.tokens <= 16 ? Launch(MoeDownKernel<1, 1, 1, 3, Fp8>, launch, stream, shape, h, down, routing, partial)
                              : Launch(MoeDownKernel<2, 1, 1, 3, Fp8>, launch, stream, shape, h, down, routing, partial);
  }
  if (shape.tokens <= 64) return Launch(MoeDownKernel<1, 3, 1, 3, Fp8>, launch, stream, shape, h, down, routing, partial);
  return Launch(MoeDownKernel<2, 1, 1, 3, Fp8>, launch, stream, shape, h, down, routing, partial);
}

cudaError_t MoeCombine(const MoeShapeArgs& shape, const __nv_bfloat16* partial, const __nv_bfloat16* residual, __nv_bfloat16* y, cudaStream_t stream) {
  if (!Valid(shape) || shape.hidden % 8 != 0) return cudaErrorInvalidValue;
  const int threads = shape.tokens * (shape.hidden / 8);
  return Launch(MoeCombineKernel, {.grid = dim3((threads + 255) / 256), .block = dim3(256)}, stream, shape, partial, residual, y);
}

}  // namespace qwen::kernels
