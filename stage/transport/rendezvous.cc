#include "stage/transport/rendezvous.h"

#include <algorithm>

#include "stage/base/check.h"

namespace qwen::transport {
namespace {

std::string RangeText(const Hello& hello) { return std::to_string(hello.layer_begin) + ":" + std::to_string(hello.layer_end); }

// The smaller one, where the head's 0 means "as the stages allow".
int32_t Bound(int32_t head, int32_t stages) { return head > 0 ? std::min(head, stages) : stages; }

}  // namespace

Rendezvous::Rendezvous(const Options& options) : options_(options), epoch_(options.initial_epoch), backoff_micros_(options.backoff_min_micros) {
  QP_CHECK(options.stages > 0);
  members_.resize(static_cast<size_t>(options.stages));
  pod_epoch_max_.resize(members_.size());
}

Refusal Rendezvous::CheckJoin(const Hello& hello) const {
  QP_CHECK(hello.stage >= 0 && hello.stage < options_.stages);  // CheckIdentity came first
  const auto index = static_cast<size_t>(hello.stage);
  if (hello.pod_epoch < pod_epoch_max_[index]) {
    return {FailureCode::kStale, "made at epoch " + std::to_string(hello.pod_epoch) + ", epoch " +
                                     std::to_string(pod_epoch_max_[index]) + " of this stage was seen"};
  }
  const auto& old = members_[index];
  if (old && old->instance != hello.instance && old->pod_epoch == hello.pod_epoch) {
    return {FailureCode::kBusy, "stage " + std::to_string(hello.stage) + " is connected from another process"};
  }
  if (hello.layer_begin < 0 || hello.layer_begin >= hello.layer_end || hello.layer_end > options_.layers) {
    return {FailureCode::kConfig, "layers " + RangeText(hello) + " out of 0:" + std::to_string(options_.layers)};
  }
  if (hello.stage == 0 && hello.layer_begin != 0) return {FailureCode::kConfig, "stage 0 must begin at layer 0"};
  if (hello.stage == options_.stages - 1 && hello.layer_end != options_.layers) {
    return {FailureCode::kConfig, "the last stage must end at layer " + std::to_string(options_.layers)};
  }
  if (hello.stage > 0 && members_[index - 1] && members_[index - 1]->layer_end != hello.layer_begin) {
    return {FailureCode::kConfig, "layers " + RangeText(hello) + " do not follow stage " + std::to_string(hello.stage - 1) + "'s " +
                                      RangeText(*members_[index - 1])};
  }
  if (hello.stage + 1 < options_.stages && members_[index + 1] && members_[index + 1]->layer_begin != hello.layer_end) {
    return {FailureCode::kConfig, "layers " + RangeText(hello) + " do not precede stage " + std::to_string(hello.stage + 1) + "'s " +
                                      RangeText(*members_[index + 1])};
  }
  return {};
}

Rendezvous::Actions Rendezvous::Join(const Hello& hello, int64_t now_micros) {
  const auto index = static_cast<size_t>(hello.stage);
  QP_CHECK(!members_.at(index).has_value());
  members_[index] = hello;
  pod_epoch_max_[index] = std::max(pod_epoch_max_[index], hello.pod_epoch);
  Actions actions;
  TryAssemble(now_micros, actions);
  return actions;
}

Rendezvous::Actions Rendezvous::Loaded(int32_t stage, const StageCapacity& capacity, int64_t now_micros) {
  Actions actions;
  auto& member = members_.at(static_cast<size_t>(stage));
  if (!member || !member->loading) return actions;
  member->capacity = capacity;
  member->loading = false;
  TryAssemble(now_micros, actions);
  return actions;
}

Rendezvous::Actions Rendezvous::Assembled(int32_t stage, uint64_t epoch, int64_t now_micros) {
  Actions actions;
  (void)now_micros;
  if (state_ != State::kAssembling || epoch != epoch_) return actions;  // of an attempt that is over
  assembled_.insert(stage);
  if (assembled_.size() < members_.size()) return actions;
  state_ = State::kReady;
  backoff_micros_ = options_.backoff_min_micros;
  actions.ready = step::GroupReady{.epoch = epoch_, .limits = GroupLimits(), .stages = options_.stages};
  return actions;
}

Rendezvous::Actions Rendezvous::Failed(int32_t stage, uint64_t epoch, const std::string& reason, int64_t now_micros) {
  Actions actions;
  if (state_ == State::kWaiting || epoch != epoch_) return actions;
  Lose("stage " + std::to_string(stage) + ": " + reason, now_micros, /*back_off=*/true, actions);
  return actions;
}

Rendezvous::Actions Rendezvous::Leave(int32_t stage, const std::string& reason, int64_t now_micros) {
  Actions actions;
  auto& member = members_.at(static_cast<size_t>(stage));
  if (!member) return actions;
  member.reset();
  Lose("stage " + std::to_string(stage) + " lost: " + reason, now_micros, /*back_off=*/false, actions);
  return actions;
}

Rendezvous::Actions Rendezvous::Tick(int64_t now_micros) {
  Actions actions;
  if (state_ == State::kAssembling && now_micros >= assemble_deadline_micros_) {
    std::string missing;
    for (int32_t stage = 0; stage < options_.stages; ++stage) {
      if (!assembled_.contains(stage)) missing += (missing.empty() ? "" : ", ") + std::to_string(stage);
    }
    Lose("edges not up in time; waiting for stage " + missing, now_micros, /*back_off=*/true, actions);
  }
  TryAssemble(now_micros, actions);
  return actions;
}

void Rendezvous::Lose(const std::string& reason, int64_t now_micros, bool back_off, Actions& actions) {
  if (state_ == State::kWaiting) return;
  if (state_ == State::kReady) actions.lost = step::GroupLost{.epoch = epoch_, .reason = reason};
  state_ = State::kWaiting;
  assembled_.clear();
  if (back_off) {  // a group that falls apart again and again must not spin
    next_attempt_micros_ = now_micros + backoff_micros_;
    backoff_micros_ = std::min(backoff_micros_ * 2, options_.backoff_max_micros);
  }
  for (int32_t stage = 0; stage < options_.stages; ++stage) {
    if (!connected(stage)) continue;
    actions.notify.emplace_back(stage, Failure{.epoch = epoch_, .code = FailureCode::kEpochLost, .reason = reason, .fatal = false, .hmac = {}});
  }
}

std::optional<std::string> Rendezvous::FindMismatch(int32_t& stage) const {
  const int32_t expected = options_.limits.block_tokens > 0 ? options_.limits.block_tokens : members_[0]->capacity.block_tokens;
  for (stage = 0; stage < options_.stages; ++stage) {
    const int32_t found = members_[static_cast<size_t>(stage)]->capacity.block_tokens;
    if (found != expected) return "block_tokens " + std::to_string(found) + ", the group has " + std::to_string(expected);
  }
  return std::nullopt;
}

step::PlanLimits Rendezvous::GroupLimits() const {
  StageCapacity least = members_[0]->capacity;
  for (const auto& member : members_) {
    const StageCapacity& c = member->capacity;
    least.block_count = std::min(least.block_count, c.block_count);
    least.max_slots = std::min(least.max_slots, c.max_slots);
    least.max_batch_tokens = std::min(least.max_batch_tokens, c.max_batch_tokens);
    least.max_sequence_tokens = std::min(least.max_sequence_tokens, c.max_sequence_tokens);
  }
  const step::PlanLimits& head = options_.limits;
  return {.block_tokens = least.block_tokens,
          .block_count = Bound(head.block_count, least.block_count),
          .max_slots = Bound(head.max_slots, least.max_slots),
          .max_batch_tokens = Bound(head.max_batch_tokens, least.max_batch_tokens),
          .max_sequence_tokens = Bound(head.max_sequence_tokens, least.max_sequence_tokens),
          .vocab_size = head.vocab_size};
}

void Rendezvous::TryAssemble(int64_t now_micros, Actions& actions) {
  if (state_ != State::kWaiting || now_micros < next_attempt_micros_) return;
  for (const auto& member : members_) {
    if (!member || member->loading) return;
  }
  int32_t wrong = 0;
  if (const auto mismatch = FindMismatch(wrong)) {
    actions.drop.emplace_back(wrong, Failure{.epoch = epoch_, .code = FailureCode::kConfig, .reason = *mismatch, .fatal = true, .hmac = {}});
    members_[static_cast<size_t>(wrong)].reset();
    return;
  }
  for (const auto& member : members_) epoch_ = std::max({epoch_, member->epoch, member->pod_epoch});
  ++epoch_;
  state_ = State::kAssembling;
  assembled_.clear();
  assemble_deadline_micros_ = now_micros + options_.assemble_timeout_micros;
  const int32_t block_count = GroupLimits().block_count;
  for (int32_t stage = 0; stage < options_.stages; ++stage) {
    const bool last = stage + 1 == options_.stages;
    actions.assemble.emplace_back(stage, Assemble{.epoch = epoch_,
                                                  .next_address = last ? "" : members_[static_cast<size_t>(stage) + 1]->data_address,
                                                  .block_count = block_count});
  }
}

}  // namespace qwen::transport
