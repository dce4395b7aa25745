#include "controller/kube/work_queue.h"

#include <algorithm>
#include <chrono>

#include "stage/base/check.h"

namespace qwen::kube {

void QueueState::Enqueue(const ObjectKey& key, Priority priority, int64_t now_micros) {
  const int32_t priority_down = -static_cast<int32_t>(priority);
  if (const auto found = waits_.find(key); found != waits_.end()) {
    if (found->second.order.priority_down <= priority_down) return;
    waiting_.erase(found->second.order);
    found->second.order = {priority_down, sequence_++};
    waiting_.emplace(found->second.order, key);
    return;
  }
  const Order order{priority_down, sequence_++};
  waiting_.emplace(order, key);
  waits_.emplace(key, Wait{order, now_micros});
}

void QueueState::Add(const ObjectKey& key, Priority priority, int64_t now_micros) {
  if (processing_.contains(key)) {
    const auto [found, inserted] = again_.emplace(key, priority);
    if (!inserted) found->second = std::max(found->second, priority);
    return;
  }
  Enqueue(key, priority, now_micros);
}

void QueueState::AddAfter(const ObjectKey& key, Priority priority, int64_t delay_micros, int64_t now_micros) {
  if (delay_micros <= 0) return Add(key, priority, now_micros);
  const int64_t due = now_micros + delay_micros;
  if (const auto found = delays_.find(key); found != delays_.end()) {
    found->second.priority = std::max(found->second.priority, priority);
    if (found->second.at->first <= due) return;
    delayed_.erase(found->second.at);
    found->second.at = delayed_.emplace(due, key);
    return;
  }
  delays_.emplace(key, Delay{delayed_.emplace(due, key), priority});
}

void QueueState::AddRateLimited(const ObjectKey& key, Priority priority, int64_t now_micros) {
  AddAfter(key, priority, limiter_.When(key, now_micros), now_micros);
}

void QueueState::Promote(int64_t now_micros) {
  while (!delayed_.empty() && delayed_.begin()->first <= now_micros) {
    const ObjectKey key = delayed_.begin()->second;
    const Priority priority = delays_.at(key).priority;
    delayed_.erase(delayed_.begin());
    delays_.erase(key);
    Add(key, priority, now_micros);
  }
}

std::optional<QueueState::Item> QueueState::Get(int64_t now_micros) {
  Promote(now_micros);
  if (waiting_.empty()) return std::nullopt;
  const auto first = waiting_.begin();
  const Wait wait = waits_.at(first->second);
  Item item{first->second, static_cast<Priority>(-first->first.priority_down), now_micros - wait.since_micros};
  waits_.erase(first->second);
  waiting_.erase(first);
  processing_.emplace(item.key, now_micros);
  return item;
}

int64_t QueueState::Done(const ObjectKey& key, int64_t now_micros) {
  const auto found = processing_.find(key);
  QP_CHECK(found != processing_.end()) << key.ToString() << " was not handed out";
  const int64_t worked = now_micros - found->second;
  processing_.erase(found);
  if (const auto again = again_.find(key); again != again_.end()) {
    const Priority priority = again->second;
    again_.erase(again);
    Enqueue(key, priority, now_micros);
  }
  return worked;
}

std::optional<int64_t> QueueState::NextDue() const {
  return delayed_.empty() ? std::nullopt : std::optional<int64_t>(delayed_.begin()->first);
}

int64_t QueueState::LongestMicros(int64_t now_micros) const {
  int64_t longest = 0;
  for (const auto& [key, since] : processing_) longest = std::max(longest, now_micros - since);
  return longest;
}

int64_t QueueState::UnfinishedMicros(int64_t now_micros) const {
  int64_t sum = 0;
  for (const auto& [key, since] : processing_) sum += now_micros - since;
  return sum;
}

WorkQueue::WorkQueue(std::string name, const Clock& clock, Metrics& metrics, const RateLimiter::Options& options)
    : name_(std::move(name)), clock_(clock), metrics_(metrics), state_(options) {}

// Wakes one worker: for the key that became ready, or to wait for a nearer due time.
void WorkQueue::Changed(std::unique_lock<std::mutex>& lock) {
  const size_t depth = state_.depth();
  lock.unlock();
  metrics_.QueueAdd(name_, depth);
  readable_.notify_one();
}

void WorkQueue::Add(const ObjectKey& key, Priority priority) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (closed_) return;
  state_.Add(key, priority, clock_.NowMicros());
  Changed(lock);
}

void WorkQueue::AddAfter(const ObjectKey& key, int64_t delay_micros, Priority priority) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (closed_) return;
  state_.AddAfter(key, priority, delay_micros, clock_.NowMicros());
  Changed(lock);
}

void WorkQueue::AddRateLimited(const ObjectKey& key, Priority priority) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (closed_) return;
  state_.AddRateLimited(key, priority, clock_.NowMicros());
  metrics_.QueueRetry(name_);
  Changed(lock);
}

void WorkQueue::Forget(const ObjectKey& key) {
  std::lock_guard<std::mutex> lock(mutex_);
  state_.Forget(key);
}

int32_t WorkQueue::Failures(const ObjectKey& key) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return state_.Failures(key);
}

std::optional<QueueState::Item> WorkQueue::Get() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    if (closed_) return std::nullopt;
    const int64_t now = clock_.NowMicros();
    if (auto item = state_.Get(now)) {
      metrics_.QueueGet(name_, state_.depth(), item->waited_micros);
      if (state_.depth() > 0) readable_.notify_one();  // several keys may have become due at once
      return item;
    }
    metrics_.QueueUnfinished(name_, state_.UnfinishedMicros(now), state_.LongestMicros(now));
    if (const auto due = state_.NextDue()) {
      readable_.wait_for(lock, std::chrono::microseconds(std::max<int64_t>(*due - now, 1)));
    } else {
      readable_.wait(lock);
    }
  }
}

void WorkQueue::Done(const ObjectKey& key) {
  std::unique_lock<std::mutex> lock(mutex_);
  const int64_t worked = state_.Done(key, clock_.NowMicros());
  const bool more = state_.depth() > 0;
  lock.unlock();
  metrics_.QueueDone(name_, worked);
  if (more) readable_.notify_one();
}

void WorkQueue::ShutDown() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
  }
  readable_.notify_all();
}

size_t WorkQueue::depth() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return state_.depth();
}

}  // namespace qwen::kube
