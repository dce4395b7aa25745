#include "controller/plan/scheduling.h"

#include "stage/contract/pod_contract.h"

namespace qwen::plan {
namespace {
using api::Gang;
using nlohmann::json;

int32_t Members(const api::QwenPipeline& pipeline) { return pipeline.spec.stages.size() + 1; }

void ApplyGang(const api::QwenPipeline& pipeline, Group group, json& pod) {
  const api::Scheduling& scheduling = pipeline.spec.scheduling;
  json& metadata = pod["metadata"];
  const std::string name = GangName(pipeline, group);
  switch (scheduling.gang) {
    case Gang::kNone: break;
    case Gang::kKueue:
      metadata["labels"]["kueue.x-k8s.io/queue-name"] = scheduling.queue_name;
      metadata["labels"]["kueue.x-k8s.io/pod-group-name"] = name;
      metadata["annotations"]["kueue.x-k8s.io/pod-group-total-count"] = std::to_string(Members(pipeline));
      metadata["annotations"]["kueue.x-k8s.io/retriable-in-group"] = "false";  // a new try is a group of another name
      break;
    case Gang::kCoscheduling: metadata["labels"]["scheduling.x-k8s.io/pod-group"] = name; break;
    case Gang::kVolcano:
      metadata["annotations"]["scheduling.k8s.io/group-name"] = name;
      if (!scheduling.queue_name.empty()) metadata["annotations"]["scheduling.volcano.sh/queue-name"] = scheduling.queue_name;
      break;
  }
  std::string scheduler = scheduling.scheduler_name;
  if (scheduler.empty() && scheduling.gang == Gang::kVolcano) scheduler = "volcano";
  if (scheduler.empty() && scheduling.gang == Gang::kCoscheduling) scheduler = "scheduler-plugins-scheduler";
  if (!scheduler.empty()) pod["spec"]["schedulerName"] = scheduler;
}

// Near the other pods of the group. The first one may go anywhere: Kubernetes lets a pod that matches its own term be the first.
void ApplyTopology(const api::QwenPipeline& pipeline, json& pod) {
  const api::Scheduling& scheduling = pipeline.spec.scheduling;
  if (scheduling.topology_key.empty()) return;
  json labels;
  for (const std::string_view label : {contract::kLabelPipeline, contract::kLabelReplica, contract::kLabelGroup})
    labels[std::string(label)] = pod["metadata"]["labels"][std::string(label)];
  const json term = {{"topologyKey", scheduling.topology_key}, {"labelSelector", {{"matchLabels", labels}}}};
  json& affinity = pod["spec"]["affinity"]["podAffinity"];
  if (scheduling.topology_policy == api::TopologyPolicy::kRequired) {
    affinity["requiredDuringSchedulingIgnoredDuringExecution"] = json::array({term});
  } else {
    affinity["preferredDuringSchedulingIgnoredDuringExecution"] = json::array({{{"weight", 100}, {"podAffinityTerm", term}}});
  }
}

}  // namespace

std::string GangName(const api::QwenPipeline& pipeline, Group group) {
  return pipeline.metadata.name + "-" + std::to_string(group.replica) + "-" + std::to_string(group.epoch);
}

void ApplyScheduling(const api::QwenPipeline& pipeline, Group group, bool head, json& pod) {
  ApplyGang(pipeline, group, pod);
  ApplyTopology(pipeline, pod);
  const auto& rdma = pipeline.spec.transport.rdma;
  if (!rdma || head) return;
  json& container = pod["spec"]["containers"][0];
  container["resources"]["limits"][rdma->resource] = std::to_string(rdma->count);
  container["securityContext"]["capabilities"]["add"] = json::array({"IPC_LOCK"});  // registered memory must not be swapped
}

std::optional<json> PodGroup(const api::QwenPipeline& pipeline, Group group, const std::string& head_name, const std::string& head_uid) {
  const api::Scheduling& scheduling = pipeline.spec.scheduling;
  if (scheduling.gang != Gang::kCoscheduling && scheduling.gang != Gang::kVolcano) return std::nullopt;
  const bool volcano = scheduling.gang == Gang::kVolcano;
  json metadata = ChildMetadata(pipeline, GangName(pipeline, group));
  metadata["ownerReferences"] = json::array({{{"apiVersion", "v1"}, {"kind", "Pod"}, {"name", head_name}, {"uid", head_uid}}});
  json spec = {{"minMember", Members(pipeline)}};
  if (volcano && !scheduling.queue_name.empty()) spec["queue"] = scheduling.queue_name;
  return json{{"apiVersion", volcano ? "scheduling.volcano.sh/v1beta1" : "scheduling.x-k8s.io/v1alpha1"}, {"kind", "PodGroup"}, {"metadata", std::move(metadata)},
              {"spec", std::move(spec)}};
}

}  // namespace qwen::plan
