// stage/kernels/moe_prefill.h — what stands around the two grouped products of a MoE block for many tokens.
//   MoePermute -> MoeGroupedGateUp -> MoeGroupedDown (moe_grouped.h) -> MoePrefillCombine
// Rounding is that of moe_decode.h. An assignment is a = token * top_k + rank; sorted rows are the assignments by expert,
// in order of a within one, so results repeat bit for bit. No host synchronisation, safe in graph capture.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "stage/kernels/moe_decode.h"

namespace qwen::kernels {

struct MoePermutation {
  int32_t* expert_of = nullptr;        // (assignments), best first within a token
  __nv_bfloat16* weight_of = nullptr;  // (assignments)
  int32_t* count = nullptr;            // (experts), scratch
  int32_t* end = nullptr;              // (experts): one past the last sorted row of each expert
  int32_t* source = nullptr;           // (assignments): token of each sorted row
  int32_t* row_of = nullptr;           // (assignments): sorted row of each assignment
};
// logits: (tokens, experts) bf16. REQUIRES: experts <= kMaxExperts, top_k <= kMaxExpertsPerToken, top_k <= experts.
cudaError_t MoePermute(const MoeShapeArgs& shape, const __nv_bfloat16* logits, const MoePermutation& permutation, bool normalise,
                       cudaStream_t stream);

// h (rows, inter) = silu(gate) * up of gate_up (rows, 2 * inter): gate columns first. bytes moved: 6 * rows * inter.
// Also a dense block's activation. REQUIRES: inter % 8 == 0.
cudaError_t SiluMul(const __nv_bfloat16* gate_up, __nv_bfloat16* h, int rows, int inter, cudaStream_t stream);

// y[t] = residual[t] + sum over ranks of sorted[row_of[a]] * weight_of[a]; y may alias residual. sorted: (assignments, hidden).
// With `norm` also norm.y[t] = RMSNorm(y[t]) by norm.weight (rms_norm.h): what the next layer begins with. REQUIRES: hidden <= 16384.
struct MoeNextNorm {
  const __nv_bfloat16* weight = nullptr;  // (hidden); with y, or neither
  __nv_bfloat16* y = nullptr;             // (tokens, hidden), not y of the sum
  float eps = 1e-6f;
};
cudaError_t MoePrefillCombine(const MoeShapeArgs& shape, const __nv_bfloat16* sorted, const MoePermutation& permutation,
                              const __nv_bfloat16* residual, __nv_bfloat16* y, cudaStream_t stream, const MoeNextNorm& norm = {});

}  // namespace qwen::kernels
