#include "controller/reconcile/views.h"

#include <algorithm>
#include <charconv>
#include <nlohmann/json.hpp>

#include "controller/api/codec.h"
#include "controller/kube/time_text.h"
#include "controller/plan/objects.h"
#include "stage/contract/pod_contract.h"

namespace qwen::reconcile {
namespace {
using kube::FindAt;
using kube::IntAt;
using kube::Json;
using kube::StringAt;

int64_t Number(const kube::ObjectMeta& meta, std::string_view label, int64_t fallback) {
  const auto found = meta.labels.find(std::string(label));
  if (found == meta.labels.end()) return fallback;
  int64_t value = fallback;
  const std::string& text = found->second;
  const auto parsed = std::from_chars(text.data(), text.data() + text.size(), value);
  return parsed.ec == std::errc() && parsed.ptr == text.data() + text.size() ? value : fallback;
}

// 0: no time.
int64_t Seconds(const std::string& time) {
  const auto micros = kube::ParseTime(time);
  return micros.ok() ? *micros / 1'000'000 : 0;
}

// Our pods have one container; a mesh may have injected others, which count when they are what fails.
void ReadContainers(const Json& object, plan::ObservedPod& pod) {
  const Json* containers = FindAt(object, "/status/containerStatuses");
  if (containers == nullptr || !containers->is_array()) return;
  for (const Json& container : *containers) {
    if (const Json* waiting = FindAt(container, "/state/waiting"); waiting != nullptr && pod.waiting_reason.empty()) {
      pod.waiting_reason = StringAt(*waiting, "/reason");
      pod.message = StringAt(*waiting, "/message");
    }
    pod.started_seconds = std::max(pod.started_seconds, Seconds(StringAt(container, "/state/running/startedAt")));
    const Json* ended = FindAt(container, "/state/terminated");
    if (ended == nullptr) ended = FindAt(container, "/lastState/terminated");
    if (ended == nullptr || (pod.exit_code && *pod.exit_code != 0)) continue;
    pod.exit_code = static_cast<int>(IntAt(*ended, "/exitCode"));
    pod.end_reason = StringAt(*ended, "/reason");
  }
}

void ReadConditions(const Json& object, plan::ObservedPod& pod) {
  const Json* conditions = FindAt(object, "/status/conditions");
  if (conditions == nullptr || !conditions->is_array()) return;
  for (const Json& condition : *conditions) {
    const bool value = StringAt(condition, "/status") == "True";
    const std::string type = StringAt(condition, "/type");
    if (type == "Ready") pod.ready = value;
    if (type == "PodScheduled" && !value && StringAt(condition, "/reason") == "Unschedulable") {
      pod.unschedulable = true;
      pod.message = StringAt(condition, "/message");
    }
  }
}

}  // namespace

PipelineView DecodePipeline(const Json& object) {
  PipelineView view{.meta = kube::ParseMeta(object)};
  view.pipeline = api::ParsePipeline(object.dump(), api::UnknownFields::kIgnore);
  if (const Json* finalizers = FindAt(object, "/metadata/finalizers"); finalizers != nullptr && finalizers->is_array())
    for (const Json& finalizer : *finalizers) view.finalizers.push_back(finalizer.get<std::string>());
  view.deleting_since_seconds = Seconds(StringAt(object, "/metadata/deletionTimestamp"));
  if (const Json* status = FindAt(object, "/status")) view.status = api::ParseStatus(status->dump());
  return view;
}

PodView DecodePod(const Json& object) {
  PodView view{.meta = kube::ParseMeta(object)};
  plan::ObservedPod& pod = view.pod;
  pod.name = view.meta.key.name;
  pod.uid = view.meta.uid;
  pod.replica = static_cast<int32_t>(Number(view.meta, contract::kLabelReplica, 0));
  pod.stage = static_cast<int32_t>(Number(view.meta, contract::kLabelStage, -1));
  pod.epoch = Number(view.meta, contract::kLabelEpoch, 0);
  pod.group_epoch = Number(view.meta, contract::kLabelGroup, pod.epoch);
  const auto revision = view.meta.labels.find(std::string(contract::kLabelRevision));
  if (revision != view.meta.labels.end()) pod.revision = revision->second;
  pod.deleting = view.meta.deleting;
  pod.node = StringAt(object, "/spec/nodeName");
  view.ip = StringAt(object, "/status/podIP");
  pod.gone_by_seconds = Seconds(StringAt(object, "/metadata/deletionTimestamp"));
  const Json* grace = FindAt(object, "/metadata/deletionGracePeriodSeconds");
  pod.deleting_since_seconds = pod.gone_by_seconds - (grace != nullptr && grace->is_number_integer() ? grace->get<int64_t>() : 0);
  const std::string phase = StringAt(object, "/status/phase");
  pod.phase = phase == "Running" ? plan::PodPhase::kRunning : phase == "Failed" || phase == "Succeeded" ? plan::PodPhase::kEnded : plan::PodPhase::kPending;
  ReadConditions(object, pod);
  ReadContainers(object, pod);
  if (const std::string reason = StringAt(object, "/status/reason"); !reason.empty()) {  // of the pod as a whole: "Evicted"
    pod.end_reason = reason;
    pod.message = StringAt(object, "/status/message");
  }
  return view;
}

ChildView DecodeChild(const Json& object) { return {.meta = kube::ParseMeta(object), .fingerprint = plan::Fingerprint(object)}; }

SecretView DecodeSecret(const Json& object) { return {.meta = kube::ParseMeta(object)}; }

ClaimView DecodeClaim(const Json& object) { return {.meta = kube::ParseMeta(object)}; }

JobView DecodeJob(const Json& object) {
  JobView view{.meta = kube::ParseMeta(object)};
  const Json* conditions = FindAt(object, "/status/conditions");
  if (conditions == nullptr || !conditions->is_array()) return view;
  for (const Json& condition : *conditions) {
    if (StringAt(condition, "/status") != "True") continue;
    const std::string type = StringAt(condition, "/type");
    view.job.complete |= type == "Complete";
    if (type == "Failed") {
      view.job.failed = true;
      view.job.message = StringAt(condition, "/message");
    }
  }
  return view;
}

NodeView DecodeNode(const Json& object) {
  NodeView view;
  view.meta.key = kube::KeyOf(object);
  view.meta.resource_version = StringAt(object, "/metadata/resourceVersion");
  const std::string name = "node " + view.meta.key.name;
  if (const Json* conditions = FindAt(object, "/status/conditions"); conditions != nullptr && conditions->is_array()) {
    for (const Json& condition : *conditions) {
      if (StringAt(condition, "/type") != "Ready" || StringAt(condition, "/status") == "True") continue;
      view.state = plan::NodeState::kLost;
      view.trouble = name + " is not ready: " + StringAt(condition, "/reason", "no reason given");
    }
  }
  if (const Json* taints = FindAt(object, "/spec/taints"); taints != nullptr && taints->is_array()) {
    for (const Json& taint : *taints) {
      const std::string key = StringAt(taint, "/key");
      if (key == "node.kubernetes.io/unreachable" && view.state == plan::NodeState::kFine) {
        view.state = plan::NodeState::kLost;
        view.trouble = name + " is unreachable";
      }
      if (key == "node.kubernetes.io/out-of-service") {
        view.state = plan::NodeState::kGone;
        view.trouble = name + " is out of service";
      }
    }
  }
  return view;
}

}  // namespace qwen::reconcile
