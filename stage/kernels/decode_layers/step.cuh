// stage/kernels/decode_layers/step.cuh — the kernel of DecodeLayers: warps that load, 16 that compute, phase by phase.
#pragma once
#include "stage/kernels/common/launch.cuh"
#include "stage/kernels/decode_layers/attention.cuh"
#include "stage/kernels/decode_layers/experts.cuh"
#include "stage/kernels/decode_layers/plan.cuh"

namespace qwen::kernels::decode {

// By weights' type, a file each (compile time). REQUIRES: what DecodeLayers has checked.
cudaError_t LaunchBf16(const DecodeLayersArgs& args, cudaStream_t stream);
cudaError_t LaunchFp8(const DecodeLayersArgs& args, cudaStream_t stream);

namespace {

constexpr uint32_t kFlagsPerStep = 128;  // flag = step * 128 + layer + 1
static_assert(kDecodeLayersMax + 1 < static_cast<int>(kFlagsPerStep));

// The rows that enter the first layer, as words. One block a token.
template <class P>
__global__ void __launch_bounds__(256) EnterKernel(const DecodeLayersArgs args) {
  auto& ws = *static_cast<Workspace<P>*>(args.workspace);
  GridDependencyWait();
  GridDependencyLaunch();
  const uint32_t flag = ws.epoch * kFlagsPerStep + 1;
  const int token = blockIdx.x;
  const auto* from = reinterpret_cast<const uint32_t*>(args.rows + static_cast<size_t>(args.ids != nullptr ? args.ids[token] : token) * P::kHidden);
  for (int i = threadIdx.x; i < P::kHidden / 2; i += blockDim.x) {
    const uint32_t two = from[i];
#pragma unroll
    for (int copy = 0; copy < kCopies; ++copy) Publish(&ws.input[copy][token][i], two, flag);
  }
}

// This warp's share of `rows`, RMS-normalised, to its own part of sm.x. `use(token, i, values)` sees what lane holds.
template <class P, typename Use>
__device__ __forceinline__ void Normalise(const DecodeLayersArgs& args, Shared<P>& sm, const Word (*rows)[P::kHidden / 2], const __nv_bfloat16* weight, uint32_t flag, Use use) {
  constexpr int kLoads = P::kHiddenSlice / 128;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  // Lane holds 4 values: load i is 8 lanes of 16 of a piece.
  const auto at = [&](int i) { return (i * 32 + lane) / 16 * kPiece + warp * kWarpPiece + lane % 16 * 4; };
  uint2 weights[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) weights[i] = __ldg(reinterpret_cast<const uint2*>(weight + at(i)));
  uint2 got[P::kTokens * kLoads];
  Await2(flag, got, [&](int i) -> const Word* { return i / kLoads < args.tokens ? &rows[i / kLoads][at(i % kLoads) / 2] : nullptr; });
#pragma unroll
  for (int token = 0; token < P::kTokens; ++token) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const float2 a = UnpackBf16(got[token * kLoads + i].x), b = UnpackBf16(got[token * kLoads + i].y);
      squares += a.x * a.x + a.y * a.y + b.x * b.x + b.y * b.y;
    }
    squares = WarpSum(squares);
    if (lane == 0) sm.squares[warp][token] = squares;
  }
  ConsumerSync();
#pragma unroll
  for (int token = 0; token < P::kTokens; ++token) {
    const float scale = rsqrtf(AddUp<kWarps>(&sm.squares[0][token], P::kTokens) / P::kHidden + args.norm_eps);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const uint2 x = got[token * kLoads + i];
      const float2 a = UnpackBf16(x.x), b = UnpackBf16(x.y), wa = UnpackBf16(weights[i].x), wb = UnpackBf16(weights[i].y);
      const uint2 normed = make_uint2(PackBf16(RoundBf16(a.x * scale) * wa.x, RoundBf16(a.y * scale) * wa.y),
                                      PackBf16(RoundBf16(b.x * scale) * wb.x, RoundBf16(b.y * scale) * wb.y));
      *reinterpret_cast<uint2*>(sm.x + (warp * P::kTokens + token) * P::kHiddenStride + (i * 32 + lane) * 4) = normed;
      use(token, i, normed);
    }
  }
  __syncwarp();
}

// One warp a token, one lane a row: the residual stream of this block's rows goes on to everybody.
template <class P>
__device__ __forceinline__ void PublishRows(Word (*copies)[kTokensMax][P::kHidden / 2], int token, float value, uint32_t flag) {
  constexpr int kWords = P::kRows / 2;
  const int lane = threadIdx.x & 31;
  const float low = __shfl_sync(0xffffffffu, value, lane % kWords * 2), high = __shfl_sync(0xffffffffu, value, lane % kWords * 2 + 1);
#pragma unroll
  for (int i = lane / kWords; i < kCopies; i += 32 / kWords) Publish(&copies[i][token][blockIdx.x * kWords + lane % kWords], PackBf16(low, high), flag);
}

template <class P>
__device__ void LoadWeights(const DecodeLayersArgs& args, Shared<P>& sm, int loader) {
  const int block = blockIdx.x, lane = threadIdx.x & 31;
  RingAt at{.turns = loader};
  for (int l = 0; l < args.layer_count; ++l) {
    const typename P::Layer& layer = Layers<P>(args)[l];
    const size_t qkv_row = static_cast<size_t>(block) * P::kQkvRows;
    const typename P::Value* qkv = Values<P>(layer.qkv) + qkv_row * P::kHidden;
#pragma unroll 1
    for (int unit = 0; unit < P::kQkvUnits; unit += 2) {
#pragma unroll 1
      for (int p = 0; p < P::kHiddenPieces; ++p) {
        const typename P::Value* from = qkv + static_cast<size_t>(unit) * kPieceRows * P::kHidden + p * kPiece;
        const size_t row = qkv_row + unit * kPieceRows;
        LoadPiece<P, P::kPieceStride>(sm, at, from, P::kHidden, PieceScales<P>(layer, &DecodeLayerFp8::qkv_scales, row, p * kPiece, P::kHidden));
        if (unit + 1 < P::kQkvUnits) {
          LoadPiece<P, P::kPieceStride>(sm, at, from + kPieceRows * P::kHidden, P::kHidden, PieceScales<P>(layer, &DecodeLayerFp8::qkv_scales, row + kPieceRows, p * kPiece, P::kHidden));
        }
      }
    }
    // What is small and read by plain loads at a moment when everybody waits for it.
    if (block < args.shape.experts && loader == 0 && lane == 0) BulkPrefetch(layer.router + static_cast<size_t>(block) * P::kHidden, P::kHidden * 2);
    if (block == 0 && loader == 0 && lane == 0) BulkPrefetch(layer.post_norm, P::kHidden * 2);
    if (block == 0 && loader == 0 && lane == 1 && l + 1 < args.layer_count) {
      BulkPrefetch(Layers<P>(args)[l + 1].input_norm, P::kHidden * 2);
      BulkPrefetch(Layers<P>(args)[l + 1].q_norm, kHeadDim * 2);
      BulkPrefetch(Layers<P>(args)[l + 1].k_norm, kHeadDim * 2);
    }
    const typename P::Value* o = Values<P>(layer.o) + static_cast<size_t>(block) * P::kRows * P::kWidth;
#pragma unroll 1
    for (int q = 0; q < P::kRows / 16; ++q) {
#pragma unroll 1
      for (int p = 0; p < P::kWidthPieces; ++p) {
        const float* scales = PieceScales<P>(layer, &DecodeLayerFp8::o_scales, static_cast<size_t>(block) * P::kRows + q * 16, p * kPiece, P::kWidth);  // 16 rows lie in one block
        LoadPiece<P, P::kPieceStride>(sm, at, o + static_cast<size_t>(q * 16) * P::kWidth + p * kPiece, P::kWidth, scales);
        LoadPiece<P, P::kPieceStride>(sm, at, o + static_cast<size_t>(q * 16 + 8) * P::kWidth + p * kPiece, P::kWidth, scales);
      }
    }
    BarrierWait(&sm.routed, l & 1);
    LoadGateUp<P>(layer, sm, at);
    LoadDown<P>(layer, sm, at);
  }
}

template <class P>
__device__ void Compute(const DecodeLayersArgs& args, Shared<P>& sm) {
  auto& ws = *static_cast<Workspace<P>*>(args.workspace);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, block = blockIdx.x;
  const uint32_t base = ws.epoch * kFlagsPerStep;
  if (threadIdx.x == 0) sm.share = ShareAttention<P>(args);
  // This lane's column of the activations that this warp multiplies.
  const int column = min(g, P::kTokens - 1);
  const __nv_bfloat16* hidden_x = sm.x + (warp * P::kTokens + column) * P::kHiddenStride + t * P::kLaneColumns;
  const __nv_bfloat16* wide_x = sm.o.x + (warp * P::kTokens + column) * P::kWidthStride + t * P::kLaneColumns;
  for (int i = threadIdx.x; i < 16 * kHeadStride; i += kWarps * 32) sm.q[i] = __float2bfloat16_rn(0.0f);  // rows past the group stay zero
  if (P::kTokens == 1 && threadIdx.x == 0) {
    sm.routing.slots = args.shape.top_k;  // one token's slots are its ranks
  }
  // Warp i, lane r: row r of this block of token i's residual stream.
  float residual = 0.0f;
  if (warp < args.tokens && lane < P::kRows) {
    const uint32_t two = static_cast<uint32_t>(ws.input[0][warp][block * (P::kRows / 2) + lane / 2]);
    residual = lane % 2 == 0 ? UnpackBf16(two).x : UnpackBf16(two).y;
  }
  // The layer's pointers, one layer ahead: a chain of two loads would stand in every norm otherwise.
  const auto fetch_layer = [&](int l) {
    if (threadIdx.x < sizeof(typename P::Layer) / 8 && l < args.layer_count) {
      reinterpret_cast<uint64_t*>(&sm.layers[l & 1])[threadIdx.x] = reinterpret_cast<const uint64_t*>(Layers<P>(args) + l)[threadIdx.x];
    }
  };
  fetch_layer(0);
  ConsumerSync();
  RingAt at;
  for (int l = 0; l < args.layer_count; ++l) {
    const typename P::Layer& layer = sm.layers[l & 1];
    fetch_layer(l + 1);
    const uint32_t flag = base + l + 1;
    AttentionAhead<P>(layer, sm);

    // qkv
    Normalise<P>(args, sm, ws.input[block % kCopies], layer.input_norm, flag, [](int, int, uint2) {});
    {
#pragma unroll 1
      for (int unit = 0; unit < P::kQkvUnits; unit += 2) {
        const bool two = unit + 1 < P::kQkvUnits;
        float acc[2][4] = {};
#pragma unroll 1
        for (int p = 0; p < P::kHiddenPieces; p += kTogether) {
          MultiplyPieces<P, P::kPieceStride, kTogether>(sm, at, hidden_x + p * kWarpPiece, acc, two);
        }
        StoreSums<P::kTokens, P::kQkvRows>(sm.qkv, unit * kPieceRows, acc, two);
      }
    }
    ConsumerSync();
    for (int i = threadIdx.x; i < P::kTokens * P::kQkvRows / 2; i += kWarps * 32) {
      const int token = i / (P::kQkvRows / 2), two = i % (P::kQkvRows / 2);
      if (token >= args.tokens) break;
      float a = 0.0f, b = 0.0f;
#pragma unroll 4
      for (int w = 0; w < kWarps; ++w) {
        const float2 v = *reinterpret_cast<const float2*>(sm.qkv + (w * P::kTokens + token) * P::kQkvRows + 2 * two);
        a += v.x;
        b += v.y;
      }
      Publish(&ws.qkv[token][block * (P::kQkvRows / 2) + two], PackBf16(a, b), flag);
    }

    Attention<P>(args, layer, sm, ws, flag);
    MergeSplits<P>(args, P::kTokens == 1 ? 5 : sm.share.splits_shift, ws, flag);

    // o, and the residual
    {
      constexpr int kLoads = P::kWidthSlice / 128, kRowsAtOnce = P::kTokens == 1 ? 1 : 4 / kLoads;  // tokens
      for (int first = 0; first < args.tokens; first += kRowsAtOnce) {
        uint2 got[kLoads * kRowsAtOnce];
        const auto value = [&](int i) { return (i % kLoads * 32 + lane) / 16 * kPiece + warp * kWarpPiece + lane % 16 * 4; };
        Await2(flag, got, [&](int i) -> const Word* { return first + i / kLoads < args.tokens ? &ws.attended[block % kCopies][first + i / kLoads][value(i) / 2] : nullptr; });
#pragma unroll
        for (int i = 0; i < kLoads * kRowsAtOnce; ++i) {
          if (first + i / kLoads < P::kTokens) *reinterpret_cast<uint2*>(sm.o.x + (warp * P::kTokens + first + i / kLoads) * P::kWidthStride + (i % kLoads * 32 + lane) * 4) = got[i];
        }
      }
      __syncwarp();
#pragma unroll 1
      for (int q = 0; q < P::kRows / 16; ++q) {
        float acc[2][4] = {};
#pragma unroll 1
        for (int p = 0; p < P::kWidthPieces; p += kTogether) MultiplyPieces<P, P::kPieceStride, kTogether>(sm, at, wide_x + p * kWarpPiece, acc);
        StoreSums<P::kTokens, P::kRows>(sm.o.sums, q * 16, acc, true);
      }
      ConsumerSync();
      if (warp < args.tokens) {
        if (lane < P::kRows) residual = RoundBf16(residual + RoundBf16(AddUp<kWarps>(sm.o.sums + warp * P::kRows + lane, P::kTokens * P::kRows)));
        PublishRows<P>(ws.middle, warp, residual, flag);
      }
    }

    // The router: one expert a block.
    {
      constexpr int kLoads = P::kHiddenSlice / 128;
      const bool mine = block < args.shape.experts;
      uint2 router[kLoads] = {};
      float dot[P::kTokens] = {};
      if (mine) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          router[i] = __ldg(reinterpret_cast<const uint2*>(layer.router + static_cast<size_t>(block) * P::kHidden + (i * 32 + lane) / 16 * kPiece + warp * kWarpPiece + lane % 16 * 4));
        }
      }
      Normalise<P>(args, sm, ws.middle[block % kCopies], layer.post_norm, flag, [&](int token, int i, uint2 x) {
        const float2 a = UnpackBf16(x.x), b = UnpackBf16(x.y), ra = UnpackBf16(router[i].x), rb = UnpackBf16(router[i].y);
        dot[token] += a.x * ra.x + a.y * ra.y + b.x * rb.x + b.y * rb.y;
      });
#pragma unroll
      for (int token = 0; token < P::kTokens; ++token) {
        const float sum = WarpSum(dot[token]);
        if (lane == 0) sm.router[warp][token] = sum;
      }
      ConsumerSync();
      if (mine && threadIdx.x < kCopies * P::kTokens) {
        const int token = threadIdx.x / kCopies;
        if (token < args.tokens) Publish(&ws.logits[threadIdx.x % kCopies][token][block], __float_as_uint(RoundBf16(AddUp<kWarps>(&sm.router[0][token], P::kTokens))), flag);
      }
    }

    Route<P>(args, sm, ws, flag);
    GateUp<P>(sm, ws, at, hidden_x, flag);
    Down<P>(args, sm, ws, at, flag);
    if (warp < args.tokens) {
      float sum = 0.0f;
      if (lane < P::kRows) {
#pragma unroll
        for (int rank = 0; rank < kTopKMax; ++rank) {
          if (rank < args.shape.top_k) sum += sm.product[warp * args.shape.top_k + rank][lane];
        }
        residual = RoundBf16(residual + RoundBf16(sum));
      }
      if (l + 1 < args.layer_count) {
        PublishRows<P>(ws.input, warp, residual, flag + 1);
      } else if (lane < P::kRows) {
        args.out[static_cast<size_t>(warp) * P::kHidden + block * P::kRows + lane] = __float2bfloat16_rn(residual);
      }
    }
  }
  // Everybody has read it: this block has seen words of the last layer from all of them.
  if (block == 0 && threadIdx.x == 0) ws.epoch += 1;
}

template <class P>
__global__ void __launch_bounds__(P::kThreads, 1) DecodeLayersKernel(const DecodeLayersArgs args) {
  extern __shared__ __align__(128) unsigned char raw[];
  Shared<P>& sm = *reinterpret_cast<Shared<P>*>(raw);
  if (threadIdx.x == 0) {
    for (int s = 0; s < P::kSlots; ++s) {
      BarrierInit(&sm.full[s], 1);
      BarrierInit(&sm.empty[s], kWarps);
    }
    BarrierInit(&sm.routed, 1);
    FenceBarrierInit();
  }
  __syncthreads();
  if (const int warp = static_cast<int>(threadIdx.x) / 32; warp >= kWarps) {
    LoadWeights<P>(args, sm, warp - kWarps);
  } else {
    Compute<P>(args, sm);
  }
}

template <class P>
cudaError_t LaunchPlan(const DecodeLayersArgs& args, cudaStream_t stream) {
  if (cudaError_t e = Launch(EnterKernel<P>, {.grid = dim3(args.tokens), .block = dim3(256)}, stream, args); e != cudaSuccess) return e;
  if (cudaError_t e = cudaFuncSetAttribute(DecodeLayersKernel<P>, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared<P>)); e != cudaSuccess) return e;
  cudaLaunchAttribute cooperative;
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(kGrid);
  config.blockDim = dim3(P::kThreads);
  config.dynamicSmemBytes = sizeof(Shared<P>);
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  static_assert(sizeof(Shared<P>) <= 227 * 1024);
  return cudaLaunchKernelEx(&config, DecodeLayersKernel<P>, args);
}

template <int kTokens, typename Value = __nv_bfloat16>
using Small = Plan<2048, 32, 4, 768, kTokens, Value>;  // 30B-A3B
template <int kTokens, typename Value = __nv_bfloat16>
using Large = Plan<4096, 64, 4, 1536, kTokens, Value>;  // 235B-A22B

template <typename Value>
cudaError_t LaunchShape(const DecodeLayersArgs& args, cudaStream_t stream) {
  if (args.shape.hidden == Large<1>::kHidden) return LaunchPlan<Large<1, Value>>(args, stream);
  return args.tokens == 1 ? LaunchPlan<Small<1, Value>>(args, stream) : LaunchPlan<Small<4, Value>>(args, stream);
}

}  // namespace
}  // namespace qwen::kernels::decode
