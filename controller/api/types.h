// controller/api/types.h — the QwenPipeline manifest as structs, one to one with crds/qwenpipeline.yaml and docs/crd.md.
// Values. Initialisers are the schema's defaults (a test compares them); std::optional is a field without a default.
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "stage/contract/layer_plan.h"

namespace qwen::api {

struct PersistentVolumeClaimSource {
  std::string claim_name;
  std::string sub_path;  // empty: the volume's root
};
// Exactly one of the two.
struct ModelSource {
  std::optional<std::string> path;  // a folder on the node, or for `qwenctl run` on this machine (relative: to the manifest)
  std::optional<PersistentVolumeClaimSource> claim;
};
enum class DtypeChoice { kAuto, kFloat32, kBFloat16 };  // kAuto: as the checkpoint
struct Model {
  std::string id;  // the name that API requests use
  ModelSource source;
  DtypeChoice dtype = DtypeChoice::kAuto;
  std::optional<int32_t> max_model_len;  // tokens of one sequence, prompt and answer
  std::string shape;  // a released model's name (contract::NamedModelShape): the operator, who sees no checkpoint, then knows its sizes
};

struct EnvVar {
  std::string name, value;
};
// What a pod has beside what the operator gives it. Kubernetes' own types stay JSON text, empty for none: only the API server
// knows what is right in them. `qwenctl run` uses env alone.
struct PodTemplate {
  std::string image;          // empty: the operator's
  std::vector<EnvVar> env;
  std::map<std::string, std::string> node_selector, annotations;
  std::string priority_class_name;
  std::string resources;      // object: ResourceRequirements
  std::string tolerations;    // lists of objects
  std::string volumes, volume_mounts;
  std::string image_pull_secrets;
};
struct StageItem {
  std::string name;             // key of the list
  contract::LayerRange layers;  // [begin, end)
  PodTemplate pod;              // over Stages::pod: maps and env by key, lists one after the other, the rest replaced
};
// Exactly one of count and list.
struct Stages {
  std::optional<int32_t> count;
  std::vector<StageItem> list;
  contract::BalancePolicy balance = contract::BalancePolicy::kTime;  // for count
  int32_t gpus_per_stage = 1;
  std::optional<int32_t> gpu_memory_gb;  // 10^9 bytes of a stage's GPUs; with Model::shape: what does not fit is refused
  PodTemplate pod;                       // of every stage

  int32_t size() const { return count ? *count : static_cast<int32_t>(list.size()); }
};

enum class TransportType { kAuto, kTcp, kNccl };  // kAuto: NCCL between GPUs, else TCP
struct Rdma {
  std::string resource;  // extended resource of the network's device plugin
  int32_t count = 1;     // of it a stage
};
struct Transport {
  TransportType type = TransportType::kAuto;
  std::optional<Rdma> rdma;  // a stage's pod then may lock memory (IPC_LOCK), which the restricted standard forbids
};

enum class Device { kCuda, kCpu };
struct Engine {
  Device device = Device::kCuda;
  int32_t block_tokens = 16;        // tokens of one KV block
  int32_t max_batch_tokens = 2048;  // tokens of one step
  int32_t max_sequences = 256;      // running at once
  int32_t queue_limit = 1024;       // waiting; one more is answered 429
  std::optional<int64_t> kv_cache_tokens;  // tokens that every stage's KV cache holds; absent: what memory allows
  std::optional<int32_t> threads;          // CPU threads of a stage; absent: the machine's cores shared out
};

// At most one is used: a cluster reads the Secret, `qwenctl run` the file.
struct ApiKeys {
  std::optional<std::string> secret_name;  // Secret with the key "keys", one API key a line
  std::optional<std::string> file;
};
struct Server {
  int32_t port = 8000;
  ApiKeys api_keys;
  std::vector<std::string> allowed_image_hosts;  // http(s) image URLs are fetched from these only; none: data: URLs only
  int32_t drain_timeout_seconds = 60;
  int32_t pre_stop_seconds = 5;  // in a cluster: a head that is to end serves on for so long, until no proxy sends it new connections
};

// What a group's failures cost. A group that was ready for 10 minutes begins anew.
struct Restart {
  int32_t budget = 5;            // failures after which the group is given up, its pods kept for a look
  int32_t backoff_seconds = 10;  // before the second restart, then doubled up to 5 min; the first is at once
  int32_t stall_timeout_seconds = 10;  // of silence or standstill, after which head and stages give a neighbour up
  std::optional<int32_t> startup_timeout_seconds;  // from a container's start to ready; absent: from the bytes it loads, or 2 h
};

enum class RolloutStrategy { kSurge, kReplace };
// How a group gets another revision. kSurge: the next epoch's group beside it; it drains when that one is ready. Where there is no
// room for both, and with kReplace: it drains first.
struct Rollout {
  RolloutStrategy strategy = RolloutStrategy::kSurge;
  int32_t surge_timeout_seconds = 120;  // that the new group's pods may be without a node
};

// kShared: everybody reads Model::source. kPerStage: stage k reads the claim PREFIX-k. kExport: claims that the operator makes and
// fills with each stage's shard.
// All pods of a group get their nodes at once, or none does. By whom; kNone: nobody.
enum class Gang { kNone, kKueue, kCoscheduling, kVolcano };
enum class TopologyPolicy { kPreferred, kRequired };
struct Scheduling {
  Gang gang = Gang::kNone;
  std::string queue_name;      // Kueue: required; Volcano
  std::string scheduler_name;  // empty: the gang's usual one, or the cluster's default
  std::string topology_key;    // label of nodes, one of whose values the pods of a group should share; empty: anywhere
  TopologyPolicy topology_policy = TopologyPolicy::kPreferred;
};

enum class WeightsMode { kShared, kPerStage, kExport };
struct Weights {
  WeightsMode mode = WeightsMode::kShared;
  std::string claim_prefix;                   // kPerStage
  std::string size;                           // kExport: a quantity, of each claim
  std::optional<std::string> storage_class;   // kExport; absent: the cluster's default
  std::string access_mode = "ReadWriteOnce";  // kExport
  PodTemplate pod;                            // kExport: of the Jobs' pods
};

enum class NetworkPolicyMode { kManaged, kNone };  // kManaged: the operator makes one for the pipeline

struct Metadata {
  std::string name;
  std::string namespace_name = "default";
  std::string uid;  // empty outside a cluster
};
struct Spec {
  Model model;
  Stages stages;
  Transport transport;
  Engine engine;
  Server server;
  Restart restart;
  Rollout rollout;
  Weights weights;
  Scheduling scheduling;
  PodTemplate head;
  NetworkPolicyMode network_policy = NetworkPolicyMode::kManaged;
  int32_t replicas = 1;  // whole pipelines
  bool suspend = false;
};
struct QwenPipeline {
  Metadata metadata;
  Spec spec;
};

}  // namespace qwen::api
