// Goal: whole changes of a pipeline that serves: scaled, suspended, rolled out in place and beside itself, deleted; somebody always
// serves where that is promised, and heads drain before their stages go.
#include "controller/plan/group.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "controller/plan/status.h"
#include "tests/unit/controller/plan/world.h"

namespace qwen::plan {
namespace {

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
  world.observed.deleting_since_seconds = world.now;
  const Actions heads = world.Step();
  ASSERT_EQ(heads.delete_pods.size(), 2u);
  EXPECT_EQ(heads.delete_pods[0].name, "q-0-head-1");
  EXPECT_EQ(heads.delete_pods[1].name, "q-1-head-2");
  EXPECT_EQ(world.ReadyReason(), "AllReplicasReady") << "a deletion that is over at once is not told of";
  EXPECT_EQ(world.Settle().wake_seconds, world.now + 4);
  EXPECT_EQ(world.ReadyReason(), "AllReplicasReady");
  world.now += 4;
  world.Step();
  EXPECT_EQ(world.ReadyReason(), "Deleting");
  EXPECT_EQ(world.ReadyMessage(), "pod q-0-head-1 finishes its requests");
  world.Settle();
  EXPECT_TRUE(world.observed.has_finalizer);
  EXPECT_EQ(world.Pods(), "q-0-stage-0-1 q-0-stage-1-1 q-1-stage-0-2 q-1-stage-1-2");
  world.Lose("q-1-head-2");  // done first
  world.Settle();
  EXPECT_EQ(world.Pods(), "q-0-stage-0-1 q-0-stage-1-1");
  EXPECT_TRUE(world.observed.children.contains("PodDisruptionBudget/q")) << "one head still serves";
  world.KubeletRuns();
  EXPECT_EQ(world.Settle().wake_seconds, world.now + 76) << "the end of their grace";
  EXPECT_FALSE(world.observed.children.contains("PodDisruptionBudget/q")) << "nothing to protect";
  EXPECT_TRUE(world.observed.has_finalizer) << "stages are not gone yet";
  EXPECT_EQ(world.ReadyMessage(), "pod q-0-head-1 finishes its requests");
  world.now += 76;
  world.Settle();
  EXPECT_EQ(world.ReadyMessage(), "group 0 is being deleted");
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

TEST(Deletion, ARefusalIsToldAtOnce) {
  World world;
  world.Settle();
  world.observed.deleting = true;
  world.observed.deleting_since_seconds = world.now;
  world.observed.write_error = "delete pod q-0-stage-0-1: denied by a webhook";
  world.Step();
  EXPECT_NE(world.ReadyMessage().find("denied by a webhook"), std::string::npos) << world.ReadyMessage();
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
  world.observed.pipeline.spec.rollout.strategy = api::RolloutStrategy::kReplace;
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
  world.observed.pipeline.spec.rollout.strategy = api::RolloutStrategy::kReplace;
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

TEST(Surge, TheNextEpochsGroupIsMadeBesideTheOldOneWhichDrainsWhenItIsReady) {
  World world;
  world.Serve();
  world.images.stage = "s:2";
  const Actions first = world.Step();
  EXPECT_TRUE(first.delete_pods.empty());
  EXPECT_EQ(world.Pods(), "q-0-head-1 q-0-head-2 q-0-stage-0-1 q-0-stage-0-2 q-0-stage-1-1 q-0-stage-1-2");
  EXPECT_EQ(world.ReadyReason(), "Updating");
  EXPECT_EQ(world.ReadyMessage(), "group 0 serves its old revision until the new one is ready under epoch 2");
  world.Settle();
  world.Find("q-0-head-2").phase = world.Find("q-0-stage-0-2").phase = PodPhase::kRunning;
  world.Find("q-0-head-2").ready = world.Find("q-0-stage-0-2").ready = true;
  world.Settle();
  EXPECT_TRUE(world.Find("q-0-head-1").serving()) << "the last stage is not ready yet";
  world.Find("q-0-stage-1-2").phase = PodPhase::kRunning;
  world.Find("q-0-stage-1-2").ready = true;
  const Actions over = world.Step();
  EXPECT_TRUE(world.Is("Ready").value) << world.ReadyMessage();
  ASSERT_EQ(over.delete_pods.size(), 1u);
  EXPECT_EQ(over.delete_pods[0].name, "q-0-head-1");
  world.Settle();
  EXPECT_NE(world.Pods().find("q-0-stage-0-1"), std::string::npos) << "stages stay while their head finishes its requests: " << world.Pods();
  world.KubeletRuns();
  world.Settle();
  EXPECT_EQ(world.Pods(), "q-0-head-2 q-0-stage-0-2 q-0-stage-1-2");
  EXPECT_TRUE(world.Is("Ready").value);
  EXPECT_EQ(world.observed.previous.restarts, 0);
  EXPECT_EQ(world.observed.previous.epoch, 2);
}

TEST(Surge, WithoutRoomForTwoTheOldOneDrainsFirst) {
  World world;
  world.observed.pipeline.spec.rollout.surge_timeout_seconds = 50;
  world.Serve();
  world.images.stage = "s:2";
  world.Settle();
  ObservedPod& homeless = world.Find("q-0-stage-1-2");
  homeless.unschedulable = true;
  homeless.node = "";
  homeless.message = "0/4 nodes are available";
  const Actions waiting = world.Settle();
  EXPECT_EQ(world.ReadyReason(), "Unschedulable");
  EXPECT_EQ(waiting.wake_seconds, world.now + 50);
  world.now += 49;
  EXPECT_EQ(MakePlan(world.observed, world.images, world.now).writes(world.observed), 0u);
  world.now += 1;
  world.Step();
  EXPECT_EQ(world.Pods(), "q-0-stage-0-1 q-0-stage-1-1") << "the old head drains, the new group is gone";
  world.KubeletRuns();
  world.Serve();
  EXPECT_EQ(world.Pods(), "q-0-head-3 q-0-stage-0-3 q-0-stage-1-3");
  EXPECT_TRUE(world.Is("Ready").value) << world.ReadyMessage();
}

TEST(Surge, ANewRevisionThatFailsLeavesTheOldOneServingAndIsGivenUp) {
  World world;
  world.observed.pipeline.spec.restart = {.budget = 1, .backoff_seconds = 10};
  world.Serve();
  world.images.stage = "s:bad";
  world.Settle();
  world.KubeletRuns();
  world.End("q-0-stage-0-2", 1);
  const Actions failed = world.Step();
  EXPECT_EQ(world.ReadyReason(), "RolloutFailing");
  EXPECT_EQ(failed.notices.at(0).reason, "RolloutFailed");
  EXPECT_EQ(world.Pods(), "q-0-head-1 q-0-stage-0-1 q-0-stage-1-1");
  world.Settle();  // the first retry is at once
  EXPECT_NE(world.Pods().find("q-0-head-3"), std::string::npos) << world.Pods();
  world.KubeletRuns();
  world.End("q-0-stage-0-3", 1);
  world.Settle();
  EXPECT_EQ(world.ReadyReason(), "RolloutFailed");
  EXPECT_EQ(world.ReadyMessage(), "the new revision failed: pod q-0-stage-0-3 ended: exit code 1 (internal failure); failure 2, the budget is 1; the old revision serves");
  EXPECT_FALSE(world.Is("Failed").value) << "it serves";
  EXPECT_FALSE(world.Is("Progressing").value);
  EXPECT_EQ(world.observed.previous.restarts, 0);
  world.KubeletRuns();
  world.now += 100'000;
  world.Settle();
  EXPECT_EQ(world.Pods(), "q-0-head-1 q-0-stage-0-1 q-0-stage-1-1");
  world.images.stage = "s:3";
  world.Serve();
  world.Serve();
  EXPECT_TRUE(world.Is("Ready").value) << world.ReadyMessage();
  EXPECT_EQ(world.Pods(), "q-0-head-4 q-0-stage-0-4 q-0-stage-1-4");
}

TEST(Surge, GoingBackDropsTheNewGroupAndAThirdRevisionReplacesIt) {
  World world;
  world.Serve();
  world.images.stage = "s:2";
  world.Settle();
  world.images.stage = "s:1";
  world.Settle();
  EXPECT_EQ(world.Pods(), "q-0-head-1 q-0-stage-0-1 q-0-stage-1-1");
  EXPECT_TRUE(world.Is("Ready").value) << world.ReadyMessage();
  world.images.stage = "s:2";
  world.Settle();
  world.images.stage = "s:3";
  world.Settle();
  EXPECT_EQ(world.Pods(), "q-0-head-1 q-0-head-4 q-0-stage-0-1 q-0-stage-0-4 q-0-stage-1-1 q-0-stage-1-4");
}

TEST(Surge, WhenTheOldGroupBreaksTheNewOneTakesItsPlaceAtOnce) {
  World world;
  world.Serve();
  world.images.stage = "s:2";
  world.Settle();
  world.End("q-0-stage-0-1", 70);
  world.Step();
  EXPECT_EQ(world.Pods(), "q-0-head-2 q-0-stage-0-2 q-0-stage-1-2");
  world.Serve();
  EXPECT_TRUE(world.Is("Ready").value) << world.ReadyMessage();
  EXPECT_EQ(world.observed.previous.epoch, 2);
}

TEST(Surge, ALostPodOfTheNewGroupIsNotMadeAgainUnderItsEpoch) {
  World world;
  world.Serve();
  world.images.stage = "s:2";
  world.Settle();
  world.Lose("q-0-stage-0-2");
  world.Settle();
  EXPECT_EQ(world.Pods(), "q-0-head-1 q-0-head-3 q-0-stage-0-1 q-0-stage-0-3 q-0-stage-1-1 q-0-stage-1-3");
}

TEST(Surge, SuspendAndDeletionTakeBothGroups) {
  for (const bool deletion : {false, true}) {
    World world;
    world.Serve();
    world.images.stage = "s:2";
    world.Settle();
    world.observed.pipeline.spec.suspend = !deletion;
    world.observed.deleting = deletion;
    ++world.observed.generation;
    world.Step();
    EXPECT_EQ(world.Pods(), "q-0-stage-0-1 q-0-stage-1-1") << "only what serves drains";
    for (int i = 0; i < 3; ++i) world.Settle(), world.KubeletRuns();
    world.Settle();
    EXPECT_TRUE(world.observed.pods.empty()) << world.Pods();
    EXPECT_EQ(world.observed.has_finalizer, !deletion);
  }
}

}  // namespace
}  // namespace qwen::plan
