// controller/kube/work_queue.h — keys to reconcile: each at most once in the queue and on one worker at a time.
//
//   waiting     in order of priority, then of arrival: what Get hands out
//   processing  handed out, Done not yet called
//   dirty       everything that wants (another) look: waiting, or added while in processing (Done then makes it waiting)
//   delayed     AddAfter and AddRateLimited: made dirty when due; the earlier of two times holds
// A key that is added while it waits keeps its place, or moves up when the new priority is higher.
//
// QueueState is the pure part (time is an argument, no locks); WorkQueue adds a lock and a wait.
// Bounded by the number of distinct keys, which are those of the store.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>

#include "controller/kube/metrics.h"
#include "controller/kube/object.h"
#include "controller/kube/rate_limiter.h"
#include "stage/base/clock.h"

namespace qwen::kube {

// What happened just now goes before what is only looked at again (start-up, resync), so that a restart of the controller with
// a thousand pipelines does not delay a lost pod.
enum class Priority { kLow = -100, kNormal = 0, kHigh = 100 };

class QueueState {
 public:
  explicit QueueState(const RateLimiter::Options& options = {}) : limiter_(options) {}

  void Add(const ObjectKey& key, Priority priority, int64_t now_micros);
  void AddAfter(const ObjectKey& key, Priority priority, int64_t delay_micros, int64_t now_micros);
  void AddRateLimited(const ObjectKey& key, Priority priority, int64_t now_micros);  // one more failure of this key
  void Forget(const ObjectKey& key) { limiter_.Forget(key); }                        // it succeeded
  int32_t Failures(const ObjectKey& key) const { return limiter_.Failures(key); }

  struct Item {
    ObjectKey key;
    Priority priority;
    int64_t waited_micros;
  };
  std::optional<Item> Get(int64_t now_micros);              // empty: nothing is due
  int64_t Done(const ObjectKey& key, int64_t now_micros);   // REQUIRES: Get handed it out. Returns how long it was worked on.
  std::optional<int64_t> NextDue() const;                   // when the first delayed key is due

  size_t depth() const { return waiting_.size(); }
  size_t processing() const { return processing_.size(); }
  size_t delayed() const { return delayed_.size(); }
  int64_t LongestMicros(int64_t now_micros) const;     // of the work in progress
  int64_t UnfinishedMicros(int64_t now_micros) const;  // sum of it

 private:
  struct Order {
    int32_t priority_down;  // negated, so that the highest comes first
    uint64_t sequence;
    auto operator<=>(const Order&) const = default;
  };
  struct Wait {
    Order order;
    int64_t since_micros;
  };
  void Enqueue(const ObjectKey& key, Priority priority, int64_t now_micros);
  void Promote(int64_t now_micros);  // delayed keys that are due

  RateLimiter limiter_;
  uint64_t sequence_ = 0;
  std::map<Order, ObjectKey> waiting_;
  std::unordered_map<ObjectKey, Wait> waits_;            // the same keys as waiting_
  std::unordered_map<ObjectKey, int64_t> processing_;    // key -> since
  std::unordered_map<ObjectKey, Priority> again_;        // added while in processing
  std::multimap<int64_t, ObjectKey> delayed_;            // due -> key
  struct Delay {
    std::multimap<int64_t, ObjectKey>::iterator at;
    Priority priority;
  };
  std::unordered_map<ObjectKey, Delay> delays_;  // the same keys as delayed_
};

// Thread safety: all members from any thread.
class WorkQueue {
 public:
  // `name` is the label of the workqueue_* metrics. Everything borrowed outlives the queue.
  WorkQueue(std::string name, const Clock& clock, Metrics& metrics, const RateLimiter::Options& options = {});

  void Add(const ObjectKey& key, Priority priority = Priority::kNormal);
  void AddAfter(const ObjectKey& key, int64_t delay_micros, Priority priority = Priority::kNormal);
  void AddRateLimited(const ObjectKey& key, Priority priority = Priority::kNormal);
  void Forget(const ObjectKey& key);
  int32_t Failures(const ObjectKey& key) const;

  std::optional<QueueState::Item> Get();  // waits; empty: shut down
  void Done(const ObjectKey& key);
  void ShutDown();  // wakes every Get; what waits is dropped
  size_t depth() const;

 private:
  void Changed(std::unique_lock<std::mutex>& lock);

  const std::string name_;
  const Clock& clock_;
  Metrics& metrics_;
  mutable std::mutex mutex_;
  std::condition_variable readable_;
  QueueState state_;     // guarded by mutex_
  bool closed_ = false;  // guarded by mutex_
};

}  // namespace qwen::kube
