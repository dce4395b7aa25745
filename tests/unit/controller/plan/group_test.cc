// Goal: whole lives of a pipeline, decided without a cluster. A toy cluster does what the plan says (it shares no code with the
// planner), and each story checks pods, epochs and what the status tells. After each step a plan of an unchanged world must be
// empty.
#include "controller/plan/group.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>

#include "controller/plan/plan.h"
#include "controller/plan/status.h"

namespace qwen::plan {
namespace {

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
    for (const api::GroupRecord& group : observed.previous.groups)
      if (group.phase == api::GroupPhase::kFormed) formed_ever.insert({group.replica, group.epoch});
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
      made.revision = labels["qwenpipeline.dev/revision"];
      made.node = FineNode();
      EXPECT_FALSE(formed_ever.contains({made.replica, made.epoch})) << name << ": that group was complete once";
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

TEST(Group, IsCreatedOnceAndThenLeftAlone) {
  World world;
  const Actions first = world.Step();
  EXPECT_TRUE(first.create_secret);
  EXPECT_TRUE(first.add_finalizer);
  EXPECT_EQ(first.apply.size(), 4u);
  EXPECT_EQ(world.Pods(), "q-0-head-1 q-0-stage-0-1 q-0-stage-1-1");
  world.Settle();
  EXPECT_EQ(world.ReadyReason(), "PodsNotReady");
  EXPECT_TRUE(world.Is("Progressing").value);
  world.KubeletRuns();
  world.Settle();
  EXPECT_TRUE(world.Is("Ready").value);
  EXPECT_FALSE(world.Is("Progressing").value);
  EXPECT_FALSE(world.Is("Failed").value);
  EXPECT_EQ(world.observed.previous.stages, "2/2");
  EXPECT_EQ(world.observed.previous.ready_replicas, 1);
  world.now += 100'000;  // time alone changes nothing
  EXPECT_EQ(MakePlan(world.observed, world.images, world.now).writes(world.observed), 0u);
  EXPECT_EQ(world.observed.previous.restarts, 0);
}

TEST(Group, WhatACrashLeftHalfCreatedIsCompletedUnderTheSameEpoch) {
  World world;
  world.Step();
  world.Lose("q-0-stage-1-1");  // its creation never reached the API server
  world.names_ever.erase("q-0-stage-1-1");
  world.Step();
  EXPECT_EQ(world.Pods(), "q-0-head-1 q-0-stage-0-1 q-0-stage-1-1");
  world.Serve();
  EXPECT_EQ(world.observed.previous.epoch, 1);
  EXPECT_EQ(world.observed.previous.restarts, 0);
}

TEST(Group, ALostPodReplacesTheWholeGroupUnderTheNextEpoch) {
  World world;
  world.Serve();
  world.Lose("q-0-stage-0-1");
  const Actions actions = world.Step();
  EXPECT_EQ(world.Pods(), "q-0-head-2 q-0-stage-0-2 q-0-stage-1-2");
  EXPECT_EQ(actions.delete_pods.size(), 2u);
  EXPECT_EQ(world.observed.previous.restarts, 1);
  EXPECT_NE(world.ReadyMessage().find("pod q-0-stage-0-1 is gone; the whole group restarts under epoch 2"), std::string::npos) << world.ReadyMessage();
  ASSERT_EQ(actions.notices.size(), 2u);
  EXPECT_EQ(actions.notices[0].reason, "GroupLost");
  EXPECT_TRUE(actions.notices[0].warning);
  // Pods of the dead group that never go away (their node has no power) hinder nothing and are counted nowhere.
  for (ObservedPod& pod : world.observed.pods)
    if (!pod.deleting) pod.phase = PodPhase::kRunning, pod.ready = true;
  world.Settle();
  EXPECT_TRUE(world.Is("Ready").value) << world.ReadyMessage();
  EXPECT_EQ(world.observed.previous.stages, "2/2");
}

TEST(Group, ACrashLoopBacksOffNamesTheReasonAndEndsWithItsBudget) {
  World world;
  world.observed.pipeline.spec.restart = {.budget = 3, .backoff_seconds = 10};
  world.Serve();
  int64_t epoch = 1;
  for (const int64_t wait : {0, 10, 20}) {
    world.End("q-0-stage-1-" + std::to_string(epoch), 70);
    const Actions actions = world.Step();
    if (wait > 0) {
      EXPECT_EQ(actions.wake_seconds, world.now + wait);
      EXPECT_EQ(world.ReadyReason(), "CrashLoop");
      EXPECT_NE(world.ReadyMessage().find("pod q-0-stage-1-" + std::to_string(epoch) + " ended: exit code 70 (GPU fault)"), std::string::npos) << world.ReadyMessage();
      world.now += wait - 1;
      EXPECT_EQ(MakePlan(world.observed, world.images, world.now).writes(world.observed), 0u) << "the back-off is quiet";
      world.now += 1;
      world.Step();
    }
    ++epoch;
    EXPECT_NE(world.Pods().find("q-0-head-" + std::to_string(epoch)), std::string::npos) << world.Pods();
    world.KubeletRuns();
    world.Settle();
    EXPECT_TRUE(world.Is("Ready").value);
  }
  world.End("q-0-stage-1-4", 70);
  world.Settle();
  EXPECT_TRUE(world.Is("Failed").value);
  EXPECT_EQ(world.ReadyReason(), "GaveUp");
  EXPECT_EQ(world.ReadyMessage(), "pod q-0-stage-1-4 ended: exit code 70 (GPU fault); failure 4, the budget is 3 restarts");
  EXPECT_NE(world.Pods().find("q-0-stage-1-4"), std::string::npos) << "kept for a look";
  world.now += 100'000;
  EXPECT_EQ(MakePlan(world.observed, world.images, world.now).writes(world.observed), 0u);

  world.observed.pipeline.spec.restart.budget = 4;  // somebody edits the spec: it is tried again
  ++world.observed.generation;
  world.Serve();
  EXPECT_TRUE(world.Is("Ready").value) << world.ReadyMessage();
  EXPECT_FALSE(world.Is("Failed").value);
  EXPECT_EQ(world.observed.previous.epoch, 5);
  EXPECT_EQ(world.observed.previous.restarts, 4);
}

TEST(Group, ABadCheckpointIsNotTriedAgain) {
  World world;
  world.Settle();
  world.End("q-0-stage-0-1", 65);
  world.End("q-0-head-1", 67);  // a consequence
  world.Settle();
  EXPECT_TRUE(world.Is("Failed").value);
  EXPECT_EQ(world.ReadyMessage(), "pod q-0-stage-0-1 ended: exit code 65 (bad checkpoint); restarting cannot help");
  EXPECT_EQ(world.observed.previous.restarts, 0);
}

TEST(Group, TenMinutesOfServiceForgiveFailures) {
  World world;
  world.Serve();
  world.Lose("q-0-head-1");
  world.Serve();
  EXPECT_EQ(world.observed.previous.groups[0].failures, 1);
  const Actions actions = MakePlan(world.observed, world.images, world.now);
  EXPECT_EQ(actions.wake_seconds, world.now + 600);
  world.now += 600;
  world.Settle();
  EXPECT_EQ(world.observed.previous.groups[0].failures, 0);
  EXPECT_EQ(world.observed.previous.restarts, 1) << "the count for people stays";
}

TEST(Group, BackoffDoublesUpToItsCeiling) {
  const api::Restart restart{.budget = 9, .backoff_seconds = 10};
  const std::vector<int64_t> expected = {0, 0, 10, 20, 40, 80, 160, 300, 300};
  for (size_t failures = 0; failures < expected.size(); ++failures) EXPECT_EQ(BackoffSeconds(restart, static_cast<int32_t>(failures)), expected[failures]) << failures;
}

// The head is on n0, stages on n1 and n2.
TEST(Node, APodOnALostNodeIsLostAtOnceAndNothingWaitsForIt) {
  World world;
  world.observed.pipeline.spec.restart = {.budget = 0, .backoff_seconds = 10};
  world.Serve();
  world.SetNode("n1", NodeState::kLost);  // its pod says Running and Ready still: nobody is there to say anything else
  const Actions actions = world.Step();
  EXPECT_EQ(world.Pods(), "q-0-head-2 q-0-stage-0-2 q-0-stage-1-2");
  EXPECT_EQ(world.observed.previous.restarts, 1);
  EXPECT_NE(world.ReadyMessage().find("pod q-0-stage-0-1 is lost: node n1 is not ready"), std::string::npos) << world.ReadyMessage();
  EXPECT_EQ(actions.delete_pods.size(), 3u);
  world.KubeletRuns();
  world.Settle();
  EXPECT_TRUE(world.Is("Ready").value) << "the pod that is stuck on its node hinders nothing: " << world.ReadyMessage();
  EXPECT_TRUE(world.Find("q-0-stage-0-1").deleting);
  world.now += 100'000;
  world.Settle();
  EXPECT_EQ(world.observed.pods.size(), 4u) << "while its node may come back, its object stays";
  EXPECT_FALSE(world.Is("Failed").value) << "a lost node is not charged to the budget, which is 0";

  world.SetNode("n1", NodeState::kGone);
  const Actions cleaned = world.Step();
  ASSERT_EQ(cleaned.delete_pods.size(), 1u);
  EXPECT_TRUE(cleaned.delete_pods[0].force);
  world.Settle();
  EXPECT_EQ(world.observed.pods.size(), 3u);
}

TEST(Node, ALossExplainsTheEndOfTheOthersButNotABadCheckpoint) {
  World world;
  world.Serve();
  world.SetNode("n1", NodeState::kLost);
  world.End("q-0-stage-1-1", 67);  // could not reach its neighbour
  world.Step();
  EXPECT_NE(world.ReadyMessage().find("pod q-0-stage-0-1 is lost"), std::string::npos) << world.ReadyMessage();
  World bad;
  bad.Serve();
  bad.SetNode("n1", NodeState::kLost);
  bad.End("q-0-stage-1-1", 65);
  bad.Step();
  EXPECT_EQ(bad.ReadyReason(), "GaveUp");
}

TEST(Node, NodesThatGoOneAfterTheOtherCostABackOffEach) {
  World world;
  world.observed.pipeline.spec.restart = {.budget = 0, .backoff_seconds = 10};
  world.Serve();
  world.SetNode("n0", NodeState::kLost);
  world.Serve();
  EXPECT_TRUE(world.Is("Ready").value) << world.ReadyMessage();
  world.SetNode(world.Find("q-0-head-2").node, NodeState::kLost);
  const Actions actions = world.Step();
  EXPECT_EQ(actions.wake_seconds, world.now + 10) << "or a node that flaps makes epochs without end";
  world.now += 10;
  world.Serve();
  EXPECT_TRUE(world.Is("Ready").value) << world.ReadyMessage();
}

TEST(Node, AHeadOnALostNodeIsNotDrained) {
  World world;
  world.Serve();
  world.SetNode("n0", NodeState::kLost);
  world.observed.pipeline.spec.suspend = true;
  ++world.observed.generation;
  world.Settle();
  EXPECT_EQ(world.Pods(), "") << "stages are deleted at once";
  world.KubeletRuns();
  world.Settle();
  EXPECT_EQ(world.ReadyMessage(), "group 0 is being deleted") << "which is the truth while the object is there";
  world.SetNode("n0", NodeState::kGone);
  world.Settle();
  EXPECT_EQ(world.ReadyReason(), "Suspended");
}

TEST(Node, WhenTheWholeClusterSeemsLostNothingIsReplaced) {
  World world;
  world.Serve();
  ObservedPod& pod = world.Find("q-0-stage-0-1");  // as the reconciler reads it when no node is fine
  pod.node_trouble = "node n1 is not ready: NodeStatusUnknown";
  pod.ready = false;
  world.Settle();
  EXPECT_EQ(world.Pods(), "q-0-head-1 q-0-stage-0-1 q-0-stage-1-1");
  EXPECT_EQ(world.ReadyReason(), "NodeNotReady");
  EXPECT_EQ(world.ReadyMessage(), "pod q-0-stage-0-1: node n1 is not ready: NodeStatusUnknown");
}

TEST(Scale, MoreReplicasAreFurtherGroupsWithTheirOwnEpochs) {
  World world;
  world.Serve();
  world.observed.pipeline.spec.replicas = 2;
  ++world.observed.generation;
  world.Serve();
  EXPECT_EQ(world.Pods(), "q-0-head-1 q-0-stage-0-1 q-0-stage-1-1 q-1-head-2 q-1-stage-0-2 q-1-stage-1-2");
  EXPECT_EQ(world.observed.previous.stages, "4/4");
  EXPECT_EQ(world.ReadyMessage(), "2 of 2 replicas serve");

  world.observed.pipeline.spec.replicas = 1;  // the last one drains: its head first
  ++world.observed.generation;
  const Actions down = world.Step();
  ASSERT_EQ(down.delete_pods.size(), 1u);
  EXPECT_EQ(down.delete_pods[0].name, "q-1-head-2");
  EXPECT_TRUE(world.Is("Ready").value) << "the other still serves";
  world.KubeletRuns();
  world.Settle();
  world.KubeletRuns();
  world.Settle();
  EXPECT_EQ(world.Pods(), "q-0-head-1 q-0-stage-0-1 q-0-stage-1-1");
  EXPECT_EQ(world.observed.previous.replicas, 1);
  EXPECT_EQ(world.observed.previous.groups.size(), 1u);
  EXPECT_EQ(world.observed.previous.restarts, 0);

  world.observed.pipeline.spec.replicas = 2;  // an epoch never comes back
  ++world.observed.generation;
  world.Serve();
  EXPECT_NE(world.Pods().find("q-1-head-3"), std::string::npos) << world.Pods();
}

TEST(Suspend, DrainsEverythingAndResumesUnderANewEpoch) {
  World world;
  world.Serve();
  world.observed.pipeline.spec.suspend = true;
  ++world.observed.generation;
  for (int i = 0; i < 3; ++i) world.Settle(), world.KubeletRuns();
  world.Settle();
  EXPECT_EQ(world.Pods(), "");
  EXPECT_EQ(world.ReadyReason(), "Suspended");
  EXPECT_FALSE(world.Is("Progressing").value);
  world.observed.pipeline.spec.suspend = false;
  ++world.observed.generation;
  world.Serve();
  EXPECT_EQ(world.Pods(), "q-0-head-2 q-0-stage-0-2 q-0-stage-1-2");
  EXPECT_TRUE(world.Is("Ready").value);
  EXPECT_EQ(world.observed.previous.restarts, 0);
}

TEST(Suspend, ResumedBeforeEverythingIsGoneItBeginsAnewWithoutAFailure) {
  World world;
  world.observed.pipeline.spec.restart.budget = 0;
  world.Serve();
  world.observed.pipeline.spec.suspend = true;
  ++world.observed.generation;
  world.Settle();
  world.observed.pipeline.spec.suspend = false;  // while the head still finishes its requests
  ++world.observed.generation;
  world.Settle();
  EXPECT_EQ(world.Pods(), "q-0-stage-0-1 q-0-stage-1-1") << "the drain goes on";
  world.KubeletRuns();
  world.Serve();
  EXPECT_EQ(world.Pods(), "q-0-head-2 q-0-stage-0-2 q-0-stage-1-2");
  EXPECT_TRUE(world.Is("Ready").value) << world.ReadyMessage();
  EXPECT_EQ(world.observed.previous.restarts, 0);
}

TEST(Deletion, DrainsEveryHeadThenTheStagesGoThenTheFinalizer) {
  World world(2, 2);
  world.Serve();
  world.observed.deleting = true;
  const Actions heads = world.Step();
  ASSERT_EQ(heads.delete_pods.size(), 2u);
  EXPECT_EQ(heads.delete_pods[0].name, "q-0-head-1");
  EXPECT_EQ(heads.delete_pods[1].name, "q-1-head-2");
  EXPECT_EQ(world.ReadyReason(), "Deleting");
  EXPECT_EQ(world.ReadyMessage(), "pod q-0-head-1 finishes its requests");
  world.Settle();
  EXPECT_TRUE(world.observed.has_finalizer);
  EXPECT_EQ(world.Pods(), "q-0-stage-0-1 q-0-stage-1-1 q-1-stage-0-2 q-1-stage-1-2");
  world.Lose("q-1-head-2");  // done first
  world.Settle();
  EXPECT_EQ(world.Pods(), "q-0-stage-0-1 q-0-stage-1-1");
  world.KubeletRuns();
  world.Settle();
  EXPECT_TRUE(world.observed.has_finalizer) << "stages are not gone yet";
  world.KubeletRuns();
  const Actions last = world.Step();
  EXPECT_TRUE(last.remove_finalizer);
  EXPECT_EQ(last.writes(world.observed), 1u) << "no status for an object that goes";
  EXPECT_EQ(MakePlan(world.observed, world.images, world.now).writes(world.observed), 0u);
}

TEST(Deletion, WhatDoesNotServeGoesAtOnceAndNothingIsMadeOnTheWay) {
  World world;
  world.Settle();
  world.observed.deleting = true;
  const Actions actions = world.Step();
  EXPECT_EQ(actions.delete_pods.size(), 3u);
  EXPECT_TRUE(actions.create_pods.empty());
  World fresh;
  fresh.observed.deleting = true;  // deleted before it was ever looked at
  EXPECT_EQ(MakePlan(fresh.observed, fresh.images, fresh.now).writes(fresh.observed), 0u);
}

TEST(Deletion, ADeadNodeDoesNotKeepThePipeline) {
  World world;
  world.Serve();
  world.SetNode("n1", NodeState::kLost);
  world.observed.deleting = true;
  world.Settle();
  world.KubeletRuns();
  world.Settle();
  world.KubeletRuns();
  world.Settle();
  EXPECT_FALSE(world.observed.has_finalizer);
  EXPECT_EQ(world.observed.pods.size(), 1u) << "its pod stays until the node says something";
}

TEST(Deletion, DoesNotNeedToReadTheSpec) {
  World world;
  world.Serve();
  world.observed.pipeline.spec = {};
  world.observed.spec_error = "spec.fromTheFuture: unknown field";
  world.observed.deleting = true;
  for (int i = 0; i < 3; ++i) world.Settle(), world.KubeletRuns();
  world.Settle();
  EXPECT_FALSE(world.observed.has_finalizer);
  EXPECT_TRUE(world.observed.pods.empty());
}

TEST(Children, WhatSomebodyChangedOrDeletedIsAppliedAgainAndWhatIsNotWantedGoes) {
  World world;
  world.Serve();
  world.observed.children["Service/q"] = "changed by hand";
  world.observed.children.erase("PodDisruptionBudget/q");
  const Actions repair = world.Step();
  ASSERT_EQ(repair.apply.size(), 2u);
  EXPECT_EQ(ChildName(repair.apply[0]), "Service/q");
  EXPECT_EQ(ChildName(repair.apply[1]), "PodDisruptionBudget/q");
  world.Settle();
  world.observed.pipeline.spec.network_policy = api::NetworkPolicyMode::kNone;
  ++world.observed.generation;
  const Actions less = world.Step();
  EXPECT_EQ(less.delete_children, std::vector<std::string>{"NetworkPolicy/q"});
  world.Settle();
  EXPECT_TRUE(world.Is("Ready").value) << "no pod had to be replaced for it";
}

TEST(Suspend, AHeadOnADeadNodeDoesNotHoldItUpForEver) {
  World world;
  world.Serve();
  world.observed.pipeline.spec.suspend = true;
  ++world.observed.generation;
  const Actions asleep = world.Settle();
  EXPECT_EQ(world.Pods(), "q-0-stage-0-1 q-0-stage-1-1");
  EXPECT_EQ(asleep.wake_seconds, world.now + 75 + 31);
  world.now += 75 + 31;
  world.Settle();
  EXPECT_EQ(world.Pods(), "");
}

TEST(Rollout, AnotherRevisionDrainsOneReplicaAfterTheOther) {
  World world(2, 2);
  world.Serve();
  const std::string before = world.observed.previous.groups[0].revision;
  world.images.stage = "s:2";
  const Actions first = world.Step();
  ASSERT_EQ(first.delete_pods.size(), 1u);
  EXPECT_EQ(first.delete_pods[0].name, "q-0-head-1");
  EXPECT_TRUE(world.Find("q-1-head-2").ready);
  for (int i = 0; i < 6; ++i) {
    world.Settle();
    int serving = 0;
    for (const char* head : {"-0-head-", "-1-head-"})
      serving += std::any_of(world.observed.pods.begin(), world.observed.pods.end(), [&](const ObservedPod& pod) { return pod.ready && !pod.deleting && pod.name.find(head) != std::string::npos; });
    EXPECT_GE(serving, 1) << world.Pods();
    world.KubeletRuns();
  }
  world.Settle();
  EXPECT_TRUE(world.Is("Ready").value) << world.ReadyMessage();
  EXPECT_EQ(world.Pods(), "q-0-head-3 q-0-stage-0-3 q-0-stage-1-3 q-1-head-4 q-1-stage-0-4 q-1-stage-1-4");
  EXPECT_NE(world.observed.previous.groups[1].revision, before);
  EXPECT_EQ(world.observed.previous.restarts, 0) << "a rollout is no failure";
}

TEST(Rollout, AGroupThatNeverServedIsReplacedAtOnce) {
  World world;
  world.Settle();
  world.Find("q-0-stage-0-1").waiting_reason = "ImagePullBackOff";
  world.images.stage = "s:2";
  world.Step();
  EXPECT_EQ(world.Pods(), "q-0-head-2 q-0-stage-0-2 q-0-stage-1-2");
}

TEST(Rollout, FewerStagesDrainBeforeAnyPodOfTheOldGroupGoes) {
  World world(3);
  world.Serve();
  world.observed.pipeline.spec.stages.count = 1;
  ++world.observed.generation;
  const Actions actions = world.Step();
  ASSERT_EQ(actions.delete_pods.size(), 1u);
  EXPECT_EQ(actions.delete_pods[0].name, "q-0-head-1");
  world.KubeletRuns();
  world.Serve();
  EXPECT_EQ(world.Pods(), "q-0-head-2 q-0-stage-0-2");
}

TEST(Status, NamesTheOnePodThatBlocks) {
  struct Case {
    const char* what;
    std::function<void(ObservedPod&)> break_it;
    const char *reason, *message;
  };
  const Case cases[] = {
      {"image", [](ObservedPod& p) { p.waiting_reason = "ErrImagePull"; p.message = "no such tag"; }, "ImagePullFailed", "pod q-0-stage-1-1: ErrImagePull: no such tag"},
      {"name", [](ObservedPod& p) { p.waiting_reason = "InvalidImageName"; }, "ImagePullFailed", "pod q-0-stage-1-1: InvalidImageName"},
      {"loop", [](ObservedPod& p) { p.waiting_reason = "CrashLoopBackOff"; p.exit_code = 66; p.end_reason = "Error"; }, "CrashLoop",
       "pod q-0-stage-1-1 ended: exit code 66 (does not fit into memory)"},
      {"config", [](ObservedPod& p) { p.waiting_reason = "CreateContainerConfigError"; p.message = "secret \"k\" not found"; }, "ContainerNotStarted",
       "pod q-0-stage-1-1: CreateContainerConfigError: secret \"k\" not found"},
      {"place", [](ObservedPod& p) { p.unschedulable = true; p.message = "0/3 nodes are available"; }, "Unschedulable", "pod q-0-stage-1-1: 0/3 nodes are available"},
      {"wait", [](ObservedPod& p) { p.waiting_reason = "ContainerCreating"; }, "PodsNotReady", "pod q-0-stage-1-1 is being started"},
      {"load", [](ObservedPod& p) { p.phase = PodPhase::kRunning; }, "PodsNotReady", "pod q-0-stage-1-1 runs and is not ready yet"},
  };
  for (const Case& c : cases) {
    World world;
    world.Serve();
    ObservedPod& pod = world.Find("q-0-stage-1-1");
    pod.ready = false;
    pod.phase = PodPhase::kPending;
    c.break_it(pod);
    world.Settle();
    EXPECT_EQ(world.ReadyReason(), c.reason) << c.what;
    EXPECT_EQ(world.ReadyMessage(), c.message) << c.what;
    EXPECT_EQ(world.Is("Progressing").message, c.message) << c.what;
    EXPECT_FALSE(world.Is("Ready").value) << c.what;
  }
}

TEST(Status, TellsQuotaAndAWrongSpec) {
  World world;
  world.observed.write_error = "pod q-0-head-1: pods \"q-0-head-1\" is forbidden: exceeded quota: gpus";
  world.Settle();
  EXPECT_EQ(world.ReadyReason(), "QuotaExceeded");
  World wrong;
  wrong.observed.pipeline.spec.model.source = {.path = "relative"};
  const Actions actions = wrong.Step();
  EXPECT_EQ(wrong.ReadyReason(), "InvalidSpec");
  EXPECT_TRUE(wrong.Is("Failed").value);
  EXPECT_TRUE(actions.create_pods.empty());
  EXPECT_NE(wrong.ReadyMessage().find("spec.model.source.path"), std::string::npos);
  wrong.Settle();
}

TEST(Status, ASpecThatCannotBeReadIsToldOnceAndWhatRunsIsLeftAlone) {
  World world;
  world.Serve();
  world.observed.spec_error = "spec.fromTheFuture: unknown field";
  ++world.observed.generation;
  const Actions first = world.Step();
  EXPECT_EQ(world.ReadyReason(), "InvalidSpec");
  EXPECT_EQ(world.ReadyMessage(), "spec.fromTheFuture: unknown field");
  EXPECT_TRUE(world.Is("Failed").value);
  ASSERT_EQ(first.notices.size(), 1u);
  EXPECT_EQ(first.notices[0].reason, "InvalidSpec");
  EXPECT_EQ(world.Pods(), "q-0-head-1 q-0-stage-0-1 q-0-stage-1-1");
  EXPECT_EQ(world.observed.previous.ready_replicas, 1) << "it serves on";
  EXPECT_TRUE(world.Settle().notices.empty());
  world.observed.spec_error.clear();
  ++world.observed.generation;
  world.Settle();
  EXPECT_TRUE(world.Is("Ready").value) << world.ReadyMessage();
}

TEST(Status, AConditionsTimeChangesOnlyWithItsValue) {
  World world;
  world.Serve();
  const int64_t since = world.Is("Ready").last_transition_seconds;
  const int64_t not_failed_since = world.Is("Failed").last_transition_seconds;
  world.now += 50;
  world.Find("q-0-stage-0-1").ready = false;
  world.Settle();
  EXPECT_EQ(world.Is("Ready").last_transition_seconds, since + 50);
  EXPECT_EQ(world.Is("Failed").last_transition_seconds, not_failed_since);
}

// Anything may happen in any order, the controller dying between two writes included. Checked all along by the toy cluster: no pod
// is deleted twice or created while one of its name is there, and no group that was complete is added to. In the end everybody
// behaves, and then exactly what was asked for must serve.
TEST(Chaos, WhateverHappenedWhatWasAskedForServesInTheEnd) {
  for (uint32_t seed = 1; seed <= 100; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::minstd_rand random(seed);
    const auto below = [&](size_t count) { return static_cast<size_t>(random() % count); };
    World world(2, 2);
    world.strict_names = false;
    api::Spec& spec = world.observed.pipeline.spec;
    spec.restart = {.budget = 2, .backoff_seconds = 5};
    for (int event = 0; event < 60; ++event) {
      ObservedPod* pod = world.observed.pods.empty() ? nullptr : &world.observed.pods[below(world.observed.pods.size())];
      switch (below(14)) {
        case 0: spec.replicas = static_cast<int32_t>(below(4)), ++world.observed.generation; break;
        case 1: spec.suspend = !spec.suspend, ++world.observed.generation; break;
        case 2: spec.stages.count = static_cast<int32_t>(1 + below(3)), ++world.observed.generation; break;
        case 3: world.images.stage = "s:" + std::to_string(event); break;
        case 4: if (pod) world.Lose(std::string(pod->name)); break;
        case 5: if (pod) world.End(pod->name, std::vector<int>{0, 1, 65, 70, 137}[below(5)]); break;
        case 6: if (pod && pod->phase == PodPhase::kRunning) pod->ready = !pod->ready; break;
        case 7: if (pod && pod->phase == PodPhase::kPending) pod->phase = PodPhase::kRunning; break;
        case 8: world.now += static_cast<int64_t>(below(200)); break;
        case 9: world.KubeletRuns(); break;
        case 10: if (pod && !pod->deleting) pod->deleting = true, pod->gone_by_seconds = world.now + 75; break;  // somebody else
        case 11: world.SetNode("n" + std::to_string(below(World::kNodes)), NodeState::kLost); break;
        case 12: world.SetNode("n" + std::to_string(below(World::kNodes)), below(2) ? NodeState::kGone : NodeState::kFine); break;
        default: world.Step(below(4)); break;
      }
      if (below(3) == 0) world.Step();
      if (::testing::Test::HasFailure()) return;
    }
    for (int i = 0; i < World::kNodes; ++i) world.SetNode("n" + std::to_string(i), NodeState::kFine);
    spec.suspend = false;
    spec.replicas = 2;
    spec.restart.budget = 1000;
    world.Settle();  // a hopeless end may be noticed only now, and gives the group up
    ++world.observed.generation;
    for (int i = 0; i < 20; ++i) {
      world.Settle();
      world.KubeletRuns();
      world.now += 400;
    }
    world.Settle();
    EXPECT_TRUE(world.Is("Ready").value) << world.ReadyMessage();
    EXPECT_EQ(world.observed.pods.size(), 2u * static_cast<size_t>(*spec.stages.count + 1)) << world.Pods();
    for (const api::GroupRecord& group : world.observed.previous.groups) {
      for (const ObservedPod& pod : world.observed.pods) EXPECT_TRUE(pod.replica != group.replica || pod.epoch == group.epoch) << pod.name;
    }
    world.observed.deleting = true;
    for (int i = 0; i < 4; ++i) world.Settle(), world.KubeletRuns();
    world.Settle();
    EXPECT_TRUE(world.observed.pods.empty()) << world.Pods();
    EXPECT_FALSE(world.observed.has_finalizer);
    if (::testing::Test::HasFailure()) return;
  }
}

}  // namespace
}  // namespace qwen::plan
