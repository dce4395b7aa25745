// controller/plan/objects.h — the Kubernetes objects of a pipeline, as JSON with deterministic names. Pure.
//
//   NAME                          Service of the OpenAI API: every ready head
//   NAME-group                    headless Service: DNS names of all pods, ready or not, for the rendezvous
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

// Annotation of applied objects: a hash of what was applied, so that an unchanged one costs no request.
inline constexpr std::string_view kAppliedAnnotation = "qwenpipeline.dev/applied";

struct Images {
  std::string head;
  std::string stage;
};

std::string PodName(const api::QwenPipeline& pipeline, int32_t replica, int32_t stage, int64_t epoch);  // stage -1: the head
std::string ApiServiceName(const api::QwenPipeline& pipeline);
std::string GroupServiceName(const api::QwenPipeline& pipeline);
std::string SecretName(const api::QwenPipeline& pipeline);

// The pods of one group: head first, then stages ascending. REQUIRES: metadata.uid.
// kInvalidArgument and kUnimplemented name the manifest's field that no cluster could run.
struct Group {
  int32_t replica = 0;
  int64_t epoch = 0;
};
Result<std::vector<nlohmann::json>> GroupPods(const api::QwenPipeline& pipeline, const Images& images, Group group);
// A digest of everything that the pods are made of but replica and epoch: a group of another revision is out of date. It also
// changes when a new version of the controller makes other pods.
Result<std::string> Revision(const api::QwenPipeline& pipeline, const Images& images);

// With kAppliedAnnotation.
std::vector<nlohmann::json> Services(const api::QwenPipeline& pipeline);
nlohmann::json HandshakeSecret(const api::QwenPipeline& pipeline, const std::string& value);

}  // namespace qwen::plan
