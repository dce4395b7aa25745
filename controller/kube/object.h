// controller/kube/object.h — the names of things in a cluster: resource, key, metadata, and the few well-known resources.
// Values; thread-safe to copy. Nothing here does I/O.
#pragma once
#include <compare>
#include <cstdint>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

namespace qwen::kube {

using Json = nlohmann::json;

// A resource type as the API server's paths name it.
struct Resource {
  std::string group;  // empty: the core group
  std::string version;
  std::string plural;
  std::string kind;
  bool namespaced = true;

  std::string api_version() const { return group.empty() ? version : group + "/" + version; }
};
namespace resources {
inline const Resource kPods{"", "v1", "pods", "Pod"};
inline const Resource kServices{"", "v1", "services", "Service"};
inline const Resource kSecrets{"", "v1", "secrets", "Secret"};
inline const Resource kConfigMaps{"", "v1", "configmaps", "ConfigMap"};
inline const Resource kPersistentVolumeClaims{"", "v1", "persistentvolumeclaims", "PersistentVolumeClaim"};
inline const Resource kNodes{"", "v1", "nodes", "Node", false};
inline const Resource kNamespaces{"", "v1", "namespaces", "Namespace", false};
inline const Resource kEvents{"events.k8s.io", "v1", "events", "Event"};
inline const Resource kLeases{"coordination.k8s.io", "v1", "leases", "Lease"};
inline const Resource kJobs{"batch", "v1", "jobs", "Job"};
// Of gang schedulers: definitions that a cluster may lack.
inline const Resource kCoschedulingPodGroups{"scheduling.x-k8s.io", "v1alpha1", "podgroups", "PodGroup"};
inline const Resource kVolcanoPodGroups{"scheduling.volcano.sh", "v1beta1", "podgroups", "PodGroup"};
inline const Resource kNetworkPolicies{"networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy"};
inline const Resource kPodDisruptionBudgets{"policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget"};
inline const Resource kCustomResourceDefinitions{"apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition",
                                                 false};
inline const Resource kQwenPipelines{"qwenpipeline.dev", "v1alpha1", "qwenpipelines", "QwenPipeline"};
}  // namespace resources

// namespace/name, or name alone for what has no namespace.
struct ObjectKey {
  std::string namespace_name;
  std::string name;

  auto operator<=>(const ObjectKey&) const = default;
  std::string ToString() const { return namespace_name.empty() ? name : namespace_name + "/" + name; }
};

// What every cached object keeps of its metadata. Annotations are left out: they can be as large as the object.
struct ObjectMeta {
  ObjectKey key;
  std::string uid;
  std::string resource_version;
  int64_t generation = 0;
  bool deleting = false;  // deletionTimestamp is set
  std::string creation_timestamp;
  std::string owner_uid;  // of the owner reference with controller: true; empty: none
  std::string owner_kind;
  std::string owner_name;
  std::map<std::string, std::string> labels;
};

// Missing and mistyped fields become empty: the API server has checked what matters.
ObjectMeta ParseMeta(const Json& object);
ObjectKey KeyOf(const Json& object);

// The value at a JSON pointer ("/status/phase") when it is there and of that type, else the fallback. Never throws.
std::string StringAt(const Json& value, std::string_view pointer, std::string_view fallback = {});
int64_t IntAt(const Json& value, std::string_view pointer, int64_t fallback = 0);
bool BoolAt(const Json& value, std::string_view pointer, bool fallback = false);
const Json* FindAt(const Json& value, std::string_view pointer);  // null: not there

// resourceVersions are ordered for every etcd-backed resource. 0 for what is no number.
uint64_t RevisionOf(std::string_view resource_version);

}  // namespace qwen::kube

template <>
struct std::hash<qwen::kube::ObjectKey> {
  size_t operator()(const qwen::kube::ObjectKey& key) const {
    return std::hash<std::string>()(key.name) * 31 + std::hash<std::string>()(key.namespace_name);
  }
};
