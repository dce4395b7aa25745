// stage/kernels/decode_layers/experts.cuh — routing, gate-up + SiLU, and down + weighted sum of up to 8 tokens.
#pragma once
#include <cfloat>

#include "stage/kernels/common/reduce.cuh"
#include "stage/kernels/decode_layers/plan.cuh"

namespace qwen::kernels::decode {

// Units of gate-up of a block: a contiguous run, so that it reads contiguous rows.
template <class P>
struct UnitShare {
  int first, last;
  __device__ explicit UnitShare(int slots) {
    const int units = slots * P::kExpertUnits;
    first = static_cast<int>(blockIdx.x) * units / kGrid;
    last = (static_cast<int>(blockIdx.x) + 1) * units / kGrid;
  }
};

// Every block routes for itself: softmax in fp32, the largest top_k, among equals the lowest id (common/route.cuh), but by
// counting who is larger: all warps at once, no rank waits for the one before. Fills sm.routing and lets the loading warp go on.
template <class P>
__device__ __forceinline__ void Route(const DecodeLayersArgs& args, Shared<P>& sm, Workspace<P>& ws, uint32_t flag) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, experts = args.shape.experts, top_k = args.shape.top_k;
  Routing& r = sm.routing;
  if (P::kTokens > 1 && threadIdx.x < kExpertsMax) r.mask_of[threadIdx.x] = 0;
  if (warp < args.tokens) {
    uint2 got[2];
    Await2(flag, got, [&](int i) -> const Word* {
      const int first = i * 64 + lane * 2;
      return first < experts ? &ws.logits[blockIdx.x % kCopies][warp][first] : nullptr;
    });
    float value[4], top = -FLT_MAX, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      value[i] = i / 2 * 64 + lane * 2 < experts ? __uint_as_float(i % 2 == 0 ? got[i / 2].x : got[i / 2].y) : -FLT_MAX;
      top = fmaxf(top, value[i]);
    }
    top = WarpMax(top);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      value[i] = i / 2 * 64 + lane * 2 < experts ? expf(value[i] - top) : 0.0f;
      sum += value[i];
    }
    sum = WarpSum(sum);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool in = i * 64 + lane * 2 < experts;
      *reinterpret_cast<float2*>(&sm.probability[warp][i * 64 + lane * 2]) = in ? make_float2(fminf(value[2 * i] / sum, 1.0f), fminf(value[2 * i + 1] / sum, 1.0f)) : make_float2(-1.0f, -1.0f);
    }
  }
  ConsumerSync();
  {
    // kParts warps a token; a lane compares kMine experts with one of kSegments shares of all.
    constexpr int kParts = kWarps / P::kTokens, kExperts = kExpertsMax / kParts, kMine = kExperts > 32 ? kExperts / 32 : 1;
    constexpr int kSegments = 32 * kMine / kExperts, kOthers = kExpertsMax / kSegments;
    const int token = warp / kParts, segment = lane / (32 / kSegments);
    if (token < args.tokens) {
      // Probabilities are not negative and no NaN (fminf), so their bits order as integers do: expert j is ahead of e when bits(j) + (j < e) > bits(e).
      int expert[kMine], larger[kMine], mine[kMine];
#pragma unroll
      for (int m = 0; m < kMine; ++m) {
        expert[m] = warp % kParts * kExperts + m * 32 + lane % (32 / kSegments);
        mine[m] = __float_as_int(sm.probability[token][expert[m]]);
        larger[m] = 0;
      }
#pragma unroll 1
      for (int first = segment * kOthers; first < (segment + 1) * kOthers; first += 4) {
        const int4 other = *reinterpret_cast<const int4*>(&sm.probability[token][first]);
#pragma unroll
        for (int m = 0; m < kMine; ++m) {
          const int ids = expert[m] - first;
          larger[m] += (other.x + (0 < ids) > mine[m]) + (other.y + (1 < ids) > mine[m]) + (other.z + (2 < ids) > mine[m]) + (other.w + (3 < ids) > mine[m]);
        }
      }
#pragma unroll
      for (int m = 0; m < kMine; ++m) {
        for (int offset = 16; offset >= 32 / kSegments; offset /= 2) larger[m] += __shfl_xor_sync(0xffffffffu, larger[m], offset);
        if (segment == 0 && larger[m] < top_k && expert[m] < experts) {
          r.weight[token * top_k + larger[m]] = __int_as_float(mine[m]);
          if constexpr (P::kTokens == 1) {
            r.expert[larger[m]] = static_cast<int16_t>(expert[m]);
          } else {
            atomicOr(&r.mask_of[expert[m]], 1 << token);
            r.rank_of[expert[m]][token] = static_cast<uint8_t>(larger[m]);
          }
        }
      }
    }
  }
  ConsumerSync();
  if constexpr (P::kTokens > 1) {
    if (warp == 0) {
      int slots = 0, assignments = 0;
#pragma unroll 1
      for (int base = 0; base < experts; base += 32) {
        const int expert = base + lane, mask = r.mask_of[expert], count = __popc(mask);
        const uint32_t used = __ballot_sync(0xffffffffu, mask != 0);
        int sum = count;
#pragma unroll
        for (int offset = 1; offset < 32; offset <<= 1) {
          const int s = __shfl_up_sync(0xffffffffu, sum, offset);
          if (lane >= offset) sum += s;
        }
        if (mask != 0) {
          const int slot = slots + __popc(used & ((1u << lane) - 1));
          int at = assignments + sum - count;
          r.expert[slot] = static_cast<int16_t>(expert);
          r.mask[slot] = static_cast<uint8_t>(mask);
          r.begin[slot] = static_cast<int16_t>(at);
#pragma unroll 1
          for (int token = 0; token < P::kTokens; ++token) {
            if (mask >> token & 1) r.order[at++] = static_cast<uint8_t>(token * top_k + r.rank_of[expert][token]);
          }
        }
        slots += __popc(used);
        assignments += __shfl_sync(0xffffffffu, sum, 31);
      }
      if (lane == 0) {
        r.slots = slots;
        r.begin[slots] = static_cast<int16_t>(assignments);
      }
      __syncwarp();
    }
  }
  if (threadIdx.x == 0) BarrierArrive(&sm.routed);
  if constexpr (P::kTokens > 1) ConsumerSync();
}

template <class P>
__device__ __forceinline__ void LoadGateUp(const typename P::Layer& layer, Shared<P>& sm, RingAt& at) {
  const UnitShare<P> share(sm.routing.slots);
#pragma unroll 1
  for (int unit = share.first; unit < share.last; ++unit) {
    const int expert = sm.routing.expert[unit / P::kExpertUnits];
    const size_t row = static_cast<size_t>(expert) * 2 * P::kInter + unit % P::kExpertUnits * kPieceRows;
    const typename P::Value* gate = Values<P>(layer.gate_up) + row * P::kHidden;
#pragma unroll 1
    for (int p = 0; p < P::kHiddenPieces; ++p) {
      LoadPiece<P, P::kPieceStride>(sm, at, gate + p * kPiece, P::kHidden, PieceScales<P>(layer, &DecodeLayerFp8::gate_up_scales, row, p * kPiece, P::kHidden));
      LoadPiece<P, P::kPieceStride>(sm, at, gate + static_cast<size_t>(P::kInter) * P::kHidden + p * kPiece, P::kHidden,
                                    PieceScales<P>(layer, &DecodeLayerFp8::gate_up_scales, row + P::kInter, p * kPiece, P::kHidden));
    }
  }
}

template <class P>
__device__ __forceinline__ void LoadDown(const typename P::Layer& layer, Shared<P>& sm, RingAt& at) {
  const int slots = sm.routing.slots;
  for (int slot = 0; slot < slots; ++slot) {
    const size_t row = static_cast<size_t>(sm.routing.expert[slot]) * P::kHidden + blockIdx.x * P::kRows;
    const typename P::Value* rows = Values<P>(layer.down) + row * P::kInter;
#pragma unroll 1
    for (int q = 0; q < P::kRows / 16; ++q) {
#pragma unroll 1
      for (int p = 0; p < P::kDownPieces; ++p) {
        const float* piece_scales = PieceScales<P>(layer, &DecodeLayerFp8::down_scales, row + q * 16, p * kDownPiece, P::kInter);  // 16 rows lie in one block
        LoadPiece<P, P::kDownStride>(sm, at, rows + static_cast<size_t>(q * 16) * P::kInter + p * kDownPiece, P::kInter, piece_scales);
        LoadPiece<P, P::kDownStride>(sm, at, rows + static_cast<size_t>(q * 16 + 8) * P::kInter + p * kDownPiece, P::kInter, piece_scales);
      }
    }
  }
}

// sm.x holds the tokens after the post-attention norm. All tokens are columns of every expert's product: a column costs
// nothing, and only those of the expert's own tokens are read.
template <class P>
__device__ __forceinline__ void GateUp(Shared<P>& sm, Workspace<P>& ws, RingAt& at, const __nv_bfloat16* x, uint32_t flag) {
  const UnitShare<P> share(sm.routing.slots);
  for (int base = share.first; base < share.last; base += kUnitBatch) {
    const int count = min(kUnitBatch, share.last - base);
    for (int i = 0; i < count; ++i) {
      float acc[2][4] = {};
#pragma unroll 1
      for (int p = 0; p < P::kHiddenPieces; p += kTogether) MultiplyPieces<P, P::kPieceStride, kTogether>(sm, at, x + p * kWarpPiece, acc);
      StoreSums<P::kTokens, 16>(&sm.gate_up[i][0][0][0], 0, acc, true);
    }
    ConsumerSync();
#pragma unroll 1
    for (int first = threadIdx.x & ~31; first < count * P::kTokens * 8; first += kWarps * 32) {  // whole warps
      const int i = min(first + static_cast<int>(threadIdx.x & 31), count * P::kTokens * 8 - 1);
      const int unit = i / (P::kTokens * 8), token = i / 8 % P::kTokens, row = i % 8;
      const int slot = (base + unit) / P::kExpertUnits, mask = P::kTokens == 1 ? 1 : sm.routing.mask[slot];
      const float* sums = &sm.gate_up[unit][0][token][row];
      const float gate = RoundBf16(AddUp<kWarps>(sums, P::kTokens * 16)), up = RoundBf16(AddUp<kWarps>(sums + 8, P::kTokens * 16));
      const float value = RoundBf16(gate / (1.0f + expf(-gate))) * up;
      const float next = __shfl_down_sync(0xffffffffu, value, 1);
      if (!(mask >> token & 1) || i != first + static_cast<int>(threadIdx.x & 31)) continue;
      const int assignment = P::kTokens == 1 ? slot : sm.routing.order[sm.routing.begin[slot] + __popc(mask & ((1 << token) - 1))];
      if (row % 2 == 0) {
#pragma unroll
        for (int copy = 0; copy < kCopies; ++copy) Publish(&ws.active[copy][assignment][(base + unit) % P::kExpertUnits * 4 + row / 2], PackBf16(value, next), flag);
      }
    }
    ConsumerSync();
  }
}

template <class P>
__device__ __forceinline__ int Assignment(const Routing& r, int i) {
  return P::kTokens == 1 ? i : r.order[i];
}

// Fills sm.product: what each assignment adds to this block's rows.
template <class P>
__device__ __forceinline__ void Down(const DecodeLayersArgs& args, Shared<P>& sm, Workspace<P>& ws, RingAt& at, uint32_t flag) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const Routing& r = sm.routing;
  const int slots = r.slots;
  for (int slot = 0; slot < slots;) {
    int begin = 0, end = slots;
    if constexpr (P::kTokens > 1) {
      begin = r.begin[slot];
      end = slot + 1;
      while (end < slots && r.begin[end + 1] - begin <= P::kDownBatch) ++end;
    }
    const int rows = P::kTokens == 1 ? slots : r.begin[end] - begin, combined = rows * P::kDownPieces;
    if (warp < kDownWarps) {
      // Two (assignment, piece) a load: 16 lanes bring the 64 values that this warp multiplies.
      constexpr int kLoads = P::kTokens == 1 ? 4 * P::kDownPieces : 4;
#pragma unroll 1
      for (int first = 0; first < combined; first += 2 * kLoads) {
        uint2 got[kLoads];
        const auto index = [&](int i) { return first + 2 * i + lane / 16; };
        Await2(flag, got, [&](int i) -> const Word* {
          if (index(i) >= combined) return nullptr;
          return &ws.active[blockIdx.x % kCopies][Assignment<P>(r, begin + index(i) / P::kDownPieces)][index(i) % P::kDownPieces * (kDownPiece / 2) + warp * (kWarpPiece / 2) + lane % 16 * 2];
        });
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          if (index(i) < combined) *reinterpret_cast<uint2*>(&sm.down.x[warp][index(i) / P::kDownPieces][index(i) % P::kDownPieces * kWarpPiece + lane % 16 * 4]) = got[i];
        }
      }
      __syncwarp();
    }
#pragma unroll 1
    for (int s = slot; s < end; ++s) {
      const int mask = P::kTokens == 1 ? 1 : r.mask[s], row = P::kTokens == 1 ? s : r.begin[s] - begin;
#pragma unroll 1
      for (int q = 0; q < P::kRows / 16; ++q) {
        if (warp < kDownWarps) {
          // Column g: token g, or any other when it did not choose this expert.
          const int column = P::kTokens > 1 && (mask >> g & 1) ? __popc(mask & ((1 << g) - 1)) : 0;
          const __nv_bfloat16* x = &sm.down.x[warp][row + column][t * P::kLaneColumns];
          float acc[2][4] = {};
#pragma unroll 1
          for (int p = 0; p < P::kDownPieces; ++p) MultiplyPieces<P, P::kDownStride, 1>(sm, at, x + p * kWarpPiece, acc, true, p * kDownPiece / kFp8Block % 4);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int token = 2 * t + j;
            if (token < P::kTokens && (mask >> token & 1)) {
              float* to = &sm.down.sums[row + (P::kTokens == 1 ? 0 : __popc(mask & ((1 << token) - 1)))][warp][q * 16 + g];
              to[0] = acc[0][j] + acc[1][j];
              to[8] = acc[0][2 + j] + acc[1][2 + j];
            }
          }
        } else {
#pragma unroll 1
          for (int p = 0; p < 2 * P::kDownPieces; ++p) SkipPiece<P>(sm, at);
        }
      }
    }
    ConsumerSync();
    for (int i = threadIdx.x; i < rows * P::kRows; i += kWarps * 32) {
      const int assignment = Assignment<P>(r, begin + i / P::kRows), ranks = assignment / args.shape.top_k * args.shape.top_k;
      float weight = r.weight[assignment], total = 0.0f;
#pragma unroll
      for (int rank = 0; rank < kTopKMax; ++rank) {
        if (rank < args.shape.top_k) total += r.weight[ranks + rank];
      }
      if (args.normalise) weight /= total;
      sm.product[assignment][i % P::kRows] = RoundBf16(RoundBf16(AddUp<kDownWarps>(&sm.down.sums[i / P::kRows][0][i % P::kRows], P::kRows)) * RoundBf16(weight));
    }
    ConsumerSync();
    slot = end;
  }
}

}  // namespace qwen::kernels::decode
