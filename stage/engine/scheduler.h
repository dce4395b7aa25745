// stage/engine/scheduler.h — who computes what next. A pure state machine: no clock, thread, socket or device; the same
// calls give the same plans. README.md gives the rules and why they hold.
//
// Thread safety: none; the engine thread owns it.
// Driver: Add/Cancel at any time; after StartOver, while Schedule() gives a step: send its vision inputs, then its
// plan; on a result Commit(); after each of them deliver TakeEvents().
#pragma once
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "stage/engine/block_pool.h"
#include "stage/engine/prefix_cache.h"
#include "stage/engine/request.h"
#include "stage/engine/sequence.h"
#include "stage/step/step_plan.h"
#include "stage/step/step_result.h"

namespace qwen::engine {

struct ScheduledStep {
  std::vector<std::shared_ptr<const step::VisionInput>> vision;  // to arrive at stage 0 before `plan`
  step::StepPlan plan;
};

struct SequenceEvent {
  step::SequenceId sequence = 0;
  RequestEvent event;
};

class Scheduler {
 public:
  struct Options {
    int32_t max_batch_tokens = 0;  // 0 = the group's
    bool prefix_cache = true;
    // A sequence that decodes gets its next block one token early, if that takes it from nobody: a single stage can then begin
    // the next step before it is asked (stage/model/run_ahead.h).
    bool block_ahead = false;
  };
  struct Counters {
    uint64_t plans = 0, preemptions = 0, prompt_tokens = 0, cached_prompt_tokens = 0, generated_tokens = 0;
    int64_t last_step_micros = 0;  // from Schedule() to the Schedule() that follows the plan's Commit()
  };
  explicit Scheduler(const Options& options) : options_(options) {}

  // REQUIRES: ValidateRequest(request) is OK; its id is not live. One that does not fit the group finishes with kError.
  void Add(Request&& request, int64_t now_micros);
  // Finishes a live sequence with kCancelled at once; else nothing. Its blocks come back when no plan in flight names
  // them.
  void Cancel(step::SequenceId id);
  // A new group: plans in flight are void, every live sequence waits again, in its old order, with what it has
  // generated.
  void StartOver(uint64_t epoch, const step::PlanLimits& limits, int32_t stages);
  // No group: Schedule gives nothing until StartOver.
  void Suspend() { ready_ = false; }

  // The next microbatch, or nothing: no group, `stages` plans in flight, or no sequence can go on before a result.
  std::optional<ScheduledStep> Schedule(int64_t now_micros);
  // The result of the oldest plan in flight. False when it is of another (an earlier epoch's): nothing has changed
  // then.
  bool Commit(const step::StepResult& result);
  // What the sequences have to be told since the last call, in order.
  std::vector<SequenceEvent> TakeEvents() { return std::exchange(events_, {}); }

  uint64_t epoch() const { return epoch_; }
  bool ready() const { return ready_; }
  int32_t stages() const { return stages_; }
  const Counters& counters() const { return counters_; }
  int32_t running_count() const { return static_cast<int32_t>(running_.size()); }
  int32_t waiting_count() const { return static_cast<int32_t>(waiting_.size()); }
  int32_t plans_in_flight() const { return static_cast<int32_t>(in_flight_.size()); }
  int32_t blocks_total() const { return pool_ ? pool_->capacity() : 0; }
  int32_t blocks_used() const { return cache_ ? cache_->used_count() : 0; }
  int32_t blocks_cached() const { return cache_ ? cache_->idle_count() : 0; }
  // Since when the next request to be admitted waits.
  std::optional<int64_t> waiting_since() const;

 private:
  struct PlanInFlight {
    uint64_t step = 0;
    int64_t scheduled_micros = 0;
    std::vector<std::pair<Sequence*, bool>> parts;  // in span order; true: samples
  };
  struct Refusal {  // for want of blocks: whom, and what there was
    uint64_t arrival = 0;
    int32_t available = 0, running = 0;
    bool operator==(const Refusal&) const = default;
  };
  struct Draft;  // the plan being built

  // Schedule's three passes, and what they share.
  void AddDecodes(Draft& draft);
  int32_t PrefillShare() const;
  void AddPrefills(Draft& draft);
  void AdmitWaiting(Draft& draft);
  bool AddSpan(Sequence& sequence, int32_t count, Draft& draft);
  void AddVision(Sequence& sequence, step::SequenceSpan& span, Draft& draft);
  void PublishBlocks(Sequence& sequence);

  bool Admit(Sequence& sequence);
  bool SoonCached(const Sequence& sequence, const PrefixCache::Match& match) const;
  bool TakeOneBlock(Sequence& sequence);
  void Preempt(Sequence& sequence);
  void Accept(Sequence& sequence, const step::SampledToken* sample);
  void Finish(Sequence& sequence, FinishEvent event);
  void FreeResources(Sequence& sequence);
  void InsertByArrival(std::vector<Sequence*>& list, Sequence* sequence);

  const Options options_;
  bool ready_ = false;
  uint64_t epoch_ = 0;
  step::PlanLimits limits_;
  int32_t stages_ = 0;
  uint64_t next_step_ = 0;
  uint64_t next_arrival_ = 0;
  std::optional<int64_t> committed_since_;  // when the plan of the last Commit() was scheduled, until it is timed
  Counters counters_;

  std::unique_ptr<BlockPool> pool_;     // new with every epoch; null before the first
  std::unique_ptr<PrefixCache> cache_;  // borrows *pool_
  std::vector<int32_t> free_slots_;     // a stack, lowest on top at the start

  std::unordered_map<step::SequenceId, std::unique_ptr<Sequence>> sequences_;  // all phases
  std::vector<Sequence*> running_;      // by arrival
  std::vector<Sequence*> waiting_;      // by arrival
  int32_t retiring_ = 0;                // sequences whose blocks come back with a result: retired, or victims in flight
  std::optional<Refusal> refusal_;      // the last
  std::deque<PlanInFlight> in_flight_;  // by step; at most stages_
  std::vector<step::VisionId> released_;  // to go out with the next plan
  std::vector<SequenceEvent> events_;
};

}  // namespace qwen::engine
