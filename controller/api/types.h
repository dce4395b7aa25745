// controller/api/types.h — the QwenPipeline manifest as structs, one to one with crds/qwenpipeline.yaml and docs/manifest.md.
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
};

struct EnvVar {
  std::string name, value;
};
struct StageItem {
  std::string name;             // key of the list
  contract::LayerRange layers;  // [begin, end)
  std::vector<EnvVar> env;      // added to the stage's environment
};
// Exactly one of count and list.
struct Stages {
  std::optional<int32_t> count;
  std::vector<StageItem> list;
  contract::BalancePolicy balance = contract::BalancePolicy::kTime;  // for count
  int32_t gpus_per_stage = 1;

  int32_t size() const { return count ? *count : static_cast<int32_t>(list.size()); }
};

enum class TransportType { kAuto, kTcp, kNccl };  // kAuto: NCCL between GPUs, else TCP
struct Transport {
  TransportType type = TransportType::kAuto;
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
  NetworkPolicyMode network_policy = NetworkPolicyMode::kManaged;
  int32_t replicas = 1;  // whole pipelines
  bool suspend = false;
};
struct QwenPipeline {
  Metadata metadata;
  Spec spec;
};

}  // namespace qwen::api
