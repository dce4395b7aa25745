// Goal: of what the API server sends, the few facts that decisions need are read right, and nothing that is missing hurts.
#include "controller/reconcile/views.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace qwen::reconcile {
namespace {
using kube::Json;

Json Pod(Json status) {
  return {{"metadata",
           {{"name", "q-1-stage-2-7"}, {"namespace", "ns"}, {"uid", "pod-uid"}, {"resourceVersion", "12"},
            {"labels",
             {{"qwenpipeline.dev/pipeline", "q"}, {"qwenpipeline.dev/replica", "1"}, {"qwenpipeline.dev/stage", "2"}, {"qwenpipeline.dev/epoch", "7"},
              {"qwenpipeline.dev/revision", "abc"}}},
            {"ownerReferences", Json::array({{{"kind", "QwenPipeline"}, {"name", "q"}, {"uid", "u-1"}, {"controller", true}}})}}},
          {"status", std::move(status)}};
}

TEST(Views, APodIsWhoItsLabelsSay) {
  const PodView view = DecodePod(Pod({{"phase", "Running"}, {"conditions", Json::array({{{"type", "Ready"}, {"status", "True"}}})}}));
  EXPECT_EQ(view.meta.owner_name, "q");
  EXPECT_EQ(view.pod.replica, 1);
  EXPECT_EQ(view.pod.stage, 2);
  EXPECT_EQ(view.pod.epoch, 7);
  EXPECT_EQ(view.pod.group_epoch, 7) << "of a pod that an older operator made";
  EXPECT_EQ(view.pod.revision, "abc");
  EXPECT_EQ(view.pod.phase, plan::PodPhase::kRunning);
  EXPECT_EQ(view.pod.node, "");
  EXPECT_TRUE(view.pod.ready);
  EXPECT_FALSE(view.pod.deleting);
  EXPECT_FALSE(view.pod.exit_code);
}

TEST(Views, AReplacementKnowsWhenItsGroupBegan) {
  Json pod = Pod({{"phase", "Running"}});
  pod["metadata"]["labels"]["qwenpipeline.dev/group"] = "3";
  EXPECT_EQ(DecodePod(pod).pod.epoch, 7);
  EXPECT_EQ(DecodePod(pod).pod.group_epoch, 3);
}

TEST(Views, APodWithoutAStageIsAHead) {
  Json head = Pod({{"phase", "Pending"}});
  head["metadata"]["labels"].erase("qwenpipeline.dev/stage");
  EXPECT_EQ(DecodePod(head).pod.stage, -1);
  EXPECT_EQ(DecodePod(head).pod.phase, plan::PodPhase::kPending);
}

TEST(Views, WhyAPodDoesNotRunIsRead) {
  const Json waiting = {{"name", "stage"}, {"state", {{"waiting", {{"reason", "CrashLoopBackOff"}, {"message", "back-off 10s"}}}}},
                        {"lastState", {{"terminated", {{"exitCode", 70}, {"reason", "Error"}}}}}};
  const plan::ObservedPod loop = DecodePod(Pod({{"phase", "Running"}, {"containerStatuses", Json::array({waiting})}})).pod;
  EXPECT_EQ(loop.waiting_reason, "CrashLoopBackOff");
  EXPECT_EQ(loop.message, "back-off 10s");
  EXPECT_EQ(loop.exit_code, 70);

  const Json ended = {{"name", "stage"}, {"state", {{"terminated", {{"exitCode", 137}, {"reason", "OOMKilled"}}}}}};
  const plan::ObservedPod killed = DecodePod(Pod({{"phase", "Failed"}, {"containerStatuses", Json::array({ended})}})).pod;
  EXPECT_EQ(killed.phase, plan::PodPhase::kEnded);
  EXPECT_EQ(killed.exit_code, 137);
  EXPECT_EQ(killed.end_reason, "OOMKilled");

  const Json unscheduled = {{"type", "PodScheduled"}, {"status", "False"}, {"reason", "Unschedulable"}, {"message", "0/4 nodes"}};
  const plan::ObservedPod homeless = DecodePod(Pod({{"phase", "Pending"}, {"conditions", Json::array({unscheduled})}})).pod;
  EXPECT_TRUE(homeless.unschedulable);
  EXPECT_EQ(homeless.message, "0/4 nodes");

  const plan::ObservedPod evicted = DecodePod(Pod({{"phase", "Failed"}, {"reason", "Evicted"}, {"message", "low on disk"}})).pod;
  EXPECT_EQ(evicted.end_reason, "Evicted");
  EXPECT_FALSE(evicted.exit_code);
}

TEST(Views, APodThatIsBeingDeletedKnowsUntilWhen) {
  Json pod = Pod({{"phase", "Running"}});
  pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:10Z";
  pod["metadata"]["deletionGracePeriodSeconds"] = 10;
  pod["spec"]["nodeName"] = "n7";
  EXPECT_EQ(DecodePod(pod).pod.node, "n7");
  EXPECT_TRUE(DecodePod(pod).pod.deleting);
  EXPECT_EQ(DecodePod(pod).pod.gone_by_seconds, 1767225610);
  EXPECT_EQ(DecodePod(pod).pod.deleting_since_seconds, 1767225600);
}

TEST(Views, ASidecarsSuccessDoesNotHideAFailure) {
  const auto ended = [](const char* name, int code) { return Json{{"name", name}, {"state", {{"terminated", {{"exitCode", code}, {"reason", "Error"}}}}}}; };
  EXPECT_EQ(DecodePod(Pod({{"phase", "Failed"}, {"containerStatuses", Json::array({ended("stage", 70), ended("mesh", 0)})}})).pod.exit_code, 70);
  EXPECT_EQ(DecodePod(Pod({{"phase", "Failed"}, {"containerStatuses", Json::array({ended("mesh", 0), ended("stage", 70)})}})).pod.exit_code, 70);
}

TEST(Views, APipelineIsItsSpecItsStatusAndAnErrorWhenItCannotBeRead) {
  Json pipeline = {{"apiVersion", "qwenpipeline.dev/v1alpha1"}, {"kind", "QwenPipeline"},
                   {"metadata", {{"name", "q"}, {"namespace", "ns"}, {"uid", "u-1"}, {"generation", 4}}},
                   {"spec", {{"model", {{"id", "m"}, {"source", {{"path", "/m"}}}}}, {"stages", {{"count", 2}}}}},
                   {"status", {{"epoch", 9}, {"observedGeneration", 3}}}};
  const PipelineView view = DecodePipeline(pipeline);
  ASSERT_TRUE(view.pipeline.ok()) << view.pipeline.status().ToString();
  EXPECT_EQ(view.pipeline->metadata.uid, "u-1");
  EXPECT_EQ(view.meta.generation, 4);
  EXPECT_EQ(view.status.epoch, 9);
  EXPECT_TRUE(view.finalizers.empty());
  pipeline["metadata"]["finalizers"] = {"theirs", "qwenpipeline.dev/drain"};
  EXPECT_EQ(DecodePipeline(pipeline).finalizers, (std::vector<std::string>{"theirs", "qwenpipeline.dev/drain"}));
  pipeline["spec"]["replicas"] = "two";
  EXPECT_FALSE(DecodePipeline(pipeline).pipeline.ok());
}

TEST(Views, APipelineWithAFieldOfANewerDefinitionIsServedOnDuringTheUpgrade) {
  const Json pipeline = {{"apiVersion", "qwenpipeline.dev/v1alpha1"}, {"kind", "QwenPipeline"}, {"metadata", {{"name", "q"}, {"namespace", "ns"}, {"uid", "u-1"}}},
                         {"spec", {{"model", {{"id", "m"}, {"source", {{"path", "/m"}}}}}, {"stages", {{"count", 2}, {"fromTheFuture", 1}}}, {"fromTheFuture", {{"a", 1}}}}}};
  const PipelineView view = DecodePipeline(pipeline);
  ASSERT_TRUE(view.pipeline.ok()) << view.pipeline.status().ToString();
  EXPECT_EQ(view.pipeline->spec.stages.count, 2);
}

TEST(Views, ANodeIsFineLostOrGone) {
  const auto node = [](const char* ready, Json taints) {
    return DecodeNode({{"metadata", {{"name", "n"}, {"resourceVersion", "3"}, {"labels", {{"a", "b"}}}}}, {"spec", {{"taints", std::move(taints)}}},
                       {"status", {{"conditions", Json::array({{{"type", "MemoryPressure"}, {"status", "False"}},
                                                               {{"type", "Ready"}, {"status", ready}, {"reason", "NodeStatusUnknown"}}})}}}});
  };
  const auto taint = [](const char* key) { return Json::array({{{"key", key}, {"effect", "NoExecute"}}}); };
  EXPECT_EQ(node("True", Json::array()).state, plan::NodeState::kFine);
  EXPECT_EQ(node("True", Json::array()).trouble, "");
  EXPECT_EQ(node("True", taint("node.kubernetes.io/unschedulable")).state, plan::NodeState::kFine) << "cordoned nodes work";
  EXPECT_EQ(node("Unknown", Json::array()).state, plan::NodeState::kLost);
  EXPECT_EQ(node("Unknown", Json::array()).trouble, "node n is not ready: NodeStatusUnknown");
  EXPECT_EQ(node("False", Json::array()).state, plan::NodeState::kLost);
  EXPECT_EQ(node("True", taint("node.kubernetes.io/unreachable")).trouble, "node n is unreachable");
  EXPECT_EQ(node("Unknown", taint("node.kubernetes.io/out-of-service")).state, plan::NodeState::kGone);
  EXPECT_EQ(node("True", Json::array()).meta.key.ToString(), "n");
  EXPECT_TRUE(node("True", Json::array()).meta.labels.empty()) << "ten thousand nodes are many labels";
  EXPECT_EQ(DecodeNode({{"metadata", {{"name", "new"}}}}).state, plan::NodeState::kFine) << "one that has said nothing yet has no pods of ours";
}

TEST(Views, AChildIsKnownByWhatItIsNotByWhatSomebodySaid) {
  const Json service = {{"kind", "Service"}, {"metadata", {{"name", "q"}}}, {"spec", {{"selector", {{"a", "b"}}}, {"clusterIP", "10.0.0.1"}}}};
  Json changed = service;
  changed["spec"]["selector"]["a"] = "c";
  EXPECT_EQ(DecodeChild(service).fingerprint, DecodeChild(service).fingerprint);
  EXPECT_NE(DecodeChild(service).fingerprint, DecodeChild(changed).fingerprint);
}

}  // namespace
}  // namespace qwen::reconcile
