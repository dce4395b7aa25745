// stage/kernels/decode_linear.h — y = epilogue(prologue(x) W^T) for few tokens: bound by reading W once.
//
//   x: (tokens, k) bf16, contiguous           w: (n, k) bf16, contiguous
//   y: (tokens, n) bf16, contiguous           1 <= tokens <= kDecodeTokensMax, k % 256 == 0, n % 16 == 0,
//   fp8: the same weights in block FP8 (common/fp8.h) instead of w; n % 128 == 0, k % 512 == 0.
//   norm_weight: (k) bf16 or null: x is first RMS-normalised in the reference's rounding (docs/numerics.md): x*rsqrt in
//       fp32, to bf16, times weight in bf16. Every block normalises for itself, which pays for one or two tokens; for more
//       run RmsNorm first. REQUIRES: tokens * (k + 32) * 2 bytes <= 227 KiB, else cudaErrorInvalidConfiguration.
//   normed: (tokens, k) bf16 or null: where one block leaves the normalised x for other readers
//   residual: (tokens, n) bf16 or null: y = bf16(residual + bf16(xW^T)); may alias y.
//   bytes moved: 2nk (FP8: nk) + 2 tokens (k + n) (+ 2 tokens n with a residual)
// fp32 accumulation; the order of the sum depends on k alone, so a token's result does not depend on its company.
// Enqueues one kernel on `stream`, never synchronises, safe in graph capture. Uses programmatic dependent launch: reads
// of w start before the previous kernel ends.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "stage/kernels/common/fp8.h"

namespace qwen::kernels {

struct DecodeLinearArgs {
  const __nv_bfloat16* x = nullptr;
  const __nv_bfloat16* w = nullptr;
  __nv_bfloat16* y = nullptr;
  const __nv_bfloat16* norm_weight = nullptr;
  __nv_bfloat16* normed = nullptr;
  const __nv_bfloat16* residual = nullptr;
  float norm_eps = 1e-6f;
  int tokens = 0, n = 0, k = 0;
  Fp8Matrix fp8;  // when it has codes, instead of w
};
cudaError_t DecodeLinear(const DecodeLinearArgs& args, cudaStream_t stream);

}  // namespace qwen::kernels
