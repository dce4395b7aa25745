#include "stage/kernels/common/async.cuh"
#include "stage/kernels/common/expert_map.cuh"
#include "stage/kernels/common/launch.cuh"
#include "stage/kernels/common/limits.h"
#include "stage/kernels/common/wgmma_registers.cuh"
#include "stage/kernels/common/wgmma_wide.cuh"
#include "stage/kernels/moe_grouped.h"

namespace qwen::kernels {
namespace {

constexpr int kChunk = kExpertMapColumns;  // columns of a step
constexpr int kGroup = 128;         // threads of a warpgroup
constexpr int kThreads = 3 * kGroup;  // one loads, two multiply

// Sizes that go with the weights' type. kTokensMax, of a tile: in bf16 two accumulators of 64 x 192 fill a thread's registers; in FP8
// the operands that are multiplied out need some too. kStep: a tile's tokens are padded to a multiple of it. In FP8 that is 64, because
// ptxas 13.0 finds registers for the products of two widths in one kernel, and with more it makes each wait for the one before.
template <typename W>
struct Cut {
  static constexpr bool kFp8 = sizeof(W) == 1;
  static constexpr int kTokensMax = kFp8 ? 128 : 192, kStages = kFp8 ? 5 : 3, kStep = kFp8 ? 64 : 16;
  static constexpr int kHalf = 64 * kChunk * sizeof(W);  // bytes of 64 weight rows of a step
  static constexpr int kBoxBytes = 2 * kHalf;            // one warpgroup's weights of a step, one bulk copy
  static constexpr int kTokenBytes = kTokensMax * kChunk * 2;
};

template <typename W>
struct Shared : Cut<W> {
  using C = Cut<W>;
  alignas(1024) unsigned char weights[C::kStages][2 * C::kBoxBytes];
  alignas(1024) unsigned char tokens[C::kStages][C::kTokenBytes];
  alignas(1024) unsigned char result[2][C::kTokensMax * 128];  // of each multiplying warpgroup: 64 columns of its tokens
  int first_tile[kMaxExperts + 1];                             // of each expert
  int end[kMaxExperts];
  uint64_t full[C::kStages], empty[C::kStages];
  float scale[C::kFp8 ? C::kStages : 0][2];  // of gate and up, or of both warpgroups' rows; a step lies in one block of columns
};

struct GroupedArgs {
  MoeShapeArgs shape;
  const int32_t* end;      // (experts)
  const int32_t* source;   // gate-up: token of each sorted row
  const __nv_bfloat16* x;  // gate-up: (tokens, hidden); down: (assignments, inter)
  __nv_bfloat16* out;      // gate-up: (assignments, inter); down: (assignments, hidden)
  const float* scales;     // of FP8 weights
};

struct Tile {
  int expert, block;      // `block`: which 256 weight rows
  int first, tokens, padded;  // sorted rows [first, first + tokens), padded to a multiple of Cut::kStep
};

template <int kTokensMax>
__device__ __forceinline__ int TokenTiles(int tokens) { return (tokens + kTokensMax - 1) / kTokensMax; }

// Tile `index` of the list: by expert, then block of weights, then tokens; so neighbours share what the L2 cache holds.
template <typename W>
__device__ __forceinline__ Tile FindTile(const Shared<W>& sm, int experts, int index) {
  int low = 0, high = experts - 1;  // the last expert that begins at or before index, among those with tiles
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (sm.first_tile[middle] <= index) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int begin = low == 0 ? 0 : sm.end[low - 1], count = sm.end[low] - begin, parts = TokenTiles<Cut<W>::kTokensMax>(count);
  const int within = index - sm.first_tile[low], part = within % parts;
  constexpr int kStep = Cut<W>::kStep;
  const int share = Cut<W>::kFp8 ? Cut<W>::kTokensMax : ((count + parts - 1) / parts + kStep - 1) / kStep * kStep;
  Tile tile;
  tile.expert = low;
  tile.block = within / parts;
  tile.first = begin + part * share;
  tile.tokens = min(share, count - part * share);
  tile.padded = (tile.tokens + kStep - 1) / kStep * kStep;
  return tile;
}

// The list of tiles, in every block for itself: the host does not know how many tokens an expert has. All threads.
template <typename W>
__device__ __forceinline__ void ListTiles(Shared<W>& sm, const GroupedArgs& args, int blocks) {
  const int experts = args.shape.experts;
  for (int e = threadIdx.x; e < experts; e += kThreads) sm.end[e] = args.end[e];
  __syncthreads();
  if (threadIdx.x < 32) {
    constexpr int kPerLane = kMaxExperts / 32;
    int own[kPerLane], sum = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int e = static_cast<int>(threadIdx.x) * kPerLane + i;
      own[i] = sum;
      if (e < experts) sum += TokenTiles<Cut<W>::kTokensMax>(sm.end[e] - (e > 0 ? sm.end[e - 1] : 0)) * blocks;
    }
    int before = sum;
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
      const int v = __shfl_up_sync(0xffffffffu, before, offset);
      if (static_cast<int>(threadIdx.x) >= offset) before += v;
    }
    before -= sum;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int e = static_cast<int>(threadIdx.x) * kPerLane + i;
      if (e <= experts) sm.first_tile[e] = before + own[i];
    }
    if (threadIdx.x == 31 && experts == kMaxExperts) sm.first_tile[experts] = before + sum;
  }
  __syncthreads();
}

struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  template <int kStages>
  __device__ __forceinline__ void Advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <bool kGateUp, typename W>
__device__ __forceinline__ void Load(Shared<W>& sm, Ring& ring, const CUtensorMap& map, const GroupedArgs& args, const Tile& tile, int chunks) {
  constexpr int kTokensMax = Cut<W>::kTokensMax, kTokenBytes = Cut<W>::kTokenBytes, kBoxBytes = Cut<W>::kBoxBytes;
  const int thread = threadIdx.x, piece = thread % 8, row = thread / 8;
  const int columns = kGateUp ? args.shape.hidden : args.shape.inter;
  // Rows row, row + 16, ... of the tile; those past its end repeat the last. Offsets in pieces of 16 bytes.
  uint32_t from[kTokensMax / 16];
#pragma unroll
  for (int i = 0; i < kTokensMax / 16; ++i) {
    const int sorted = tile.first + min(row + 16 * i, tile.tokens - 1);
    from[i] = static_cast<uint32_t>(kGateUp ? args.source[sorted] : sorted) * static_cast<uint32_t>(columns / 8) + piece;
  }
  const uint4* x = reinterpret_cast<const uint4*>(args.x);
  const float* scale = nullptr;
  if constexpr (Cut<W>::kFp8) {  // threads 0 and 1
    const int block = kGateUp ? (tile.expert * 2 + thread) * (args.shape.inter / kFp8Block) + tile.block : tile.expert * (args.shape.hidden / kFp8Block) + tile.block * 2 + thread;
    scale = args.scales + static_cast<size_t>(block) * Fp8ScaleStride(columns);
  }
  const uint32_t to = SharedAddress(sm.tokens[0]) + row * 128 + (piece ^ (row % 8)) * 16;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    BarrierWait(&sm.empty[ring.stage], ring.parity ^ 1);
    if (thread == 0) {
      BarrierArriveExpect(&sm.full[ring.stage], 2 * kBoxBytes);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int weight_row = kGateUp ? tile.block * 128 + half * 64 : tile.block * 256 + half * 128;
        LoadTile4(sm.weights[ring.stage] + half * kBoxBytes, &map, &sm.full[ring.stage], chunk * kChunk, weight_row, 0, tile.expert);
      }
    }
#pragma unroll
    for (int i = 0; i < kTokensMax / 16; ++i) {
      if (i * 16 < tile.padded) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + ring.stage * kTokenBytes + i * 2048), "l"(x + from[i] + chunk * (kChunk / 8)) : "memory");
      }
    }
    if constexpr (Cut<W>::kFp8) {
      if (thread < 2) CopyAsync4(&sm.scale[ring.stage][thread], scale + chunk * kChunk / kFp8Block);
    }
    BarrierArriveCopies(&sm.full[ring.stage]);
    ring.Advance<Cut<W>::kStages>();
  }
}

// 64 columns of the result for the warpgroup's tokens: transposed through shared memory, so that rows are written whole.
template <int kN, typename Value>
__device__ __forceinline__ void Store(unsigned char* staging, int barrier, const Tile& tile, __nv_bfloat16* out, size_t row_stride, Value&& value) {
  const int thread = threadIdx.x % kGroup, warp = thread / 32, lane = thread % 32;
  WarpgroupSync(barrier);  // the last tile's rows have been read
  const int token = lane % 8 + lane / 16 * 8;  // of 16
  const uint32_t to = SharedAddress(staging) + token * 128 + ((warp * 2 + lane / 8 % 2) ^ (token % 8)) * 16;
#pragma unroll
  for (int j = 0; j < kN / 16; ++j) {
    StoreMatrix4Transposed(to + j * 16 * 128, value(8 * j), value(8 * j + 2), value(8 * j + 4), value(8 * j + 6));
  }
  WarpgroupSync(barrier);
  const int piece = thread % 8;
#pragma unroll
  for (int i = 0; i < kN / 16; ++i) {
    const int row = thread / 8 + 16 * i;
    if (row < tile.tokens) {
      *reinterpret_cast<uint4*>(out + static_cast<size_t>(tile.first + row) * row_stride + piece * 8) =
          *reinterpret_cast<const uint4*>(staging + row * 128 + (piece ^ (row % 8)) * 16);
    }
  }
}

// A tile's products in bf16: gate and up of the same rows, or 64 rows and the 64 after them.
template <int kN>
__device__ __forceinline__ void Products(Shared<__nv_bfloat16>& sm, Ring& ring, float (&acc)[2][kN / 2], int chunks, int group) {
  constexpr int kBoxBytes = Cut<__nv_bfloat16>::kBoxBytes, kHalf = Cut<__nv_bfloat16>::kHalf;
  const int lane = threadIdx.x % 32;
  int before = -1;  // the stage whose products may still be running
  for (int chunk = 0; chunk < chunks; ++chunk) {
    BarrierWait(&sm.full[ring.stage], ring.parity);
    FenceAsyncProxy();  // the gathered pieces were written by generic copies
    const uint64_t a0 = MatrixDescriptor(sm.weights[ring.stage] + group * kBoxBytes), a1 = MatrixDescriptor(sm.weights[ring.stage] + group * kBoxBytes + kHalf);
    const uint64_t b = MatrixDescriptor(sm.tokens[ring.stage]);
    WgmmaFence();
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) {  // 32 bytes further in the swizzled row
      WgmmaWide<kN>(acc[0], a0 + 2 * k, b + 2 * k);
      WgmmaWide<kN>(acc[1], a1 + 2 * k, b + 2 * k);
    }
    WgmmaCommit();
    WgmmaWait<1>();
    if (before >= 0 && lane == 0) BarrierArrive(&sm.empty[before]);
    before = ring.stage;
    ring.Advance<Cut<__nv_bfloat16>::kStages>();
  }
  WgmmaWait<0>();
  if (lane == 0) BarrierArrive(&sm.empty[before]);
}
// In FP8: each half is multiplied out into registers while the other half's products run.
template <bool kGateUp, int kN>
__device__ __forceinline__ void ProductsFp8(Shared<Fp8>& sm, Ring& ring, float (&acc)[2][kN / 2], int chunks, int group) {
  constexpr int kBoxBytes = Cut<Fp8>::kBoxBytes, kHalf = Cut<Fp8>::kHalf;
  const int lane = threadIdx.x % 32, warp = static_cast<int>(threadIdx.x) % kGroup / 32;
  uint32_t a[2][4][4];
  int before = -1;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    BarrierWait(&sm.full[ring.stage], ring.parity);
    FenceAsyncProxy();
    const uint64_t b = MatrixDescriptor(sm.tokens[ring.stage]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      WgmmaWait<1>();  // all but the group just committed: a[half] is free, and after the first half the stage before
      if (half == 1 && before >= 0 && lane == 0) BarrierArrive(&sm.empty[before]);
      LoadOperands<kChunk>(a[half], sm.weights[ring.stage] + group * kBoxBytes + half * kHalf, warp * 16, 0, sm.scale[ring.stage][kGateUp ? half : group]);
      WgmmaFence();
#pragma unroll
      for (int k = 0; k < kChunk / 16; ++k) WgmmaRegisters<kN>(acc[half], a[half][k], b + 2 * k);
      WgmmaCommit();
    }
    before = ring.stage;
    ring.Advance<Cut<Fp8>::kStages>();
  }
  WgmmaWait<0>();
  if (lane == 0) BarrierArrive(&sm.empty[before]);
}

template <bool kGateUp, int kN, typename W>
__device__ __forceinline__ void Multiply(Shared<W>& sm, Ring& ring, const GroupedArgs& args, const Tile& tile, int chunks, int group) {
  float acc[2][kN / 2] = {};
  if constexpr (Cut<W>::kFp8) {
    ProductsFp8<kGateUp, kN>(sm, ring, acc, chunks, group);
  } else {
    Products<kN>(sm, ring, acc, chunks, group);
  }
  unsigned char* staging = sm.result[group];
  if constexpr (kGateUp) {
    const auto active = [&](int i) {
      const float gate = RoundBf16(acc[0][i]);
      return RoundBf16(__fdividef(gate, 1.0f + __expf(-gate))) * RoundBf16(acc[1][i]);
    };
    Store<kN>(staging, 1 + group, tile, args.out + tile.block * 128 + group * 64, args.shape.inter, [&](int i) { return PackBf16(active(i), active(i + 1)); });
  } else {
    __nv_bfloat16* out = args.out + tile.block * 256 + group * 128;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Store<kN>(staging, 1 + group, tile, out + half * 64, args.shape.hidden, [&](int i) { return PackBf16(acc[half][i], acc[half][i + 1]); });
    }
  }
}

template <bool kGateUp, typename W>
__global__ void __launch_bounds__(kThreads, 1) MoeGroupedKernel(const __grid_constant__ CUtensorMap map, const GroupedArgs args) {
  extern __shared__ unsigned char raw[];
  Shared<W>& sm = *reinterpret_cast<Shared<W>*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t{1023});
  const int blocks = kGateUp ? args.shape.inter / 128 : args.shape.hidden / 256;  // of one expert's weights
  const int chunks = (kGateUp ? args.shape.hidden : args.shape.inter) / kChunk;
  if (threadIdx.x == 0) {
    PrefetchMap(&map);
    for (int s = 0; s < Cut<W>::kStages; ++s) {
      BarrierInit(&sm.full[s], 1 + kGroup);  // the bulk copies' bytes, and every loading thread's pieces
      BarrierInit(&sm.empty[s], 2 * kGroup / 32);
    }
    FenceBarrierInit();
  }
  GridDependencyWait();
  GridDependencyLaunch();
  ListTiles(sm, args, blocks);
  const int tiles = sm.first_tile[args.shape.experts];
  Ring ring;
  if (threadIdx.x < kGroup) {
    ReleaseRegisters<40>();
    for (int index = blockIdx.x; index < tiles; index += gridDim.x) Load<kGateUp>(sm, ring, map, args, FindTile(sm, args.shape.experts, index), chunks);
    CopyAsyncCommit();
    CopyAsyncWait<0>();  // no copy may land after the block has ended
    return;
  }
  ClaimRegisters<232>();
  const int group = static_cast<int>(threadIdx.x) / kGroup - 1;
  for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Tile tile = FindTile(sm, args.shape.experts, index);
    switch (tile.padded / Cut<W>::kStep) {
#define QP_CASE(i)                                                                                                                            \
  case i:                                                                                                                                     \
    if constexpr (i * Cut<W>::kStep <= Cut<W>::kTokensMax) Multiply<kGateUp, i * Cut<W>::kStep>(sm, ring, args, tile, chunks, group); \
    break;
      QP_CASE(1) QP_CASE(2) QP_CASE(3) QP_CASE(4) QP_CASE(5) QP_CASE(6) QP_CASE(7) QP_CASE(8) QP_CASE(9) QP_CASE(10) QP_CASE(11) QP_CASE(12)
#undef QP_CASE
      default: break;
    }
  }
}

template <bool kGateUp, typename W>
cudaError_t LaunchGrouped(const CUtensorMap& map, const GroupedArgs& args, cudaStream_t stream) {
  const MoeShapeArgs& s = args.shape;
  if (s.tokens < 1 || s.hidden < 256 || s.hidden % 256 != 0 || s.inter < 128 || s.inter % 128 != 0 || s.experts < 1 || s.experts > kMaxExperts) return cudaErrorInvalidValue;
  // Offsets of pieces are 32 bits.
  if (static_cast<int64_t>(s.tokens) * s.top_k * (s.hidden > s.inter ? s.hidden : s.inter) / 8 >= int64_t{1} << 32) return cudaErrorInvalidValue;
  int device = 0, multiprocessors = 0;
  if (cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return e;
  if (cudaError_t e = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device); e != cudaSuccess) return e;
  return Launch(MoeGroupedKernel<kGateUp, W>, {.grid = dim3(multiprocessors), .block = dim3(kThreads), .shared_bytes = sizeof(Shared<W>) + 1024}, stream, map, args);
}

}  // namespace

cudaError_t MakeMoeGroupedWeights(const MoeShapeArgs& shape, const __nv_bfloat16* gate_up, const __nv_bfloat16* down, MoeGroupedWeights* out) {
  if (cudaError_t e = MakeExpertMap(gate_up, shape.hidden, shape.inter, 2, shape.experts, 128, &out->gate_up); e != cudaSuccess) return e;
  return MakeExpertMap(down, shape.inter, shape.hidden, 1, shape.experts, 128, &out->down);
}

cudaError_t MakeMoeGroupedWeights(const MoeShapeArgs& shape, const Fp8Matrix& gate_up, const Fp8Matrix& down, MoeGroupedWeights* out) {
  out->gate_up_scales = gate_up.scales;
  out->down_scales = down.scales;
  if (cudaError_t e = MakeExpertMap(gate_up.codes, shape.hidden, shape.inter, 2, shape.experts, kChunk, 128, &out->gate_up); e != cudaSuccess) return e;
  return MakeExpertMap(down.codes, shape.inter, shape.hidden, 1, shape.experts, kChunk, 128, &out->down);
}

cudaError_t MoeGroupedGateUp(const MoeShapeArgs& shape, const __nv_bfloat16* x, const MoeGroupedWeights& weights, const MoePermutation& permutation,
                             __nv_bfloat16* active, cudaStream_t stream) {
  const GroupedArgs args{shape, permutation.end, permutation.source, x, active, weights.gate_up_scales};
  return weights.gate_up_scales != nullptr ? LaunchGrouped<true, Fp8>(weights.gate_up, args, stream) : LaunchGrouped<true, __nv_bfloat16>(weights.gate_up, args, stream);
}

cudaError_t MoeGroupedDown(const MoeShapeArgs& shape, const __nv_bfloat16* active, const MoeGroupedWeights& weights, const MoePermutation& permutation,
                           __nv_bfloat16* sorted, cudaStream_t stream) {
  const GroupedArgs args{shape, permutation.end, permutation.source, active, sorted, weights.down_scales};
  return weights.down_scales != nullptr ? LaunchGrouped<false, Fp8>(weights.down, args, stream) : LaunchGrouped<false, __nv_bfloat16>(weights.down, args, stream);
}

}  // namespace qwen::kernels
