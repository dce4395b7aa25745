// tests/unit/controller/plan/world.h — a toy cluster for whole lives of a pipeline: it does what the plan says and shares no code with
// the planner. Checked all along: no pod is deleted twice, or created while one of its name is there, and no group that was complete
// is added to.
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>
#include <string>

#include "controller/plan/plan.h"
#include "controller/plan/status.h"

namespace qwen::plan {

class World {
 public:
  explicit World(int stages = 2, int replicas = 1) {
    observed.pipeline.metadata = {.name = "q", .namespace_name = "ns", .uid = "u-1"};
    observed.pipeline.spec.model = {.id = "m", .source = {.claim = api::PersistentVolumeClaimSource{.claim_name = "weights"}}};
    observed.pipeline.spec.stages.count = stages;
    observed.pipeline.spec.replicas = replicas;
    observed.generation = 1;
  }

  // One reconcile: what is planned is done; or only `budget` writes after the status, because the controller is killed then.
  Actions Step(size_t budget = SIZE_MAX) {
    Actions actions = MakePlan(observed, images, now);
    observed.previous = actions.status;
    for (const api::GroupRecord& group : observed.previous.groups) {
      if (group.phase == api::GroupPhase::kFormed) {
        formed_ever.insert({group.replica, group.epoch});
        for (const api::Replacement& one : group.replaced) formed_ever.insert({group.replica, one.epoch});
      }
      if (group.next && group.next->phase == api::GroupPhase::kFormed) formed_ever.insert({group.replica, group.next->epoch});
    }
    if (actions.add_finalizer) observed.has_finalizer = true;
    EXPECT_TRUE(actions.create_pods.empty() || (observed.has_finalizer && !observed.deleting)) << "pods that nobody would drain";
    if (actions.remove_finalizer) observed.has_finalizer = false;
    observed.has_secret |= actions.create_secret;
    for (const auto& child : actions.apply) observed.children[ChildName(child)] = Fingerprint(child);
    for (const std::string& name : actions.delete_children) EXPECT_EQ(observed.children.erase(name), 1u) << name;
    for (const PodRef& ref : actions.delete_pods) {
      if (budget-- == 0) return actions;
      ObservedPod& pod = Find(ref.name);
      EXPECT_EQ(pod.uid, ref.uid);
      EXPECT_EQ(ref.force, pod.node_state == NodeState::kGone) << ref.name;
      EXPECT_FALSE(pod.deleting && !ref.force) << ref.name << " is deleted twice";
      if (ref.force) {
        Lose(std::string(ref.name));
        continue;
      }
      pod.deleting = true;
      pod.deleting_since_seconds = now;
      pod.gone_by_seconds = now + 75;
    }
    for (const auto& pod : actions.create_pods) {
      if (budget-- == 0) return actions;
      const auto& labels = pod["metadata"]["labels"];
      const std::string name = pod["metadata"]["name"];
      EXPECT_TRUE(names_ever.insert(name).second || !strict_names) << name << " is created twice";
      EXPECT_TRUE(std::none_of(observed.pods.begin(), observed.pods.end(), [&](const ObservedPod& p) { return p.name == name; })) << name << " is there";
      ObservedPod made{.name = name, .uid = name + "-uid"};
      made.replica = std::stoi(labels["qwenpipeline.dev/replica"].get<std::string>());
      made.stage = labels.contains("qwenpipeline.dev/stage") ? std::stoi(labels["qwenpipeline.dev/stage"].get<std::string>()) : -1;
      made.epoch = std::stoi(labels["qwenpipeline.dev/epoch"].get<std::string>());
      made.group_epoch = std::stoi(labels["qwenpipeline.dev/group"].get<std::string>());
      made.revision = labels["qwenpipeline.dev/revision"];
      made.node = FineNode();
      EXPECT_FALSE(formed_ever.contains({made.replica, made.epoch})) << name << ": all of that epoch were there once";
      observed.pods.push_back(made);
    }
    return actions;
  }
  // Until nothing is planned any more; that it comes to rest is part of every story.
  Actions Settle() {
    Actions all, last;
    for (int i = 0; i < 8; ++i) {
      last = MakePlan(observed, images, now);
      if (last.writes(observed) == 0) return last;
      Step();
    }
    ADD_FAILURE() << "does not come to rest: " << ReadyMessage();
    return last;
  }
  void KubeletRuns() {  // what is deleted goes, what is there becomes ready; but on a node without power nothing changes
    const auto powered = [this](const ObservedPod& pod) { return !nodes.contains(pod.node) || nodes[pod.node] == NodeState::kFine; };
    std::erase_if(observed.pods, [&](const ObservedPod& pod) { return pod.deleting && powered(pod); });
    for (ObservedPod& pod : observed.pods)
      if (pod.phase != PodPhase::kEnded && powered(pod)) pod.phase = PodPhase::kRunning, pod.ready = true;
  }
  // Pods are bound to n0, n1, ... in turn, but to no node that is not fine.
  std::string FineNode() {
    for (int i = 0; i < kNodes; ++i) {
      const std::string name = "n" + std::to_string(next_node++ % kNodes);
      if (nodes[name] == NodeState::kFine) return name;
    }
    return "";
  }
  void SetNode(const std::string& name, NodeState state) {
    nodes[name] = state;
    for (ObservedPod& pod : observed.pods)
      if (pod.node == name) pod.node_state = state, pod.node_trouble = state == NodeState::kFine ? "" : "node " + name + " is not ready: Gone";
  }
  void Serve() {
    Settle();
    KubeletRuns();
    Settle();
  }
  ObservedPod& Find(const std::string& name) {
    const auto found = std::find_if(observed.pods.begin(), observed.pods.end(), [&](const ObservedPod& pod) { return pod.name == name; });
    QP_CHECK(found != observed.pods.end()) << name;
    return *found;
  }
  void End(const std::string& name, int code) {
    ObservedPod& pod = Find(name);
    pod.phase = PodPhase::kEnded;
    pod.ready = false;
    pod.exit_code = code;
    pod.end_reason = "Error";
  }
  void Lose(const std::string& name) {
    std::erase_if(observed.pods, [&](const ObservedPod& pod) { return pod.name == name; });
  }
  std::string Pods() const {  // living ones, in order
    std::set<std::string> names;
    for (const ObservedPod& pod : observed.pods)
      if (!pod.deleting) names.insert(pod.name);
    std::string text;
    for (const std::string& name : names) text += (text.empty() ? "" : " ") + name;
    return text;
  }
  const api::Condition& Is(const char* type) const {
    const api::Condition* found = FindCondition(observed.previous, type);
    QP_CHECK(found != nullptr) << type;
    return *found;
  }
  std::string ReadyReason() const { return Is("Ready").reason; }
  std::string ReadyMessage() const { return Is("Ready").message; }

  Observed observed;
  Images images{.head = "h:1", .stage = "s:1"};
  int64_t now = 1'000'000;
  std::set<std::string> names_ever;
  bool strict_names = true;  // false: a pod may be lost before anybody saw its group complete, and is then made again
  std::set<std::pair<int32_t, int64_t>> formed_ever;  // replica, epoch
  static constexpr int kNodes = 4;
  std::map<std::string, NodeState> nodes;
  int next_node = 0;
};

}  // namespace qwen::plan
