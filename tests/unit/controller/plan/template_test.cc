// Goal: what a manifest says of its pods reaches exactly those pods, beside what the operator gives them; a change of it is
// another revision.
#include "controller/plan/template.h"

#include <gtest/gtest.h>

#include "controller/plan/objects.h"

namespace qwen::plan {
namespace {
using nlohmann::json;

api::QwenPipeline Pipeline() {
  api::QwenPipeline pipeline;
  pipeline.metadata = {.name = "q", .namespace_name = "ns", .uid = "u-1"};
  pipeline.spec.model = {.id = "m", .source = {.claim = api::PersistentVolumeClaimSource{.claim_name = "weights"}}};
  pipeline.spec.stages.list = {{.name = "front", .layers = {0, 10}}, {.name = "back", .layers = {10, 20}}};
  return pipeline;
}
std::vector<json> Pods(const api::QwenPipeline& pipeline) { return *GroupPods(pipeline, {.head = "head:1", .stage = "stage:1"}, {.replica = 0, .epoch = 1}); }
const json& Container(const json& pod) { return pod.at("spec").at("containers").at(0); }

TEST(Template, AStagesOwnFieldsGoOverThoseOfEveryStage) {
  const api::PodTemplate every{.image = "all:1", .env = {{"A", "1"}, {"B", "2"}}, .node_selector = {{"gpu", "h200"}, {"zone", "a"}}, .resources = R"({"limits":{"cpu":"8"}})",
                               .tolerations = R"([{"key":"x"}])", .volumes = R"([{"name":"v"}])"};
  const api::PodTemplate one{.env = {{"B", "3"}}, .node_selector = {{"zone", "b"}}, .resources = R"({"limits":{"cpu":"16"}})", .tolerations = R"([{"key":"y"}])"};
  const api::PodTemplate merged = Merge(every, one);
  EXPECT_EQ(merged.image, "all:1");
  ASSERT_EQ(merged.env.size(), 2u);
  EXPECT_EQ(merged.env[0].name + merged.env[0].value + merged.env[1].name + merged.env[1].value, "A1B3");
  EXPECT_EQ(merged.node_selector, (std::map<std::string, std::string>{{"gpu", "h200"}, {"zone", "b"}}));
  EXPECT_EQ(merged.resources, R"({"limits":{"cpu":"16"}})");
  EXPECT_EQ(json::parse(merged.tolerations), json::parse(R"([{"key":"x"},{"key":"y"}])"));
  EXPECT_EQ(merged.volumes, R"([{"name":"v"}])");
  EXPECT_EQ(Merge({}, one).tolerations, one.tolerations);
}

TEST(Template, ReachesThePodsThatItIsOf) {
  api::QwenPipeline pipeline = Pipeline();
  pipeline.spec.head = {.image = "own/head:2", .env = {{"H", "h"}}, .priority_class_name = "high"};
  pipeline.spec.stages.pod = {.annotations = {{"a", "b"}}, .tolerations = R"([{"key":"nvidia.com/gpu","operator":"Exists"}])", .volumes = R"([{"name":"scratch","emptyDir":{}}])",
                              .volume_mounts = R"([{"name":"scratch","mountPath":"/scratch"}])", .image_pull_secrets = R"([{"name":"registry"}])"};
  pipeline.spec.stages.list[1].pod = {.image = "own/stage:3", .node_selector = {{"gpu", "h200"}}, .resources = R"({"requests":{"memory":"64Gi"},"limits":{"memory":"64Gi"}})"};
  const std::vector<json> pods = Pods(pipeline);
  const json &head = pods[0], &front = pods[1], &back = pods[2];
  EXPECT_EQ(Container(head)["image"], "own/head:2");
  EXPECT_EQ(Container(front)["image"], "stage:1");
  EXPECT_EQ(Container(back)["image"], "own/stage:3");
  EXPECT_EQ(head["spec"]["priorityClassName"], "high");
  EXPECT_FALSE(front["spec"].contains("priorityClassName"));
  EXPECT_FALSE(head["spec"].contains("tolerations"));
  for (const json* stage : {&front, &back}) {
    EXPECT_EQ((*stage)["spec"]["tolerations"][0]["key"], "nvidia.com/gpu");
    EXPECT_EQ((*stage)["spec"]["imagePullSecrets"], json::parse(R"([{"name":"registry"}])"));
    EXPECT_EQ((*stage)["spec"]["volumes"].back()["name"], "scratch");
    EXPECT_EQ(Container(*stage)["volumeMounts"].back()["mountPath"], "/scratch");
    EXPECT_EQ((*stage)["spec"]["volumes"][0]["name"], "model") << "what the operator gives stays";
    EXPECT_EQ((*stage)["metadata"]["annotations"]["a"], "b");
  }
  EXPECT_FALSE(front["spec"].contains("nodeSelector"));
  EXPECT_EQ(back["spec"]["nodeSelector"], (json{{"gpu", "h200"}}));
  EXPECT_EQ(Container(back)["resources"], json::parse(R"({"requests":{"memory":"64Gi"},"limits":{"memory":"64Gi","nvidia.com/gpu":"1"}})"));
  EXPECT_EQ(Container(front)["resources"], json::parse(R"({"limits":{"nvidia.com/gpu":"1"}})"));
  std::string named;
  for (const json& variable : Container(head)["env"])
    if (variable["name"] == "H") named = variable["value"];
  EXPECT_EQ(named, "h");
}

TEST(Template, WhoNamesTheGpusDecidesTheirNumber) {
  api::QwenPipeline pipeline = Pipeline();
  pipeline.spec.stages.pod.resources = R"({"limits":{"nvidia.com/gpu":"0","nvidia.com/mig-3g.71gb":"1"}})";
  EXPECT_EQ(Container(Pods(pipeline)[1])["resources"]["limits"], json::parse(R"({"nvidia.com/gpu":"0","nvidia.com/mig-3g.71gb":"1"})"));
}

TEST(Template, AnyChangeIsAnotherRevision) {
  const Images images{.head = "head:1", .stage = "stage:1"};
  const api::QwenPipeline base = Pipeline();
  const std::string revision = *Revision(base, images);
  const auto changed = [&](auto change) {
    api::QwenPipeline other = base;
    change(other.spec);
    return *Revision(other, images) != revision;
  };
  EXPECT_TRUE(changed([](api::Spec& s) { s.head.annotations["a"] = "b"; }));
  EXPECT_TRUE(changed([](api::Spec& s) { s.stages.pod.image = "x"; }));
  EXPECT_TRUE(changed([](api::Spec& s) { s.stages.list[0].pod.tolerations = R"([{"key":"x"}])"; }));
  EXPECT_TRUE(changed([](api::Spec& s) { s.restart.stall_timeout_seconds = 11; })) << "processes are told of it";
  EXPECT_FALSE(changed([](api::Spec& s) { s.rollout.strategy = api::RolloutStrategy::kReplace; }));
  EXPECT_FALSE(changed([](api::Spec& s) { s.restart.startup_timeout_seconds = 100; }));
}

}  // namespace
}  // namespace qwen::plan
