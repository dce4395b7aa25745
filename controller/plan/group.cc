#include "controller/plan/group.h"

#include <algorithm>

#include "controller/plan/sizing.h"
#include "stage/contract/pod_contract.h"

namespace qwen::plan {
namespace {
using api::GroupPhase;
using contract::ExitCode;

bool Hopeless(const ObservedPod& pod) { return pod.phase == PodPhase::kEnded && pod.exit_code && IsHopeless(*pod.exit_code); }

std::string HowItEnded(const ObservedPod& pod) {
  std::string text;
  if (pod.exit_code) {
    text = "exit code " + std::to_string(*pod.exit_code);
    const std::string_view reason = contract::ExitReason(*pod.exit_code);
    if (!reason.empty()) text += " (" + std::string(reason) + ")";
  }
  if (!pod.end_reason.empty() && pod.end_reason != "Error" && pod.end_reason != "Completed") text += (text.empty() ? "" : ", ") + pod.end_reason;
  if (text.empty()) text = "no exit code";
  return text;
}

// At a character's boundary: JSON takes no half ones.
std::string Cut(std::string text, size_t bytes_max) {
  if (text.size() <= bytes_max) return text;
  while (bytes_max > 0 && (static_cast<unsigned char>(text[bytes_max]) & 0xc0) == 0x80) --bytes_max;
  text.resize(bytes_max);
  return text;
}

// The pods of one replica, sorted out.
struct Members {
  std::vector<const ObservedPod*> current;  // index 0 the head, k + 1 stage k; null: not there
  std::vector<const ObservedPod*> stale;    // of other groups, replaced, or no member of this group at all
};
Members Sort(const GroupInput& input, const api::GroupRecord& record, int32_t stages, int64_t other_epoch = 0) {
  Members members;
  members.current.resize(static_cast<size_t>(stages) + 1);
  for (const ObservedPod* pod : input.pods) {
    if (IsMember(record, *pod) && pod->stage >= -1 && pod->stage < stages) {
      members.current[static_cast<size_t>(pod->stage + 1)] = pod;
    } else if (pod->group_epoch != other_epoch) {
      members.stale.push_back(pod);
    }
  }
  return members;
}

std::string StageList(const std::vector<int32_t>& stages) {
  std::string text;
  for (const int32_t stage : stages) text += (text.empty() ? "" : ", ") + (stage < 0 ? "the head" : "stage " + std::to_string(stage));
  return text;
}

class Planner {
 public:
  Planner(const api::QwenPipeline& pipeline, const GroupInput& input) : pipeline_(pipeline), input_(input) {}

  GroupPlan Plan() {
    Recall();
    if (plan_.record) record().loading.clear();
    if (!plan_.record) {
      if (input_.wanted && input_.may_begin) Begin();
      return std::move(plan_);
    }
    // A group beside this one that nobody wants any more is like any other stale pod.
    if (record().next && (!input_.wanted || record().revision == input_.revision || record().next->revision != input_.revision)) record().next.reset();
    members_ = Sort(input_, record(), Stages(), record().next ? record().next->epoch : 0);
    Count();
    if (!input_.wanted) {
      record().phase = GroupPhase::kLeaving;
      if (Retire(input_.leaving)) plan_.record.reset();
    } else if (plan_.record->phase == GroupPhase::kLeaving) {
      Return();
    } else if (plan_.record->phase == GroupPhase::kFailed) {
      plan_.blocker = Blocker{100, "GaveUp", plan_.record->last_failure_message};
    } else if (plan_.record->revision != input_.revision) {
      Update();
    } else {
      Keep();
    }
    RemoveStale();
    RemoveGone();
    return std::move(plan_);
  }

 private:
  // What broke the group, if anything did: the pod that ended, or one that is gone.
  struct Problem {
    bool hopeless = false;
    std::string what;
    bool node = false;  // that was lost: not the group's fault
  };

  api::GroupRecord& record() { return *plan_.record; }

  // Of the group that is there: another revision may have had another number.
  int32_t Stages() {
    if (record().revision == input_.revision) return pipeline_.spec.stages.size();
    int32_t last = 0;
    for (const ObservedPod* pod : input_.pods)
      if (IsMember(record(), *pod)) last = std::max(last, pod->stage);
    return last + 1;
  }

  // The status is the memory; pods that it does not know of (it was lost, or is from a backup) are adopted.
  void Recall() {
    plan_.record = input_.record;
    const ObservedPod* youngest = nullptr;  // of those that it does not know of
    for (const ObservedPod* pod : input_.pods) {
      if (plan_.record && pod->epoch <= std::max(record().epoch, input_.known_epoch)) continue;
      if (youngest == nullptr || pod->group_epoch > youngest->group_epoch) youngest = pod;
    }
    if (youngest != nullptr) {
      if (!plan_.record) plan_.record = api::GroupRecord{.replica = input_.replica};
      BeginAs(youngest->group_epoch, youngest->revision);
      for (const ObservedPod* pod : input_.pods)
        if (pod->group_epoch == record().epoch && pod->epoch > MemberEpoch(record(), pod->stage)) SetMemberEpoch(pod->stage, pod->epoch);
      record().next.reset();
    }
    if (plan_.record && input_.spec_changed) {
      record().refused_revision.clear();
      if (record().phase == GroupPhase::kFailed) record().phase = GroupPhase::kDown;
      record().failures = 0;
    }
  }

  void Count() {
    plan_.heads_ready = plan_.stages_ready = 0;
    for (const ObservedPod* pod : members_.current) {
      if (pod == nullptr || !pod->serving()) continue;
      (pod->stage < 0 ? plan_.heads_ready : plan_.stages_ready) += 1;
    }
  }
  bool AllReady() const { return plan_.heads_ready + plan_.stages_ready == static_cast<int32_t>(members_.current.size()); }

  void Remove(const ObservedPod* pod) {
    if (pod != nullptr && (!pod->deleting || pod->node_state == NodeState::kGone)) plan_.remove.push_back(pod);
  }

  void Wake(int64_t at_seconds) { plan_.wake_seconds = std::min(plan_.wake_seconds.value_or(at_seconds), at_seconds); }

  void CreateAll(int64_t epoch) {
    for (int32_t stage = -1; stage < pipeline_.spec.stages.size(); ++stage) plan_.create.push_back({stage, {.replica = input_.replica, .epoch = epoch}});
  }
  void BeginAs(int64_t epoch, const std::string& revision) {
    record().epoch = epoch;
    record().revision = revision;
    record().phase = GroupPhase::kForming;
    record().served = false;
    record().unready_since_seconds = 0;
    record().replaced.clear();
    record().mending_epoch = 0;
  }
  void SetMemberEpoch(int32_t stage, int64_t epoch) {
    std::vector<api::Replacement>& replaced = record().replaced;
    std::erase_if(replaced, [&](const api::Replacement& one) { return one.stage == stage; });
    replaced.insert(std::upper_bound(replaced.begin(), replaced.end(), stage, [](int32_t s, const api::Replacement& one) { return s < one.stage; }), {stage, epoch});
  }

  void Begin() {
    plan_.record = api::GroupRecord{.replica = input_.replica, .epoch = input_.next_epoch, .revision = input_.revision};
    CreateAll(record().epoch);
    plan_.blocker = Blocker{1, "Creating", "group " + std::to_string(input_.replica) + " is being created"};
  }

  // Everything of this epoch goes; the next one begins at once, because a pod that is stuck on a dead node must not stop it.
  void Replace() {
    for (const ObservedPod* pod : members_.current) Remove(pod);
    BeginAs(input_.next_epoch, input_.revision);
    plan_.heads_ready = plan_.stages_ready = 0;
    CreateAll(record().epoch);
  }

  // The head of a group that serves goes first and finishes its requests. True: that is under way, the stages must stay.
  bool Finishing(const ObservedPod* head) {
    if (head == nullptr || head->phase != PodPhase::kRunning || !(head->ready || head->deleting)) return false;
    if (head->node_state != NodeState::kFine) return false;  // nobody is there to finish anything
    if (head->deleting && input_.now_seconds > head->gone_by_seconds + kOverdueSeconds) return false;
    plan_.draining = true;
    Remove(head);
    if (head->deleting) Wake(head->gone_by_seconds + kOverdueSeconds + 1);
    return true;
  }
  // Of other epochs: all at once, but for the one that served until the present group took over.
  void RemoveStale() {
    const ObservedPod* head = nullptr;
    for (const ObservedPod* pod : members_.stale)
      if (pod->group_epoch == retiring() && pod->stage < 0 && (head == nullptr || pod->epoch > head->epoch)) head = pod;
    const bool drains = Finishing(head);
    for (const ObservedPod* pod : members_.stale)
      if (!drains || pod->group_epoch != head->group_epoch) Remove(pod);
  }
  // Whatever the group waits for: a pod that Kubernetes is to delete, on a node that is gone, is but a name.
  void RemoveGone() {
    for (const ObservedPod* pod : members_.current)
      if (pod != nullptr && pod->deleting && pod->node_state == NodeState::kGone && std::find(plan_.remove.begin(), plan_.remove.end(), pod) == plan_.remove.end())
        plan_.remove.push_back(pod);
  }
  int64_t retiring() const { return plan_.record ? plan_.record->retiring_epoch : 0; }

  bool Draining(const char* reason) {
    const ObservedPod* head = members_.current[0];
    if (!Finishing(head)) return false;
    plan_.blocker = Blocker{3, reason, "pod " + head->name + " finishes its requests"};
    return true;
  }

  // True: nothing of the group is left.
  bool Retire(const char* reason) {
    if (Draining(reason)) return false;
    bool empty = members_.stale.empty();
    for (const ObservedPod* pod : members_.current) {
      empty &= pod == nullptr;
      Remove(pod);
    }
    if (!empty) plan_.blocker = Blocker{3, reason, "group " + std::to_string(input_.replica) + " is being deleted"};
    return empty;
  }

  // Wanted again before it was gone: no failure, so none is counted.
  void Return() {
    if (!input_.may_begin) {
      Retire("WaitingForWeights");
      return;
    }
    if (Draining("Updating")) return;
    Replace();
    plan_.blocker = Blocker{3, "Updating", "group " + std::to_string(input_.replica) + " begins again under epoch " + std::to_string(record().epoch)};
  }

  // Another revision is wanted. A group that serves waits for its turn and drains; one that does not has nothing to lose.
  void Update() {
    if (record().next) return Surge();
    if (!input_.may_begin) {
      plan_.blocker = Blocker{2, "WaitingForWeights", "group " + std::to_string(input_.replica) + " stays as it is until the new revision's weights are there"};
      return;
    }
    if (AllReady() && !input_.may_roll) {
      plan_.blocker = Blocker{2, "Updating", "group " + std::to_string(input_.replica) + " serves an older revision until its turn comes"};
      return;
    }
    if (AllReady() && pipeline_.spec.rollout.strategy == api::RolloutStrategy::kSurge) return BeginNext();
    ReplaceRevision();
  }

  void ReplaceRevision() {
    if (Draining("Updating")) return;
    Replace();
    record().failures = 0;
    plan_.blocker = Blocker{3, "Updating", "group " + std::to_string(input_.replica) + " begins again under epoch " + std::to_string(record().epoch) +
                                               " with the new revision"};
  }

  // The wanted revision is made beside the group, unless it has proved hopeless there.
  void BeginNext() {
    const int64_t due = record().last_failure_seconds + BackoffSeconds(pipeline_.spec.restart, record().failures);
    if (record().refused_revision == input_.revision || input_.now_seconds < due) return BeginNextLater();
    record().next = api::IncomingGroup{.epoch = input_.next_epoch, .revision = input_.revision, .since_seconds = input_.now_seconds};
    Wake(input_.now_seconds + pipeline_.spec.rollout.surge_timeout_seconds);
    CreateAll(record().next->epoch);
    plan_.blocker = Blocker{3, "Updating", Beside()};
  }
  std::string Beside() const {
    return "group " + std::to_string(input_.replica) + " serves its old revision until the new one is ready under epoch " + std::to_string(plan_.record->next->epoch);
  }

  // `next` is there, of the wanted revision.
  void Surge() {
    api::IncomingGroup& next = *record().next;
    api::GroupRecord incoming{.replica = input_.replica, .epoch = next.epoch, .revision = next.revision, .phase = next.phase};
    Members coming = Sort(input_, incoming, pipeline_.spec.stages.size());
    if (!AllReady()) return TakeOver(std::move(coming));  // what it was to relieve is broken
    if (const std::optional<Problem> problem = FindProblem(coming.current, incoming)) {
      for (const ObservedPod* pod : coming.current) Remove(pod);
      record().next.reset();
      return NoteRolloutFailure(*problem);
    }
    const bool complete = std::all_of(coming.current.begin(), coming.current.end(), [](const ObservedPod* pod) { return pod != nullptr; });
    const auto serves = [](const ObservedPod* pod) { return pod->serving(); };
    if (complete && std::all_of(coming.current.begin(), coming.current.end(), serves)) return TakeOver(std::move(coming));
    if (complete) next.phase = GroupPhase::kFormed;
    plan_.blocker = Blocker{3, "Updating", Beside()};
    bool placed = complete;
    for (size_t i = 0; i < coming.current.size(); ++i) {
      const ObservedPod* pod = coming.current[i];
      if (pod == nullptr) {
        plan_.create.push_back({static_cast<int32_t>(i) - 1, {.replica = input_.replica, .epoch = next.epoch}});
        continue;
      }
      placed &= !pod->node.empty();
      if (Blocker blocker = BlockerOf(*pod); !pod->ready && blocker.rank >= 55 && blocker.rank > plan_.blocker->rank) plan_.blocker = std::move(blocker);
    }
    const int64_t seconds = pipeline_.spec.rollout.surge_timeout_seconds + (placed ? StartupSeconds(pipeline_.spec) : 0);
    const int64_t deadline = next.since_seconds + seconds;
    if (input_.now_seconds < deadline) return Wake(deadline);
    if (placed) {
      const std::string why = plan_.blocker->rank > 3 ? plan_.blocker->message : "epoch " + std::to_string(next.epoch);
      for (const ObservedPod* pod : coming.current) Remove(pod);
      record().next.reset();
      return NoteRolloutFailure({false, why + " was not ready in " + std::to_string(seconds) + " s"});
    }
    for (const ObservedPod* pod : coming.current) Remove(pod);  // no room for two
    plan_.create.clear();
    record().next.reset();
    ReplaceRevision();
  }

  void TakeOver(Members coming) {
    record().retiring_epoch = AllReady() ? record().epoch : 0;  // else there is nothing that it could finish
    const api::IncomingGroup next = *record().next;
    BeginAs(next.epoch, next.revision);
    record().phase = next.phase;
    record().failures = 0;
    record().next.reset();
    members_ = std::move(coming);
    Count();
    Keep();
  }

  void NoteRolloutFailure(const Problem& problem) {
    ++record().failures;
    record().last_failure_seconds = input_.now_seconds;
    record().last_failure_message = Cut("the new revision failed: " + problem.what, 900);
    plan_.failure = record().last_failure_message;
    plan_.rollout_failed = true;
    if (problem.hopeless || (!problem.node && record().failures > pipeline_.spec.restart.budget)) {
      record().refused_revision = input_.revision;
      record().last_failure_message += problem.hopeless ? "; trying again cannot help" : "; failure " + std::to_string(record().failures) + ", the budget is " +
                                                                                             std::to_string(pipeline_.spec.restart.budget);
      record().last_failure_message += "; the old revision serves";
    }
    BeginNextLater();
  }
  // Says why nothing is begun now; the next look, at the latest when the back-off is over, begins it.
  void BeginNextLater() {
    const int64_t due = record().last_failure_seconds + BackoffSeconds(pipeline_.spec.restart, record().failures);
    const bool refused = record().refused_revision == input_.revision;
    if (!refused) Wake(std::max(due, input_.now_seconds));
    plan_.blocker = Blocker{refused ? 100 : 50, refused ? "RolloutFailed" : "RolloutFailing", record().last_failure_message};
  }

  // Has a member's pod ever been there? Then one that is missing was lost.
  static bool WasThere(const api::GroupRecord& record, int32_t stage) {
    return record.phase != GroupPhase::kForming || MemberEpoch(record, stage) < record.mending_epoch;
  }

  std::optional<Problem> FindProblem(const std::vector<const ObservedPod*>& pods, const api::GroupRecord& record) const {
    const ObservedPod *ended = nullptr, *cut_off = nullptr;
    std::optional<Problem> gone;
    for (size_t i = 0; i < pods.size(); ++i) {
      const ObservedPod* pod = pods[i];
      if (pod != nullptr && pod->node_state != NodeState::kFine && cut_off == nullptr) cut_off = pod;
      if (pod != nullptr && pod->phase == PodPhase::kEnded) {
        // A hopeless end explains the others; else the first that failed, before one that merely finished.
        const auto weight = [](const ObservedPod& p) { return Hopeless(p) ? 2 : p.exit_code.value_or(1) != 0 ? 1 : 0; };
        if (ended == nullptr || weight(*pod) > weight(*ended)) ended = pod;
      } else if (!gone && pod != nullptr && pod->deleting) {
        gone = Problem{false, "pod " + pod->name + " is being deleted"};
      } else if (const int32_t stage = static_cast<int32_t>(i) - 1; !gone && pod == nullptr && WasThere(record, stage)) {
        gone = Problem{false, "pod " + PodName(pipeline_, input_.replica, stage, MemberEpoch(record, stage)) + " is gone"};
      }
    }
    if (ended != nullptr && Hopeless(*ended)) return Problem{true, BlockerOf(*ended).message};
    if (cut_off != nullptr) return Problem{false, "pod " + cut_off->name + " is lost: " + cut_off->node_trouble, true};  // explains other ends
    if (ended != nullptr) return Problem{false, BlockerOf(*ended).message};
    return gone;
  }

  // A process that runs and does not get ready, or that stopped being ready and does not come back. One that hangs altogether is
  // ended by its liveness probe before that.
  std::optional<Problem> FindHang() {
    const bool served = record().served;
    const int64_t patience = served ? std::max<int64_t>(kUnreadySecondsMin, 6 * int64_t{pipeline_.spec.restart.stall_timeout_seconds}) : 0;
    bool all_ready = true;
    for (const ObservedPod* pod : members_.current) {
      if (pod == nullptr || pod->ready || pod->phase != PodPhase::kRunning || !pod->node_trouble.empty()) continue;
      all_ready = false;
      if (served && record().unready_since_seconds == 0) record().unready_since_seconds = input_.now_seconds;
      if (!served && pod->started_seconds == 0) continue;
      if (!served && pod->epoch < record().mending_epoch) continue;  // it cannot be ready before the one that is made again
      const int64_t seconds = served ? patience : StartupSeconds(pipeline_.spec);
      const int64_t due = (served ? record().unready_since_seconds : pod->started_seconds) + seconds;
      if (input_.now_seconds >= due)
        return Problem{false, "pod " + pod->name + (served ? " is not ready, and its group does not serve for " : " was not ready in ") + std::to_string(seconds) + " s"};
      Wake(due);
    }
    if (all_ready) record().unready_since_seconds = 0;
    return std::nullopt;
  }

  void Keep() {
    const bool down = record().phase == GroupPhase::kDown;
    std::optional<Problem> problem = FindProblem(members_.current, record());
    if (!problem && !down) problem = FindHang();
    if (problem && record().phase != GroupPhase::kDown) NoteFailure(*problem);
    if (record().phase == GroupPhase::kFailed) return;
    if (record().phase == GroupPhase::kDown) {
      // A node that was only away, a process that hung: whole again before its turn, and a restart would cost everybody's weights.
      if (problem || !AllReady()) return Restart();
      record().phase = GroupPhase::kFormed;
    }
    Grow();
  }

  void NoteFailure(const Problem& problem) {
    ++record().failures;
    record().last_failure_seconds = input_.now_seconds;
    record().last_failure_message = Cut(problem.what, 900);
    plan_.failure = problem.what;
    if (problem.hopeless || (!problem.node && record().failures > pipeline_.spec.restart.budget)) {
      record().phase = GroupPhase::kFailed;
      record().last_failure_message = record().last_failure_message +
                                      (problem.hopeless ? "; restarting cannot help" : "; failure " + std::to_string(record().failures) + ", the budget is " +
                                                                                           std::to_string(pipeline_.spec.restart.budget) + " restarts");
      plan_.blocker = Blocker{100, "GaveUp", record().last_failure_message};
      return;
    }
    record().phase = GroupPhase::kDown;
  }

  void Restart() {
    const int64_t due = record().last_failure_seconds + BackoffSeconds(pipeline_.spec.restart, record().failures);
    const std::vector<int32_t> lost = Mendable();
    if (input_.now_seconds < due) {
      plan_.mended = !lost.empty();  // as it will be: the event is written now
      Wake(due);
      plan_.blocker = Blocker{50, "CrashLoop", record().last_failure_message + "; failure " + std::to_string(record().failures) +
                                                   ", the group restarts after a back-off of " +
                                                   std::to_string(BackoffSeconds(pipeline_.spec.restart, record().failures)) + " s"};
      return;
    }
    plan_.restarted = true;
    if (!lost.empty()) return Mend(lost);
    Replace();
    plan_.blocker = Blocker{40, "Restarting", record().last_failure_message + "; the whole group restarts under epoch " + std::to_string(record().epoch) +
                                                  ", every stage loads its weights again"};
  }

  // The members that were lost, when it is enough to make them again; else none.
  std::vector<int32_t> Mendable() {
    if (!record().served && record().mending_epoch == 0) return {};
    if (pipeline_.spec.scheduling.gang == api::Gang::kKueue) return {};  // it admits a group of pods once, as a whole
    std::vector<int32_t> lost;
    bool kept = false;
    for (size_t i = 0; i < members_.current.size(); ++i) {
      const ObservedPod* pod = members_.current[i];
      const int32_t stage = static_cast<int32_t>(i) - 1;
      const bool replacement = record().mending_epoch != 0 && MemberEpoch(record(), stage) >= record().mending_epoch;
      if (pod == nullptr && replacement) continue;  // still to be made
      if (pod == nullptr || pod->phase == PodPhase::kEnded || pod->deleting || pod->node_state != NodeState::kFine) {
        if (replacement) return {};
        lost.push_back(stage);
      } else if (stage >= 0) {
        kept = true;
      }
    }
    return kept ? lost : std::vector<int32_t>();
  }

  void Mend(const std::vector<int32_t>& lost) {
    const int64_t epoch = input_.next_epoch;
    for (const int32_t stage : lost) {
      const ObservedPod*& pod = members_.current[static_cast<size_t>(stage + 1)];
      Remove(pod);
      pod = nullptr;
      SetMemberEpoch(stage, epoch);
      plan_.create.push_back({stage, {.replica = input_.replica, .epoch = record().epoch, .made = epoch}});
    }
    if (record().mending_epoch == 0) record().mending_epoch = epoch;
    record().phase = GroupPhase::kForming;
    record().served = false;
    record().unready_since_seconds = 0;
    plan_.mended = true;
    plan_.blocker = Blocker{40, "Restarting", record().last_failure_message + "; " + StageList(lost) + (lost.size() == 1 ? " is" : " are") +
                                                  " made again under epoch " + std::to_string(epoch) + ", the other stages keep their weights"};
  }

  void Grow() {
    bool complete = true;
    for (size_t i = 0; i < members_.current.size(); ++i) {
      if (members_.current[i] != nullptr) continue;
      complete = false;
      const int32_t stage = static_cast<int32_t>(i) - 1;
      plan_.create.push_back({stage, {.replica = input_.replica, .epoch = record().epoch, .made = MemberEpoch(record(), stage)}});
    }
    if (complete) record().phase = GroupPhase::kFormed;
    plan_.ready = complete && AllReady();
    if (plan_.ready) {
      record().served = true;
      record().mending_epoch = 0;
      const int64_t forgiven = record().last_failure_seconds + kStableSeconds;
      if (record().failures > 0 && input_.now_seconds >= forgiven) record().failures = 0;
      if (record().failures > 0) Wake(forgiven);
      return;
    }
    if (!complete) plan_.blocker = Blocker{1, "Creating", "group " + std::to_string(input_.replica) + " is being created"};
    for (const ObservedPod* pod : members_.current) {
      if (pod == nullptr || pod->ready) continue;
      if (pod->phase == PodPhase::kRunning && pod->load_percent >= 0 && pod->load_percent < 100) record().loading.push_back({pod->stage, pod->load_percent});
      Blocker blocker = BlockerOf(*pod);
      if (!plan_.blocker || blocker.rank > plan_.blocker->rank) plan_.blocker = std::move(blocker);
    }
    // A group that failed before and is on its way again is a crash loop, and says of what; unless something worse is seen now.
    if (record().failures > 1 && plan_.blocker->rank < 40)
      plan_.blocker = Blocker{40, "CrashLoop", record().last_failure_message + "; failure " + std::to_string(record().failures) + ", now starting under epoch " +
                                                   std::to_string(record().epoch)};
  }

  const api::QwenPipeline& pipeline_;
  const GroupInput& input_;
  GroupPlan plan_;
  Members members_;
};

}  // namespace

bool IsHopeless(int exit_code) {
  const auto code = static_cast<ExitCode>(exit_code);
  return code == ExitCode::kBadFlags || code == ExitCode::kBadCheckpoint || code == ExitCode::kDoesNotFit;
}

int64_t MemberEpoch(const api::GroupRecord& record, int32_t stage) {
  const auto found = std::find_if(record.replaced.begin(), record.replaced.end(), [&](const api::Replacement& one) { return one.stage == stage; });
  return found == record.replaced.end() ? record.epoch : found->epoch;
}
bool IsMember(const api::GroupRecord& record, const ObservedPod& pod) {
  return pod.group_epoch == record.epoch && pod.epoch == MemberEpoch(record, pod.stage);
}

int64_t GroupPlan::highest_epoch() const {
  int64_t highest = 0;
  if (record) {
    highest = record->epoch;
    for (const api::Replacement& one : record->replaced) highest = std::max(highest, one.epoch);
  }
  for (const Create& one : create) highest = std::max(highest, one.group.pod_epoch());
  return highest;
}

int64_t BackoffSeconds(const api::Restart& restart, int32_t failures) {
  if (failures <= 1) return 0;
  int64_t seconds = restart.backoff_seconds;
  for (int32_t i = 2; i < failures && seconds < kBackoffSecondsMax; ++i) seconds *= 2;
  return std::min<int64_t>(seconds, std::max(kBackoffSecondsMax, restart.backoff_seconds));
}

Blocker BlockerOf(const ObservedPod& pod) {
  const std::string name = "pod " + pod.name;
  const std::string words = pod.message.empty() ? "" : ": " + Cut(pod.message, 500);
  if (pod.phase == PodPhase::kEnded) return {60, "PodFailed", name + " ended: " + HowItEnded(pod)};
  const std::string& waiting = pod.waiting_reason;
  if (waiting == "ImagePullBackOff" || waiting == "ErrImagePull" || waiting == "InvalidImageName" || waiting == "ErrImageNeverPull" ||
      waiting == "ImageInspectError" || waiting == "RegistryUnavailable")
    return {59, "ImagePullFailed", name + ": " + waiting + words};
  if (waiting == "CrashLoopBackOff") return {58, "CrashLoop", name + " ended: " + HowItEnded(pod) + words};
  if (!waiting.empty() && waiting != "ContainerCreating" && waiting != "PodInitializing") return {57, "ContainerNotStarted", name + ": " + waiting + words};
  if (pod.unschedulable) return {56, "Unschedulable", name + words};
  if (!pod.node_trouble.empty()) return {55, "NodeNotReady", name + ": " + pod.node_trouble};
  if (pod.deleting) return {20, "PodsNotReady", name + " is being deleted"};
  if (pod.phase == PodPhase::kRunning && pod.load_percent >= 0 && pod.load_percent < 100)
    return {12, "LoadingWeights", name + " has loaded " + std::to_string(pod.load_percent) + " % of its weights"};
  if (pod.phase == PodPhase::kRunning) return {11, "PodsNotReady", name + " runs and is not ready yet"};
  return {10, "PodsNotReady", name + " is being started"};
}

GroupPlan PlanGroup(const api::QwenPipeline& pipeline, const GroupInput& input) { return Planner(pipeline, input).Plan(); }

}  // namespace qwen::plan
