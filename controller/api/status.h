// controller/api/status.h — the status of a QwenPipeline as structs, one to one with crds/qwenpipeline.yaml, and its codec.
// Values; pure; thread-safe. Times are seconds since 1970 here and RFC 3339 in JSON; 0 is "never" and left out.
//
// `groups` is the controller's memory: everything it needs to know about the past is in there, so that a new leader goes on
// where the old one stopped. It is written before the pods that it speaks of (write-ahead), never after.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace qwen::api {

struct Condition {  // metav1.Condition
  std::string type;
  bool value = false;  // "True" or "False"; Unknown is never written
  std::string reason;
  std::string message;
  int64_t observed_generation = 0;
  int64_t last_transition_seconds = 0;  // when `value` last changed
  bool operator==(const Condition&) const = default;
};

// kForming: pods of this epoch may be missing because they are being created. kFormed: all were there once, so one that is
// missing was lost. kDown: a failure was counted, the restart waits for its back-off. kFailed: given up until the spec changes.
// kLeaving: it drains and goes, because it is not wanted; wanted again, it begins anew.
enum class GroupPhase { kForming, kFormed, kDown, kFailed, kLeaving };
struct IncomingGroup {  // of another revision, being made beside the one that serves
  int64_t epoch = 0;
  std::string revision;
  GroupPhase phase = GroupPhase::kForming;  // or kFormed
  int64_t since_seconds = 0;
  bool operator==(const IncomingGroup&) const = default;
};
struct Replacement {  // of a member that was lost while the others kept their weights
  int32_t stage = 0;   // -1: the head
  int64_t epoch = 0;   // above its group's
  bool operator==(const Replacement&) const = default;
};
struct StageLoad {  // of a stage whose weights are being loaded
  int32_t stage = 0;
  int32_t percent = 0;  // in tens
  bool operator==(const StageLoad&) const = default;
};
struct GroupRecord {
  int32_t replica = 0;
  int64_t epoch = 0;     // at which it began, and of every member that is not in `replaced`
  std::string revision;  // of its pods
  GroupPhase phase = GroupPhase::kForming;
  int32_t failures = 0;  // since the group last served for long
  int64_t last_failure_seconds = 0;
  std::string last_failure_message;
  bool served = false;            // all its pods were ready at once, under this epoch
  int64_t unready_since_seconds = 0;  // since when one that served does not; by this controller's clock, not the nodes'
  std::vector<Replacement> replaced;  // ascending stages
  int64_t mending_epoch = 0;          // of the first replacement since all its pods were ready; 0: none since
  std::vector<StageLoad> loading;     // ascending stages; for people: nothing is decided by it
  std::optional<IncomingGroup> next;
  int64_t retiring_epoch = 0;     // of the last group that this one took over from; its head drains before its stages go
  std::string refused_revision;   // given up beside a group that serves
  bool operator==(const GroupRecord&) const = default;
};

struct PipelineStatus {
  int64_t observed_generation = 0;
  int32_t replicas = 0;        // groups that exist
  int32_t ready_replicas = 0;
  std::string selector;        // of the heads, for autoscalers
  std::string stages;          // "7/8": ready of wanted, over all replicas
  int64_t epoch = 0;           // the highest of any group, ever
  int32_t restarts = 0;        // of groups, because of failures
  std::vector<GroupRecord> groups;  // ascending replicas
  std::vector<Condition> conditions;
  bool operator==(const PipelineStatus&) const = default;
};

// Lenient: what is missing or mistyped is as in a fresh object. `status_json`: the object under "status", or empty.
PipelineStatus ParseStatus(std::string_view status_json);
std::string StatusToJson(const PipelineStatus& status);

std::string_view GroupPhaseName(GroupPhase phase);

}  // namespace qwen::api
