#include "controller/plan/plan.h"

#include <algorithm>
#include <map>

#include "controller/plan/group.h"
#include "controller/plan/scheduling.h"
#include "controller/plan/status.h"
#include "controller/plan/weights.h"

namespace qwen::plan {
namespace {

struct Replica {
  std::optional<api::GroupRecord> record;
  std::vector<const ObservedPod*> pods;
};

// Every replica that is wanted, remembered or still has pods.
std::map<int32_t, Replica> Replicas(const Observed& observed, int32_t wanted) {
  std::map<int32_t, Replica> replicas;
  for (int32_t replica = 0; replica < wanted; ++replica) replicas[replica];
  for (const api::GroupRecord& record : observed.previous.groups) replicas[record.replica].record = record;
  for (const ObservedPod& pod : observed.pods) replicas[pod.replica].pods.push_back(&pod);
  return replicas;
}

// Under its own revision, which may have had another number of stages.
bool Serves(const Replica& replica, const std::string& revision, int32_t stages) {
  if (!replica.record) return false;
  int32_t ready = 0, last = 0;
  for (const ObservedPod* pod : replica.pods) {
    if (!IsMember(*replica.record, *pod)) continue;
    last = std::max(last, pod->stage);
    ready += pod->serving();
  }
  return ready == (replica.record->revision == revision ? stages : last + 1) + 1;
}

void Tell(const Observed& observed, const GroupPlan& group, Actions& actions) {
  const std::string replica = group.record ? std::to_string(group.record->replica) : "";
  if (!group.failure.empty()) {
    const bool failed = group.record->phase == api::GroupPhase::kFailed;
    const char* reason = group.rollout_failed ? "RolloutFailed" : failed ? "GroupFailed" : group.mended ? "PodLost" : "GroupLost";
    const char* action = group.rollout_failed ? "KeepOldRevision" : failed ? "GiveUp" : group.mended ? "ReplacePod" : "RestartGroup";
    actions.notices.push_back({true, reason, action, "replica " + replica + ": " + group.failure});
  }
  if (group.record && !group.create.empty() && group.create.size() == static_cast<size_t>(observed.pipeline.spec.stages.size()) + 1)
    actions.notices.push_back({false, "GroupCreated", "CreatePods", "replica " + replica + " begins under epoch " + std::to_string(group.create.front().group.epoch)});
}

// What runs goes on running: an edit that cannot be carried out is no reason to stop serving.
Actions Reject(const Observed& observed, const std::string& error, int64_t now_seconds) {
  Actions actions;
  actions.status = MakeStatus(observed, {}, error, now_seconds);
  const api::Condition* before = FindCondition(observed.previous, "Ready");
  if (before == nullptr || before->reason != "InvalidSpec" || before->message != error) actions.notices.push_back({true, "InvalidSpec", "Reconcile", error});
  return actions;
}

void Wake(int64_t at_seconds, Actions& actions) { actions.wake_seconds = std::min(actions.wake_seconds.value_or(at_seconds), at_seconds); }

void Remove(const GroupPlan& group, Actions& actions) {
  for (const ObservedPod* pod : group.remove) actions.delete_pods.push_back({pod->name, pod->uid, pod->node_state == NodeState::kGone});
  if (group.wake_seconds) Wake(*group.wake_seconds, actions);
}

// Each group as on a scale down: its head finishes its requests, then its stages go. Services, Secret and the rest stay until then,
// and Kubernetes deletes them with the pipeline. Without the finalizer that already happens. The disruption budget goes with the
// stages: nothing serves any more that it could protect, and Kubernetes would count in its status how one pod after the other goes.
Actions Retire(const Observed& observed, int64_t now_seconds) {
  Actions actions;
  actions.status = observed.previous;
  if (!observed.has_finalizer) return actions;
  std::vector<GroupPlan> groups;
  bool empty = true, draining = false;
  for (const auto& [index, replica] : Replicas(observed, 0)) {
    // No revision: of the group as it is, whatever the spec says by now.
    groups.push_back(PlanGroup(observed.pipeline, {.replica = index, .wanted = false, .leaving = "Deleting", .known_epoch = observed.previous.epoch,
                                                   .now_seconds = now_seconds, .record = replica.record,
                                                   .pods = replica.pods}));
    // Kubernetes has been told to delete these; a node that does not answer must not keep the pipeline's object.
    const auto stuck = [](const ObservedPod* pod) { return pod->deleting && pod->node_state != NodeState::kFine; };
    empty &= !groups.back().record || (!replica.pods.empty() && std::all_of(replica.pods.begin(), replica.pods.end(), stuck));
    Remove(groups.back(), actions);
    draining |= groups.back().draining;
  }
  actions.remove_finalizer = empty;
  if (empty) return actions;
  if (!draining)
    for (const auto& [name, fingerprint] : observed.children)
      if (name.starts_with("PodDisruptionBudget/")) actions.delete_children.push_back(name);
  // Told of a refusal, of a head that takes its time and of pods that outstay their grace: the rest is over before anybody reads it.
  bool tell = !observed.write_error.empty();
  const auto tell_from = [&](int64_t at_seconds) {
    tell |= now_seconds >= at_seconds;
    if (now_seconds < at_seconds) Wake(at_seconds, actions);
  };
  for (const ObservedPod& pod : observed.pods) {
    if (!pod.deleting) continue;
    if (draining && pod.stage < 0) tell_from(pod.deleting_since_seconds + kTellSeconds);
    if (!draining) tell_from(pod.gone_by_seconds + 1);
  }
  if (!tell) return actions;
  // When it says something new; that one pod after the other is gone need not be written for every pod.
  api::PipelineStatus status = MakeStatus(observed, groups, "", now_seconds);
  if (status.conditions != observed.previous.conditions) actions.status = std::move(status);
  return actions;
}

void AddPodGroups(const Observed& observed, Actions& actions) {
  for (const ObservedPod& pod : observed.pods) {
    if (pod.stage >= 0 || pod.deleting) continue;
    if (auto group = PodGroup(observed.pipeline, {.replica = pod.replica, .epoch = pod.group_epoch}, pod.name, pod.uid)) actions.pod_groups.push_back(std::move(*group));
  }
}

void PlanChildren(const Observed& observed, Actions& actions) {
  std::map<std::string, std::string> unwanted = observed.children;
  for (nlohmann::json& child : Children(observed.pipeline)) {
    const std::string name = ChildName(child);
    const auto known = observed.children.find(name);
    if (known == observed.children.end() || known->second != Fingerprint(child)) actions.apply.push_back(std::move(child));
    unwanted.erase(name);
  }
  for (const auto& [name, fingerprint] : unwanted) actions.delete_children.push_back(name);
}

}  // namespace

Actions MakePlan(const Observed& observed, const Images& images, int64_t now_seconds) {
  if (observed.deleting) return Retire(observed, now_seconds);
  if (!observed.spec_error.empty()) return Reject(observed, observed.spec_error, now_seconds);
  Actions actions;
  const api::Spec& spec = observed.pipeline.spec;
  const Result<std::string> revision = observed.revision.empty() ? Revision(observed.pipeline, images) : observed.revision;
  if (!revision.ok()) return Reject(observed, revision.status().message(), now_seconds);

  actions.revision = *revision;
  actions.add_finalizer = !observed.has_finalizer;
  actions.create_secret = !observed.has_secret;
  PlanChildren(observed, actions);
  WeightsPlan weights = PlanWeights(observed, images);
  actions.create_weights = std::move(weights.create);
  const int32_t wanted = spec.suspend ? 0 : spec.replicas;
  const std::map<int32_t, Replica> replicas = Replicas(observed, wanted);
  int64_t epoch = observed.previous.epoch;  // one counter for all replicas: an epoch never comes back, not even after scaling down
  for (const ObservedPod& pod : observed.pods) epoch = std::max(epoch, pod.epoch);
  bool all_serve = true;
  for (int32_t replica = 0; replica < wanted; ++replica) all_serve &= Serves(replicas.at(replica), *revision, spec.stages.size());

  std::vector<GroupPlan> groups;
  for (const auto& [index, replica] : replicas) {
    GroupInput input{.replica = index, .wanted = index < wanted, .may_begin = weights.ready, .may_roll = all_serve, .spec_changed = observed.generation != observed.previous.observed_generation,
                     .revision = *revision, .next_epoch = epoch + 1, .known_epoch = observed.previous.epoch,
                     .now_seconds = now_seconds, .record = replica.record, .pods = replica.pods};
    const bool outdated = replica.record && replica.record->revision != *revision;
    if (outdated && all_serve && input.wanted) all_serve = false;  // this one's turn; the next waits until it serves again
    GroupPlan group = PlanGroup(observed.pipeline, input);
    epoch = std::max(epoch, group.highest_epoch());
    Remove(group, actions);
    std::map<int64_t, std::vector<nlohmann::json>> pods;  // by their own epoch: nearly always one
    for (const auto& [stage, made] : group.create) {
      std::vector<nlohmann::json>& all = pods[made.pod_epoch()];
      if (all.empty()) {
        Result<std::vector<nlohmann::json>> built = GroupPods(observed.pipeline, images, made);
        QP_CHECK(built.ok()) << built.status().ToString();  // Revision made them before
        all = std::move(built).value();
      }
      actions.create_pods.push_back(std::move(all[static_cast<size_t>(stage + 1)]));
    }
    Tell(observed, group, actions);
    groups.push_back(std::move(group));
  }
  AddPodGroups(observed, actions);
  actions.status = MakeStatus(observed, groups, "", now_seconds, &weights);
  return actions;
}

}  // namespace qwen::plan
