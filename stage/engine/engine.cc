#include "stage/engine/engine.h"

#include <algorithm>
#include <utility>

#include "stage/base/check.h"
#include "stage/base/log.h"

namespace qwen::engine {

Engine::Engine(const Options& options, step::Executor& executor)
    : options_(options),
      executor_(executor),
      scheduler_({.max_batch_tokens = options.max_batch_tokens, .prefix_cache = options.prefix_cache, .block_ahead = options.block_ahead}) {
  QP_CHECK_GT(options.queue_capacity, 0);
  stats_.group_lost_reason = "waiting for the first group";
}

// ---- Any thread ----

Status Engine::Submit(Request request) {
  RETURN_IF_ERROR(ValidateRequest(request));
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (draining_) return FailedPreconditionError("the server is draining");
    if (limits_.block_count > 0) {
      RETURN_IF_ERROR(ValidateRequestLimits(request, static_cast<int32_t>(request.tokens.size()), limits_));
    }
    if (static_cast<int64_t>(inbox_.size()) + stats_.waiting >= options_.queue_capacity) {
      return ResourceExhaustedError("the queue of " + std::to_string(options_.queue_capacity) +
                                    " waiting requests is full");
    }
    if (!live_.insert(request.id).second) return InvalidArgumentError("id: " + std::to_string(request.id) + " is live");
    inbox_.push_back(std::move(request));
  }
  executor_.Wake();
  return OkStatus();
}

void Engine::Cancel(step::SequenceId id) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!live_.contains(id)) return;
    cancels_.insert(id);
  }
  executor_.Wake();
}

void Engine::Drain() {
  std::lock_guard<std::mutex> lock(mutex_);
  draining_ = true;
}

bool Engine::idle() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return live_.empty();
}

EngineStats Engine::stats() const {
  std::lock_guard<std::mutex> lock(mutex_);
  EngineStats stats = stats_;
  stats.waiting += static_cast<int32_t>(inbox_.size());
  return stats;
}

// ---- The engine thread ----

void Engine::Step(int64_t now_micros, std::chrono::microseconds poll_timeout) {
  TakeInbox(now_micros);
  SubmitPlans(now_micros);
  UpdateStats(now_micros);  // before waiting: Submit counts the queue by it
  Handle(executor_.Poll(poll_timeout));
  UpdateStats(now_micros);
}

void Engine::TakeInbox(int64_t now_micros) {
  std::vector<Request> requests;
  std::set<step::SequenceId> cancels;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    requests.swap(inbox_);
    cancels.swap(cancels_);
    stats_.waiting += static_cast<int32_t>(requests.size());
  }
  for (Request& request : requests) {
    callbacks_.emplace(request.id, std::move(request.on_event));
    scheduler_.Add(std::move(request), now_micros);
  }
  for (const step::SequenceId id : cancels) scheduler_.Cancel(id);
  Deliver();
}

void Engine::SubmitPlans(int64_t now_micros) {
  while (std::optional<ScheduledStep> next = scheduler_.Schedule(now_micros)) {
    Status sent = OkStatus();
    for (auto& input : next->vision) {
      if (sent.ok()) sent = executor_.SubmitVision(std::move(input));
    }
    if (sent.ok()) sent = executor_.Submit(next->plan);
    // The plan counts as in flight although nobody has it: it is void with the epoch, like all the others.
    if (!sent.ok()) LoseGroup(sent.ToString());
  }
  Deliver();
}

void Engine::Handle(const step::ExecutorEvent& event) {
  if (const auto* result = std::get_if<step::StepResult>(&event)) {
    if (!scheduler_.Commit(*result)) {
      log::Debug("stale step result ignored", {{"epoch", result->epoch}, {"step", result->step}});
    }
  } else if (const auto* ready = std::get_if<step::GroupReady>(&event)) {
    if (scheduler_.stages() > 0 && ready->epoch <= scheduler_.epoch()) {
      log::Warning("stale group ignored", {{"epoch", ready->epoch}, {"current", scheduler_.epoch()}});
      return;
    }
    scheduler_.StartOver(ready->epoch, ready->limits, ready->stages);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      limits_ = ready->limits;
      stats_.group_lost_reason.clear();
    }
    log::Info("engine starts over with a new group", {{"epoch", ready->epoch},
                                                      {"stages", ready->stages},
                                                      {"blocks", ready->limits.block_count},
                                                      {"sequences", scheduler_.waiting_count()}});
  } else if (const auto* lost = std::get_if<step::GroupLost>(&event)) {
    if (scheduler_.stages() == 0 || lost->epoch >= scheduler_.epoch()) LoseGroup(lost->reason);
  }
  Deliver();
}

void Engine::LoseGroup(std::string reason) {
  if (scheduler_.ready()) log::Warning("group lost", {{"epoch", scheduler_.epoch()}, {"reason", reason}});
  scheduler_.Suspend();
  std::lock_guard<std::mutex> lock(mutex_);
  stats_.group_lost_reason = std::move(reason);
}

void Engine::Deliver() {
  for (SequenceEvent& next : scheduler_.TakeEvents()) {
    const auto callback = callbacks_.find(next.sequence);
    QP_CHECK(callback != callbacks_.end()) << "sequence " << next.sequence;
    const bool last = std::holds_alternative<FinishEvent>(next.event);
    callback->second(std::move(next.event));
    if (!last) continue;
    callbacks_.erase(callback);
    std::lock_guard<std::mutex> lock(mutex_);
    live_.erase(next.sequence);
    cancels_.erase(next.sequence);
  }
}

void Engine::UpdateStats(int64_t now_micros) {
  const Scheduler::Counters& counters = scheduler_.counters();
  const std::optional<int64_t> since = scheduler_.waiting_since();
  std::lock_guard<std::mutex> lock(mutex_);
  stats_.epoch = scheduler_.epoch();
  stats_.group_ready = scheduler_.ready();
  if (stats_.group_ready) {
    stats_.not_ready_since_micros = 0;
  } else if (stats_.not_ready_since_micros == 0) {
    stats_.not_ready_since_micros = now_micros;
  }
  stats_.stages = scheduler_.stages();
  stats_.running = scheduler_.running_count();
  stats_.waiting = scheduler_.waiting_count();
  stats_.plans_in_flight = scheduler_.plans_in_flight();
  stats_.max_request_tokens = static_cast<int32_t>(
      std::min<int64_t>(limits_.max_sequence_tokens, int64_t{limits_.block_count} * limits_.block_tokens));
  stats_.kv_blocks_total = scheduler_.blocks_total();
  stats_.kv_blocks_used = scheduler_.blocks_used();
  stats_.kv_blocks_cached = scheduler_.blocks_cached();
  stats_.oldest_waiting_micros = since ? now_micros - *since : 0;
  stats_.last_step_micros = counters.last_step_micros;
  stats_.plans_total = counters.plans;
  stats_.preemptions_total = counters.preemptions;
  stats_.prompt_tokens_total = counters.prompt_tokens;
  stats_.cached_prompt_tokens_total = counters.cached_prompt_tokens;
  stats_.generated_tokens_total = counters.generated_tokens;
}

}  // namespace qwen::engine
