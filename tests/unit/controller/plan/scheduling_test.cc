// Goal: a group's pods carry what each gang scheduler's documentation asks for, are drawn together, and reach the fast network; the
// expected labels are written out.
#include "controller/plan/scheduling.h"

#include <gtest/gtest.h>

#include "controller/plan/plan.h"

namespace qwen::plan {
namespace {
using nlohmann::json;

api::QwenPipeline Pipeline() {
  api::QwenPipeline pipeline;
  pipeline.metadata = {.name = "q", .namespace_name = "ns", .uid = "u-1"};
  pipeline.spec.model = {.id = "m", .source = {.claim = api::PersistentVolumeClaimSource{.claim_name = "weights"}}};
  pipeline.spec.stages.count = 2;
  return pipeline;
}
std::vector<json> Pods(const api::QwenPipeline& pipeline) { return *GroupPods(pipeline, {.head = "h", .stage = "s"}, {.replica = 1, .epoch = 7}); }

TEST(Scheduling, WithoutAWishAPodIsAnOrdinaryOne) {
  for (const json& pod : Pods(Pipeline())) {
    EXPECT_FALSE(pod["spec"].contains("affinity"));
    EXPECT_FALSE(pod["spec"].contains("schedulerName"));
    EXPECT_FALSE(pod["metadata"].contains("annotations"));
  }
  EXPECT_FALSE(PodGroup(Pipeline(), {.replica = 1, .epoch = 7}, "q-1-head-7", "uid"));
}

TEST(Scheduling, KueueGetsAPlainPodGroupOfKnownSize) {
  api::QwenPipeline pipeline = Pipeline();
  pipeline.spec.scheduling = {.gang = api::Gang::kKueue, .queue_name = "team-a"};
  for (const json& pod : Pods(pipeline)) {
    EXPECT_EQ(pod["metadata"]["labels"]["kueue.x-k8s.io/queue-name"], "team-a");
    EXPECT_EQ(pod["metadata"]["labels"]["kueue.x-k8s.io/pod-group-name"], "q-1-7") << "a new epoch is another group";
    EXPECT_EQ(pod["metadata"]["annotations"]["kueue.x-k8s.io/pod-group-total-count"], "3");
    EXPECT_FALSE(pod["spec"].contains("schedulerName"));
  }
  EXPECT_FALSE(PodGroup(pipeline, {.replica = 1, .epoch = 7}, "h", "u"));
}

TEST(Scheduling, CoschedulingAndVolcanoGetAPodGroupThatGoesWithTheHead) {
  api::QwenPipeline pipeline = Pipeline();
  pipeline.spec.scheduling.gang = api::Gang::kCoscheduling;
  EXPECT_EQ(Pods(pipeline)[2]["metadata"]["labels"]["scheduling.x-k8s.io/pod-group"], "q-1-7");
  EXPECT_EQ(Pods(pipeline)[2]["spec"]["schedulerName"], "scheduler-plugins-scheduler");
  json group = *PodGroup(pipeline, {.replica = 1, .epoch = 7}, "q-1-head-7", "head-uid");
  EXPECT_EQ(group["apiVersion"], "scheduling.x-k8s.io/v1alpha1");
  EXPECT_EQ(group["metadata"]["name"], "q-1-7");
  EXPECT_EQ(group["metadata"]["ownerReferences"], json::parse(R"([{"apiVersion": "v1", "kind": "Pod", "name": "q-1-head-7", "uid": "head-uid"}])"));
  EXPECT_EQ(group["spec"], (json{{"minMember", 3}}));
  pipeline.spec.scheduling = {.gang = api::Gang::kVolcano, .queue_name = "gold", .scheduler_name = "mine"};
  EXPECT_EQ(Pods(pipeline)[0]["metadata"]["annotations"]["scheduling.k8s.io/group-name"], "q-1-7");
  EXPECT_EQ(Pods(pipeline)[0]["spec"]["schedulerName"], "mine");
  group = *PodGroup(pipeline, {.replica = 1, .epoch = 7}, "q-1-head-7", "head-uid");
  EXPECT_EQ(group["apiVersion"], "scheduling.volcano.sh/v1beta1");
  EXPECT_EQ(group["spec"], json::parse(R"({"minMember": 3, "queue": "gold"})"));
}

TEST(Scheduling, APodGroupIsWantedAsSoonAsItsHeadIsThere) {
  Observed observed;
  observed.pipeline = Pipeline();
  observed.pipeline.spec.scheduling.gang = api::Gang::kVolcano;
  EXPECT_TRUE(MakePlan(observed, {.head = "h", .stage = "s"}, 5).pod_groups.empty());
  observed.pods.push_back({.name = "q-0-head-1", .uid = "u", .epoch = 1, .group_epoch = 1});
  observed.pods.push_back({.name = "q-0-stage-0-1", .uid = "v", .stage = 0, .epoch = 1, .group_epoch = 1});
  const std::vector<json> groups = MakePlan(observed, {.head = "h", .stage = "s"}, 5).pod_groups;
  ASSERT_EQ(groups.size(), 1u);
  EXPECT_EQ(groups[0]["metadata"]["name"], "q-0-1");
  observed.pods[0].epoch = 4;
  EXPECT_EQ(MakePlan(observed, {.head = "h", .stage = "s"}, 5).pod_groups[0]["metadata"]["name"], "q-0-1") << "a head that replaced another is of the same gang";
  observed.pods[0].deleting = true;
  EXPECT_TRUE(MakePlan(observed, {.head = "h", .stage = "s"}, 5).pod_groups.empty()) << "it goes with its head";
}

TEST(Scheduling, PodsOfOneGroupAreDrawnTogether) {
  api::QwenPipeline pipeline = Pipeline();
  pipeline.spec.scheduling.topology_key = "rack";
  const json term = json::parse(R"({"topologyKey": "rack", "labelSelector": {"matchLabels": {
    "qwenpipeline.dev/pipeline": "q", "qwenpipeline.dev/replica": "1", "qwenpipeline.dev/group": "7"}}})");
  for (const json& pod : Pods(pipeline))
    EXPECT_EQ(pod["spec"]["affinity"], (json{{"podAffinity", {{"preferredDuringSchedulingIgnoredDuringExecution", json::array({{{"weight", 100}, {"podAffinityTerm", term}}})}}}}));
  pipeline.spec.scheduling.topology_policy = api::TopologyPolicy::kRequired;
  for (const json& pod : Pods(pipeline)) EXPECT_EQ(pod["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"], json::array({term}));
}

TEST(Scheduling, OnlyWhoAsksForRdmaMayLockMemory) {
  api::QwenPipeline pipeline = Pipeline();
  pipeline.spec.transport.rdma = api::Rdma{.resource = "rdma/hca", .count = 2};
  const std::vector<json> pods = Pods(pipeline);
  EXPECT_FALSE(pods[0]["spec"]["containers"][0]["securityContext"]["capabilities"].contains("add"));
  const json& stage = pods[1]["spec"]["containers"][0];
  EXPECT_EQ(stage["resources"]["limits"], json::parse(R"({"nvidia.com/gpu": "1", "rdma/hca": "2"})"));
  EXPECT_EQ(stage["securityContext"]["capabilities"], json::parse(R"({"drop": ["ALL"], "add": ["IPC_LOCK"]})"));
  EXPECT_NE(*Revision(pipeline, {.head = "h", .stage = "s"}), *Revision(Pipeline(), {.head = "h", .stage = "s"}));
}

}  // namespace
}  // namespace qwen::plan
