#include "stage/model/batch.h"

#include "stage/base/check.h"

namespace qwen::model {
namespace {

at::Tensor Upload(const std::vector<int64_t>& values, at::Device device) {
  return at::tensor(values, at::TensorOptions().dtype(at::kLong)).to(device);
}

ops::RowGroups Groups(const std::vector<int64_t>& counts, RowGrouping grouping) {
  ops::RowGroups groups;
  int64_t begin = 0;
  for (int64_t count : counts) {
    if (grouping == RowGrouping::kPerSpan || groups.empty()) {
      groups.push_back({begin, count});
    } else {
      groups.back().count += count;
    }
    begin += count;
  }
  return groups;
}

// Positions of the whole plan, axis-major. int32 to float32 is exact up to 2^24, far beyond any context length.
at::Tensor Positions(const step::StepPlan& plan, int64_t tokens, at::Device device) {
  at::Tensor positions = at::empty({3, tokens}, at::kFloat);
  float* out = positions.mutable_data_ptr<float>();
  int64_t row = 0;
  for (const step::SequenceSpan& span : plan.spans) {
    for (const step::Position& position : span.positions) {
      out[row] = static_cast<float>(position.t);
      out[tokens + row] = static_cast<float>(position.h);
      out[2 * tokens + row] = static_cast<float>(position.w);
      ++row;
    }
  }
  return positions.to(device);
}

}  // namespace

Batch MakeBatch(const step::StepPlan& plan, const BatchOptions& options) {
  Batch batch;
  batch.tokens = plan.token_count();
  std::vector<int64_t> token_ids, cache_rows, visual_rows, sample_rows, span_counts;
  token_ids.reserve(batch.tokens);
  cache_rows.reserve(batch.tokens);
  int64_t row = 0;
  for (const step::SequenceSpan& span : plan.spans) {
    const int64_t count = static_cast<int64_t>(span.tokens.size());
    QP_CHECK(count > 0 && span.positions.size() == span.tokens.size());
    token_ids.insert(token_ids.end(), span.tokens.begin(), span.tokens.end());
    for (int64_t i = span.begin; i < span.begin + count; ++i) {
      QP_CHECK_LT(i / options.block_tokens, static_cast<int64_t>(span.blocks.size()));
      cache_rows.push_back(span.blocks[i / options.block_tokens] * options.block_tokens + i % options.block_tokens);
    }
    for (const step::VisionSlice& slice : span.vision) {
      for (int64_t i = 0; i < slice.count; ++i) visual_rows.push_back(row + slice.span_offset + i);
    }
    if (span.sample) sample_rows.push_back(row + count - 1);
    span_counts.push_back(count);
    const int64_t first = row;
    row += count;
    if (!options.attention) continue;
    ops::AttentionSpan attention{.row_begin = first, .row_count = count, .kv_begin = span.begin};
    if (span.begin > 0) {
      attention.block_table = Upload({span.blocks.begin(), span.blocks.end()}, options.device);
      attention.mask = ops::CausalMask(span.begin, count, options.device);
    }
    batch.spans.push_back(std::move(attention));
  }
  batch.token_ids = Upload(token_ids, options.device);
  batch.positions = Positions(plan, batch.tokens, options.device);
  batch.cache_rows = Upload(cache_rows, options.device);
  if (!visual_rows.empty()) batch.visual_rows = Upload(visual_rows, options.device);
  if (!sample_rows.empty()) batch.sample_rows = Upload(sample_rows, options.device);
  batch.groups = Groups(span_counts, options.grouping);
  batch.sample_groups = Groups(std::vector<int64_t>(sample_rows.size(), 1), options.grouping);
  return batch;
}

}  // namespace qwen::model
