// controller/reconcile/views.h — what the informers keep of each object: a few hundred bytes instead of a JSON tree of 60 kB.
// Pure decoders; thread-safe.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "controller/api/status.h"
#include "controller/api/types.h"
#include "controller/kube/object.h"
#include "controller/plan/observed.h"
#include "stage/base/status.h"

namespace qwen::reconcile {

struct PipelineView {
  kube::ObjectMeta meta;
  Result<api::QwenPipeline> pipeline = Status(StatusCode::kInternal, "not decoded");  // an error: the CRD takes what we do not
  api::PipelineStatus status;
  std::vector<std::string> finalizers;
  int64_t deleting_since_seconds = 0;  // when meta.deleting
};
struct PodView {
  kube::ObjectMeta meta;
  plan::ObservedPod pod;
  std::string ip;  // empty: none yet
};
struct ChildView {  // Service, NetworkPolicy, PodDisruptionBudget
  kube::ObjectMeta meta;
  std::string fingerprint;  // plan::Fingerprint
};
struct SecretView {  // never the content
  kube::ObjectMeta meta;
};

struct ClaimView {
  kube::ObjectMeta meta;
};
struct JobView {
  kube::ObjectMeta meta;
  plan::ObservedJob job;
};
struct NodeView {  // a few of the 10 kB that a Node has
  kube::ObjectMeta meta;
  plan::NodeState state = plan::NodeState::kFine;
  std::string trouble;  // for people; empty when fine
};

PipelineView DecodePipeline(const kube::Json& object);
PodView DecodePod(const kube::Json& object);
ChildView DecodeChild(const kube::Json& object);
SecretView DecodeSecret(const kube::Json& object);
ClaimView DecodeClaim(const kube::Json& object);
JobView DecodeJob(const kube::Json& object);
NodeView DecodeNode(const kube::Json& object);

}  // namespace qwen::reconcile
