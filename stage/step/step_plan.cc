#include "stage/step/step_plan.h"

#include <set>

namespace qwen::step {

int64_t StepPlan::token_count() const {
  int64_t count = 0;
  for (const SequenceSpan& span : spans) count += static_cast<int64_t>(span.tokens.size());
  return count;
}

int64_t StepPlan::vision_token_count() const {
  int64_t count = 0;
  for (const SequenceSpan& span : spans) {
    for (const VisionSlice& slice : span.vision) count += slice.count;
  }
  return count;
}

int64_t StepPlan::sample_count() const {
  int64_t count = 0;
  for (const SequenceSpan& span : spans) count += span.sample;
  return count;
}

namespace {

Status Bad(size_t span, const std::string& what) {
  return InvalidArgumentError("plan.spans[" + std::to_string(span) + "]." + what);
}

Status ValidateTokens(const std::vector<int32_t>& tokens, const PlanLimits& limits, const std::string& where) {
  for (int32_t token : tokens) {
    if (token < 0 || token >= limits.vocab_size) return InvalidArgumentError(where + ": id " + std::to_string(token) + " out of the vocabulary");
  }
  return OkStatus();
}

Status ValidateSpan(const SequenceSpan& span, size_t index, const PlanLimits& limits) {
  if (span.tokens.empty()) return Bad(index, "tokens: empty");
  if (span.positions.size() != span.tokens.size()) return Bad(index, "positions: not as many as tokens");
  if (span.begin < 0) return Bad(index, "begin: negative");
  const int64_t end = int64_t{span.begin} + static_cast<int64_t>(span.tokens.size());
  if (end > limits.max_sequence_tokens) return Bad(index, "begin: past max_sequence_tokens");
  const int64_t blocks = (end + limits.block_tokens - 1) / limits.block_tokens;
  const auto given = static_cast<int64_t>(span.blocks.size());
  if (given < blocks || given > blocks + 1) return Bad(index, "blocks: " + std::to_string(given) + ", expected " + std::to_string(blocks));
  for (BlockId block : span.blocks) {
    if (block < 0 || block >= limits.block_count) return Bad(index, "blocks: id " + std::to_string(block) + " out of range");
  }
  if (span.slot < 0 || span.slot >= limits.max_slots) return Bad(index, "slot: out of range");
  RETURN_IF_ERROR(ValidateTokens(span.tokens, limits, "plan.spans[" + std::to_string(index) + "].tokens"));
  for (const Position& p : span.positions) {
    if (p.t < 0 || p.h < 0 || p.w < 0) return Bad(index, "positions: negative");
  }
  int64_t at = 0;
  for (const VisionSlice& slice : span.vision) {
    if (slice.count <= 0 || slice.feature_begin < 0 || slice.span_offset < at) return Bad(index, "vision: not ascending");
    at = int64_t{slice.span_offset} + slice.count;
    if (at > static_cast<int64_t>(span.tokens.size())) return Bad(index, "vision: past the span's end");
  }
  const size_t words = (static_cast<size_t>(limits.vocab_size) + 31) / 32;
  if (!span.allowed.empty() && span.allowed.size() != words) return Bad(index, "allowed: wrong length");
  return OkStatus();
}

}  // namespace

Status ValidatePlan(const StepPlan& plan, const PlanLimits& limits) {
  if (plan.spans.empty()) return InvalidArgumentError("plan.spans: empty");
  if (plan.spans.size() > static_cast<size_t>(limits.max_slots)) return InvalidArgumentError("plan.spans: more than max_slots");
  if (plan.starts.size() > static_cast<size_t>(limits.max_slots)) return InvalidArgumentError("plan.starts: more than max_slots");
  if (plan.token_count() > limits.max_batch_tokens) return InvalidArgumentError("plan.spans: more tokens than max_batch_tokens");
  std::set<int32_t> slots;
  for (size_t i = 0; i < plan.spans.size(); ++i) {
    RETURN_IF_ERROR(ValidateSpan(plan.spans[i], i, limits));
    if (!slots.insert(plan.spans[i].slot).second) return Bad(i, "slot: used twice");
  }
  for (size_t i = 0; i < plan.starts.size(); ++i) {
    const SequenceStart& start = plan.starts[i];
    const std::string where = "plan.starts[" + std::to_string(i) + "]";
    if (start.slot < 0 || start.slot >= limits.max_slots) return InvalidArgumentError(where + ".slot: out of range");
    if (start.tokens.size() > static_cast<size_t>(limits.max_sequence_tokens)) return InvalidArgumentError(where + ".tokens: too many");
    if (start.prompt_tokens < 0 || start.prompt_tokens > static_cast<int64_t>(start.tokens.size())) {
      return InvalidArgumentError(where + ".prompt_tokens: out of range");
    }
    RETURN_IF_ERROR(ValidateTokens(start.tokens, limits, where + ".tokens"));
    for (const auto& [token, bias] : start.params.logit_bias) {
      if (token < 0 || token >= limits.vocab_size) return InvalidArgumentError(where + ".params.logit_bias: id out of range");
      (void)bias;
    }
    RETURN_IF_ERROR(ValidateTokens(start.params.stop_tokens, limits, where + ".params.stop_tokens"));
  }
  return OkStatus();
}

}  // namespace qwen::step
