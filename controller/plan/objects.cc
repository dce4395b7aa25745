#include "controller/plan/objects.h"

#include <algorithm>
#include <array>

#include "controller/plan/desired.h"
#include "controller/plan/scheduling.h"
#include "controller/plan/template.h"
#include "controller/plan/weights.h"
#include "stage/contract/pod_contract.h"

namespace qwen::plan {
namespace {
using nlohmann::json;

constexpr int32_t kUser = 65532;  // "nonroot" of the common base images
// Loading may take an hour from a slow volume; meanwhile /healthz answers, so a process that hangs before it listens is what
// this bounds.
constexpr int32_t kStartupSeconds = 3600;
// The first probe meets a process that does not listen yet; a group that starts again waits this long for the second.
constexpr int32_t kStartupPeriodSeconds = 1;
constexpr int32_t kLivenessPeriodSeconds = 5;  // three in a row: a process that hangs is noticed after 15 to 20 s
// Beyond the drain: what closing connections and freeing a GPU take. A stage has nothing to finish: its head ends first. One
// that hangs hears no SIGTERM, and its group waits for the end of its grace. (A probe's own grace counts only where the container may
// be restarted.)
constexpr int32_t kGraceSlackSeconds = 15;
constexpr int32_t kStageGraceSeconds = 5;

std::string S(std::string_view text) { return std::string(text); }

json Labels(const api::QwenPipeline& pipeline) {
  return {{"app.kubernetes.io/name", "qwen-pipeline"}, {"app.kubernetes.io/instance", pipeline.metadata.name},
          {"app.kubernetes.io/managed-by", S(contract::kFieldManager)}, {S(contract::kLabelPipeline), pipeline.metadata.name}};
}

json Variable(std::string_view name, const std::string& value) { return {{"name", S(name)}, {"value", value}}; }
json FromPod(std::string_view name, const char* field) { return {{"name", S(name)}, {"valueFrom", {{"fieldRef", {{"fieldPath", field}}}}}}; }

json Probe(std::string_view path, const char* port, int32_t period_seconds, int32_t failures) {
  return {{"httpGet", {{"path", S(path)}, {"port", port}}}, {"periodSeconds", period_seconds}, {"timeoutSeconds", 5}, {"failureThreshold", failures}};
}

void AddVolume(json& spec, json& container, const char* name, std::string_view path, json source, bool read_only = true, const std::string& sub_path = {}) {
  source["name"] = name;
  spec["volumes"].push_back(std::move(source));
  json mount = {{"name", name}, {"mountPath", S(path)}, {"readOnly", read_only}};
  if (!sub_path.empty()) mount["subPath"] = sub_path;
  container["volumeMounts"].push_back(std::move(mount));
}

void AddVolumes(const api::QwenPipeline& pipeline, const api::ModelSource& weights, bool head, json& spec, json& container) {
  AddVolume(spec, container, "model", contract::kModelMountPath, ModelVolume(weights), true, weights.claim ? weights.claim->sub_path : "");
  AddVolume(spec, container, "handshake", contract::kSecretMountPath, {{"secret", {{"secretName", SecretName(pipeline)}, {"defaultMode", 0440}}}});
  if (const auto& keys = pipeline.spec.server.api_keys.secret_name; head && keys)
    AddVolume(spec, container, "api-keys", contract::kApiKeysMountPath, {{"secret", {{"secretName", *keys}, {"defaultMode", 0440}}}});
  AddVolume(spec, container, "tmp", "/tmp", {{"emptyDir", json::object()}}, false);  // the root file system is read-only
}

json Container(const api::QwenPipeline& pipeline, const Process& process, const std::string& image, Group group, int32_t stages) {
  const bool head = process.role == Role::kHead;
  const char* probed = head ? "api" : "metrics";
  const int32_t pre_stop_seconds = pipeline.spec.server.pre_stop_seconds;
  json container = {{"name", head ? "head" : "stage"},
                    {"image", image},
                    {"command", {process.program}},
                    {"args", process.args},
                    {"startupProbe", Probe(contract::kHealthPath, probed, kStartupPeriodSeconds, kStartupSeconds / kStartupPeriodSeconds)},
                    {"livenessProbe", Probe(contract::kHealthPath, probed, kLivenessPeriodSeconds, 3)},
                    {"readinessProbe", Probe(contract::kReadyPath, probed, 2, 1)},
                    {"securityContext", ContainerSecurity()}};
  if (head && pre_stop_seconds > 0) container["lifecycle"]["preStop"]["sleep"]["seconds"] = pre_stop_seconds;
  const auto port = [](const char* name, uint16_t number) { return json{{"name", name}, {"containerPort", number}}; };
  container["ports"] = head ? json{port("api", contract::kApiPort), port("control", contract::kControlPort)}
                            : json{port("data", contract::kDataPort), port("metrics", contract::kStageMetricsPort)};
  json& env = container["env"] = {Variable(contract::kEnvPipelineUid, pipeline.metadata.uid), Variable(contract::kEnvEpoch, std::to_string(group.pod_epoch())),
                                  Variable(contract::kEnvStages, std::to_string(stages)), Variable(contract::kEnvLogFormat, "json"),
                                  FromPod(contract::kEnvPodName, "metadata.name"), FromPod(contract::kEnvPodIp, "status.podIP")};
  if (!head) env.push_back(Variable(contract::kEnvStage, std::to_string(process.stage)));
  for (const auto& [name, value] : process.env) env.push_back(Variable(name, value));
  if (!head && pipeline.spec.engine.device == api::Device::kCuda)  // extended resources need limits; requests follow them
    container["resources"]["limits"]["nvidia.com/gpu"] = std::to_string(pipeline.spec.stages.gpus_per_stage);
  return container;
}

json Pod(const api::QwenPipeline& pipeline, const PipelineSize& size, const Process& process, const std::string& image, Group group) {
  const bool head = process.role == Role::kHead;
  const std::string name = PodName(pipeline, group.replica, process.stage, group.pod_epoch());
  json metadata = ChildMetadata(pipeline, name);
  json& labels = metadata["labels"];
  labels["app.kubernetes.io/component"] = S(head ? contract::kRoleHead : contract::kRoleStage);
  labels[S(contract::kLabelRole)] = S(head ? contract::kRoleHead : contract::kRoleStage);
  labels[S(contract::kLabelReplica)] = std::to_string(group.replica);
  labels[S(contract::kLabelEpoch)] = std::to_string(group.pod_epoch());
  labels[S(contract::kLabelGroup)] = std::to_string(group.epoch);
  if (!head) labels[S(contract::kLabelStage)] = std::to_string(process.stage);
  const api::Server& server = pipeline.spec.server;
  const int32_t grace_seconds = head ? server.pre_stop_seconds + server.drain_timeout_seconds + kGraceSlackSeconds : kStageGraceSeconds;
  json spec = {{"restartPolicy", "Never"},
               {"hostname", head ? PodName(pipeline, group.replica, -1, group.epoch) : name},
               {"subdomain", GroupServiceName(pipeline)},
               {"automountServiceAccountToken", false},
               {"enableServiceLinks", false},
               {"terminationGracePeriodSeconds", grace_seconds},
               {"securityContext", PodSecurity()}};
  json container = Container(pipeline, process, image, group, pipeline.spec.stages.size());
  AddVolumes(pipeline, WeightsOf(pipeline, size, process.stage), head, spec, container);
  spec["containers"].push_back(std::move(container));
  json pod = {{"apiVersion", "v1"}, {"kind", "Pod"}, {"metadata", std::move(metadata)}, {"spec", std::move(spec)}};
  ApplyTemplate(TemplateOf(pipeline.spec, process.stage), pod);
  ApplyScheduling(pipeline, group, head, pod);
  return pod;
}

Result<std::vector<json>> UnstampedPods(const api::QwenPipeline& pipeline, const Images& images, Group group) {
  QP_CHECK(!pipeline.metadata.uid.empty());
  const api::Spec& spec = pipeline.spec;
  if (spec.model.source.path && !spec.model.source.path->starts_with('/'))
    return InvalidArgumentError("spec.model.source.path: in a cluster it must be absolute: a folder on every node");
  if (spec.server.api_keys.file && !spec.server.api_keys.secret_name)
    return InvalidArgumentError("spec.server.apiKeys: a cluster needs secretName; file is for qwenctl run");
  ASSIGN_OR_RETURN(const PipelineSize size, ClusterSize(spec));
  RETURN_IF_ERROR(CheckWeights(spec, size, images));
  const auto any = [](uint16_t port) { return "0.0.0.0:" + std::to_string(port); };
  const Placement placement{
      .model_dir = S(contract::kModelMountPath),
      .pipeline_uid = pipeline.metadata.uid,
      .secret_file = S(contract::kSecretMountPath) + "/" + S(contract::kSecretKey),
      .head_address = PodName(pipeline, group.replica, -1, group.epoch) + "." + GroupServiceName(pipeline) + "." + pipeline.metadata.namespace_name +
                      ".svc:" + std::to_string(contract::kControlPort),
      .control_listen = any(contract::kControlPort),
      .api_listen = any(contract::kApiPort),
      .data_listen = any(contract::kDataPort),
      .data_advertise = "$(" + S(contract::kEnvPodIp) + ")",  // the kubelet fills it in
      .metrics_ports = std::vector<uint16_t>(size.stages.size(), contract::kStageMetricsPort),
      .api_keys_file = spec.server.api_keys.secret_name ? S(contract::kApiKeysMountPath) + "/" + S(contract::kApiKeysKey) : "",
      .cores = 0,
  };
  ASSIGN_OR_RETURN(const std::vector<Process> processes, DesiredProcesses(pipeline, size, placement));
  std::vector<json> pods;
  for (const Process& process : processes) {
    const std::string own = TemplateOf(spec, process.stage).image;
    pods.push_back(Pod(pipeline, size, process, !own.empty() ? own : process.role == Role::kHead ? images.head : images.stage, group));
  }
  return pods;
}

json Child(const api::QwenPipeline& pipeline, const char* version, const char* kind, const std::string& name, json spec) {
  return {{"apiVersion", version}, {"kind", kind}, {"metadata", ChildMetadata(pipeline, name)}, {"spec", std::move(spec)}};
}

json Matching(const api::QwenPipeline& pipeline) { return {{"matchLabels", {{S(contract::kLabelPipeline), pipeline.metadata.name}}}}; }

// Head and stages among themselves (control, data, NCCL's ports); everybody else the API and the metrics. Named ports: only a head
// has "api". Outgoing connections are left alone: image hosts, DNS and the network of the GPUs differ from cluster to cluster.
json NetworkPolicy(const api::QwenPipeline& pipeline) {
  const auto port = [](const char* name) { return json{{"port", name}, {"protocol", "TCP"}}; };
  return Child(pipeline, "networking.k8s.io/v1", "NetworkPolicy", pipeline.metadata.name,
               {{"podSelector", Matching(pipeline)}, {"policyTypes", {"Ingress"}},
                {"ingress", {{{"from", {{{"podSelector", Matching(pipeline)}}}}}, {{"ports", {port("api"), port("metrics")}}}}}});
}

// One pod may be evicted when all are ready. That takes its group down, and no other group loses one until it serves again. Pods
// that are not ready may go at any time, or a group that cannot start would hold up the drain of its nodes for ever.
json DisruptionBudget(const api::QwenPipeline& pipeline) {
  const api::Spec& spec = pipeline.spec;
  const int32_t pods = (spec.suspend ? 0 : spec.replicas) * (spec.stages.size() + 1);
  return Child(pipeline, "policy/v1", "PodDisruptionBudget", pipeline.metadata.name,
               {{"minAvailable", std::max(0, pods - 1)}, {"selector", Matching(pipeline)}, {"unhealthyPodEvictionPolicy", "AlwaysAllow"}});
}

// The value at `key`, or null: what the API server leaves out and what it was never given are the same.
const json& At(const json& object, const char* key) {
  static const json kNull;
  const auto found = object.is_object() ? object.find(key) : object.end();
  return object.is_object() && found != object.end() ? *found : kNull;
}

}  // namespace

// FNV-1a: against accidents, not against anybody.
std::string Hash(const std::string& text) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const unsigned char c : text) hash = (hash ^ c) * 0x100000001b3;
  std::array<char, 17> hex;
  std::snprintf(hex.data(), hex.size(), "%016llx", static_cast<unsigned long long>(hash));
  return hex.data();
}

json ChildMetadata(const api::QwenPipeline& pipeline, const std::string& name) {
  return {{"name", name},
          {"namespace", pipeline.metadata.namespace_name},
          {"labels", Labels(pipeline)},
          {"ownerReferences",
           {{{"apiVersion", S(contract::kApiVersion)}, {"kind", S(contract::kKind)}, {"name", pipeline.metadata.name}, {"uid", pipeline.metadata.uid},
             {"controller", true}, {"blockOwnerDeletion", true}}}}};
}

json PodSecurity() {
  return {{"runAsNonRoot", true}, {"runAsUser", kUser}, {"runAsGroup", kUser}, {"fsGroup", kUser}, {"seccompProfile", {{"type", "RuntimeDefault"}}}};
}

json ContainerSecurity() {
  return {{"allowPrivilegeEscalation", false}, {"readOnlyRootFilesystem", true}, {"capabilities", {{"drop", {"ALL"}}}}};
}

json ModelVolume(const api::ModelSource& source) {
  if (source.claim) return {{"name", "model"}, {"persistentVolumeClaim", {{"claimName", source.claim->claim_name}, {"readOnly", true}}}};
  return {{"name", "model"}, {"hostPath", {{"path", *source.path}, {"type", "Directory"}}}};
}

std::string PodName(const api::QwenPipeline& pipeline, int32_t replica, int32_t stage, int64_t epoch) {
  const std::string member = stage < 0 ? "head" : "stage-" + std::to_string(stage);
  return pipeline.metadata.name + "-" + std::to_string(replica) + "-" + member + "-" + std::to_string(epoch);
}
std::string ApiServiceName(const api::QwenPipeline& pipeline) { return pipeline.metadata.name; }
std::string GroupServiceName(const api::QwenPipeline& pipeline) { return pipeline.metadata.name + "-group"; }
std::string SecretName(const api::QwenPipeline& pipeline) { return pipeline.metadata.name + "-handshake"; }

Result<std::vector<json>> GroupPods(const api::QwenPipeline& pipeline, const Images& images, Group group) {
  ASSIGN_OR_RETURN(const std::string revision, Revision(pipeline, images));
  ASSIGN_OR_RETURN(std::vector<json> pods, UnstampedPods(pipeline, images, group));
  for (json& pod : pods) pod["metadata"]["labels"][S(contract::kLabelRevision)] = revision;
  return pods;
}

Result<std::string> Revision(const api::QwenPipeline& pipeline, const Images& images) {
  ASSIGN_OR_RETURN(const std::vector<json> pods, UnstampedPods(pipeline, images, {}));
  std::string text;
  for (const json& pod : pods) text += pod.at("spec").dump() + At(pod.at("metadata"), "annotations").dump() + At(pod.at("metadata"), "labels").dump();
  return Hash(text);
}

std::vector<json> Children(const api::QwenPipeline& pipeline) {
  const auto port = [](const char* name, int32_t number) { return json{{"name", name}, {"port", number}, {"targetPort", name}, {"protocol", "TCP"}}; };
  const json heads = {{S(contract::kLabelPipeline), pipeline.metadata.name}, {S(contract::kLabelRole), S(contract::kRoleHead)}};
  const int32_t api_port = pipeline.spec.server.port != 0 ? pipeline.spec.server.port : contract::kApiPort;
  std::vector<json> children = {
      Child(pipeline, "v1", "Service", ApiServiceName(pipeline), {{"selector", heads}, {"ports", {port("api", api_port)}}}),
      Child(pipeline, "v1", "Service", GroupServiceName(pipeline),
            {{"selector", heads}, {"clusterIP", "None"}, {"publishNotReadyAddresses", true}, {"ports", {port("control", contract::kControlPort)}}}),
      DisruptionBudget(pipeline)};
  if (pipeline.spec.network_policy == api::NetworkPolicyMode::kManaged) children.push_back(NetworkPolicy(pipeline));
  return children;
}

std::string ChildName(const json& object) { return object.at("kind").get<std::string>() + "/" + object.at("metadata").at("name").get<std::string>(); }

std::string Fingerprint(const json& child) {
  const json& spec = At(child, "spec");
  json essence = json::array();
  essence.push_back(At(spec, "selector"));
  // Of a Service; the server adds clusterIP, nodePort and more.
  essence.push_back(At(spec, "clusterIP") == "None");
  essence.push_back(At(spec, "publishNotReadyAddresses") == true);
  if (const json& ports = At(spec, "ports"); ports.is_array())
    for (const json& port : ports) essence.push_back({At(port, "name"), At(port, "port"), At(port, "targetPort"), At(port, "protocol")});
  for (const char* key : {"minAvailable", "maxUnavailable", "unhealthyPodEvictionPolicy", "podSelector", "policyTypes", "ingress", "egress"})
    essence.push_back(At(spec, key));
  return Hash(essence.dump());
}

json HandshakeSecret(const api::QwenPipeline& pipeline, const std::string& value) {
  return {{"apiVersion", "v1"}, {"kind", "Secret"}, {"metadata", ChildMetadata(pipeline, SecretName(pipeline))}, {"type", "Opaque"}, {"immutable", true},
          {"stringData", {{S(contract::kSecretKey), value}}}};
}

}  // namespace qwen::plan
