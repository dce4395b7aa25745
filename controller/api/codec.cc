#include "controller/api/codec.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <set>

#include "stage/contract/pod_contract.h"

namespace qwen::api {
namespace {

using Json = nlohmann::json;

template <typename T>
using Names = std::array<std::pair<std::string_view, T>, 3>;
constexpr Names<DtypeChoice> kDtypes = {{{"Auto", DtypeChoice::kAuto}, {"Float32", DtypeChoice::kFloat32}, {"BFloat16", DtypeChoice::kBFloat16}}};
constexpr Names<TransportType> kTransports = {{{"Auto", TransportType::kAuto}, {"TCP", TransportType::kTcp}, {"NCCL", TransportType::kNccl}}};
constexpr std::array<std::pair<std::string_view, Gang>, 4> kGangs = {
    {{"None", Gang::kNone}, {"Kueue", Gang::kKueue}, {"Coscheduling", Gang::kCoscheduling}, {"Volcano", Gang::kVolcano}}};
constexpr std::array<std::pair<std::string_view, TopologyPolicy>, 2> kTopologyPolicies = {
    {{"Preferred", TopologyPolicy::kPreferred}, {"Required", TopologyPolicy::kRequired}}};
constexpr Names<WeightsMode> kWeightsModes = {{{"Shared", WeightsMode::kShared}, {"PerStage", WeightsMode::kPerStage}, {"Export", WeightsMode::kExport}}};
constexpr std::array<std::pair<std::string_view, std::string_view>, 2> kAccessModes = {
    {{"ReadWriteOnce", "ReadWriteOnce"}, {"ReadWriteMany", "ReadWriteMany"}}};
constexpr std::array<std::pair<std::string_view, RolloutStrategy>, 2> kStrategies = {{{"Surge", RolloutStrategy::kSurge}, {"Replace", RolloutStrategy::kReplace}}};
constexpr std::array<std::pair<std::string_view, Device>, 2> kDevices = {{{"Cuda", Device::kCuda}, {"Cpu", Device::kCpu}}};
constexpr std::array<std::pair<std::string_view, NetworkPolicyMode>, 2> kNetworkPolicies = {{{"Managed", NetworkPolicyMode::kManaged}, {"None", NetworkPolicyMode::kNone}}};
constexpr std::array<std::pair<std::string_view, contract::BalancePolicy>, 2> kBalances = {
    {{"Time", contract::BalancePolicy::kTime}, {"EvenLayers", contract::BalancePolicy::kEvenLayers}}};

template <typename Table, typename T>
std::string_view NameOf(const Table& table, T value) {
  for (const auto& [name, item] : table)
    if (item == value) return name;
  QP_CHECK(false) << "value " << static_cast<int>(value);
  return "";
}

// RFC 1123 label: what Kubernetes accepts as a name.
bool IsLabel(const std::string& text, size_t maximum) {
  const auto alnum = [](char c) { return ('a' <= c && c <= 'z') || ('0' <= c && c <= '9'); };
  return !text.empty() && text.size() <= maximum && alnum(text.front()) && alnum(text.back()) &&
         std::all_of(text.begin(), text.end(), [&](char c) { return alnum(c) || c == '-'; });
}

// One object of the manifest. Every key that is asked for is remembered, so that Finish() can name one that nobody knows.
class Object {
 public:
  Object(const Json& json, std::string path, UnknownFields unknown, Status& error) : json_(json), path_(std::move(path)), unknown_(unknown), error_(error) {
    if (!json_.is_object()) Fail(error_, path_, "must be an object");
  }

  // Null counts as absent, as in Kubernetes.
  bool Has(const char* key) {
    known_.insert(key);
    return json_.is_object() && json_.contains(key) && !json_.at(key).is_null();
  }
  const Json& At(const char* key) const { return json_.at(key); }
  std::string PathOf(std::string_view key) const { return path_.empty() ? std::string(key) : path_ + "." + std::string(key); }
  void Problem(const char* key, const std::string& what) { Fail(error_, key[0] ? PathOf(key) : path_, what); }

  void Text(const char* key, std::string& out, size_t maximum, bool required = false) {
    if (!Has(key)) {
      if (required) Problem(key, "required");
      return;
    }
    if (!At(key).is_string()) return Problem(key, "must be a string");
    const std::string value = At(key).get<std::string>();
    if (value.size() > maximum || (required && value.empty())) return Problem(key, "must have 1 to " + std::to_string(maximum) + " characters");
    if (value.find('\0') != std::string::npos || value.find('\n') != std::string::npos) return Problem(key, "must be one line");
    out = value;
  }
  void Text(const char* key, std::optional<std::string>& out, size_t maximum) {
    std::string value;
    if (!Has(key)) return;
    Text(key, value, maximum, true);
    out = std::move(value);
  }
  template <typename T>
  void Integer(const char* key, T& out, int64_t minimum, int64_t maximum) {
    if (!Has(key)) return;
    const Json& value = At(key);
    const bool fits = value.is_number_integer() && !(value.is_number_unsigned() && value.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX));
    if (!fits || value.get<int64_t>() < minimum || value.get<int64_t>() > maximum)
      return Problem(key, "must be an integer in [" + std::to_string(minimum) + ", " + std::to_string(maximum) + "], found " + value.dump().substr(0, 40));
    out = static_cast<T>(value.get<int64_t>());
  }
  template <typename T>
  void Integer(const char* key, std::optional<T>& out, int64_t minimum, int64_t maximum) {
    if (!Has(key)) return;
    T value{};
    Integer(key, value, minimum, maximum);
    out = value;
  }
  void Bool(const char* key, bool& out) {
    if (!Has(key)) return;
    if (!At(key).is_boolean()) return Problem(key, "must be true or false");
    out = At(key).get<bool>();
  }
  template <typename Table, typename T>
  void Enum(const char* key, const Table& table, T& out) {
    if (!Has(key)) return;
    std::string choices;
    for (const auto& [name, value] : table) {
      if (At(key) == name) {
        out = value;
        return;
      }
      choices += (choices.empty() ? "" : ", ") + std::string(name);
    }
    Problem(key, "must be one of " + choices + ", found " + At(key).dump().substr(0, 40));
  }
  // Calls parse(Object&) for a nested object, when it is there.
  template <typename Parse>
  void Nested(const char* key, bool required, const Parse& parse) {
    if (!Has(key)) {
      if (required) Problem(key, "required");
      return;
    }
    Object nested(At(key), PathOf(key), unknown_, error_);
    parse(nested);
    nested.Finish();
  }
  // Calls parse(Object&) for each item of a list of objects.
  template <typename Parse>
  void List(const char* key, size_t maximum, const Parse& parse) {
    if (!Has(key)) return;
    if (!At(key).is_array() || At(key).size() > maximum) return Problem(key, "must be a list of at most " + std::to_string(maximum) + " items");
    for (size_t i = 0; i < At(key).size(); ++i) {
      Object item(At(key)[i], PathOf(key) + "[" + std::to_string(i) + "]", unknown_, error_);
      parse(item);
      item.Finish();
    }
  }
  void Texts(const char* key, std::vector<std::string>& out, size_t count_maximum, size_t maximum) {
    if (!Has(key)) return;
    if (!At(key).is_array() || At(key).size() > count_maximum) return Problem(key, "must be a list of at most " + std::to_string(count_maximum) + " strings");
    for (const Json& item : At(key)) {
      if (!item.is_string() || item.get<std::string>().empty() || item.get<std::string>().size() > maximum)
        return Problem(key, "must hold strings of 1 to " + std::to_string(maximum) + " characters");
      out.push_back(item.get<std::string>());
    }
  }
  void Map(const char* key, std::map<std::string, std::string>& out, size_t count_maximum, size_t maximum) {
    if (!Has(key)) return;
    if (!At(key).is_object() || At(key).size() > count_maximum) return Problem(key, "must be an object of at most " + std::to_string(count_maximum) + " strings");
    for (const auto& [name, value] : At(key).items()) {
      if (!value.is_string() || value.get<std::string>().size() > maximum) return Problem(key, "must hold strings of at most " + std::to_string(maximum) + " characters");
      out[name] = value.get<std::string>();
    }
  }
  // Kept as text: types of Kubernetes, which only the API server checks.
  void RawObject(const char* key, std::string& out) {
    if (!Has(key)) return;
    if (!At(key).is_object()) return Problem(key, "must be an object");
    if (!At(key).empty()) out = At(key).dump();
  }
  void RawList(const char* key, std::string& out, size_t count_maximum) {
    if (!Has(key)) return;
    const bool objects = At(key).is_array() && std::all_of(At(key).begin(), At(key).end(), [](const Json& item) { return item.is_object(); });
    if (!objects || At(key).size() > count_maximum) return Problem(key, "must be a list of at most " + std::to_string(count_maximum) + " objects");
    if (!At(key).empty()) out = At(key).dump();
  }
  void Ignore(const char* key) { known_.insert(key); }
  void Finish() {
    if (!json_.is_object() || unknown_ == UnknownFields::kIgnore) return;
    for (const auto& [key, value] : json_.items())
      if (!known_.count(key)) Fail(error_, PathOf(key.substr(0, 80)), "unknown field");
  }

  static void Fail(Status& error, const std::string& path, const std::string& what) {
    if (error.ok()) error = InvalidArgumentError((path.empty() ? "manifest" : path) + ": " + what);
  }

 private:
  const Json& json_;
  const std::string path_;
  const UnknownFields unknown_;
  Status& error_;
  std::set<std::string, std::less<>> known_;
};

void ParseModel(Object& o, Model& model) {
  o.Text("id", model.id, 253, true);
  o.Nested("source", true, [&](Object& source) {
    source.Text("path", model.source.path, 4096);
    source.Nested("persistentVolumeClaim", false, [&](Object& claim) {
      PersistentVolumeClaimSource out;
      claim.Text("claimName", out.claim_name, 253, true);
      claim.Text("subPath", out.sub_path, 4096);
      model.source.claim = out;
    });
    if (model.source.path.has_value() == model.source.claim.has_value()) source.Problem("", "exactly one of path and persistentVolumeClaim is required");
  });
  o.Enum("dtype", kDtypes, model.dtype);
  o.Integer("maxModelLen", model.max_model_len, 1, 1 << 24);
  o.Text("shape", model.shape, 64);
}

void ParseTemplate(Object& o, PodTemplate& pod) {
  o.Text("image", pod.image, 512);
  o.List("env", 64, [&](Object& entry) {
    EnvVar variable;
    entry.Text("name", variable.name, 253, true);
    entry.Text("value", variable.value, 4096);
    if (variable.name.find('=') != std::string::npos) entry.Problem("name", "must not contain '='");
    pod.env.push_back(std::move(variable));
  });
  o.Map("nodeSelector", pod.node_selector, 32, 63);
  o.Map("annotations", pod.annotations, 32, 4096);
  o.Text("priorityClassName", pod.priority_class_name, 253);
  o.RawObject("resources", pod.resources);
  o.RawList("tolerations", pod.tolerations, 16);
  o.RawList("volumes", pod.volumes, 16);
  o.RawList("volumeMounts", pod.volume_mounts, 16);
  o.RawList("imagePullSecrets", pod.image_pull_secrets, 8);
  if (pod.volumes.empty()) return;
  for (const Json& volume : Json::parse(pod.volumes))
    for (const std::string_view own : {"model", "handshake", "api-keys", "tmp"})
      if (volume.value("name", Json()) == own) o.Problem("volumes", "\"" + std::string(own) + "\" is the operator's own");
}

void ParseWeights(Object& o, Weights& weights) {
  o.Enum("mode", kWeightsModes, weights.mode);
  o.Text("claimPrefix", weights.claim_prefix, 240);
  o.Text("size", weights.size, 32);
  std::string storage_class;
  if (o.Has("storageClassName")) {  // empty means: none, and is not the same as absent
    o.Text("storageClassName", storage_class, 253);
    weights.storage_class = storage_class;
  }
  std::string_view access_mode = weights.access_mode;
  o.Enum("accessMode", kAccessModes, access_mode);
  weights.access_mode = access_mode;
  o.Nested("template", false, [&](Object& pod) { ParseTemplate(pod, weights.pod); });
  if (weights.mode == WeightsMode::kPerStage && weights.claim_prefix.empty()) o.Problem("claimPrefix", "required with mode PerStage");
  if (weights.mode == WeightsMode::kExport && weights.size.empty()) o.Problem("size", "required with mode Export");
}

void ParseStages(Object& o, Stages& stages) {
  o.Integer("count", stages.count, 1, contract::kStagesMax);
  std::set<std::string> names;
  o.List("list", contract::kStagesMax, [&](Object& item) {
    StageItem stage;
    item.Text("name", stage.name, 63, true);
    if (!stage.name.empty() && !IsLabel(stage.name, 63)) item.Problem("name", "must be lower-case letters, digits and '-'");
    if (!names.insert(stage.name).second) item.Problem("name", "\"" + stage.name + "\" is used twice");
    item.Nested("layers", true, [&](Object& layers) {
      for (const char* key : {"begin", "end"})
        if (!layers.Has(key)) layers.Problem(key, "required");
      layers.Integer("begin", stage.layers.begin, 0, 4096);
      layers.Integer("end", stage.layers.end, 1, 4096);
      const int32_t expected = stages.list.empty() ? 0 : stages.list.back().layers.end;
      if (stage.layers.begin != expected) layers.Problem("begin", "must be " + std::to_string(expected) + ", found " + std::to_string(stage.layers.begin));
      if (stage.layers.end <= stage.layers.begin) layers.Problem("end", "must be greater than begin");
    });
    ParseTemplate(item, stage.pod);
    stages.list.push_back(std::move(stage));
  });
  if (stages.count.has_value() != stages.list.empty()) o.Problem("", "exactly one of count and list is required");
  o.Enum("balance", kBalances, stages.balance);
  o.Integer("gpusPerStage", stages.gpus_per_stage, 1, 16);
  o.Integer("gpuMemoryGB", stages.gpu_memory_gb, 1, 100000);
  o.Nested("template", false, [&](Object& pod) { ParseTemplate(pod, stages.pod); });
}

void ParseEngine(Object& o, Engine& engine) {
  o.Enum("device", kDevices, engine.device);
  o.Integer("blockTokens", engine.block_tokens, 1, 256);
  o.Integer("maxBatchTokens", engine.max_batch_tokens, 16, 65536);
  o.Integer("maxSequences", engine.max_sequences, 1, 4096);
  o.Integer("queueLimit", engine.queue_limit, 1, 1 << 20);
  o.Integer("kvCacheTokens", engine.kv_cache_tokens, 1, int64_t{1} << 40);
  o.Integer("threads", engine.threads, 1, 1024);
  if (engine.max_batch_tokens < engine.max_sequences)
    o.Problem("maxBatchTokens", "must be at least maxSequences (" + std::to_string(engine.max_sequences) + "): every running sequence needs one token a step");
}

void ParseServer(Object& o, Server& server) {
  o.Integer("port", server.port, 0, 65535);
  o.Nested("apiKeys", false, [&](Object& keys) {
    keys.Text("secretName", server.api_keys.secret_name, 253);
    keys.Text("file", server.api_keys.file, 4096);
  });
  o.Texts("allowedImageHosts", server.allowed_image_hosts, 64, 253);
  o.Integer("drainTimeoutSeconds", server.drain_timeout_seconds, 0, 3600);
  o.Integer("preStopSeconds", server.pre_stop_seconds, 0, 300);
}

// Adds what is set of `pod` to `json`.
void AddTemplate(const PodTemplate& pod, Json& json) {
  if (!pod.image.empty()) json["image"] = pod.image;
  for (const EnvVar& variable : pod.env) json["env"].push_back({{"name", variable.name}, {"value", variable.value}});
  if (!pod.node_selector.empty()) json["nodeSelector"] = pod.node_selector;
  if (!pod.annotations.empty()) json["annotations"] = pod.annotations;
  if (!pod.priority_class_name.empty()) json["priorityClassName"] = pod.priority_class_name;
  for (const auto& [key, text] : {std::pair{"resources", &pod.resources}, {"tolerations", &pod.tolerations}, {"volumes", &pod.volumes},
                                  {"volumeMounts", &pod.volume_mounts}, {"imagePullSecrets", &pod.image_pull_secrets}})
    if (!text->empty()) json[key] = Json::parse(*text);
}

}  // namespace

std::string_view DeviceName(Device device) { return NameOf(kDevices, device); }
std::string_view DtypeChoiceName(DtypeChoice dtype) { return NameOf(kDtypes, dtype); }
std::string_view TransportName(TransportType type) { return NameOf(kTransports, type); }
std::string_view BalanceName(contract::BalancePolicy balance) { return NameOf(kBalances, balance); }

Result<QwenPipeline> ParsePipeline(std::string_view text, UnknownFields unknown) {
  const Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (json.is_discarded()) return InvalidArgumentError("manifest: not JSON");
  Status error;
  QwenPipeline pipeline;
  Object top(json, "", unknown, error);
  for (const auto& [key, expected] : {std::pair{"apiVersion", contract::kApiVersion}, {"kind", contract::kKind}})
    if (!top.Has(key) || top.At(key) != expected) top.Problem(key, "must be " + std::string(expected));
  if (!error.ok()) return error;
  top.Nested("metadata", true, [&](Object& o) {
    o.Text("name", pipeline.metadata.name, 253, true);
    if (!pipeline.metadata.name.empty() && !IsLabel(pipeline.metadata.name, contract::kPipelineNameBytesMax))
      o.Problem("name", "must be at most " + std::to_string(contract::kPipelineNameBytesMax) + " lower-case letters, digits and '-'");
    if (!pipeline.metadata.name.empty() && std::isdigit(static_cast<unsigned char>(pipeline.metadata.name.front())))
      o.Problem("name", "must begin with a letter, as the Service of that name must");
    o.Text("namespace", pipeline.metadata.namespace_name, 63);
    o.Text("uid", pipeline.metadata.uid, 64);
    for (const char* key : {"labels", "annotations", "generation", "resourceVersion", "creationTimestamp", "deletionTimestamp", "managedFields", "finalizers",
                            "ownerReferences", "generateName", "deletionGracePeriodSeconds", "selfLink"})
      o.Ignore(key);
  });
  Spec& spec = pipeline.spec;
  top.Nested("spec", true, [&](Object& o) {
    o.Nested("model", true, [&](Object& model) { ParseModel(model, spec.model); });
    o.Nested("stages", true, [&](Object& stages) { ParseStages(stages, spec.stages); });
    o.Nested("transport", false, [&](Object& transport) {
      transport.Enum("type", kTransports, spec.transport.type);
      transport.Nested("rdma", false, [&](Object& rdma) {
        spec.transport.rdma.emplace();
        rdma.Text("resource", spec.transport.rdma->resource, 253, true);
        rdma.Integer("count", spec.transport.rdma->count, 1, 16);
      });
    });
    o.Nested("scheduling", false, [&](Object& scheduling) {
      scheduling.Enum("gang", kGangs, spec.scheduling.gang);
      scheduling.Text("queueName", spec.scheduling.queue_name, 63);
      scheduling.Text("schedulerName", spec.scheduling.scheduler_name, 253);
      scheduling.Text("topologyKey", spec.scheduling.topology_key, 316);
      scheduling.Enum("topologyPolicy", kTopologyPolicies, spec.scheduling.topology_policy);
      if (spec.scheduling.gang == Gang::kKueue && spec.scheduling.queue_name.empty()) scheduling.Problem("queueName", "required with gang Kueue");
    });
    o.Nested("engine", false, [&](Object& engine) { ParseEngine(engine, spec.engine); });
    o.Nested("server", false, [&](Object& server) { ParseServer(server, spec.server); });
    o.Nested("restart", false, [&](Object& restart) {
      restart.Integer("budget", spec.restart.budget, 0, 1000);
      restart.Integer("backoffSeconds", spec.restart.backoff_seconds, 1, 3600);
      restart.Integer("stallTimeoutSeconds", spec.restart.stall_timeout_seconds, 1, 3600);
      restart.Integer("startupTimeoutSeconds", spec.restart.startup_timeout_seconds, 60, 604800);
    });
    o.Nested("rollout", false, [&](Object& rollout) {
      rollout.Enum("strategy", kStrategies, spec.rollout.strategy);
      rollout.Integer("surgeTimeoutSeconds", spec.rollout.surge_timeout_seconds, 0, 86400);
    });
    o.Nested("weights", false, [&](Object& weights) { ParseWeights(weights, spec.weights); });
    o.Nested("head", false, [&](Object& head) { ParseTemplate(head, spec.head); });
    o.Enum("networkPolicy", kNetworkPolicies, spec.network_policy);
    o.Integer("replicas", spec.replicas, 0, 1000);
    o.Bool("suspend", spec.suspend);
    if (spec.engine.device == Device::kCpu && spec.transport.type == TransportType::kNccl) o.Problem("transport", "type NCCL needs spec.engine.device Cuda");
  });
  top.Ignore("status");
  top.Finish();
  if (!error.ok()) return error;
  return pipeline;
}

std::string PipelineToJson(const QwenPipeline& p) {
  const Spec& s = p.spec;
  Json json = {{"apiVersion", contract::kApiVersion}, {"kind", contract::kKind}};
  json["metadata"] = {{"name", p.metadata.name}, {"namespace", p.metadata.namespace_name}};
  if (!p.metadata.uid.empty()) json["metadata"]["uid"] = p.metadata.uid;

  Json& model = json["spec"]["model"];
  model = {{"id", s.model.id}, {"dtype", DtypeChoiceName(s.model.dtype)}};
  if (s.model.max_model_len) model["maxModelLen"] = *s.model.max_model_len;
  if (!s.model.shape.empty()) model["shape"] = s.model.shape;
  if (s.model.source.path) model["source"]["path"] = *s.model.source.path;
  if (const auto& claim = s.model.source.claim) {
    model["source"]["persistentVolumeClaim"] = {{"claimName", claim->claim_name}};
    if (!claim->sub_path.empty()) model["source"]["persistentVolumeClaim"]["subPath"] = claim->sub_path;
  }
  Json& stages = json["spec"]["stages"];
  stages = {{"balance", BalanceName(s.stages.balance)}, {"gpusPerStage", s.stages.gpus_per_stage}};
  if (s.stages.count) stages["count"] = *s.stages.count;
  if (s.stages.gpu_memory_gb) stages["gpuMemoryGB"] = *s.stages.gpu_memory_gb;
  AddTemplate(s.stages.pod, stages["template"]);
  if (stages["template"].is_null()) stages.erase("template");
  for (const StageItem& item : s.stages.list) {
    Json stage = {{"name", item.name}, {"layers", {{"begin", item.layers.begin}, {"end", item.layers.end}}}};
    AddTemplate(item.pod, stage);
    stages["list"].push_back(std::move(stage));
  }
  json["spec"]["transport"] = {{"type", TransportName(s.transport.type)}};
  if (s.transport.rdma) json["spec"]["transport"]["rdma"] = {{"resource", s.transport.rdma->resource}, {"count", s.transport.rdma->count}};
  Json& scheduling = json["spec"]["scheduling"];
  scheduling = {{"gang", NameOf(kGangs, s.scheduling.gang)}, {"topologyPolicy", NameOf(kTopologyPolicies, s.scheduling.topology_policy)}};
  if (!s.scheduling.queue_name.empty()) scheduling["queueName"] = s.scheduling.queue_name;
  if (!s.scheduling.scheduler_name.empty()) scheduling["schedulerName"] = s.scheduling.scheduler_name;
  if (!s.scheduling.topology_key.empty()) scheduling["topologyKey"] = s.scheduling.topology_key;
  Json& engine = json["spec"]["engine"];
  engine = {{"device", DeviceName(s.engine.device)}, {"blockTokens", s.engine.block_tokens},   {"maxBatchTokens", s.engine.max_batch_tokens},
            {"maxSequences", s.engine.max_sequences}, {"queueLimit", s.engine.queue_limit}};
  if (s.engine.kv_cache_tokens) engine["kvCacheTokens"] = *s.engine.kv_cache_tokens;
  if (s.engine.threads) engine["threads"] = *s.engine.threads;
  Json& server = json["spec"]["server"];
  server = {{"port", s.server.port}, {"drainTimeoutSeconds", s.server.drain_timeout_seconds}, {"preStopSeconds", s.server.pre_stop_seconds}};
  if (s.server.api_keys.secret_name) server["apiKeys"]["secretName"] = *s.server.api_keys.secret_name;
  if (s.server.api_keys.file) server["apiKeys"]["file"] = *s.server.api_keys.file;
  for (const std::string& host : s.server.allowed_image_hosts) server["allowedImageHosts"].push_back(host);
  json["spec"]["restart"] = {{"budget", s.restart.budget}, {"backoffSeconds", s.restart.backoff_seconds}, {"stallTimeoutSeconds", s.restart.stall_timeout_seconds}};
  if (s.restart.startup_timeout_seconds) json["spec"]["restart"]["startupTimeoutSeconds"] = *s.restart.startup_timeout_seconds;
  json["spec"]["rollout"] = {{"strategy", NameOf(kStrategies, s.rollout.strategy)}, {"surgeTimeoutSeconds", s.rollout.surge_timeout_seconds}};
  Json& weights = json["spec"]["weights"];
  weights = {{"mode", NameOf(kWeightsModes, s.weights.mode)}, {"accessMode", s.weights.access_mode}};
  if (!s.weights.claim_prefix.empty()) weights["claimPrefix"] = s.weights.claim_prefix;
  if (!s.weights.size.empty()) weights["size"] = s.weights.size;
  if (s.weights.storage_class) weights["storageClassName"] = *s.weights.storage_class;
  AddTemplate(s.weights.pod, weights["template"]);
  if (weights["template"].is_null()) weights.erase("template");
  AddTemplate(s.head, json["spec"]["head"]);
  if (json["spec"]["head"].is_null()) json["spec"].erase("head");
  json["spec"]["networkPolicy"] = NameOf(kNetworkPolicies, s.network_policy);
  json["spec"]["replicas"] = s.replicas;
  json["spec"]["suspend"] = s.suspend;
  return json.dump(2);
}

}  // namespace qwen::api
