// stage/kernels/attention_decode.h — one new token per sequence: QK-norm, RoPE, KV write and attention over the paged cache.
//
//   qkv: (tokens, (heads + 2 * kv_heads) * 128) bf16: q heads, k heads, v heads of each token, as one fused projection gives
//   q_norm, k_norm: (128) bf16 RMS weights, per head, before RoPE
//   cos_sin: (tokens, 2, 64) bf16: cos then sin of the token's 64 angles (already interleaved for M-RoPE)
//   k_cache, v_cache: (blocks, block_tokens, kv_heads, 128) bf16; the new token's k and v are written at `context[i]`
//   block_table: (tokens, table_stride) int32     context: (tokens) int32, tokens in the cache before this one
//   out: (tokens, heads * 128) bf16
// heads / kv_heads is 1..16: one kv head's query heads are the 16 rows of a tensor-core tile (unused rows are zero).
// Each (token, kv head) is one cluster of `splits` blocks, each taking a contiguous share of the context; partial results
// meet in distributed shared memory, so there is no second kernel and no scratch in global memory.
// bytes moved: 4 * 128 * kv_heads * context per token. REQUIRES: block_tokens a multiple of 16; splits 1, 2, 4, 8 or 16.
// Softmax in fp32 (log2 domain); probabilities are rounded to bf16 for the second product, as flash attention does.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace qwen::kernels {

struct AttentionDecodeArgs {
  const __nv_bfloat16* qkv = nullptr;
  const __nv_bfloat16* q_norm = nullptr;
  const __nv_bfloat16* k_norm = nullptr;
  const __nv_bfloat16* cos_sin = nullptr;
  __nv_bfloat16* k_cache = nullptr;
  __nv_bfloat16* v_cache = nullptr;
  const int32_t* block_table = nullptr;
  const int32_t* context = nullptr;
  __nv_bfloat16* out = nullptr;
  float norm_eps = 1e-6f;
  int tokens = 0, heads = 0, kv_heads = 0, block_tokens = 0, table_stride = 0;
  int splits = 0;  // 0: chosen from tokens and kv_heads
};
cudaError_t AttentionDecode(const AttentionDecodeArgs& args, cudaStream_t stream);

}  // namespace qwen::kernels
