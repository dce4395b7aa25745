// stage/ops/attention.h — causal attention of a batch of sequences over a paged KV cache.
//
// Each sequence is one call of scaled_dot_product_attention over its gathered keys and values, in the three forms that the
// reference uses (transformers 5.17.0 integrations/sdpa_attention.py, masking_utils.py): a whole prompt is causal without
// a mask, one new token sees everything without a mask (both with enable_gqa), and a chunk behind a cached prefix has a
// boolean mask and repeated K/V heads. So the first two give the bits of the reference; the third those of its cached path.
// A sequence's result does not depend on the rest of the batch. Thread safety: pure apart from the cache tensors.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace qwen::ops {

struct AttentionSpan {
  int64_t row_begin = 0, row_count = 0;  // the sequence's rows in the batch
  int64_t kv_begin = 0;                  // its tokens in the cache before this batch; kv length = kv_begin + row_count
  at::Tensor block_table;                // (blocks) int64, block i holds tokens [i*block_tokens, (i+1)*block_tokens)
  at::Tensor mask;                       // (1, 1, row_count, kv length) bool, from CausalMask; undefined if not needed
};

// True where a query may look. Undefined when kv_begin == 0 or row_count == 1: no mask is needed there.
at::Tensor CausalMask(int64_t kv_begin, int64_t row_count, at::Device device);

struct PagedKv {
  at::Tensor keys, values;  // (blocks, block_tokens, kv_heads, head_dim), model dtype
};
// Writes the batch's k and v (tokens, kv_heads, head_dim) to the cache rows `slots` (tokens) int64 = block * block_tokens +
// offset, then attends. q (tokens, heads, head_dim) -> (tokens, heads * head_dim).
at::Tensor PagedAttention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const PagedKv& cache,
                          const at::Tensor& slots, const std::vector<AttentionSpan>& spans, double scale);

}  // namespace qwen::ops
