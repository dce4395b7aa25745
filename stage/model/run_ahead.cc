#include "stage/model/run_ahead.h"

#include <algorithm>

namespace qwen::model {
namespace {

bool IsDecode(const step::SequenceSpan& span) { return span.tokens.size() == 1 && span.sample && span.vision.empty(); }

}  // namespace

std::optional<step::StepPlan> NextDecode(const step::StepPlan& done, std::span<const step::SampledToken> samples, int32_t block_tokens,
                                         int32_t max_sequence_tokens) {
  if (samples.size() != done.spans.size()) return std::nullopt;
  step::StepPlan next{.epoch = done.epoch, .step = done.step + 1};
  next.spans.reserve(done.spans.size());
  for (size_t i = 0; i < done.spans.size(); ++i) {
    const step::SequenceSpan& span = done.spans[i];
    const int32_t begin = span.begin + 1;
    if (!IsDecode(span) || samples[i].sequence != span.sequence || begin >= max_sequence_tokens) return std::nullopt;
    if (static_cast<int64_t>(span.blocks.size()) * block_tokens <= begin) return std::nullopt;
    const step::Position& at = span.positions[0];
    next.spans.push_back({.sequence = span.sequence,
                          .slot = span.slot,
                          .begin = begin,
                          .tokens = {samples[i].token},
                          .positions = {{at.t + 1, at.h + 1, at.w + 1}},
                          .blocks = span.blocks,
                          .sample = true});
  }
  return next;
}

std::optional<std::vector<int64_t>> RowsOf(const step::StepPlan& ahead, const step::StepPlan& plan) {
  if (plan.epoch != ahead.epoch || plan.spans.empty()) return std::nullopt;
  std::vector<int64_t> rows;
  rows.reserve(plan.spans.size());
  size_t at = 0;
  for (const step::SequenceSpan& span : plan.spans) {
    while (at < ahead.spans.size() && ahead.spans[at].sequence != span.sequence) ++at;
    if (at == ahead.spans.size() || !IsDecode(span)) return std::nullopt;
    const step::SequenceSpan& guess = ahead.spans[at];
    // The last block may be one that only the guess or only the plan has, ahead of its use.
    const size_t blocks = std::min(guess.blocks.size(), span.blocks.size());
    if (span.begin != guess.begin || span.tokens != guess.tokens || span.positions != guess.positions ||
        !std::equal(span.blocks.begin(), span.blocks.begin() + static_cast<std::ptrdiff_t>(blocks), guess.blocks.begin())) {
      return std::nullopt;
    }
    rows.push_back(static_cast<int64_t>(at++));
  }
  return rows;
}

}  // namespace qwen::model
