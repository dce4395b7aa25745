// stage/kernels/decode_layers/attention.cuh — QK-norm, RoPE, KV write and attention over the paged cache, split over all
// blocks, and the merge of the splits. Arithmetic and roundings are those of attention_decode.cu.
#pragma once
#include <cfloat>

#include "stage/kernels/common/head.cuh"
#include "stage/kernels/decode_layers/plan.cuh"

namespace qwen::kernels::decode {

template <class P>
__device__ __forceinline__ AttentionShare ShareAttention(const DecodeLayersArgs& args) {
  AttentionShare share = {};
  const int block = static_cast<int>(blockIdx.x);
  int tokens_shift = 0;
  while ((1 << tokens_shift) < args.tokens) ++tokens_shift;
  share.splits_shift = 5 - tokens_shift;  // kGrid blocks for 4 kv heads of each token
  share.split = block & ((1 << share.splits_shift) - 1);
  share.kv_head = (block >> share.splits_shift) % P::kKvHeads;
  share.token = (block >> share.splits_shift) / P::kKvHeads;
  while ((1 << share.block_shift) < args.block_tokens) ++share.block_shift;
  share.table = args.block_table;
  share.active = share.token < args.tokens;
  if (!share.active) return share;
  share.context = args.context[share.token];
  share.table += static_cast<size_t>(share.token) * args.table_stride;
  const int tiles = share.context / kTileTokens + 1, each = (tiles + (1 << share.splits_shift) - 1) >> share.splits_shift;
  share.first = min(share.split * each, tiles);
  share.last = min(share.first + each, tiles);
  share.owner = share.context / kTileTokens >= share.first && share.context / kTileTokens < share.last;
  return share;
}

// Two warps share a tile: both need all of its keys, and each its half of the values' dimensions.
struct TileRole {
  int slot, half;
  __device__ __forceinline__ TileRole() : slot(static_cast<int>(threadIdx.x >> 5) / kPair), half(static_cast<int>(threadIdx.x >> 5) % kPair) {}
  // Both warps of the tile.
  __device__ __forceinline__ void Sync() const { asm volatile("bar.sync %0, 64;" ::"r"(3 + slot) : "memory"); }
};

// A warp's part of 16 tokens of keys or values on their way to shared memory: 8 rows of keys or 64 columns of values. The new
// token is not in the cache yet.
template <class P>
__device__ __forceinline__ void FetchTile(const AttentionShare& share, const __nv_bfloat16* cache, int tile, bool values, int half, __nv_bfloat16* to) {
  const int lane = threadIdx.x & 31, position = tile * kTileTokens;
  const size_t row = static_cast<size_t>(P::kKvHeads) * kHeadDim;
  const size_t base = share.Row(position) * row + static_cast<size_t>(share.kv_head) * kHeadDim;
#pragma unroll 2
  for (int i = 0; i < kTileTokens * kHeadDim / 8 / 64; ++i) {
    const int chunk = i * 32 + lane, r = values ? chunk / 8 : half * 8 + chunk / 16, c = values ? half * 8 + chunk % 8 : chunk % 16;
    CopyAsync16(to + r * kHeadStride + c * 8, cache + base + r * row + c * 8, position + r < share.context);
  }
}

// What does not need the new token: the first tile of each pair of warps. Two groups of copies, keys and values. What comes after the
// first tiles goes into the L2 cache: a row of a head is two lines.
template <class P>
__device__ __forceinline__ void AttentionAhead(const DecodeLayerWeights& layer, Shared<P>& sm) {
  const AttentionShare& share = sm.share;
  const TileRole role;
  const int tile = share.first + role.slot;
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    if (role.slot < P::kTiles && tile < share.last) FetchTile<P>(share, i == 0 ? layer.k_cache : layer.v_cache, tile, i == 1, role.half, sm.tiles[role.slot][i]);
    CopyAsyncCommit();
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < (share.last - share.first - P::kTiles) * kTileTokens * 4; i += kWarps * 32) {
    const int position = (share.first + P::kTiles) * kTileTokens + i / 4;
    if (position >= share.context) break;
    const __nv_bfloat16* cache = i % 4 < 2 ? layer.k_cache : layer.v_cache;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(cache + (share.Row(position) * P::kKvHeads + share.kv_head) * kHeadDim + i % 2 * 64));
  }
}

template <class P>
__device__ __forceinline__ void CopyNewToken(__nv_bfloat16* to, const __nv_bfloat16* from) {
  const int lane = threadIdx.x & 31;
  *reinterpret_cast<uint2*>(to + lane * 4) = *reinterpret_cast<const uint2*>(from + lane * 4);
}

// All compute warps. Publishes this block's partial result to `part` and `scale`.
template <class P>
__device__ void Attention(const DecodeLayersArgs& args, const DecodeLayerWeights& layer, Shared<P>& sm, Workspace<P>& ws, uint32_t flag) {
  const AttentionShare& share = sm.share;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const bool active = share.active;
  if (active) {
    // Query heads of this kv head, normalised and rotated; where the new token falls, its key and value.
    const HeadPart cos_sin = LoadHead(args.cos_sin + static_cast<size_t>(share.token) * kHeadDim);
#pragma unroll 1
    for (int job = warp; job < P::kGroup + (share.owner ? 2 : 0); job += kWarps) {
      const int head = job < P::kGroup ? share.kv_head * P::kGroup + job : P::kHeads + (job - P::kGroup) * P::kKvHeads + share.kv_head;
      const HeadPart weight = LoadHead(job < P::kGroup ? layer.q_norm : layer.k_norm);
      const Word* words = ws.qkv[share.token] + head * (kHeadDim / 2) + lane;
      uint32_t got[2];
      Await1<2>(flag, got, [&](int i) { return words + i * (kHeadDim / 4); });
      const HeadPart part{got[0], got[1]};
      if (job < P::kGroup) {
        StoreHead(sm.q + job * kHeadStride, NormRope(part, weight, cos_sin, args.norm_eps));
      } else if (job == P::kGroup) {
        StoreHead(sm.new_k, NormRope(part, weight, cos_sin, args.norm_eps));
      } else {
        StoreHead(sm.new_v, part);
      }
    }
  }
  ConsumerSync();
  const int used = min(P::kTiles, share.last - share.first);  // slots with tiles
  const TileRole role;
  if (share.owner && warp == kWarps - 1) {  // a warp without tiles, for one token
    const size_t row = share.Row(share.context);
    const size_t at = (row * P::kKvHeads + share.kv_head) * kHeadDim;
    CopyNewToken<P>(layer.k_cache + at, sm.new_k);
    CopyNewToken<P>(layer.v_cache + at, sm.new_v);
  }
  if (active && role.slot < P::kTiles) {
    constexpr int kDims = kHeadDim / kPair;  // of the values
    constexpr float kScaleLog2 = 0.08838834764831845f * 1.4426950408889634f;  // 128^-0.5 * log2(e)
    float out[kDims / 8][4] = {};
    float row_max[2] = {-FLT_MAX, -FLT_MAX}, row_sum[2] = {0.0f, 0.0f};
    __nv_bfloat16 *k_tile = sm.tiles[role.slot][0], *v_tile = sm.tiles[role.slot][1];
#pragma unroll 1
    for (int tile = share.first + role.slot; tile < share.last; tile += P::kTiles) {
      const int first = tile * kTileTokens;
      const bool newest = share.context >= first && share.context < first + kTileTokens;
      CopyAsyncWait<1>();  // the keys
      if (newest && role.half == (share.context - first) / 8) {  // this warp fetched that row, as zeros
        __syncwarp();
        CopyNewToken<P>(k_tile + (share.context - first) * kHeadStride, sm.new_k);
      }
      role.Sync();
      float score[2][4] = {};
#pragma unroll
      for (int i = 0; i < kHeadDim / 16; ++i) {
        uint32_t q[4], b[4];  // b: tokens 0-7 k low/high, tokens 8-15 k low/high
        LoadMatrix4(q, SharedAddress(sm.q + (lane % 16) * kHeadStride + i * 16 + (lane / 16) * 8));
        LoadMatrix4(b, SharedAddress(k_tile + ((lane / 16) * 8 + lane % 8) * kHeadStride + i * 16 + ((lane / 8) % 2) * 8));
        Mma16816(score[0], q[0], q[1], q[2], q[3], b[0], b[1]);
        Mma16816(score[1], q[0], q[1], q[2], q[3], b[2], b[3]);
      }
      if (tile + P::kTiles < share.last) {
        role.Sync();  // both are done with these keys
        FetchTile<P>(share, layer.k_cache, tile + P::kTiles, false, role.half, k_tile);
      }
      CopyAsyncCommit();
      float tile_max[2] = {-FLT_MAX, -FLT_MAX};
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const bool in = first + n * 8 + 2 * t + (j & 1) <= share.context;
          score[n][j] = in ? score[n][j] * kScaleLog2 : -FLT_MAX;
          tile_max[j >> 1] = fmaxf(tile_max[j >> 1], score[n][j]);
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        tile_max[r] = fmaxf(tile_max[r], __shfl_xor_sync(0xffffffffu, tile_max[r], 1));
        tile_max[r] = fmaxf(tile_max[r], __shfl_xor_sync(0xffffffffu, tile_max[r], 2));
        const float now = fmaxf(row_max[r], tile_max[r]), shrink = exp2f(row_max[r] - now);
        row_max[r] = now;
        row_sum[r] *= shrink;
#pragma unroll
        for (int d = 0; d < kDims / 8; ++d) {
          out[d][2 * r] *= shrink;
          out[d][2 * r + 1] *= shrink;
        }
      }
      uint32_t p[4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float e[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          e[j] = exp2f(score[n][j] - row_max[j >> 1]);
          row_sum[j >> 1] += e[j];
        }
        p[2 * n] = PackBf16(e[0], e[1]);
        p[2 * n + 1] = PackBf16(e[2], e[3]);
      }
      CopyAsyncWait<1>();  // the values
      __syncwarp();
      if (newest) {
        if (lane / 16 == role.half) CopyNewToken<P>(v_tile + (share.context - first) * kHeadStride, sm.new_v);
        __syncwarp();
      }
#pragma unroll
      for (int d = 0; d < kDims / 16; ++d) {
        uint32_t b[4];  // dims 0-7: tokens low/high; dims 8-15: tokens low/high
        LoadMatrix4Transposed(b, SharedAddress(v_tile + (lane % 16) * kHeadStride + role.half * kDims + d * 16 + (lane / 16) * 8));
        Mma16816(out[2 * d], p[0], p[1], p[2], p[3], b[0], b[1]);
        Mma16816(out[2 * d + 1], p[0], p[1], p[2], p[3], b[2], b[3]);
      }
      __syncwarp();
      if (tile + P::kTiles < share.last) FetchTile<P>(share, layer.v_cache, tile + P::kTiles, true, role.half, v_tile);
      CopyAsyncCommit();
    }
    CopyAsyncWait<0>();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_sum[r] += __shfl_xor_sync(0xffffffffu, row_sum[r], 1);
      row_sum[r] += __shfl_xor_sync(0xffffffffu, row_sum[r], 2);
    }
    // `heads` lies over all tiles.
    asm volatile("bar.sync 2, %0;" ::"n"(P::kTiles * kPair * 32) : "memory");
    if (role.slot < used) {
#pragma unroll
      for (int d = 0; d < kDims / 8; ++d) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (g + 8 * r < P::kGroup) *reinterpret_cast<float2*>(&sm.heads[role.slot][g + 8 * r][role.half * kDims + d * 8 + 2 * t]) = make_float2(out[d][2 * r], out[d][2 * r + 1]);
        }
      }
      if (t == 0 && role.half == 0) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          sm.tile_max[role.slot][g + 8 * r] = row_max[r];
          sm.tile_sum[role.slot][g + 8 * r] = row_sum[r];
        }
      }
    }
  }
  ConsumerSync();
  if (active) {
    for (int i = threadIdx.x; i < P::kGroup * kHeadDim / 2; i += kWarps * 32) {
      const int r = i / (kHeadDim / 2), d = i % (kHeadDim / 2) * 2;
      float top = -FLT_MAX, sum = 0.0f;
      float2 value = make_float2(0.0f, 0.0f);
#pragma unroll 1
      for (int w = 0; w < used; ++w) top = fmaxf(top, sm.tile_max[w][r]);
#pragma unroll 2
      for (int w = 0; w < used; ++w) {
        const float scale = exp2f(sm.tile_max[w][r] - top);
        const float2 part = *reinterpret_cast<const float2*>(&sm.heads[w][r][d]);
        sum += scale * sm.tile_sum[w][r];
        value.x += scale * part.x;
        value.y += scale * part.y;
      }
      const int head = share.token * P::kHeads + share.kv_head * P::kGroup + r;
      Publish2(&ws.part[(((head * (kHeadDim / 2) + d / 2) << share.splits_shift) + share.split) * 2], __float_as_uint(value.x), __float_as_uint(value.y), flag);
      if (d == 0) Publish2(ws.scale[(head << share.splits_shift) + share.split], __float_as_uint(top), __float_as_uint(sum), flag);
    }
  }
  ConsumerSync();  // what follows writes over `heads`
}

// Warps of all blocks: `splits` lanes meet for two neighbouring values of a head.
template <class P>
__device__ __forceinline__ void MergeSplits(const DecodeLayersArgs& args, int splits_shift, Workspace<P>& ws, uint32_t flag) {
  constexpr int kTimes = P::kHeads / (8 * P::kKvHeads);
  const int lane = threadIdx.x & 31, warp = static_cast<int>(blockIdx.x) * kWarps + (threadIdx.x >> 5), splits = 1 << splits_shift, split = lane & (splits - 1);
  uint2 got[2 * kTimes];
  int pair[kTimes];
#pragma unroll
  for (int i = 0; i < kTimes; ++i) pair[i] = (i * kGrid * kWarps + warp) * (32 >> splits_shift) + (lane >> splits_shift);
  const auto wanted = [&](int i) { return pair[i] / (P::kWidth / 2) < args.tokens; };
  Await2(flag, got, [&](int i) -> const Word* {
    if (!wanted(i / 2)) return nullptr;
    return i % 2 == 0 ? &ws.part[((pair[i / 2] << splits_shift) + split) * 2] : ws.scale[(pair[i / 2] / (kHeadDim / 2) << splits_shift) + split];
  });
#pragma unroll
  for (int i = 0; i < kTimes; ++i) {
    const float mine = wanted(i) ? __uint_as_float(got[2 * i + 1].x) : 0.0f;
    float top = mine;
    for (int offset = splits / 2; offset > 0; offset /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
    const float scale = exp2f(mine - top);
    float sum = scale * __uint_as_float(got[2 * i + 1].y), a = scale * __uint_as_float(got[2 * i].x), b = scale * __uint_as_float(got[2 * i].y);
    for (int offset = splits / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      a += __shfl_xor_sync(0xffffffffu, a, offset);
      b += __shfl_xor_sync(0xffffffffu, b, offset);
    }
    static_assert(kGrid / (P::kKvHeads * kTokensMax) >= kCopies);  // splits
    if (split < kCopies && wanted(i)) Publish(&ws.attended[split][pair[i] / (P::kWidth / 2)][pair[i] % (P::kWidth / 2)], PackBf16(a / sum, b / sum), flag);
  }
}

}  // namespace qwen::kernels::decode
