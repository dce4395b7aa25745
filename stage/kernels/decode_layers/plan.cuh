// stage/kernels/decode_layers/plan.cuh — who does what, and where everything lies: one shape and token limit of DecodeLayers.
#pragma once
#include <type_traits>

#include "stage/kernels/common/async.cuh"
#include "stage/kernels/common/exchange.cuh"
#include "stage/kernels/common/limits.h"
#include "stage/kernels/common/weight.cuh"
#include "stage/kernels/decode_layers.h"

namespace qwen::kernels::decode {

constexpr int kGrid = 128;     // blocks; the other four multiprocessors of an H200 are for NCCL
constexpr int kWarps = 16;     // that compute; each takes a sixteenth of every sum
constexpr int kPieceRows = 8;  // a piece of weights: 8 rows of kPiece values, or of kDownPiece in the down projection
constexpr int kPiece = 1024, kDownPiece = 768;
constexpr int kWarpPiece = 64;                         // values of a piece's row that one warp multiplies
constexpr int kDownWarps = kDownPiece / kWarpPiece;    // 12: the other four wait
constexpr int kRowPad = 64;        // bytes after a row of a piece, so that 8 rows x 4 lanes of 16 bytes meet no bank twice
constexpr int kPieceScales = 8;    // floats in FP8, in the pad of a piece's first row: of 1,024 columns, or around 768 from a multiple of 4
constexpr int kPad = 32;            // bf16 after a row of activations, for the same reason
constexpr int kTopKMax = 8, kExpertsMax = 128;
constexpr int kTileTokens = 16;     // of keys and values: one step of attention
constexpr int kHeadStride = kHeadDim + 8, kHeadSums = kHeadDim + 8;
// What every block reads is published so many times: a line of the L2 cache that 128 blocks poll at once answers slowly.
constexpr int kCopies = 4;
constexpr int kTogether = 2;        // pairs of pieces that are multiplied at once
constexpr int kUnitBatch = 12;      // units of gate-up whose sums wait in shared memory
constexpr int kTokensMax = 4;
constexpr int kPair = 2;            // warps that share a tile of keys and values

template <int kHidden_, int kHeads_, int kKvHeads_, int kInter_, int kTokens_, typename Value_ = __nv_bfloat16>
struct Plan {
  using Value = Value_;  // of the four matrices that are most of the bytes
  static constexpr bool kFp8 = sizeof(Value) == 1;
  using Layer = std::conditional_t<kFp8, DecodeLayerFp8, DecodeLayerWeights>;
  static constexpr int kPieceStride = kPiece * sizeof(Value) + kRowPad, kDownStride = kDownPiece * sizeof(Value) + kRowPad;  // bytes; 64 mod 128
  static constexpr int kSlotBytes = kPieceRows * kPieceStride;
  static constexpr int kLaneColumns = 16 / sizeof(Value);  // neighbours that a lane multiplies
  // Warps that load, piece by piece in turn: one needs 450 ns to ask for a piece, in which memory brings one piece of bf16 or two of FP8.
  // More of them ask for it in a shorter time when experts are known, but then words that are polled wait longer behind the weights:
  // for one token of the small shape in bf16 (few pieces a phase) that costs more.
  static constexpr int kLoaders = kFp8 ? 4 : kHidden_ == 2048 && kTokens_ == 1 ? 1 : 2;
  static constexpr int kThreads = (kWarps + kLoaders) * 32;
  static constexpr int kHidden = kHidden_, kHeads = kHeads_, kKvHeads = kKvHeads_, kInter = kInter_, kTokens = kTokens_;
  static constexpr int kGroup = kHeads / kKvHeads, kWidth = kHeads * kHeadDim, kQkv = (kHeads + 2 * kKvHeads) * kHeadDim;
  static constexpr int kQkvRows = kQkv / kGrid, kQkvUnits = kQkvRows / kPieceRows;  // of one block
  static constexpr int kRows = kHidden / kGrid;                                     // of the residual stream that a block owns
  static constexpr int kHiddenPieces = kHidden / kPiece, kWidthPieces = kWidth / kPiece, kDownPieces = kInter / kDownPiece;
  static constexpr int kHiddenSlice = kHidden / kWarps, kWidthSlice = kWidth / kWarps, kDownSlice = kDownPieces * kWarpPiece;
  static constexpr int kHiddenStride = kHiddenSlice + kPad, kWidthStride = kWidthSlice + kPad, kDownXStride = kDownSlice + kPad;
  static constexpr int kExpertUnits = kInter / kPieceRows;  // of one expert: 8 gate rows and their 8 up rows
  static constexpr int kSlots = kFp8 ? (kTokens == 1 ? 17 : 13) : kTokens == 1 ? 9 : 7, kTiles = kTokens == 1 ? 6 : 8;
  static constexpr int kAssignments = kTokens * kTopKMax;
  static constexpr int kDownBatch = kTokens == 1 ? kTopKMax : 16 / kDownPieces;  // assignments whose activations wait in shared memory
  static_assert(kQkvRows % kPieceRows == 0 && kRows % 16 == 0 && kRows <= 32 && kHidden % kPiece == 0 && kWidth % kPiece == 0 && kInter % kDownPiece == 0);
  static_assert(kGroup <= kWarps && kHiddenSlice % 128 == 0 && kKvHeads == 4 && kHiddenPieces % 2 == 0 && kWidthPieces % 2 == 0);
};

// The experts of this layer, by slot: ascending ids, or for one token its ranks. Assignments are numbered slot by slot.
struct Routing {
  int slots;
  int16_t expert[kExpertsMax], begin[kExpertsMax + 1];
  uint8_t mask[kExpertsMax];  // tokens
  uint8_t order[kTokensMax * kTopKMax];  // assignment -> token * top_k + rank
  float weight[kTokensMax * kTopKMax];   // by token * top_k + rank; before they are divided by their sum
  int mask_of[kExpertsMax];   // while it is made
  uint8_t rank_of[kExpertsMax][kTokensMax];
};

// A block's part of the attention: one token, one kv head, tiles [first, last) of its context.
struct AttentionShare {
  int splits_shift, token, kv_head, split, context, first, last;
  const int32_t* table;
  bool active, owner;  // there is such a token; the new token falls into these tiles
  int block_shift;

  // Where a position lies in the caches.
  __device__ __forceinline__ size_t Row(int position) const {
    return (static_cast<size_t>(table[position >> block_shift]) << block_shift) + (position & ((1 << block_shift) - 1));
  }
};

template <class P>
struct Shared {
  alignas(128) unsigned char slots[P::kSlots][P::kSlotBytes];
  union {
    __nv_bfloat16 tiles[P::kTiles][2][kTileTokens * kHeadStride];  // K tile, V tile of a warp, or of a pair
    float heads[P::kTiles][P::kGroup][kHeadSums];                  // attention, by tile
    struct {
      __nv_bfloat16 x[kWarps * P::kTokens * P::kWidthStride];
      float sums[kWarps * P::kTokens * P::kRows];
    } o;
    float gate_up[kUnitBatch][kWarps][P::kTokens][16];
    struct {
      __nv_bfloat16 x[kDownWarps][P::kDownBatch][P::kDownXStride];
      float sums[P::kDownBatch][kDownWarps][P::kRows];
    } down;
  };
  __nv_bfloat16 x[kWarps * P::kTokens * P::kHiddenStride];  // normalised, each warp its own share
  float qkv[kWarps * P::kTokens * P::kQkvRows];
  __nv_bfloat16 q[16 * kHeadStride];
  __nv_bfloat16 new_k[kHeadDim], new_v[kHeadDim];
  float tile_max[P::kTiles][16], tile_sum[P::kTiles][16];
  float product[P::kAssignments][P::kRows];
  float router[kWarps][P::kTokens];
  float squares[kWarps][P::kTokens];
  float probability[P::kTokens][kExpertsMax];
  Routing routing;
  AttentionShare share;
  typename P::Layer layers[2];  // this one and the next
  uint64_t full[P::kSlots], empty[P::kSlots], routed;
};

// Words in the workspace, for the largest of both shapes.
template <class P>
struct Workspace {
  uint32_t epoch, pad[31];  // counts steps
  Word input[kCopies][kTokensMax][P::kHidden / 2];   // the residual stream before a layer
  Word middle[kCopies][kTokensMax][P::kHidden / 2];  // and between attention and experts
  Word qkv[kTokensMax][P::kQkv / 2];
  Word part[kGrid * P::kGroup * kHeadDim];  // [token, head][pair of values][split]: splits meet in neighbouring lanes
  Word scale[kGrid * P::kGroup][2];         // [token, head][split]: maximum and sum
  Word attended[kCopies][kTokensMax][P::kWidth / 2];
  Word logits[kCopies][kTokensMax][kExpertsMax];
  Word active[kCopies][kTokensMax * kTopKMax][P::kInter / 2];
};

__device__ __forceinline__ void ConsumerSync() { asm volatile("bar.sync 1, %0;" ::"n"(kWarps * 32) : "memory"); }

// The ring. Both sides walk the same sequence of pieces.
struct RingAt {
  int slot = 0;
  uint32_t parity = 0;
  int turns = 0;  // of a loading warp: pieces until its next one
  template <int kLoaders>
  __device__ __forceinline__ bool TakesTurn() {
    const bool mine = turns == 0;
    turns = mine ? kLoaders - 1 : turns - 1;
    return mine;
  }
  template <int kSlots>
  __device__ __forceinline__ void Next() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

template <class P>
__device__ __forceinline__ const typename P::Layer* Layers(const DecodeLayersArgs& args) {
  return static_cast<const typename P::Layer*>(args.layers);  // in FP8 an array of the derived type
}
template <class P>
__device__ __forceinline__ const typename P::Value* Values(const __nv_bfloat16* matrix) {
  return reinterpret_cast<const typename P::Value*>(matrix);
}
// Where the scales of a piece begin that starts at (row, column) of a matrix of `columns` columns: at a multiple of 4 blocks. Null in bf16.
template <class P>
__device__ __forceinline__ const float* PieceScales([[maybe_unused]] const typename P::Layer& layer, [[maybe_unused]] const float* DecodeLayerFp8::*scales, size_t row,
                                                    int column, int columns) {
  if constexpr (P::kFp8) {
    return layer.*scales + (Fp8ScaleAt(row, column, columns) & ~size_t{3});  // a row of scales begins at a multiple of 8
  } else {
    return nullptr;
  }
}

// A loading warp whose turn it is: 8 rows, `row_values` apart, and in FP8 their scales.
template <class P, int kStride>
__device__ __forceinline__ void LoadPiece(Shared<P>& sm, RingAt& at, const typename P::Value* from, int row_values, const float* scales) {
  constexpr uint32_t kBytes = kStride - kRowPad, kScaleBytes = P::kFp8 ? kPieceScales * sizeof(float) : 0;
  const int lane = threadIdx.x & 31;
  if (at.TakesTurn<P::kLoaders>()) {
    BarrierWait(&sm.empty[at.slot], at.parity ^ 1);
    if (lane == 0) BarrierArriveExpect(&sm.full[at.slot], kPieceRows * kBytes + kScaleBytes);
    __syncwarp();
    if (lane < kPieceRows) {
      BulkCopy(sm.slots[at.slot] + lane * kStride, from + static_cast<size_t>(lane) * row_values, kBytes, &sm.full[at.slot]);
    }
    if constexpr (P::kFp8) {
      if (lane == kPieceRows) BulkCopy(sm.slots[at.slot] + kBytes, scales, kScaleBytes, &sm.full[at.slot]);
    }
  }
  at.Next<P::kSlots>();
}

// acc (16 rows x 8 tokens) += kCount pieces, or pairs of pieces, times this warp's values: rows 0-7 come from one piece, 8-15
// from the next one (two) or are nothing. `x`: this lane's token column, at the first piece's values of this warp, plus
// kLaneColumns * (lane % 4). `scale`: in FP8, where the piece's first block lies among its scales. Everything is asked for before the
// first product; two accumulators, because a product waits for the one before.
template <class P, int kStride, int kCount>
__device__ __forceinline__ void MultiplyPieces(Shared<P>& sm, RingAt& at, const __nv_bfloat16* x, float (&acc)[2][4], bool two = true, int scale = 0) {
  constexpr int kEach = 2, kVectors = P::kFp8 ? 1 : 2;  // 16 bytes of a lane's row
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int offset = (lane >> 2) * kStride + warp * kWarpPiece * static_cast<int>(sizeof(typename P::Value)) + (lane & 3) * 16;
  uint4 b[kCount][2], a[kCount][kEach][kVectors];
  [[maybe_unused]] float scales[kCount][kEach];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    b[i][0] = *reinterpret_cast<const uint4*>(x + i * kWarpPiece);
    b[i][1] = *reinterpret_cast<const uint4*>(x + i * kWarpPiece + (P::kFp8 ? 8 : 32));
  }
  int used[kCount][2];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (j == 1 && !two) {
#pragma unroll
        for (int v = 0; v < kVectors; ++v) a[i][j][v] = make_uint4(0, 0, 0, 0);
        if constexpr (P::kFp8) scales[i][j] = 0.0f;
        used[i][j] = 0;
        continue;
      }
      BarrierWait(&sm.full[at.slot], at.parity);
      used[i][j] = at.slot;
      const unsigned char* rows = sm.slots[at.slot] + offset;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) a[i][j][v] = *reinterpret_cast<const uint4*>(rows + v * 64);
      if constexpr (P::kFp8) scales[i][j] = *(reinterpret_cast<const float*>(sm.slots[at.slot] + kStride - kRowPad) + scale + warp * kWarpPiece / kFp8Block);
      at.Next<P::kSlots>();
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (P::kFp8) {
      const uint32_t* low = reinterpret_cast<const uint32_t*>(&b[i][0]);
      const uint32_t* high = reinterpret_cast<const uint32_t*>(&b[i][1]);
      const uint32_t* words = reinterpret_cast<const uint32_t*>(&a[i][0][0]);
      const uint32_t* words8 = reinterpret_cast<const uint32_t*>(&a[i][1][0]);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const Bf16Pairs g = MultiplyOut(words[k], scales[i][0]), g8 = MultiplyOut(words8[k], scales[i][1]);
        Mma16816(acc[k / 2], g.low, g8.low, g.high, g8.high, low[k], high[k]);
      }
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) MmaK32(acc[half], a[i][0][half], a[i][1][half], b[i][half]);
    }
  }
  __syncwarp();
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      BarrierArrive(&sm.empty[used[i][0]]);
      if (two) BarrierArrive(&sm.empty[used[i][1]]);
    }
  }
}
// A warp without a share of the piece only says that it does not need it.
template <class P>
__device__ __forceinline__ void SkipPiece(Shared<P>& sm, RingAt& at) {
  BarrierWait(&sm.full[at.slot], at.parity);
  __syncwarp();
  if ((threadIdx.x & 31) == 0) BarrierArrive(&sm.empty[at.slot]);
  at.Next<P::kSlots>();
}

// Sums of 16 rows from `row` on to sums[warp][token][kRowCount].
template <int kTokens, int kRowCount>
__device__ __forceinline__ void StoreSums(float* sums, int row, const float (&acc)[2][4], bool two) {
  const int warp = threadIdx.x >> 5, g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (2 * t + j < kTokens) {
      float* to = sums + (warp * kTokens + 2 * t + j) * kRowCount + row + g;
      to[0] = acc[0][j] + acc[1][j];
      if (two) to[8] = acc[0][2 + j] + acc[1][2 + j];
    }
  }
}
// All warps' sums of one element, in warp order.
template <int kCount>
__device__ __forceinline__ float AddUp(const float* sums, int stride) {
  float sum = 0.0f;
#pragma unroll 4
  for (int i = 0; i < kCount; ++i) sum += sums[i * stride];
  return sum;
}

}  // namespace qwen::kernels::decode
