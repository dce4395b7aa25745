#include "controller/plan/status.h"

#include <algorithm>

#include "stage/contract/pod_contract.h"

namespace qwen::plan {
namespace {

class Conditions {
 public:
  Conditions(const Observed& observed, int64_t now_seconds) : observed_(observed), now_seconds_(now_seconds) {}

  void Set(const char* type, bool value, const Blocker& why) {
    api::Condition condition{.type = type, .value = value, .reason = why.reason, .message = why.message, .observed_generation = observed_.generation,
                             .last_transition_seconds = now_seconds_};
    const api::Condition* before = FindCondition(observed_.previous, type);
    if (before != nullptr && before->value == value) condition.last_transition_seconds = before->last_transition_seconds;
    list_.push_back(std::move(condition));
  }
  void Keep(const char* type) {
    if (const api::Condition* before = FindCondition(observed_.previous, type); before != nullptr) list_.push_back(*before);
  }
  std::vector<api::Condition> Take() { return std::move(list_); }

 private:
  const Observed& observed_;
  const int64_t now_seconds_;
  std::vector<api::Condition> list_;
};

// What the API server refused: of quota it is said so, because that is the one that somebody else must solve.
Blocker Refusal(const std::string& error) {
  return {70, error.find("exceeded quota") != std::string::npos ? "QuotaExceeded" : "WriteRefused", error};
}

}  // namespace

const api::Condition* FindCondition(const api::PipelineStatus& status, std::string_view type) {
  const auto found = std::find_if(status.conditions.begin(), status.conditions.end(), [&](const api::Condition& c) { return c.type == type; });
  return found == status.conditions.end() ? nullptr : &*found;
}

api::PipelineStatus MakeStatus(const Observed& observed, const std::vector<GroupPlan>& groups, const std::string& error, int64_t now_seconds,
                               const WeightsPlan* weights) {
  const api::Spec& spec = observed.pipeline.spec;
  api::PipelineStatus status = observed.previous;
  status.observed_generation = observed.generation;
  status.selector = std::string(contract::kLabelPipeline) + "=" + observed.pipeline.metadata.name + "," + std::string(contract::kLabelRole) + "=" +
                    std::string(contract::kRoleHead);
  Conditions conditions(observed, now_seconds);
  if (!error.empty()) {
    const Blocker why{100, "InvalidSpec", error};
    conditions.Set("Ready", false, why);
    conditions.Set("Progressing", false, why);
    conditions.Set("Failed", true, why);
    conditions.Keep("WeightsReady");
    status.conditions = conditions.Take();
    return status;
  }

  status.groups.clear();
  status.replicas = status.ready_replicas = 0;
  int32_t stages_ready = 0;
  const int32_t wanted = spec.suspend || observed.deleting ? 0 : spec.replicas;
  std::optional<Blocker> worst;
  bool failed = false;
  for (const GroupPlan& group : groups) {
    if (group.blocker && (!worst || group.blocker->rank > worst->rank)) worst = group.blocker;
    if (!group.record) continue;
    ++status.replicas;
    status.ready_replicas += group.ready;
    stages_ready += group.stages_ready;
    status.restarts += group.restarted;
    status.epoch = std::max(status.epoch, group.highest_epoch());
    failed |= group.record->phase == api::GroupPhase::kFailed;
    status.groups.push_back(*group.record);
  }
  status.stages = std::to_string(stages_ready) + "/" + std::to_string(wanted * spec.stages.size());
  if (!observed.write_error.empty() && (!worst || worst->rank < 70)) worst = Refusal(observed.write_error);

  if (weights != nullptr && !weights->ready && wanted > 0 && (!worst || worst->rank < weights->state.rank)) worst = weights->state;
  const std::string serve = std::to_string(status.ready_replicas) + " of " + std::to_string(wanted) + (wanted == 1 ? " replica serves" : " replicas serve");
  const bool ready = wanted > 0 && status.ready_replicas == wanted;
  Blocker why{0, "AllReplicasReady", serve};
  if (!ready && worst) why = *worst;
  if (!ready && !worst) why = spec.suspend ? Blocker{0, "Suspended", "spec.suspend is set; nothing runs"} : Blocker{0, "ScaledToZero", "spec.replicas is 0"};
  conditions.Set("Ready", ready, why);
  conditions.Set("Progressing", !failed && worst && worst->rank < 100, worst.value_or(why));
  conditions.Set("Failed", failed, failed ? *worst : Blocker{0, "NotFailed", "restarts are tried as the budget allows"});
  if (weights != nullptr) {
    conditions.Set("WeightsReady", weights->ready, weights->state);
  } else {
    conditions.Keep("WeightsReady");
  }
  status.conditions = conditions.Take();
  return status;
}

}  // namespace qwen::plan
