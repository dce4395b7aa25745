// Goal: whatever happens in whatever order, the controller dying between any two writes included, what was asked for serves in the end.
#include "controller/plan/group.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "controller/plan/status.h"
#include "tests/unit/controller/plan/world.h"

namespace qwen::plan {
namespace {

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
    spec.rollout.strategy = seed % 2 == 0 ? api::RolloutStrategy::kSurge : api::RolloutStrategy::kReplace;
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
      for (const ObservedPod& pod : world.observed.pods) {
        if (pod.replica != group.replica) continue;
        int64_t expected = group.epoch;
        for (const api::Replacement& one : group.replaced)
          if (one.stage == pod.stage) expected = one.epoch;
        EXPECT_EQ(pod.epoch, expected) << pod.name;
        EXPECT_EQ(pod.group_epoch, group.epoch) << pod.name;
      }
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
