// stage/kernels/rms_norm.h — y = weight * bf16(x * rsqrt(mean(x^2) + eps)); two roundings, the reference's (docs/numerics.md).
// With `add` the residual stream goes on first: x = sum = bf16(x + add).
//   x, y: (tokens, hidden) bf16, contiguous; may be the same       weight: (hidden) bf16
//   add, sum: as x, both or neither; sum may be x, not y
//   bytes moved: 4 * tokens * hidden + 2 * hidden, twice that with `add`      REQUIRES: hidden % 8 == 0, hidden <= 16384
// One block per token. Enqueues one kernel on `stream`, never synchronises, safe in graph capture.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace qwen::kernels {

struct RmsNormArgs {
  const __nv_bfloat16* x = nullptr;
  const __nv_bfloat16* weight = nullptr;
  __nv_bfloat16* y = nullptr;
  const __nv_bfloat16* add = nullptr;
  __nv_bfloat16* sum = nullptr;
  float eps = 1e-6f;
  int tokens = 0, hidden = 0;
};
cudaError_t RmsNorm(const RmsNormArgs& args, cudaStream_t stream);

}  // namespace qwen::kernels
