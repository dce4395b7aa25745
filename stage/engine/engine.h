// stage/engine/engine.h — the engine as its neighbours see it: the server hands Requests in and hears RequestEvents
// back, one thread that main starts calls Step() for ever. Everything that decides is in Scheduler; this file adds the
// inbox between threads and the calls to step::Executor. README.md is the contract.
//
// Thread safety: Submit, Cancel, Drain, idle and stats from any thread, also from inside a Request::on_event. Step by
// one thread, the engine thread, which alone touches the scheduler and the executor and makes all callbacks, without
// any lock. Lifetime: `executor` outlives the engine. Destroying the engine drops live requests without a FinishEvent.
#pragma once
#include <chrono>
#include <cstdint>
#include <functional>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "stage/base/status.h"
#include "stage/engine/request.h"
#include "stage/engine/scheduler.h"
#include "stage/step/executor.h"

namespace qwen::engine {

// A snapshot taken at the end of the last Step(); counts ending in `_total` only grow.
struct EngineStats {
  uint64_t epoch = 0;             // of the last GroupReady; 0 before the first
  bool group_ready = false;       // plans can be submitted
  int64_t not_ready_since_micros = 0;  // by the clock of Step; 0 while ready, and before the first Step
  std::string group_lost_reason;  // why not; "waiting for the first group" at the start, empty when ready
  int32_t stages = 0;             // of the last GroupReady
  int32_t running = 0;            // sequences that hold a slot and blocks
  int32_t waiting = 0;            // submitted or preempted, not running
  int32_t plans_in_flight = 0;
  int32_t max_request_tokens = 0;  // prompt + output that fit: length limit or KV cache; 0 before the first group
  int32_t kv_blocks_total = 0;
  int32_t kv_blocks_used = 0;         // referenced by a sequence
  int32_t kv_blocks_cached = 0;       // referenced by none, kept for the prefix cache; taken back when needed
  int64_t oldest_waiting_micros = 0;  // how long the next request to be admitted has waited; 0 when none waits
  int64_t last_step_micros = 0;       // from scheduling to commit of a recently committed plan
  uint64_t plans_total = 0;
  uint64_t preemptions_total = 0;           // for want of blocks; not counting new epochs
  uint64_t prompt_tokens_total = 0;         // of requests at their first admission
  uint64_t cached_prompt_tokens_total = 0;  // of these, found in the prefix cache
  uint64_t generated_tokens_total = 0;
};

class Engine {
 public:
  struct Options {
    int32_t queue_capacity = 256;  // requests that wait; one more is refused with kResourceExhausted
    int32_t max_batch_tokens = 0;  // tokens a plan; 0 = what the stages allow, else the smaller of both
    bool prefix_cache = true;      // off: no KV is shared between requests
    bool block_ahead = false;      // Scheduler::Options
  };
  // REQUIRES: queue_capacity > 0.
  Engine(const Options& options, step::Executor& executor);
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Any thread. OK: `request.on_event` will be called, last with exactly one FinishEvent. Else it is never called:
  // kInvalidArgument (names the field; a request too long states the limit and what was asked), kResourceExhausted (the
  // queue is full: 429), kFailedPrecondition (draining). With no group the request waits; one that turns out not to fit
  // when the group comes finishes with kError.
  Status Submit(Request request);
  // Any thread; idempotent; unknown and finished ids are ignored. One FinishEvent{kCancelled} follows at the next Step,
  // unless the sequence finishes by itself first.
  void Cancel(step::SequenceId id);
  // The engine thread: takes the inbox, submits plans while fewer than `stages` are in flight, waits up to
  // `poll_timeout` for one event of the executor and commits it. `now_micros` of a monotonic clock.
  void Step(int64_t now_micros, std::chrono::microseconds poll_timeout);

  void Drain();       // from now on Submit refuses; what was accepted is finished
  bool idle() const;  // every accepted request has had its FinishEvent
  EngineStats stats() const;

 private:
  void TakeInbox(int64_t now_micros);
  void SubmitPlans(int64_t now_micros);
  void Handle(const step::ExecutorEvent& event);
  void Deliver();
  void UpdateStats(int64_t now_micros);
  void LoseGroup(std::string reason);

  const Options options_;
  step::Executor& executor_;

  // Engine thread only.
  Scheduler scheduler_;
  std::unordered_map<step::SequenceId, std::function<void(RequestEvent)>> callbacks_;

  mutable std::mutex mutex_;
  // Guarded by mutex_; never held while a callback or the executor runs.
  std::vector<Request> inbox_;          // bounded: inbox + waiting <= queue_capacity
  std::set<step::SequenceId> cancels_;  // a subset of live_
  std::set<step::SequenceId> live_;     // accepted, FinishEvent not yet delivered
  step::PlanLimits limits_;             // of the last GroupReady; block_count 0 before it
  bool draining_ = false;
  EngineStats stats_;  // `waiting` without the inbox
};

}  // namespace qwen::engine
