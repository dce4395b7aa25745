// stage/kernels/moe_decode.h — a MoE block for few tokens: route, gate-up + SiLU, down + weighted sum. Bound by reading the
// touched experts' weights once; no host synchronisation, no permuted copies of activations.
//
// Rounding is the reference's (docs/numerics.md): router logits bf16 (made by DecodeLinear), softmax in fp32, top-k with the
// lowest id first among equal logits, weights divided by their sum in fp32 and rounded to bf16; gate, up and silu(gate)*up
// each rounded to bf16; expert output rounded to bf16, times weight rounded to bf16, summed in fp32 in top-k order, rounded
// once; then added to the residual in bf16.
//
// Layout of weights (one of the two that checkpoints have; the loader transposes the other):
//   gate_up: (experts, 2*inter, hidden) bf16, gate rows first        down: (experts, hidden, inter) bf16
// or both in block FP8 (common/fp8.h): half the bytes, the same results as with the multiplied out weights but for the order of
// sums.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "stage/kernels/common/fp8.h"

namespace qwen::kernels {

struct MoeShapeArgs {
  int tokens = 0, hidden = 0, inter = 0, experts = 0, top_k = 0;
};

// Who computes what, made by MoeRoute and read by the other two. `assignments` = tokens * top_k.
struct MoeRouting {
  int32_t* expert_of = nullptr;        // (tokens, top_k) expert ids, best first
  __nv_bfloat16* weight_of = nullptr;  // (tokens, top_k)
  // (experts) groups of assignments, those with work first: {expert id or -1, begin, end, 0}; order[begin .. end) are its
  // assignments. One 16-byte load tells a block what to do.
  int4* group = nullptr;
  int32_t* order = nullptr;            // (assignments): token * top_k + rank; any order inside a group (results do not depend on it)
};

// logits: (tokens, experts) bf16. REQUIRES: experts <= kMaxExperts, a multiple of 32; tokens * top_k <= 4096.
// One kernel up to 8 tokens, two beyond.
cudaError_t MoeRoute(const MoeShapeArgs& shape, const __nv_bfloat16* logits, const MoeRouting& routing, bool normalise, cudaStream_t stream);

// h[a] = silu(gate(x)) * up(x) for every assignment a = token * top_k + rank.   x: (tokens, hidden) bf16, h: (assignments, inter) bf16
// x is normalised already (RmsNorm): every block reads its tokens' rows whole.
// bytes moved: 4 * hidden * inter * (distinct experts) + small.   REQUIRES: hidden % 256 == 0, inter % 16 == 0.
cudaError_t MoeGateUp(const MoeShapeArgs& shape, const __nv_bfloat16* x, const __nv_bfloat16* gate_up, const MoeRouting& routing,
                      __nv_bfloat16* h, cudaStream_t stream);
// REQUIRES: hidden % 512 == 0, inter % 128 == 0.
cudaError_t MoeGateUp(const MoeShapeArgs& shape, const __nv_bfloat16* x, const Fp8Matrix& gate_up, const MoeRouting& routing, __nv_bfloat16* h, cudaStream_t stream);

// partial[a] = bf16(bf16(down(h[a])) * weight[a]); (assignments, hidden) bf16.
// bytes moved: 2 * hidden * inter * (distinct experts) + small.   REQUIRES: inter % 128 == 0, hidden % 32 == 0.
cudaError_t MoeDown(const MoeShapeArgs& shape, const __nv_bfloat16* h, const __nv_bfloat16* down, const MoeRouting& routing,
                    __nv_bfloat16* partial, cudaStream_t stream);
// REQUIRES: inter % 256 == 0, hidden % 128 == 0.
cudaError_t MoeDown(const MoeShapeArgs& shape, const __nv_bfloat16* h, const Fp8Matrix& down, const MoeRouting& routing, __nv_bfloat16* partial, cudaStream_t stream);

// y = bf16(residual + bf16(sum over ranks of partial)); y may alias residual. (tokens, hidden) bf16.
cudaError_t MoeCombine(const MoeShapeArgs& shape, const __nv_bfloat16* partial, const __nv_bfloat16* residual, __nv_bfloat16* y,
                       cudaStream_t stream);

}  // namespace qwen::kernels
