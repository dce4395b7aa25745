// stage/kernels/moe_stream.h — the two products of a MoE block as one stream of weights through tensor cores: for batches in
// which an expert meets several tokens (moe_decode.h is faster for one or two).
//
// One persistent block an SM. A warp asks the tensor memory accelerator for 64 rows x 64 columns of an expert's weights
// (8 KiB) at a time, up to 150 KiB ahead, and gathers the same columns of the expert's tokens; four warps multiply with
// wgmma, weights as the 64 rows of the product and tokens as its columns. So DRAM never waits for arithmetic, and weights
// cross into an SM once per 64 tokens of an expert.
//
// Layouts, routing and rounding are those of moe_decode.h. REQUIRES: hidden % 64 == 0, inter % 64 == 0, tokens * top_k <= 4096.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "stage/kernels/moe_decode.h"

namespace qwen::kernels {

// How the accelerator finds one layer's experts: made once, on the host, after loading. Refers to the weights' memory.
struct MoeStreamWeights {
  CUtensorMap gate_up, down;
  const float *gate_up_scales = nullptr, *down_scales = nullptr;  // null: bf16
};
cudaError_t MakeMoeStreamWeights(const MoeShapeArgs& shape, const __nv_bfloat16* gate_up, const __nv_bfloat16* down, MoeStreamWeights* out);
// Block FP8 (common/fp8.h): weights are then wgmma's operand in registers, multiplied out on the way. Has not run on a GPU yet.
// REQUIRES: hidden % 128 == 0, inter % 128 == 0.
cudaError_t MakeMoeStreamWeights(const MoeShapeArgs& shape, const Fp8Matrix& gate_up, const Fp8Matrix& down, MoeStreamWeights* out);

// As MoeGateUp: h[a] = silu(gate(x)) * up(x).
cudaError_t MoeStreamGateUp(const MoeShapeArgs& shape, const __nv_bfloat16* x, const MoeStreamWeights& weights, const MoeRouting& routing,
                            __nv_bfloat16* h, cudaStream_t stream);
// As MoeDown: partial[a] = bf16(bf16(down(h[a])) * weight[a]).
cudaError_t MoeStreamDown(const MoeShapeArgs& shape, const __nv_bfloat16* h, const MoeStreamWeights& weights, const MoeRouting& routing,
                          __nv_bfloat16* partial, cudaStream_t stream);

}  // namespace qwen::kernels
