#include "stage/ops/attention.h"

#include <optional>

#include "stage/base/check.h"

namespace qwen::ops {
namespace {

// (tokens, kv_heads, d) of a whole sequence out of its blocks, as (1, kv_heads, tokens, d).
at::Tensor Gather(const at::Tensor& cache, const AttentionSpan& span) {
  const int64_t length = span.kv_begin + span.row_count;
  return cache.index_select(0, span.block_table).flatten(0, 1).narrow(0, 0, length).transpose(0, 1).unsqueeze(0);
}

at::Tensor RepeatHeads(const at::Tensor& x, int64_t times) {  // (1, kv_heads, n, d) -> (1, kv_heads * times, n, d)
  if (times == 1) return x;
  return x.unsqueeze(2).expand({1, x.size(1), times, x.size(2), x.size(3)}).reshape({1, -1, x.size(2), x.size(3)});
}

}  // namespace

at::Tensor CausalMask(int64_t kv_begin, int64_t row_count, at::Device device) {
  if (kv_begin == 0 || row_count == 1) return at::Tensor();
  const auto options = at::TensorOptions().dtype(at::kLong).device(device);
  const at::Tensor key = at::arange(kv_begin + row_count, options).unsqueeze(0);
  const at::Tensor query = at::arange(kv_begin, kv_begin + row_count, options).unsqueeze(1);
  return key.le(query).unsqueeze(0).unsqueeze(0);
}

at::Tensor PagedAttention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const PagedKv& cache,
                          const at::Tensor& slots, const std::vector<AttentionSpan>& spans, double scale) {
  QP_CHECK(!spans.empty());
  const int64_t tokens = q.size(0), heads = q.size(1), kv_heads = k.size(1), head_dim = q.size(2);
  cache.keys.flatten(0, 1).index_copy_(0, slots, k);
  cache.values.flatten(0, 1).index_copy_(0, slots, v);

  at::Tensor out;
  if (spans.size() > 1) out = at::empty({tokens, heads, head_dim}, q.options());
  for (const AttentionSpan& span : spans) {
    const at::Tensor query = q.narrow(0, span.row_begin, span.row_count).transpose(0, 1).unsqueeze(0);
    at::Tensor keys, values;
    if (span.kv_begin == 0) {  // the whole sequence is in this batch: no need to read it back
      keys = k.narrow(0, span.row_begin, span.row_count).transpose(0, 1).unsqueeze(0);
      values = v.narrow(0, span.row_begin, span.row_count).transpose(0, 1).unsqueeze(0);
    } else {
      keys = Gather(cache.keys, span);
      values = Gather(cache.values, span);
    }
    std::optional<at::Tensor> mask;
    if (span.mask.defined()) {
      mask = span.mask;
      keys = RepeatHeads(keys, heads / kv_heads);
      values = RepeatHeads(values, heads / kv_heads);
    }
    const bool causal = !mask && span.row_count > 1;
    const bool grouped = !mask && heads != kv_heads;
    const at::Tensor rows =
        at::scaled_dot_product_attention(query, keys, values, mask, /*dropout_p=*/0.0, causal, scale, grouped)
            .squeeze(0)
            .transpose(0, 1);  // (row_count, heads, d)
    if (spans.size() == 1) return rows.reshape({tokens, heads * head_dim});
    out.narrow(0, span.row_begin, span.row_count).copy_(rows);
  }
  return out.view({tokens, heads * head_dim});
}

}  // namespace qwen::ops
