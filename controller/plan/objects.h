// controller/plan/objects.h — the Kubernetes objects of a pipeline, as JSON with deterministic names. Pure.
//
//   NAME                          Service of the OpenAI API: every ready head
//   NAME-group                    headless Service: DNS names of the heads, ready or not, whom the stages dial. Stages tell each other addresses, so
//                                 that Kubernetes need not write endpoints for each of them
//   NAME                          NetworkPolicy: who reaches the pods; PodDisruptionBudget: one group down at a time
//   NAME-handshake                Secret of the handshake; created once, its value is never looked at again
//   NAME-<replica>-head-<epoch>   pods; NAME-<replica>-stage-<index>-<epoch>
//
// Pods fulfil the restricted Pod Security Standard (but for a model on a node's own folder, which it forbids), hold no token of
// the API server, and end for good: a new try is a new pod of a higher epoch, which a zombie cannot be mistaken for.
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "controller/api/types.h"
#include "stage/base/status.h"

namespace qwen::plan {

struct Images {
  std::string head;
  std::string stage;
  std::string exporter;  // of spec.weights.mode Export; empty: none
};

// Shared by everything that the operator makes for a pipeline.
nlohmann::json ChildMetadata(const api::QwenPipeline& pipeline, const std::string& name);  // name, labels, owner
nlohmann::json PodSecurity();        // what the restricted standard asks of a pod
nlohmann::json ContainerSecurity();  // and of its containers
nlohmann::json ModelVolume(const api::ModelSource& source);  // named "model"
std::string Hash(const std::string& text);  // 16 digits, against accidents, not against anybody

std::string PodName(const api::QwenPipeline& pipeline, int32_t replica, int32_t stage, int64_t epoch);  // stage -1: the head
std::string ApiServiceName(const api::QwenPipeline& pipeline);
std::string GroupServiceName(const api::QwenPipeline& pipeline);
std::string SecretName(const api::QwenPipeline& pipeline);

// The pods of one group: head first, then stages ascending. REQUIRES: metadata.uid.
// A pod that replaces another of its group bears the new epoch in its name; its stages find a replaced head by the host name
// that the group's first head had.
// kInvalidArgument and kUnimplemented name the manifest's field that no cluster could run.
struct Group {
  int32_t replica = 0;
  int64_t epoch = 0;  // at which the group began
  int64_t made = 0;   // of pods that are made later, to replace others: their own epoch; 0: `epoch`

  int64_t pod_epoch() const { return made != 0 ? made : epoch; }
};
Result<std::vector<nlohmann::json>> GroupPods(const api::QwenPipeline& pipeline, const Images& images, Group group);
// A digest of everything that the pods are made of but replica and epoch: a group of another revision is out of date. It also
// changes when a new version of the controller makes other pods.
Result<std::string> Revision(const api::QwenPipeline& pipeline, const Images& images);

// What stands beside the pods but the Secret: Services, NetworkPolicy, PodDisruptionBudget. To be applied where Fingerprint tells
// another one than that of what is there: somebody changed it, or it is to change.
std::vector<nlohmann::json> Children(const api::QwenPipeline& pipeline);
// "Service/q"
std::string ChildName(const nlohmann::json& object);
// Of those fields of a child that Children sets, in an object of ours or of the API server's, who adds others.
std::string Fingerprint(const nlohmann::json& child);
nlohmann::json HandshakeSecret(const api::QwenPipeline& pipeline, const std::string& value);

}  // namespace qwen::plan
