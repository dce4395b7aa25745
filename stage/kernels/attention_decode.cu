#include <cooperative_groups.h>

#include <cfloat>
#include <type_traits>

#include "stage/kernels/attention_decode.h"
#include "stage/kernels/common/launch.cuh"
#include "stage/kernels/common/limits.h"
#include "stage/kernels/common/ptx.cuh"
#include "stage/kernels/common/reduce.cuh"
#include "stage/kernels/common/head.cuh"

namespace qwen::kernels {
namespace {

namespace cg = cooperative_groups;

constexpr int kWarps = 4;
constexpr int kStages = 2;            // tiles in flight per warp: 85 KiB a block, so that two blocks share an SM
constexpr int kTileTokens = 16;       // one tile: 16 tokens of K and of V
constexpr int kRows = 16;             // query heads of one kv head, padded
constexpr int kStride = kHeadDim + 8; // bf16; 16 bytes of padding keep ldmatrix free of bank conflicts
constexpr int kTileElements = kTileTokens * kStride;

struct SharedSingle {
  __nv_bfloat16 q[kRows * kStride];
  __nv_bfloat16 new_k[kHeadDim], new_v[kHeadDim];
  union {
    __nv_bfloat16 tiles[kWarps][kStages][2][kTileElements];  // K tile, V tile
    float partial[kWarps][kRows][kHeadDim];
  };
  float warp_max[kWarps][kRows], warp_sum[kWarps][kRows];
};
struct Shared : SharedSingle {
  float inbox[kRows * kHeadDim];  // (splits, share)
  float inbox_max[16][kRows], inbox_sum[16][kRows];
};

__device__ __forceinline__ void ClusterStartedArrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void ClusterStartedWait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

// kSingle: one block does the whole context and needs no inbox, so that three share an SM: with short contexts most of a
// block's life is finding its blocks, normalising and merging, and another block's loads fill that time.
template <bool kSingle>
__global__ void __launch_bounds__(kWarps * 32, kSingle ? 3 : 2) AttentionDecodeKernel(const AttentionDecodeArgs args) {
  extern __shared__ __align__(16) unsigned char raw[];
  using Memory = std::conditional_t<kSingle, SharedSingle, Shared>;
  Memory& sm = *reinterpret_cast<Memory*>(raw);
  const cg::cluster_group cluster = cg::this_cluster();
  const int splits = kSingle ? 1 : static_cast<int>(cluster.num_blocks()), split = kSingle ? 0 : static_cast<int>(cluster.block_rank());
  const int kv_head = blockIdx.y, token = blockIdx.z;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int group = args.heads / args.kv_heads;
  if constexpr (!kSingle) ClusterStartedArrive();
  // Everything down to the wait reads only what was there before this step: lengths, block tables and older keys and values.
  const int context = args.context[token], length = context + 1;
  // Tiles of 16 tokens, dealt to (block, warp) in contiguous runs.
  const int tiles = (length + kTileTokens - 1) / kTileTokens;
  const int per_block = (tiles + splits - 1) / splits;
  const int block_first = min(split * per_block, tiles), block_last = min(block_first + per_block, tiles);
  const size_t row_stride = static_cast<size_t>(args.kv_heads) * kHeadDim;
  const int32_t* table = args.block_table + static_cast<size_t>(token) * args.table_stride;

  // A warp takes tiles block_first + warp, + kWarps, ...; its own copies, its own waits. Lane i holds the KV block of the
  // warp's tile i of the current 32, so that no copy waits for a table entry.
  int table_entry = 0;
  auto fetch = [&](int index, int stage) {
    const int tile = block_first + warp + index * kWarps;
    if (index % 32 == 0) {
      const int ahead = (block_first + warp + (index + lane) * kWarps) * kTileTokens;
      table_entry = ahead < length ? table[ahead / args.block_tokens] : 0;
    }
    const int block = __shfl_sync(0xffffffffu, table_entry, index % 32);
    if (tile < block_last) {
      const int first = tile * kTileTokens;
      const size_t base = (static_cast<size_t>(block) * args.block_tokens + first % args.block_tokens) * row_stride + static_cast<size_t>(kv_head) * kHeadDim;
#pragma unroll
      for (int i = 0; i < kTileTokens * kHeadDim / 8 / 32; ++i) {
        const int chunk = i * 32 + lane, r = chunk / 16, c = chunk % 16;
        const bool valid = first + r < context;  // the new token comes from shared memory
        CopyAsync16(&sm.tiles[warp][stage][0][r * kStride + c * 8], args.k_cache + base + r * row_stride + c * 8, valid);
        CopyAsync16(&sm.tiles[warp][stage][1][r * kStride + c * 8], args.v_cache + base + r * row_stride + c * 8, valid);
      }
    }
    CopyAsyncCommit();
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) fetch(s, s);
  const HeadPart q_weight = LoadHead(args.q_norm), k_weight = LoadHead(args.k_norm);
  GridDependencyWait();
  GridDependencyLaunch();

  // Query heads of this kv head, normalised and rotated; the new key and value.
  const __nv_bfloat16* qkv = args.qkv + static_cast<size_t>(token) * (args.heads + 2 * args.kv_heads) * kHeadDim;
  const HeadPart cos_sin = LoadHead(args.cos_sin + static_cast<size_t>(token) * kHeadDim);
  HeadPart rows[kRows / kWarps];
#pragma unroll
  for (int i = 0; i < kRows / kWarps; ++i) rows[i] = LoadHead(qkv + (kv_head * group + min(warp + i * kWarps, group - 1)) * kHeadDim);
  if (warp == kWarps - 1) {
    StoreHead(sm.new_k, NormRope(LoadHead(qkv + (args.heads + kv_head) * kHeadDim), k_weight, cos_sin, args.norm_eps));
    *reinterpret_cast<uint2*>(sm.new_v + lane * 4) = *reinterpret_cast<const uint2*>(qkv + (args.heads + args.kv_heads + kv_head) * kHeadDim + lane * 4);
  }
#pragma unroll
  for (int i = 0; i < kRows / kWarps; ++i) {
    if (warp + i * kWarps < group) {
      StoreHead(sm.q + (warp + i * kWarps) * kStride, NormRope(rows[i], q_weight, cos_sin, args.norm_eps));
    } else {
      *reinterpret_cast<uint2*>(sm.q + (warp + i * kWarps) * kStride + lane * 4) = make_uint2(0, 0);
    }
  }
  __syncthreads();
  if (split == 0 && warp == 0) {
    const size_t at = (static_cast<size_t>(table[context / args.block_tokens]) * args.block_tokens + context % args.block_tokens) * row_stride + static_cast<size_t>(kv_head) * kHeadDim;
    *reinterpret_cast<uint2*>(args.k_cache + at + lane * 4) = *reinterpret_cast<const uint2*>(sm.new_k + lane * 4);
    *reinterpret_cast<uint2*>(args.v_cache + at + lane * 4) = *reinterpret_cast<const uint2*>(sm.new_v + lane * 4);
  }
  uint32_t q[kHeadDim / 16][4];
#pragma unroll
  for (int i = 0; i < kHeadDim / 16; ++i) LoadMatrix4(q[i], SharedAddress(sm.q + (lane % 16) * kStride + i * 16 + (lane / 16) * 8));

  constexpr float kScaleLog2 = 0.08838834764831845f * 1.4426950408889634f;  // 128^-0.5 * log2(e)
  float out[kHeadDim / 8][4] = {};
  float row_max[2] = {-FLT_MAX, -FLT_MAX}, row_sum[2] = {0.0f, 0.0f};
  int stage = 0;
  for (int index = 0; block_first + warp + index * kWarps < block_last; ++index) {
    const int tile = block_first + warp + index * kWarps;
    fetch(index + kStages - 1, (stage + kStages - 1) % kStages);
    CopyAsyncWait<kStages - 1>();
    __syncwarp();
    __nv_bfloat16* k_tile = sm.tiles[warp][stage][0];
    __nv_bfloat16* v_tile = sm.tiles[warp][stage][1];
    const int first = tile * kTileTokens;
    if (context >= first && context < first + kTileTokens) {
      *reinterpret_cast<uint2*>(k_tile + (context - first) * kStride + lane * 4) = *reinterpret_cast<const uint2*>(sm.new_k + lane * 4);
      *reinterpret_cast<uint2*>(v_tile + (context - first) * kStride + lane * 4) = *reinterpret_cast<const uint2*>(sm.new_v + lane * 4);
      __syncwarp();
    }
    float score[2][4] = {};
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      uint32_t b[4];  // tokens 0-7 k low/high, tokens 8-15 k low/high
      LoadMatrix4(b, SharedAddress(k_tile + ((lane / 16) * 8 + lane % 8) * kStride + i * 16 + ((lane / 8) % 2) * 8));
      Mma16816(score[0], q[i][0], q[i][1], q[i][2], q[i][3], b[0], b[1]);
      Mma16816(score[1], q[i][0], q[i][1], q[i][2], q[i][3], b[2], b[3]);
    }
    float tile_max[2] = {-FLT_MAX, -FLT_MAX};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool in = first + n * 8 + 2 * t + (j & 1) < length;
        score[n][j] = in ? score[n][j] * kScaleLog2 : -FLT_MAX;
        tile_max[j >> 1] = fmaxf(tile_max[j >> 1], score[n][j]);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      tile_max[r] = fmaxf(tile_max[r], __shfl_xor_sync(0xffffffffu, tile_max[r], 1));
      tile_max[r] = fmaxf(tile_max[r], __shfl_xor_sync(0xffffffffu, tile_max[r], 2));
      const float now = fmaxf(row_max[r], tile_max[r]);
      const float shrink = exp2f(row_max[r] - now);
      row_max[r] = now;
      row_sum[r] *= shrink;
#pragma unroll
      for (int d = 0; d < kHeadDim / 8; ++d) {
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
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
      uint32_t b[4];  // dims 0-7: tokens low/high; dims 8-15: tokens low/high
      LoadMatrix4Transposed(b, SharedAddress(v_tile + (lane % 16) * kStride + d * 16 + (lane / 16) * 8));
      Mma16816(out[2 * d], p[0], p[1], p[2], p[3], b[0], b[1]);
      Mma16816(out[2 * d + 1], p[0], p[1], p[2], p[3], b[2], b[3]);
    }
    __syncwarp();
    stage = (stage + 1) % kStages;
  }
  CopyAsyncWait<0>();
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    row_sum[r] += __shfl_xor_sync(0xffffffffu, row_sum[r], 1);
    row_sum[r] += __shfl_xor_sync(0xffffffffu, row_sum[r], 2);
  }
  __syncthreads();  // every warp is done with its tiles: `partial` lies over them
#pragma unroll
  for (int d = 0; d < kHeadDim / 8; ++d) {
#pragma unroll
    for (int j = 0; j < 4; ++j) sm.partial[warp][g + 8 * (j >> 1)][d * 8 + 2 * t + (j & 1)] = out[d][j];
  }
  if (t == 0) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sm.warp_max[warp][g + 8 * r] = row_max[r];
      sm.warp_sum[warp][g + 8 * r] = row_sum[r];
    }
  }
  __syncthreads();
  // Warps of this block, then blocks of the cluster, always in rank order. Each block finishes `share` elements of the output;
  // partial results are pushed into its shared memory, so that the last phase reads only its own.
  const int share = group * kHeadDim / splits;
  if constexpr (!kSingle) ClusterStartedWait();  // nobody writes into a block that has not started
  for (int i = threadIdx.x; i < group * kHeadDim; i += blockDim.x) {
    const int r = i / kHeadDim, d = i % kHeadDim;
    float top = -FLT_MAX, sum = 0.0f, value = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, sm.warp_max[w][r]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float scale = exp2f(sm.warp_max[w][r] - top);
      sum += scale * sm.warp_sum[w][r];
      value += scale * sm.partial[w][r][d];
    }
    if constexpr (kSingle) {
      args.out[(static_cast<size_t>(token) * args.heads + kv_head * group + r) * kHeadDim + d] = __float2bfloat16_rn(value / sum);
    } else {
      // To the block that finishes this element: its slot `split`.
      const int owner = i / share;
      cluster.map_shared_rank(sm.inbox, owner)[split * share + i % share] = value;
      if (d == 0 || i % share == 0) {
        cluster.map_shared_rank(&sm.inbox_max[0][0], owner)[split * kRows + r] = top;
        cluster.map_shared_rank(&sm.inbox_sum[0][0], owner)[split * kRows + r] = sum;
      }
    }
  }
  if constexpr (!kSingle) {
    cluster.sync();
    for (int i = threadIdx.x; i < share; i += blockDim.x) {
      const int r = (split * share + i) / kHeadDim, d = (split * share + i) % kHeadDim;
      float top = -FLT_MAX;
      for (int s = 0; s < splits; ++s) top = fmaxf(top, sm.inbox_max[s][r]);
      float sum = 0.0f, value = 0.0f;
      for (int s = 0; s < splits; ++s) {
        const float scale = exp2f(sm.inbox_max[s][r] - top);
        sum += scale * sm.inbox_sum[s][r];
        value += scale * sm.inbox[s * share + i];
      }
      args.out[(static_cast<size_t>(token) * args.heads + kv_head * group + r) * kHeadDim + d] = __float2bfloat16_rn(value / sum);
    }
  }
}

}  // namespace

cudaError_t AttentionDecode(const AttentionDecodeArgs& args, cudaStream_t stream) {
  if (args.tokens < 1 || args.kv_heads < 1 || args.heads % args.kv_heads != 0 || args.heads / args.kv_heads > kRows || args.block_tokens % kTileTokens != 0) return cudaErrorInvalidValue;
  int splits = args.splits;
  if (splits == 0) {  // about two blocks for each of 132 multiprocessors
    splits = 1;
    while (splits < 16 && args.tokens * args.kv_heads * splits < 200) splits *= 2;
  }
  if (splits != 1 && splits != 2 && splits != 4 && splits != 8 && splits != 16) return cudaErrorInvalidValue;
  LaunchShape shape = {.grid = dim3(splits, args.kv_heads, args.tokens), .block = dim3(kWarps * 32), .shared_bytes = sizeof(SharedSingle)};
  if (splits == 1) return Launch(AttentionDecodeKernel<true>, shape, stream, args);
  shape.shared_bytes = sizeof(Shared);
  shape.cluster_x = splits;
  return Launch(AttentionDecodeKernel<false>, shape, stream, args);
}

}  // namespace qwen::kernels
