// Goal: the pods and Services of a pipeline have the names, labels, owner, arguments and security settings that the contract and
// Kubernetes want; the expected values are written out here, not computed.
#include "controller/plan/objects.h"

#include <gtest/gtest.h>

namespace qwen::plan {
namespace {
using nlohmann::json;

api::QwenPipeline Pipeline() {
  api::QwenPipeline pipeline;
  pipeline.metadata = {.name = "q", .namespace_name = "ns", .uid = "u-1"};
  pipeline.spec.model = {.id = "m", .source = {.claim = api::PersistentVolumeClaimSource{.claim_name = "weights", .sub_path = "a/b"}}};
  pipeline.spec.stages.list = {{.name = "front", .layers = {0, 10}, .env = {{"X", "1"}}}, {.name = "back", .layers = {10, 20}}};
  pipeline.spec.server.api_keys.secret_name = "keys";
  return pipeline;
}
const Images kImages{.head = "head:1", .stage = "stage:1"};

std::string Argument(const json& pod, const std::string& flag) {
  const json& args = pod.at("spec").at("containers").at(0).at("args");
  for (size_t i = 0; i + 1 < args.size(); i += 2)
    if (args[i] == flag) return args[i + 1];
  return "<none>";
}
json Environment(const json& pod, const std::string& name) {
  for (const json& variable : pod.at("spec").at("containers").at(0).at("env"))
    if (variable.at("name") == name) return variable;
  return nullptr;
}

TEST(Objects, AGroupIsOneHeadAndItsStagesWithNamesLabelsAndOwner) {
  const auto pods = GroupPods(Pipeline(), kImages, {.replica = 3, .epoch = 7});
  ASSERT_TRUE(pods.ok()) << pods.status().ToString();
  ASSERT_EQ(pods->size(), 3u);
  const char* names[] = {"q-3-head-7", "q-3-stage-0-7", "q-3-stage-1-7"};
  for (size_t i = 0; i < 3; ++i) {
    const json& pod = (*pods)[i];
    const json& labels = pod["metadata"]["labels"];
    EXPECT_EQ(pod["metadata"]["name"], names[i]);
    EXPECT_EQ(pod["metadata"]["namespace"], "ns");
    EXPECT_EQ(pod["spec"]["hostname"], names[i]);
    EXPECT_EQ(pod["spec"]["subdomain"], "q-group");
    EXPECT_EQ(labels["qwenpipeline.dev/pipeline"], "q");
    EXPECT_EQ(labels["qwenpipeline.dev/replica"], "3");
    EXPECT_EQ(labels["qwenpipeline.dev/epoch"], "7");
    EXPECT_EQ(labels["qwenpipeline.dev/role"], i == 0 ? "head" : "stage");
    EXPECT_EQ(labels.contains("qwenpipeline.dev/stage"), i > 0);
    const json owner = {{"apiVersion", "qwenpipeline.dev/v1alpha1"}, {"kind", "QwenPipeline"}, {"name", "q"}, {"uid", "u-1"}, {"controller", true}, {"blockOwnerDeletion", true}};
    EXPECT_EQ(pod["metadata"]["ownerReferences"], json::array({owner}));
    EXPECT_EQ(pod["spec"]["restartPolicy"], "Never") << "a new try is a new epoch";
    EXPECT_EQ(Environment(pod, "QWEN_EPOCH")["value"], "7");
    EXPECT_EQ(Environment(pod, "QWEN_STAGES")["value"], "2");
  }
}

TEST(Objects, PodsFulfilTheRestrictedProfile) {
  const auto pods = GroupPods(Pipeline(), kImages, {.replica = 0, .epoch = 1});
  ASSERT_TRUE(pods.ok());
  for (const json& pod : *pods) {
    const json& spec = pod["spec"];
    EXPECT_EQ(spec["securityContext"]["runAsNonRoot"], true);
    EXPECT_EQ(spec["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
    EXPECT_EQ(spec["automountServiceAccountToken"], false);
    for (const json& container : spec["containers"]) {
      EXPECT_EQ(container["securityContext"]["allowPrivilegeEscalation"], false);
      EXPECT_EQ(container["securityContext"]["readOnlyRootFilesystem"], true);
      EXPECT_EQ(container["securityContext"]["capabilities"]["drop"], json::array({"ALL"}));
    }
    for (const json& volume : spec["volumes"]) EXPECT_FALSE(volume.contains("hostPath"));
  }
}

TEST(Objects, TheProcessesFindEachOtherTheModelAndTheSecret) {
  const auto pods = GroupPods(Pipeline(), kImages, {.replica = 0, .epoch = 4});
  ASSERT_TRUE(pods.ok());
  const json &head = (*pods)[0], &stage = (*pods)[2];
  const json& container = stage["spec"]["containers"][0];
  EXPECT_EQ(container["command"], json::array({"qwen-stage"}));
  EXPECT_EQ(container["image"], "stage:1");
  EXPECT_EQ(head["spec"]["containers"][0]["image"], "head:1");
  EXPECT_EQ(Argument(stage, "--head"), "q-0-head-4.q-group.ns.svc:7000");
  EXPECT_EQ(Argument(head, "--control-listen"), "0.0.0.0:7000");
  EXPECT_EQ(Argument(head, "--listen"), "0.0.0.0:8000");
  EXPECT_EQ(Argument(head, "--api-keys-file"), "/etc/qwen/api-keys/keys");
  EXPECT_EQ(Argument(stage, "--data-advertise"), "$(QWEN_POD_IP)");
  EXPECT_EQ(Environment(stage, "QWEN_POD_IP")["valueFrom"]["fieldRef"]["fieldPath"], "status.podIP");
  EXPECT_EQ(Environment((*pods)[1], "X")["value"], "1");
  EXPECT_EQ(Argument(stage, "--layers"), "10:20");
  EXPECT_EQ(Argument(stage, "--index"), "1");
  EXPECT_EQ(Argument(stage, "--model"), "/model");
  EXPECT_EQ(Argument(stage, "--secret-file"), "/etc/qwen/secret/handshake");
  EXPECT_EQ(container["resources"]["limits"]["nvidia.com/gpu"], "1");
  EXPECT_FALSE(head["spec"]["containers"][0].contains("resources"));
  EXPECT_EQ(container["readinessProbe"]["httpGet"]["path"], "/ready");
  EXPECT_EQ(container["livenessProbe"]["httpGet"]["path"], "/healthz");
  EXPECT_EQ(container["startupProbe"]["periodSeconds"], 1) << "a restart waits for the second probe: the first comes before the process listens";
  const json mount = {{"name", "model"}, {"mountPath", "/model"}, {"readOnly", true}, {"subPath", "a/b"}};
  EXPECT_EQ(container["volumeMounts"][0], mount);
  EXPECT_EQ(stage["spec"]["volumes"][0]["persistentVolumeClaim"], (json{{"claimName", "weights"}, {"readOnly", true}}));
  EXPECT_GT(head["spec"]["terminationGracePeriodSeconds"].get<int>(), Pipeline().spec.server.drain_timeout_seconds);
}

TEST(Objects, AStageWhoseLayersNobodyListedPlansThemItself) {
  api::QwenPipeline pipeline = Pipeline();
  pipeline.spec.stages = {.count = 4};
  const auto pods = GroupPods(pipeline, kImages, {.replica = 0, .epoch = 1});
  ASSERT_TRUE(pods.ok());
  EXPECT_EQ(Argument((*pods)[1], "--layers"), "<none>");
  EXPECT_EQ(Argument((*pods)[1], "--stages"), "4");
  pipeline.spec.stages.balance = contract::BalancePolicy::kEvenLayers;
  EXPECT_EQ(GroupPods(pipeline, kImages, {}).status().code(), StatusCode::kInvalidArgument) << "a stage plans by time only";
}

TEST(Objects, RevisionFollowsWhatPodsAreMadeOfAndNothingElse) {
  const api::QwenPipeline base = Pipeline();
  const std::string revision = *Revision(base, kImages);
  api::QwenPipeline same = base;
  same.spec.replicas = 5;
  same.spec.suspend = true;
  same.spec.restart.budget = 1;
  same.spec.server.port = 80;  // of the Service
  EXPECT_EQ(*Revision(same, kImages), revision);
  EXPECT_NE(*Revision(base, {.head = "head:2", .stage = "stage:1"}), revision);
  api::QwenPipeline other = base;
  other.spec.engine.max_sequences = 7;
  EXPECT_NE(*Revision(other, kImages), revision);
}

TEST(Objects, ServicesSelectHeadsForClientsAndEverybodyForTheRendezvous) {
  const std::vector<json> services = Services(Pipeline());
  ASSERT_EQ(services.size(), 2u);
  EXPECT_EQ(services[0]["metadata"]["name"], "q");
  EXPECT_EQ(services[0]["spec"]["selector"], (json{{"qwenpipeline.dev/pipeline", "q"}, {"qwenpipeline.dev/role", "head"}}));
  EXPECT_EQ(services[0]["spec"]["ports"][0]["port"], 8000);
  EXPECT_EQ(services[1]["metadata"]["name"], "q-group");
  EXPECT_EQ(services[1]["spec"]["clusterIP"], "None");
  EXPECT_EQ(services[1]["spec"]["publishNotReadyAddresses"], true);
  api::QwenPipeline other = Pipeline();
  other.spec.server.port = 80;
  EXPECT_NE(Services(other)[0]["metadata"]["annotations"], services[0]["metadata"]["annotations"]);
  EXPECT_EQ(Services(other)[1], services[1]);
}

TEST(Objects, TheLongestNamesAreStillLabels) {
  api::QwenPipeline pipeline = Pipeline();
  pipeline.metadata.name = std::string(40, 'a');
  EXPECT_LE(PodName(pipeline, 999, 63, 999'999'999).size(), 63u);
  EXPECT_LE(GroupServiceName(pipeline).size(), 63u);
}

}  // namespace
}  // namespace qwen::plan
