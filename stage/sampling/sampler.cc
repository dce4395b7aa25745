#include "stage/sampling/sampler.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <map>
#include <utility>

#include "stage/base/log.h"
#include "stage/sampling/device_rows.h"

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

Sampler::Sampler(const Options& options) : device_(options.device), slots_(options.max_slots) { QP_CHECK(options.max_slots > 0); }

Result<step::StepResult> Sampler::Step(const step::StepPlan& plan, const at::Tensor& logits, bool begun) {
  for (const step::SequenceStart& start : plan.starts) {
    if (start.slot < 0 || start.slot >= static_cast<int32_t>(slots_.size())) return InvalidArgumentError("starts.slot: out of range");
    slots_[start.slot] = {.history = SlotHistory(start)};
  }
  const std::vector<Begun> ahead = std::exchange(ahead_, {});
  step::StepResult result{.epoch = plan.epoch, .step = plan.step};
  std::vector<const step::SequenceSpan*> spans;
  for (const step::SequenceSpan& span : plan.spans) {
    if (!span.sample) continue;
    if (span.slot < 0 || span.slot >= static_cast<int32_t>(slots_.size())) return InvalidArgumentError("spans.slot: out of range");
    Slot& slot = slots_[span.slot];
    if (slot.history.sequence() != span.sequence) {
      return FailedPreconditionError("slot " + std::to_string(span.slot) + " was not started for this sequence");
    }
    slot.masked = !span.allowed.empty();
    spans.push_back(&span);
  }
  if (spans.empty()) return result;
  QP_CHECK(logits.defined() && logits.dim() == 2 && logits.size(0) == static_cast<int64_t>(spans.size()));

  try {
    c10::InferenceMode inference;
    std::vector<bool> done(spans.size(), false);
    result.samples.resize(spans.size());
    const auto take = [&](size_t i, const kernels::SamplerResult& sampled) -> Status {
      ASSIGN_OR_RETURN(result.samples[i], TokenOf(sampled, slots_[spans[i]->slot].history, logits.size(1)));
      done[i] = true;
      return OkStatus();
    };
    if (begun && !ahead.empty()) {
      ASSIGN_OR_RETURN(const std::span<const kernels::SamplerResult> sampled, device_->Wait());
      for (size_t i = 0; i < spans.size(); ++i) {
        const step::SequenceSpan& span = *spans[i];
        const auto row = std::find_if(ahead.begin(), ahead.end(), [&](const Begun& b) { return b.slot == span.slot; });
        if (row == ahead.end() || !span.allowed.empty()) continue;
        if (row->sequence != span.sequence || row->generated != slots_[span.slot].history.generated()) continue;
        RETURN_IF_ERROR(take(i, sampled[static_cast<size_t>(row - ahead.begin())]));
      }
    }
    std::vector<size_t> on_device;
    if (device_ != nullptr && device_->Takes(logits)) {
      std::vector<ops::RowToSample> rows;
      std::vector<Begun> asked;
      for (size_t i = 0; i < spans.size(); ++i) {
        if (done[i]) continue;
        std::optional<ops::RowToSample> row = RowFor(*spans[i], static_cast<int64_t>(i));
        if (!row) continue;
        on_device.push_back(i);
        rows.push_back(*row);
        asked.push_back({.slot = spans[i]->slot, .sequence = spans[i]->sequence});
        done[i] = true;
      }
      if (!rows.empty()) RETURN_IF_ERROR(Enqueue(logits, rows, asked));
    }
    std::map<int32_t, std::vector<int64_t>> greedy;  // token_limit -> rows
    for (size_t i = 0; i < spans.size(); ++i) {
      if (done[i]) continue;
      const SlotHistory& history = slots_[spans[i]->slot].history;
      if (history.PlainGreedy() && spans[i]->allowed.empty()) {
        greedy[history.params().token_limit].push_back(static_cast<int64_t>(i));
      } else {
        ASSIGN_OR_RETURN(result.samples[i], SampleRow(*spans[i], logits[static_cast<int64_t>(i)]));
      }
    }
    for (const auto& [limit, rows] : greedy) {
      const std::vector<int64_t> tokens = GreedyTokens(logits, rows, limit);
      for (size_t i = 0; i < rows.size(); ++i) {
        result.samples[rows[i]] = {.sequence = spans[rows[i]]->sequence, .token = static_cast<int32_t>(tokens[i])};
      }
    }
    if (!on_device.empty()) {
      ASSIGN_OR_RETURN(const std::span<const kernels::SamplerResult> sampled, device_->Wait());
      for (size_t i = 0; i < on_device.size(); ++i) RETURN_IF_ERROR(take(on_device[i], sampled[i]));
    }
  } catch (const c10::Error& error) {
    return InternalError(std::string("sampling: ") + error.what_without_backtrace());
  }
  for (size_t i = 0; i < spans.size(); ++i) slots_[spans[i]->slot].history.Append(result.samples[i].token);
  return result;
}

void Sampler::BeginAhead(const step::StepPlan& next, const at::Tensor& logits) {
  ahead_.clear();
  if (device_ == nullptr || !logits.defined() || !device_->Takes(logits)) return;
  std::vector<ops::RowToSample> rows;
  std::vector<Begun> asked;
  int64_t logits_row = 0;
  for (const step::SequenceSpan& span : next.spans) {
    if (!span.sample) continue;
    const int64_t at = logits_row++;
    const Slot& slot = slots_[span.slot];
    if (slot.masked || slot.history.sequence() != span.sequence) continue;
    std::optional<ops::RowToSample> row = RowFor(span, at);
    if (!row) continue;
    rows.push_back(*row);
    asked.push_back({.slot = span.slot, .sequence = span.sequence, .generated = slot.history.generated()});
  }
  if (rows.empty() || !Enqueue(logits, rows, asked).ok()) return;  // a fault of the device is the next step's to report
  ahead_ = std::move(asked);
}

std::optional<ops::RowToSample> Sampler::RowFor(const step::SequenceSpan& span, int64_t logits_row) {
  std::optional<ops::RowToSample> row = DeviceRow(slots_[span.slot].history, span.allowed);
  if (!row) return std::nullopt;
  row->row.logits_row = static_cast<int32_t>(logits_row);
  if (HasPenalties(slots_[span.slot].history.params()) && !UpdateState(span.slot, row->row)) return std::nullopt;
  return row;
}

bool Sampler::UpdateState(int32_t index, kernels::SamplerRow& row) {
  Slot& slot = slots_[index];
  const std::vector<int32_t>& tokens = slot.history.tokens();
  const int64_t count = static_cast<int64_t>(tokens.size()), missing = count - slot.on_device;
  row.state = index;
  if (slot.on_device >= 0 && missing <= 1) {
    if (missing == 1) row.append = tokens.back();
  } else {
    if (!states_fit_) return false;
    const Status set = device_->SetState(index, tokens, count - slot.history.generated());
    if (!set.ok()) {
      states_fit_ = false;
      log::Warning("rows with penalties are sampled on the host", {{"reason", set.message()}});
      return false;
    }
  }
  slot.on_device = count;
  return true;
}

Status Sampler::Enqueue(const at::Tensor& logits, const std::vector<ops::RowToSample>& rows, const std::vector<Begun>& begun) {
  Status status = device_->Enqueue(logits, rows);
  if (!status.ok()) {
    for (const Begun& row : begun) slots_[row.slot].on_device = -1;  // whether it was appended is not known
  }
  return status;
}

Result<step::SampledToken> Sampler::SampleRow(const step::SequenceSpan& span, const at::Tensor& row) {
  const SlotHistory& history = slots_[span.slot].history;
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
