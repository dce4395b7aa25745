// controller/plan/observed.h — one pipeline as the informers see it: plain values, a snapshot. What plan.h decides on.
// The past (epochs, failures) is in `previous`, because it must survive the controller; nothing else is remembered.
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "controller/api/status.h"
#include "controller/api/types.h"

namespace qwen::plan {

enum class PodPhase { kPending, kRunning, kEnded };  // kEnded: Failed or Succeeded; with restartPolicy Never it never comes back
// Of the node that a pod is bound to. kLost: it is not ready, or out of reach; what runs there nobody knows. kGone: it is no more, or
// somebody has vouched that it has no power (taint out-of-service), so what ran there runs no longer.
enum class NodeState { kFine, kLost, kGone };
struct ObservedPod {
  std::string name;
  std::string uid;
  int32_t replica = 0;
  int32_t stage = -1;  // -1: the head
  int64_t epoch = 0;
  int64_t group_epoch = 0;  // at which its group began: below `epoch` when it replaced another member
  std::string revision;
  PodPhase phase = PodPhase::kPending;
  bool ready = false;
  int64_t started_seconds = 0;        // its container; 0: it does not run
  bool deleting = false;
  int64_t deleting_since_seconds = 0;  // when deleting
  int64_t gone_by_seconds = 0;         // when deleting: the end of its grace period
  bool unschedulable = false;
  std::string waiting_reason;   // of its container, in the kubelet's words: "ImagePullBackOff"; empty: it does not wait
  std::string message;          // the scheduler's or the kubelet's, for people
  std::optional<int> exit_code;  // of its container's last end
  int32_t load_percent = -1;     // of a stage's weights, in tens, as its head knows it; -1: not known
  std::string end_reason;        // "OOMKilled", "Evicted", "Error"; empty: it has not ended
  std::string node;              // that it is bound to; empty: none yet
  NodeState node_state = NodeState::kFine;  // kFine also when nodes are not watched, or when no node of the cluster is fine: then
                                            // it is the observers that are cut off, and a new epoch would find no place
  std::string node_trouble;      // "node n is not ready: ..."; empty: it is fine

  bool serving() const { return ready && !deleting && node_state == NodeState::kFine; }
};

struct ObservedJob {
  bool complete = false, failed = false;
  std::string message;  // of its failure
};

struct Observed {
  api::QwenPipeline pipeline;
  int64_t generation = 0;
  api::PipelineStatus previous;
  std::vector<ObservedPod> pods;                // owned by the pipeline, in any order
  std::map<std::string, std::string> children;  // "Kind/name" -> Fingerprint (objects.h) of what stands there
  std::set<std::string> claims;                  // that the operator made, for weights
  std::map<std::string, ObservedJob> jobs;       // that fill them
  bool has_secret = false;
  bool has_finalizer = false;
  bool deleting = false;    // the pipeline
  int64_t deleting_since_seconds = 0;  // when deleting
  std::string revision;     // as Actions told it for this very generation; empty: not known, and worked out (half a millisecond)
  std::string spec_error;   // this controller cannot read the spec, which the API server took; `pipeline` is then metadata only
  std::string write_error;  // the API server's refusal of our last writes ("exceeded quota: ..."); empty: none
};

}  // namespace qwen::plan
