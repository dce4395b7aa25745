// stage/kernels/rope.h — angles of a step, and QK-norm + RoPE + KV write for prompts (decode does this inside attention).
// Halves (i, i + 64) of a head rotate together; M-RoPE is interleaved (docs/numerics.md).
// Each enqueues one kernel on `stream`, never synchronises, safe in graph capture.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace qwen::kernels {

// cos_sin: (tokens, 2, 64) bf16: cos, then sin of float(position[axis[i]]) * inverse[i], times `scaling`, rounded once.
//   positions: (3, tokens) int32, rows t, h, w     inverse: (64) float32     axis: (64) int32, 0 = t, 1 = h, 2 = w
struct RotaryTableArgs {
  const int32_t* positions = nullptr;
  const float* inverse = nullptr;
  const int32_t* axis = nullptr;
  __nv_bfloat16* cos_sin = nullptr;
  float scaling = 1.0f;
  int tokens = 0;
};
cudaError_t RotaryTable(const RotaryTableArgs& args, cudaStream_t stream);

// qkv: (tokens, (heads + 2 * kv_heads) * 128) bf16. q and k heads are normalised and rotated in place; k and v are also
// written to the caches (rows, kv_heads, 128) at row slot[token].      q_norm, k_norm: (128) bf16
// bytes moved: 4 * tokens * (heads + kv_heads) * 128 + 8 * tokens * kv_heads * 128
struct RopeKvWriteArgs {
  __nv_bfloat16* qkv = nullptr;
  const __nv_bfloat16* q_norm = nullptr;
  const __nv_bfloat16* k_norm = nullptr;
  const __nv_bfloat16* cos_sin = nullptr;
  const int64_t* slot = nullptr;  // (tokens): block * block_tokens + offset
  __nv_bfloat16* k_cache = nullptr;
  __nv_bfloat16* v_cache = nullptr;
  float norm_eps = 1e-6f;
  int tokens = 0, heads = 0, kv_heads = 0;
};
cudaError_t RopeKvWrite(const RopeKvWriteArgs& args, cudaStream_t stream);

}  // namespace qwen::kernels
