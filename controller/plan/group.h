// controller/plan/group.h — what to do with one replica's group (a head and its stages) now. Pure: same input, same answer.
//
//   no record ──▶ Forming ──all pods exist──▶ Formed ──a pod ended or is gone──▶ Down ──back-off over──▶ Forming: mended, or begun anew
//                                                                                  └──budget spent, or hopeless──▶ Failed
//   Formed, another revision wanted, strategy Surge: `next` forms under the next epoch beside it ──ready──▶ it is the group, the old
//     one drains; it fails: it goes, and is tried again within the budget; it finds no room: the old one drains first
//   any ──not wanted──▶ Leaving ──head gone, then stages gone──▶ no record; wanted again before: Forming, epoch + 1
// Mended: of a group that has served only the pods that were lost are made again, under the next epoch. The other stages keep their
// weights, and the head its requests: it computes them anew from their tokens when all are together again. Begun anew, all of it under
// the next epoch: when it never served, when what a mending made fails before all serve (then something else is wrong), when no stage
// is left that could keep weights, when a pod hangs and nobody can say which. Nothing is ever created again under an epoch under
// which it was there, so two groups of one epoch cannot be.
// A pod on a node that is lost is lost at once: the next epoch begins beside what may still run there, and is not counted against the
// budget. Such pods' objects are deleted by force only when their node is gone.
// What ends while it serves (another revision, scale down, suspend, deletion) drains first: the head is deleted and finishes its requests,
// then the stages go.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "controller/api/status.h"
#include "controller/plan/objects.h"
#include "controller/plan/observed.h"

namespace qwen::plan {

inline constexpr int32_t kBackoffSecondsMax = 300;
inline constexpr int32_t kStableSeconds = 600;      // ready for so long after a failure: failures begin at 0 again
inline constexpr int32_t kUnreadySecondsMin = 60;   // a pod that served and is not ready for so long (or six stall time-outs) hangs
inline constexpr int32_t kTellSeconds = 4;          // a deletion that is over sooner is not written into a status that goes with it
inline constexpr int32_t kOverdueSeconds = 30;      // a deleted head that is still there so long after its grace has a dead node

// An exit code of a head or stage after which another try would end the same: only another spec or checkpoint helps.
bool IsHopeless(int exit_code);

// Before the restart after failure number `failures`: 0, then the base doubled each time.
int64_t BackoffSeconds(const api::Restart& restart, int32_t failures);

// The one pod (or other thing) that keeps a group from serving. Higher rank: more worth telling.
struct Blocker {
  int32_t rank = 0;
  std::string reason;   // CamelCase, stable
  std::string message;  // names the pod
};
Blocker BlockerOf(const ObservedPod& pod);

struct GroupInput {
  int32_t replica = 0;
  bool wanted = true;    // replica < spec.replicas and not suspended
  const char* leaving = "ScalingDown";  // reason of the condition while one that is not wanted goes
  bool may_begin = true;  // pods of the wanted revision: their weights are there
  bool may_roll = true;  // a serving group of another revision may be replaced now
  bool spec_changed = false;  // since the status was written: what was given up is tried again
  std::string revision;  // as desired
  int64_t next_epoch = 1;
  int64_t known_epoch = 0;  // the highest that the status has ever told of: pods above it are of a group that it has forgotten
  int64_t now_seconds = 0;
  std::optional<api::GroupRecord> record;
  std::vector<const ObservedPod*> pods;  // of this replica, of any epoch
};

// The epoch of a member of the group: in its pod's name. stage -1: the head.
int64_t MemberEpoch(const api::GroupRecord& record, int32_t stage);
bool IsMember(const api::GroupRecord& record, const ObservedPod& pod);

struct GroupPlan {
  struct Create {
    int32_t stage = 0;  // -1: the head
    Group group;
  };
  std::optional<api::GroupRecord> record;  // to be written before anything below is done; none: there is no group
  std::vector<Create> create;              // members that are missing, of the group or of the one beside it
  std::vector<const ObservedPod*> remove;
  std::optional<int64_t> wake_seconds;     // look again then, if nothing happens before
  bool restarted = false;                  // because of a failure, as a whole or in part
  bool mended = false;                     // in part
  bool ready = false;                      // serves, under the wanted revision
  bool draining = false;                   // a head finishes its requests, or is told to
  int32_t heads_ready = 0, stages_ready = 0;
  std::optional<Blocker> blocker;          // why it does not serve
  std::string failure;                     // a failure that was noticed just now; empty: none
  bool rollout_failed = false;             // it is one of the group beside this one

  int64_t highest_epoch() const;  // of everything that it speaks of; 0: of nothing
};
GroupPlan PlanGroup(const api::QwenPipeline& pipeline, const GroupInput& input);

}  // namespace qwen::plan
