#include "stage/sampling/sampler.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <map>

namespace qwen::sampling {
namespace {

// argmax of the rows whose token_limit is `limit`, lowest id among equal maxima (at::argmax keeps the first index).
std::vector<int64_t> GreedyTokens(const at::Tensor& logits, const std::vector<int64_t>& rows, int32_t limit) {
  const int64_t vocab = logits.size(1);
  const int64_t width = limit > 0 ? std::min<int64_t>(limit, vocab) : vocab;
  at::Tensor chosen = logits;
  if (static_cast<int64_t>(rows.size()) != logits.size(0)) {
    chosen = logits.index_select(0, at::tensor(rows, at::TensorOptions().dtype(at::kLong)).to(logits.device()));
  }
  const at::Tensor tokens = chosen.narrow(1, 0, width).argmax(1).cpu();
  const int64_t* data = tokens.const_data_ptr<int64_t>();
  return {data, data + tokens.numel()};
}

}  // namespace

Sampler::Sampler(const Options& options) : slots_(options.max_slots) { QP_CHECK(options.max_slots > 0); }

Result<step::StepResult> Sampler::Step(const step::StepPlan& plan, const at::Tensor& logits) {
  for (const step::SequenceStart& start : plan.starts) {
    if (start.slot < 0 || start.slot >= static_cast<int32_t>(slots_.size())) return InvalidArgumentError("starts.slot: out of range");
    slots_[start.slot] = SlotHistory(start);
  }
  step::StepResult result{.epoch = plan.epoch, .step = plan.step};
  std::vector<const step::SequenceSpan*> spans;
  std::map<int32_t, std::vector<int64_t>> greedy;  // token_limit -> rows
  for (const step::SequenceSpan& span : plan.spans) {
    if (!span.sample) continue;
    if (span.slot < 0 || span.slot >= static_cast<int32_t>(slots_.size())) return InvalidArgumentError("spans.slot: out of range");
    const SlotHistory& history = slots_[span.slot];
    if (history.sequence() != span.sequence) {
      return FailedPreconditionError("slot " + std::to_string(span.slot) + " was not started for this sequence");
    }
    if (history.PlainGreedy() && span.allowed.empty()) {
      greedy[history.params().token_limit].push_back(static_cast<int64_t>(spans.size()));
    }
    spans.push_back(&span);
  }
  if (spans.empty()) return result;
  QP_CHECK(logits.defined() && logits.dim() == 2 && logits.size(0) == static_cast<int64_t>(spans.size()));

  try {
    c10::InferenceMode inference;
    std::vector<bool> done(spans.size(), false);
    result.samples.resize(spans.size());
    for (const auto& [limit, rows] : greedy) {
      const std::vector<int64_t> tokens = GreedyTokens(logits, rows, limit);
      for (size_t i = 0; i < rows.size(); ++i) {
        result.samples[rows[i]] = {.sequence = spans[rows[i]]->sequence, .token = static_cast<int32_t>(tokens[i])};
        done[rows[i]] = true;
      }
    }
    for (size_t i = 0; i < spans.size(); ++i) {
      if (done[i]) continue;
      ASSIGN_OR_RETURN(result.samples[i], SampleRow(*spans[i], logits[static_cast<int64_t>(i)]));
    }
  } catch (const c10::Error& error) {
    return InternalError(std::string("sampling: ") + error.what_without_backtrace());
  }
  for (size_t i = 0; i < spans.size(); ++i) slots_[spans[i]->slot].Append(result.samples[i].token);
  return result;
}

Result<step::SampledToken> Sampler::SampleRow(const step::SequenceSpan& span, const at::Tensor& row) {
  const SlotHistory& history = slots_[span.slot];
  const at::Tensor raw = row.to(at::kCPU, at::kFloat).contiguous();
  const std::span<const float> logits(raw.const_data_ptr<float>(), static_cast<size_t>(raw.numel()));
  scratch_.assign(logits.begin(), logits.end());
  ApplyConstraints(scratch_, history, span.allowed);
  step::SampledToken sampled{.sequence = span.sequence};
  ASSIGN_OR_RETURN(sampled.token, Choose(scratch_, history.params(), history.generated()));
  if (history.params().logprobs >= 0) FillLogprobs(logits, history.params().logprobs, sampled);
  return sampled;
}

}  // namespace qwen::sampling
