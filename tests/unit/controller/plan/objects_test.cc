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
  pipeline.spec.stages.list = {{.name = "front", .layers = {0, 10}, .pod = {.env = {{"X", "1"}}}}, {.name = "back", .layers = {10, 20}}};
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
  EXPECT_EQ(head["spec"]["containers"][0]["lifecycle"], (json{{"preStop", {{"sleep", {{"seconds", 5}}}}}}));
  EXPECT_EQ(head["spec"]["terminationGracePeriodSeconds"], 5 + 60 + 15) << "before SIGTERM, drain, slack";
  EXPECT_FALSE(container.contains("lifecycle"));
  EXPECT_EQ(stage["spec"]["terminationGracePeriodSeconds"], 5);
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

json Child(const api::QwenPipeline& pipeline, const std::string& name) {
  for (json& child : Children(pipeline))
    if (ChildName(child) == name) return child;
  return nullptr;
}

TEST(Objects, ServicesSelectHeadsForClientsAndEverybodyForTheRendezvous) {
  const json api = Child(Pipeline(), "Service/q"), group = Child(Pipeline(), "Service/q-group");
  EXPECT_EQ(api["spec"]["selector"], (json{{"qwenpipeline.dev/pipeline", "q"}, {"qwenpipeline.dev/role", "head"}}));
  EXPECT_EQ(api["spec"]["ports"][0]["port"], 8000);
  EXPECT_EQ(group["spec"]["clusterIP"], "None");
  EXPECT_EQ(group["spec"]["publishNotReadyAddresses"], true);
  api::QwenPipeline other = Pipeline();
  other.spec.server.port = 80;
  EXPECT_NE(Fingerprint(Child(other, "Service/q")), Fingerprint(api));
  EXPECT_EQ(Child(other, "Service/q-group"), group);
}

TEST(Objects, OnlyPodsOfThePipelineReachAStageButForItsMetrics) {
  const json policy = Child(Pipeline(), "NetworkPolicy/q");
  const json expected = json::parse(R"({
    "podSelector": {"matchLabels": {"qwenpipeline.dev/pipeline": "q"}}, "policyTypes": ["Ingress"],
    "ingress": [{"from": [{"podSelector": {"matchLabels": {"qwenpipeline.dev/pipeline": "q"}}}]},
                {"ports": [{"port": "api", "protocol": "TCP"}, {"port": "metrics", "protocol": "TCP"}]}]})");
  EXPECT_EQ(policy["spec"], expected);
  const auto pods = GroupPods(Pipeline(), kImages, {.replica = 0, .epoch = 1});
  for (const json& pod : *pods) {  // the policy speaks of ports by name
    std::string names;
    for (const json& port : pod["spec"]["containers"][0]["ports"]) names += port["name"].get<std::string>() + " ";
    EXPECT_EQ(names, pod == (*pods)[0] ? "api control " : "data metrics ");
    EXPECT_EQ(pod["metadata"]["labels"]["qwenpipeline.dev/pipeline"], "q");
  }
  api::QwenPipeline open = Pipeline();
  open.spec.network_policy = api::NetworkPolicyMode::kNone;
  EXPECT_TRUE(Child(open, "NetworkPolicy/q").is_null());
}

TEST(Objects, EvictionTakesOneGroupAtATime) {
  struct Case {
    int32_t replicas;
    bool suspend;
    int32_t available;  // of replicas * 3 pods
  };
  for (const Case& c : {Case{1, false, 2}, Case{2, false, 5}, Case{0, false, 0}, Case{2, true, 0}}) {
    api::QwenPipeline pipeline = Pipeline();
    pipeline.spec.replicas = c.replicas;
    pipeline.spec.suspend = c.suspend;
    const json spec = Child(pipeline, "PodDisruptionBudget/q")["spec"];
    EXPECT_EQ(spec["minAvailable"], c.available);
    EXPECT_EQ(spec["unhealthyPodEvictionPolicy"], "AlwaysAllow");
    EXPECT_EQ(spec["selector"], (json{{"matchLabels", {{"qwenpipeline.dev/pipeline", "q"}}}}));
  }
}

TEST(Objects, AFingerprintSeesWhatWeSetAndNothingThatTheServerAdds) {
  for (const json& child : Children(Pipeline())) {
    json stored = child;
    stored["metadata"]["resourceVersion"] = "7";
    stored["metadata"]["managedFields"] = json::array({1});
    stored["status"] = {{"currentHealthy", 3}};
    if (child["kind"] == "Service") {
      stored["spec"]["type"] = "ClusterIP";
      stored["spec"]["sessionAffinity"] = "None";
      stored["spec"]["ipFamilies"] = {"IPv4"};
      if (!child["spec"].contains("clusterIP")) stored["spec"]["clusterIP"] = "10.96.0.7";
      for (json& port : stored["spec"]["ports"]) port["nodePort"] = 0;
    }
    EXPECT_EQ(Fingerprint(stored), Fingerprint(child)) << ChildName(child);
    for (const auto& [key, value] : child["spec"].items()) {
      json changed = stored;
      changed["spec"][key] = "changed";
      EXPECT_NE(Fingerprint(changed), Fingerprint(child)) << ChildName(child) << " " << key;
      changed["spec"].erase(key);
      EXPECT_NE(Fingerprint(changed), Fingerprint(child)) << ChildName(child) << " " << key;
    }
  }
  EXPECT_FALSE(Fingerprint(json::object()).empty());
  EXPECT_FALSE(Fingerprint(json{{"spec", 5}}).empty());
}

TEST(Objects, TheLongestNamesAreStillLabels) {
  api::QwenPipeline pipeline = Pipeline();
  pipeline.metadata.name = std::string(40, 'a');
  EXPECT_LE(PodName(pipeline, 999, 63, 999'999'999).size(), 63u);
  EXPECT_LE(GroupServiceName(pipeline).size(), 63u);
}

}  // namespace
}  // namespace qwen::plan
