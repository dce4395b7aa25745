// Goal: a group's life, decided without a cluster: created, lost, backed off, given up, on dead nodes and hanging, and what the status
// tells of it. After each step a plan of an unchanged world must be empty (world.h).
#include "controller/plan/group.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>

#include "controller/plan/status.h"
#include "tests/unit/controller/plan/world.h"

namespace qwen::plan {
namespace {

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

TEST(Group, ARevisionThatIsKnownIsNotWorkedOutAgain) {
  World world;
  world.Serve();
  const Actions actions = MakePlan(world.observed, world.images, world.now);
  EXPECT_EQ(actions.revision, world.observed.previous.groups[0].revision);
  world.observed.revision = actions.revision;
  EXPECT_EQ(MakePlan(world.observed, world.images, world.now).writes(world.observed), 0u);
  world.observed.revision = "another";
  EXPECT_EQ(MakePlan(world.observed, world.images, world.now).create_pods.size(), 3u) << "it is taken at its word";
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

TEST(Group, OfAGroupThatServedOnlyTheLostPodIsMadeAgain) {
  World world;
  world.Serve();
  world.End("q-0-stage-0-1", 137);
  const Actions actions = world.Step();
  EXPECT_EQ(world.Pods(), "q-0-head-1 q-0-stage-0-2 q-0-stage-1-1");
  ASSERT_EQ(actions.delete_pods.size(), 1u);
  EXPECT_EQ(actions.delete_pods[0].name, "q-0-stage-0-1");
  EXPECT_EQ(world.observed.previous.restarts, 1);
  EXPECT_EQ(world.observed.previous.epoch, 2);
  EXPECT_NE(world.ReadyMessage().find("pod q-0-stage-0-1 ended: exit code 137; stage 0 is made again under epoch 2, the other stages keep their weights"), std::string::npos)
      << world.ReadyMessage();
  ASSERT_EQ(actions.notices.size(), 1u);
  EXPECT_EQ(actions.notices[0].reason, "PodLost");
  world.Serve();
  EXPECT_TRUE(world.Is("Ready").value) << world.ReadyMessage();
  EXPECT_EQ(world.observed.previous.groups[0].mending_epoch, 0);
  // Again, and then another one of the same group: each keeps the rest.
  world.Lose("q-0-stage-0-2");
  world.Settle();
  world.now += 100;
  world.Serve();
  EXPECT_EQ(world.Pods(), "q-0-head-1 q-0-stage-0-3 q-0-stage-1-1");
  world.Lose("q-0-stage-1-1");
  world.Settle();
  world.now += 100;
  world.Serve();
  EXPECT_EQ(world.Pods(), "q-0-head-1 q-0-stage-0-3 q-0-stage-1-4");
  EXPECT_TRUE(world.Is("Ready").value) << world.ReadyMessage();
}

TEST(Group, ALostHeadIsReplacedUnderTheNameThatItsStagesDial) {
  World world;
  world.Serve();
  world.Lose("q-0-head-1");
  const Actions actions = world.Step();
  EXPECT_EQ(world.Pods(), "q-0-head-2 q-0-stage-0-1 q-0-stage-1-1");
  ASSERT_EQ(actions.create_pods.size(), 1u);
  const auto& head = actions.create_pods[0];
  EXPECT_EQ(head["spec"]["hostname"], "q-0-head-1");
  EXPECT_EQ(head["metadata"]["labels"]["qwenpipeline.dev/group"], "1");
  EXPECT_EQ(head["metadata"]["labels"]["qwenpipeline.dev/epoch"], "2");
}

TEST(Group, TwoThatAreLostOneAfterTheOtherAreBothMadeAgain) {
  World world(3);
  world.Serve();
  world.Lose("q-0-stage-0-1");
  world.Settle();
  world.Lose("q-0-stage-2-1");  // before the group serves again
  world.Settle();
  world.now += 100;
  world.Settle();
  EXPECT_EQ(world.Pods(), "q-0-head-1 q-0-stage-0-2 q-0-stage-1-1 q-0-stage-2-3");
  world.Serve();
  EXPECT_TRUE(world.Is("Ready").value) << world.ReadyMessage();
}

TEST(Group, AReplacementThatFailsBeforeAllServeBeginsTheGroupAnew) {
  World world;
  world.Serve();
  world.Lose("q-0-stage-0-1");
  world.Settle();
  world.End("q-0-stage-0-2", 67);
  world.Settle();  // waits for the back-off
  world.now += 100;
  world.Settle();
  EXPECT_EQ(world.Pods(), "q-0-head-3 q-0-stage-0-3 q-0-stage-1-3");
  world.Serve();
  EXPECT_TRUE(world.Is("Ready").value) << world.ReadyMessage();
}

TEST(Group, AReplacementThatDoesNotStartIsNotAReasonToRestartTheOthers) {
  World world;
  world.observed.pipeline.spec.restart.startup_timeout_seconds = 900;
  world.Serve();
  for (ObservedPod& pod : world.observed.pods) pod.started_seconds = world.now;
  world.Lose("q-0-stage-0-1");
  world.Settle();
  for (ObservedPod& pod : world.observed.pods) pod.ready = false;  // nobody serves without it
  world.Find("q-0-stage-0-2").unschedulable = true;
  world.now += 100'000;
  world.Settle();
  EXPECT_EQ(world.Pods(), "q-0-head-1 q-0-stage-0-2 q-0-stage-1-1");
  EXPECT_EQ(world.ReadyReason(), "Unschedulable");
  ObservedPod& late = world.Find("q-0-stage-0-2");
  late.unschedulable = false, late.phase = PodPhase::kRunning, late.started_seconds = world.now;
  const Actions loading = world.Settle();
  EXPECT_EQ(loading.wake_seconds, world.now + 900);
  world.now += 900;  // it runs, and is not ready when its start-up time is over
  world.Settle();
  world.now += 100;
  world.Settle();
  EXPECT_EQ(world.Pods(), "q-0-head-3 q-0-stage-0-3 q-0-stage-1-3");
}

TEST(Group, ReplacementsSurviveTheLossOfTheStatus) {
  World world;
  world.Serve();
  world.Lose("q-0-stage-1-1");
  world.Serve();
  world.observed.previous = {};
  world.Serve();
  EXPECT_EQ(world.Pods(), "q-0-head-1 q-0-stage-0-1 q-0-stage-1-2");
  EXPECT_TRUE(world.Is("Ready").value) << world.ReadyMessage();
  EXPECT_EQ(world.observed.previous.epoch, 2);
}

TEST(Group, AGangThatIsAdmittedAsAWholeIsReplacedAsAWhole) {
  World world;
  world.observed.pipeline.spec.scheduling.gang = api::Gang::kKueue;
  world.observed.pipeline.spec.scheduling.queue_name = "team";
  world.Serve();
  world.Lose("q-0-stage-0-1");
  world.Step();
  EXPECT_EQ(world.Pods(), "q-0-head-2 q-0-stage-0-2 q-0-stage-1-2");
}

TEST(Group, AGroupThatNeverServedIsReplacedAsAWholeUnderTheNextEpoch) {
  World world;
  world.Settle();
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
    ASSERT_EQ(actions.notices.size(), 1u);
    EXPECT_EQ(actions.notices[0].reason, "PodLost") << "now or after its back-off, only that pod is made again";
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
    EXPECT_EQ(world.Pods(), "q-0-head-1 q-0-stage-0-1 q-0-stage-1-" + std::to_string(epoch));
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
  EXPECT_EQ(world.Pods(), "q-0-head-1 q-0-stage-0-2 q-0-stage-1-1");
  EXPECT_EQ(world.observed.previous.restarts, 1);
  EXPECT_NE(world.ReadyMessage().find("pod q-0-stage-0-1 is lost: node n1 is not ready"), std::string::npos) << world.ReadyMessage();
  EXPECT_EQ(actions.delete_pods.size(), 1u);
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

TEST(Node, ThatComesBackDuringABackOffLeavesItsGroupAsItWas) {
  World world;
  world.Serve();
  world.End("q-0-stage-1-1", 70);
  world.Serve();
  const std::string pods = world.Pods();
  const std::string node = world.Find("q-0-stage-0-1").node;
  world.SetNode(node, NodeState::kLost);
  world.Settle();  // the second failure waits
  EXPECT_EQ(world.ReadyReason(), "CrashLoop");
  world.SetNode(node, NodeState::kFine);
  world.Settle();
  EXPECT_TRUE(world.Is("Ready").value) << world.ReadyMessage();
  world.now += 1'000;
  world.Serve();
  EXPECT_EQ(world.Pods(), pods) << "nothing of it was made again";
  EXPECT_EQ(world.observed.previous.groups[0].failures, 0);
}

TEST(Node, WhatKubernetesDeletesOnANodeThatIsGoneGoesDuringABackOffToo) {
  World world;
  world.Serve();
  world.End("q-0-stage-1-1", 70);
  world.Serve();
  world.End("q-0-stage-1-2", 70);
  world.Settle();  // the second failure waits
  ObservedPod& pod = world.Find("q-0-stage-0-1");
  pod.deleting = true;
  world.SetNode(pod.node, NodeState::kGone);
  world.Step();
  EXPECT_EQ(world.Pods().find("q-0-stage-0-1"), std::string::npos) << world.Pods();
  EXPECT_EQ(world.ReadyReason(), "CrashLoop");
  world.Settle();
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

TEST(Hang, APodThatDoesNotGetReadyIsReplacedWhenItsStartUpTimeIsOver) {
  World world;
  world.observed.pipeline.spec.restart.startup_timeout_seconds = 900;
  world.Settle();
  for (ObservedPod& pod : world.observed.pods) pod.phase = PodPhase::kRunning, pod.ready = pod.stage != 1, pod.started_seconds = world.now;
  const Actions loading = world.Settle();
  EXPECT_EQ(loading.wake_seconds, world.now + 900);
  world.now += 899;
  EXPECT_EQ(MakePlan(world.observed, world.images, world.now).writes(world.observed), 0u);
  world.now += 1;
  world.Step();
  EXPECT_NE(world.ReadyMessage().find("pod q-0-stage-1-1 was not ready in 900 s"), std::string::npos) << world.ReadyMessage();
  EXPECT_EQ(world.Pods(), "q-0-head-2 q-0-stage-0-2 q-0-stage-1-2");
}

TEST(Hang, AStageThatStopsBeingReadyAndDoesNotComeBackIsReplaced) {
  World world;
  world.observed.pipeline.spec.restart.stall_timeout_seconds = 20;
  world.Serve();
  world.now += 1000;
  ObservedPod& stage = world.Find("q-0-stage-0-1");
  stage.ready = false;
  EXPECT_EQ(world.Settle().wake_seconds, world.now + 120);
  world.now += 119;
  stage.ready = true;  // it found its way back
  world.Settle();
  EXPECT_TRUE(world.Is("Ready").value);
  stage.ready = false;
  world.Settle();
  world.now += 119;
  EXPECT_EQ(MakePlan(world.observed, world.images, world.now).writes(world.observed), 0u) << "a new count began";
  world.now += 1;
  world.Step();
  EXPECT_NE(world.ReadyMessage().find("pod q-0-stage-0-1 is not ready, and its group does not serve for 120 s"), std::string::npos) << world.ReadyMessage();
  EXPECT_EQ(world.observed.previous.restarts, 1);
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

TEST(Status, TellsHowFarAStageHasLoaded) {
  World world;
  world.Settle();
  for (ObservedPod& pod : world.observed.pods) pod.phase = PodPhase::kRunning, pod.load_percent = pod.stage == 1 ? 40 : pod.stage == 0 ? 100 : -1;
  world.Settle();
  EXPECT_EQ(world.ReadyReason(), "LoadingWeights");
  EXPECT_EQ(world.ReadyMessage(), "pod q-0-stage-1-1 has loaded 40 % of its weights");
  EXPECT_EQ(world.observed.previous.groups[0].loading, (std::vector<api::StageLoad>{{.stage = 1, .percent = 40}}));
  world.Find("q-0-stage-1-1").load_percent = 100;
  world.Settle();
  EXPECT_TRUE(world.observed.previous.groups[0].loading.empty());
  EXPECT_EQ(world.ReadyReason(), "PodsNotReady");
  world.Serve();
  EXPECT_TRUE(world.Is("Ready").value);
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

}  // namespace
}  // namespace qwen::plan
