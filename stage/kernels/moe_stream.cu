#include "stage/kernels/common/async.cuh"
#include "stage/kernels/common/expert_map.cuh"
#include "stage/kernels/common/launch.cuh"
#include "stage/kernels/common/limits.h"
#include "stage/kernels/common/wgmma_registers.cuh"
#include "stage/kernels/moe_stream.h"

namespace qwen::kernels {
namespace {

constexpr int kRows = 64;     // weight rows of a tile: of gate-up 32 gate rows, then the 32 up rows that go with them
// Columns of a step: 128 bytes of a weight row. Of tokens 64 columns are one tile of 128 bytes a row.
template <typename W>
constexpr int kChunk = 128 / sizeof(W);
constexpr int kTokenColumns = 64;
constexpr int kConsumers = 128;
constexpr int kThreads = kConsumers + 32;  // and the warp that loads
constexpr int kWeightBytes = kRows * 128;
constexpr int kSharedBudget = 176 * 1024;  // for the stages
constexpr int kAssignmentsMax = 4096;

template <int kN, typename W>
struct Shared {
  static constexpr int kStages = kSharedBudget / (kWeightBytes + kN * kChunk<W> * 2);
  alignas(1024) unsigned char weights[kStages][kWeightBytes];
  alignas(1024) unsigned char tokens[kStages][kN * kChunk<W> * 2];
  float up[32][kN + 1];
  // The whole routing: a tile's beginning must not wait for a chain of loads, or the stream stops there.
  int4 group[kMaxExperts];
  int16_t order[kAssignmentsMax];
  __nv_bfloat16 weight[kAssignmentsMax];  // in the sequence of `order`
  uint64_t full[kStages], empty[kStages];
  float scale[sizeof(W) == 1 ? kStages : 0][2];  // of FP8: a step is one block of columns; gate and up, or one
};

struct StreamArgs {
  MoeShapeArgs shape;
  MoeRouting routing;
  const __nv_bfloat16* x;  // gate-up: (tokens, hidden); down: (assignments, inter)
  __nv_bfloat16* out;      // gate-up: (assignments, inter); down: (assignments, hidden)
  const float* scales;     // of FP8 weights
};

// A tile's products in bf16: both operands out of shared memory. `advance` goes to the next stage.
template <int kN, typename S, typename Advance>
__device__ __forceinline__ void MultiplyTile(S& sm, float (&acc)[kN / 2], int chunks, int& stage, uint32_t& parity, Advance advance) {
  const int lane = threadIdx.x & 31;
  int before = -1;  // the stage whose products may still be running
  for (int chunk = 0; chunk < chunks; ++chunk) {
    BarrierWait(&sm.full[stage], parity);
    FenceAsyncProxy();  // the gathered pieces were written by generic copies
    const uint64_t a = MatrixDescriptor(sm.weights[stage]), b = MatrixDescriptor(sm.tokens[stage]);
    WgmmaFence();
#pragma unroll
    for (int k = 0; k < kTokenColumns / 16; ++k) Wgmma<kN>(acc, a + 2 * k, b + 2 * k);  // 32 bytes further in the swizzled row
    WgmmaCommit();
    WgmmaWait<1>();
    if (before >= 0 && lane == 0) BarrierArrive(&sm.empty[before]);
    before = stage;
    advance();
  }
  WgmmaWait<0>();
  if (lane == 0) BarrierArrive(&sm.empty[before]);
}
// In FP8: weights go to registers and are multiplied out there, half a step while the other half is in the tensor cores.
template <int kN, typename S, typename Advance>
__device__ __forceinline__ void MultiplyTileFp8(S& sm, float (&acc)[kN / 2], int half_of_scale, int chunks, int& stage, uint32_t& parity, Advance advance) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  uint32_t a[2][4][4];
  int before = -1;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    BarrierWait(&sm.full[stage], parity);
    FenceAsyncProxy();
    const float scale = sm.scale[stage][half_of_scale];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      WgmmaWait<1>();  // all but the group just committed: a[half] is free, and after the first half the stage before
      if (half == 1 && before >= 0 && lane == 0) BarrierArrive(&sm.empty[before]);
      LoadOperands<128>(a[half], sm.weights[stage], warp * 16, 4 * half, scale);
      const uint64_t b = MatrixDescriptor(sm.tokens[stage] + half * (kN * 128));
      WgmmaFence();
#pragma unroll
      for (int k = 0; k < 4; ++k) WgmmaRegisters<kN>(acc, a[half][k], b + 2 * k);
      WgmmaCommit();
    }
    before = stage;
    advance();
  }
  WgmmaWait<0>();
  if (lane == 0) BarrierArrive(&sm.empty[before]);
}

// Both roles walk the same list: tiles of active experts, dealt round robin to the blocks; tokens of an expert kN at a time.
template <bool kGateUp, int kN, typename W>
__global__ void __launch_bounds__(kThreads, 1) MoeStreamKernel(const __grid_constant__ CUtensorMap map, const StreamArgs args) {
  extern __shared__ unsigned char raw[];
  Shared<kN, W>& sm = *reinterpret_cast<Shared<kN, W>*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t{1023});
  constexpr int kStages = Shared<kN, W>::kStages;
  const MoeShapeArgs& shape = args.shape;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int columns = kGateUp ? shape.hidden : shape.inter;                // of the weights: the sum's length
  const int tiles = kGateUp ? shape.inter / (kRows / 2) : shape.hidden / kRows;  // of one expert
  const int chunks = columns / kChunk<W>;
  if (threadIdx.x == 0) {
    PrefetchMap(&map);
    for (int s = 0; s < kStages; ++s) {
      BarrierInit(&sm.full[s], 1 + 32);  // the bulk copy's bytes, and every lane's gathered pieces
      BarrierInit(&sm.empty[s], kConsumers / 32);
    }
    FenceBarrierInit();
  }
  GridDependencyWait();
  GridDependencyLaunch();
  for (int e = threadIdx.x; e < shape.experts; e += kThreads) sm.group[e] = args.routing.group[e];
  for (int i = threadIdx.x; i < shape.tokens * shape.top_k; i += kThreads) {
    const int assignment = args.routing.order[i];
    sm.order[i] = static_cast<int16_t>(assignment);
    if constexpr (!kGateUp) sm.weight[i] = args.routing.weight_of[assignment];
  }
  __syncthreads();

  int stage = 0;
  uint32_t parity = 0;
  const auto advance = [&] {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  };
  for (int item = blockIdx.x;; item += gridDim.x) {
    const int slot = item / tiles, tile = item % tiles;
    if (slot >= shape.experts) break;
    const int4 group = sm.group[slot];
    const int expert = group.x, first = group.y, last = group.z;
    if (expert < 0) break;  // experts with work come first
    for (int base = first; base < last; base += kN) {
      if (warp == kConsumers / 32) {
        // Lane l brings piece l % 8 (16 bytes) of rows l / 8, l / 8 + 4, ...; rows past the end repeat the last.
        const __nv_bfloat16* row[kN / 4];
#pragma unroll
        for (int i = 0; i < kN / 4; ++i) {
          const int assignment = sm.order[min(base + lane / 8 + 4 * i, last - 1)];
          row[i] = args.x + static_cast<size_t>(kGateUp ? assignment / shape.top_k : assignment) * columns + lane % 8 * 8;
        }
        const float* scale = nullptr;
        if constexpr (sizeof(W) == 1) {
          const int block = kGateUp ? (expert * 2 + lane % 2) * (shape.inter / kFp8Block) + tile * (kRows / 2) / kFp8Block
                                    : expert * (shape.hidden / kFp8Block) + tile * kRows / kFp8Block;
          scale = args.scales + static_cast<size_t>(block) * Fp8ScaleStride(columns);
        }
        for (int chunk = 0; chunk < chunks; ++chunk) {
          BarrierWait(&sm.empty[stage], parity ^ 1);
          if (lane == 0) {
            BarrierArriveExpect(&sm.full[stage], kWeightBytes);
            if constexpr (kGateUp) {
              LoadTile4(sm.weights[stage], &map, &sm.full[stage], chunk * kChunk<W>, tile * (kRows / 2), 0, expert);
            } else {
              LoadTile4(sm.weights[stage], &map, &sm.full[stage], chunk * kChunk<W>, tile * kRows, 0, expert);
            }
          }
#pragma unroll
          for (int i = 0; i < kN / 4; ++i) {
            const int r = lane / 8 + 4 * i;
#pragma unroll
            for (int part = 0; part < kChunk<W> / kTokenColumns; ++part) {
              CopyAsync16(sm.tokens[stage] + part * (kN * 128) + r * 128 + ((lane % 8) ^ (r % 8)) * 16, row[i] + chunk * kChunk<W> + part * kTokenColumns, true);
            }
          }
          if constexpr (sizeof(W) == 1) {
            if (lane < (kGateUp ? 2 : 1)) CopyAsync4(&sm.scale[stage][lane], scale + chunk);
          }
          BarrierArriveCopies(&sm.full[stage]);
          advance();
        }
        continue;
      }
      float acc[kN / 2] = {};
      if constexpr (sizeof(W) == 1) {
        MultiplyTileFp8<kN>(sm, acc, kGateUp ? warp / 2 : 0, chunks, stage, parity, advance);
      } else {
        MultiplyTile<kN>(sm, acc, chunks, stage, parity, advance);
      }
      const int g = lane >> 2, t = lane & 3;
      if constexpr (kGateUp) {
        if (warp >= 2) {
#pragma unroll
          for (int i = 0; i < kN / 2; ++i) sm.up[(warp - 2) * 16 + g + (i & 2) * 4][i / 4 * 8 + 2 * t + (i & 1)] = acc[i];
        }
        asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");
        if (warp < 2) {
#pragma unroll
          for (int i = 0; i < kN / 2; ++i) {
            const int r = warp * 16 + g + (i & 2) * 4, column = i / 4 * 8 + 2 * t + (i & 1);
            if (base + column >= last) continue;
            const float gate = RoundBf16(acc[i]), up = RoundBf16(sm.up[r][column]);
            const float silu = RoundBf16(gate / (1.0f + expf(-gate)));
            args.out[static_cast<size_t>(sm.order[base + column]) * shape.inter + tile * (kRows / 2) + r] = __float2bfloat16_rn(silu * up);
          }
        }
        asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");  // `up` may be written again
      } else {
#pragma unroll
        for (int i = 0; i < kN / 2; ++i) {
          const int r = warp * 16 + g + (i & 2) * 4, column = i / 4 * 8 + 2 * t + (i & 1);
          if (base + column >= last) continue;
          const float weight = __bfloat162float(sm.weight[base + column]);
          args.out[static_cast<size_t>(sm.order[base + column]) * shape.hidden + tile * kRows + r] = __float2bfloat16_rn(RoundBf16(acc[i]) * weight);
        }
      }
    }
  }
}

template <bool kGateUp, int kN, typename W>
cudaError_t LaunchStream(const CUtensorMap& map, const StreamArgs& args, cudaStream_t stream) {
  int device = 0, multiprocessors = 0;
  if (cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return e;
  if (cudaError_t e = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device); e != cudaSuccess) return e;
  return Launch(MoeStreamKernel<kGateUp, kN, W>, {.grid = dim3(multiprocessors), .block = dim3(kThreads), .shared_bytes = sizeof(Shared<kN, W>) + 1024}, stream, map, args);
}

// The columns of a product: enough for most experts' tokens, since more mean another pass over the weights.
template <bool kGateUp, typename W>
cudaError_t Dispatch(const CUtensorMap& map, const StreamArgs& args, cudaStream_t stream) {
  const MoeShapeArgs& s = args.shape;
  if (s.tokens < 1 || s.tokens * s.top_k > kAssignmentsMax || s.hidden % kRows != 0 || s.inter % kRows != 0 || s.experts > kMaxExperts) return cudaErrorInvalidValue;
  if (sizeof(W) == 1 && (s.hidden % kFp8Block != 0 || s.inter % kFp8Block != 0)) return cudaErrorInvalidValue;
  const int mean = s.tokens * s.top_k / s.experts;
  if (mean < 2) return LaunchStream<kGateUp, 8, W>(map, args, stream);
  if (mean < 6) return LaunchStream<kGateUp, 16, W>(map, args, stream);
  if (mean < 20) return LaunchStream<kGateUp, 32, W>(map, args, stream);
  return LaunchStream<kGateUp, 64, W>(map, args, stream);
}

}  // namespace

cudaError_t MakeMoeStreamWeights(const MoeShapeArgs& shape, const __nv_bfloat16* gate_up, const __nv_bfloat16* down, MoeStreamWeights* out) {
  if (cudaError_t e = MakeExpertMap(gate_up, shape.hidden, shape.inter, 2, shape.experts, kRows, &out->gate_up); e != cudaSuccess) return e;
  return MakeExpertMap(down, shape.inter, shape.hidden, 1, shape.experts, kRows, &out->down);
}

cudaError_t MakeMoeStreamWeights(const MoeShapeArgs& shape, const Fp8Matrix& gate_up, const Fp8Matrix& down, MoeStreamWeights* out) {
  constexpr int kColumns = kChunk<Fp8>;
  out->gate_up_scales = gate_up.scales;
  out->down_scales = down.scales;
  if (cudaError_t e = MakeExpertMap(gate_up.codes, shape.hidden, shape.inter, 2, shape.experts, kColumns, kRows, &out->gate_up); e != cudaSuccess) return e;
  return MakeExpertMap(down.codes, shape.inter, shape.hidden, 1, shape.experts, kColumns, kRows, &out->down);
}

cudaError_t MoeStreamGateUp(const MoeShapeArgs& shape, const __nv_bfloat16* x, const MoeStreamWeights& weights, const MoeRouting& routing,
                            __nv_bfloat16* h, cudaStream_t stream) {
  const StreamArgs args{shape, routing, x, h, weights.gate_up_scales};
  return weights.gate_up_scales != nullptr ? Dispatch<true, Fp8>(weights.gate_up, args, stream) : Dispatch<true, __nv_bfloat16>(weights.gate_up, args, stream);
}

cudaError_t MoeStreamDown(const MoeShapeArgs& shape, const __nv_bfloat16* h, const MoeStreamWeights& weights, const MoeRouting& routing,
                          __nv_bfloat16* partial, cudaStream_t stream) {
  const StreamArgs args{shape, routing, h, partial, weights.down_scales};
  return weights.down_scales != nullptr ? Dispatch<false, Fp8>(weights.down, args, stream) : Dispatch<false, __nv_bfloat16>(weights.down, args, stream);
}

}  // namespace qwen::kernels
