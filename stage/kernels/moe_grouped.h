// stage/kernels/moe_grouped.h — the two products of a prompt's MoE block, each with what stands before and after it:
//   MoePermute (moe_prefill.h) -> MoeGroupedGateUp (gather, product, SiLU) -> MoeGroupedDown (product) -> MoePrefillCombine
//
// Weights are the 64 rows of a wgmma and tokens its columns, so an expert's tokens are padded to a multiple of 16 and not of 64
// or 128: with 128 tokens an expert that is a third less work than with tokens as rows. A persistent block an SM takes tiles of
// 256 weight rows x up to 192 tokens: a warpgroup loads (weights by the tensor memory accelerator, tokens gathered by
// cp.async), two multiply. An expert's tokens are dealt evenly to as few tiles as hold them.
//
// Rounding is that of moe_decode.h; sums run along k in one order, so results repeat bit for bit. Bytes moved: each touched
// expert's weights once, tokens once per 128 (gate-up) or 256 (down) rows of the result through L2. FLOP: 2 * rows * k * n.
// REQUIRES: hidden % 256 == 0, inter % 128 == 0, experts <= kMaxExperts. No host synchronisation, safe in graph capture.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "stage/kernels/moe_prefill.h"

namespace qwen::kernels {

// How the accelerator finds one layer's experts: made once, on the host, after loading. Refers to the weights' memory.
struct MoeGroupedWeights {
  CUtensorMap gate_up, down;
  const float *gate_up_scales = nullptr, *down_scales = nullptr;  // null: bf16
};
// gate_up: (experts, 2 * inter, hidden), gate rows first; down: (experts, hidden, inter); bf16, 16-byte aligned.
cudaError_t MakeMoeGroupedWeights(const MoeShapeArgs& shape, const __nv_bfloat16* gate_up, const __nv_bfloat16* down, MoeGroupedWeights* out);
// Block FP8 (common/fp8.h): weights are then wgmma's operand in registers, multiplied out on the way; tiles of 64 or 128
// tokens.
cudaError_t MakeMoeGroupedWeights(const MoeShapeArgs& shape, const Fp8Matrix& gate_up, const Fp8Matrix& down, MoeGroupedWeights* out);

// active (assignments, inter), rows sorted by expert: silu(gate(x[source[row]])) * up(x[source[row]]). x: (tokens, hidden).
cudaError_t MoeGroupedGateUp(const MoeShapeArgs& shape, const __nv_bfloat16* x, const MoeGroupedWeights& weights, const MoePermutation& permutation,
                             __nv_bfloat16* active, cudaStream_t stream);
// sorted (assignments, hidden) = down(active), row by row.
cudaError_t MoeGroupedDown(const MoeShapeArgs& shape, const __nv_bfloat16* active, const MoeGroupedWeights& weights, const MoePermutation& permutation,
                           __nv_bfloat16* sorted, cudaStream_t stream);

}  // namespace qwen::kernels
