// stage/base/bounded_queue.h — a fixed-capacity FIFO between threads. Full is a value (TryPush gives false), not a wait,
// unless the caller asks to wait; Close() wakes everybody and lets readers drain what is left.
//
// Thread safety: every member may be called from any thread.
#pragma once
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <mutex>
#include <optional>

#include "stage/base/check.h"

namespace qwen {

template <typename T>
class BoundedQueue {
 public:
  explicit BoundedQueue(size_t capacity) : capacity_(capacity) { QP_CHECK(capacity > 0); }
  BoundedQueue(const BoundedQueue&) = delete;
  BoundedQueue& operator=(const BoundedQueue&) = delete;

  // False when full or closed; `item` is then untouched.
  bool TryPush(T&& item) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (closed_ || items_.size() >= capacity_) return false;
      items_.push_back(std::move(item));
    }
    readable_.notify_one();
    return true;
  }
  // Waits for room. False when closed.
  bool Push(T&& item) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      writable_.wait(lock, [&] { return closed_ || items_.size() < capacity_; });
      if (closed_) return false;
      items_.push_back(std::move(item));
    }
    readable_.notify_one();
    return true;
  }
  std::optional<T> TryPop() {
    std::unique_lock<std::mutex> lock(mutex_);
    return PopLocked(lock);
  }
  // Waits up to `timeout`. Empty on timeout, or when closed and drained.
  std::optional<T> PopFor(std::chrono::microseconds timeout) {
    std::unique_lock<std::mutex> lock(mutex_);
    readable_.wait_for(lock, timeout, [&] { return closed_ || !items_.empty(); });
    return PopLocked(lock);
  }
  // Waits until there is an item or the queue is closed and drained (then empty).
  std::optional<T> Pop() {
    std::unique_lock<std::mutex> lock(mutex_);
    readable_.wait(lock, [&] { return closed_ || !items_.empty(); });
    return PopLocked(lock);
  }
  void Close() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closed_ = true;
    }
    readable_.notify_all();
    writable_.notify_all();
  }
  bool closed() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return closed_;
  }
  size_t size() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return items_.size();
  }
  size_t capacity() const { return capacity_; }

 private:
  std::optional<T> PopLocked(std::unique_lock<std::mutex>& lock) {
    if (items_.empty()) return std::nullopt;
    std::optional<T> item(std::move(items_.front()));
    items_.pop_front();
    lock.unlock();
    writable_.notify_one();
    return item;
  }

  const size_t capacity_;
  mutable std::mutex mutex_;
  std::condition_variable readable_;
  std::condition_variable writable_;
  std::deque<T> items_;   // guarded by mutex_
  bool closed_ = false;  // guarded by mutex_
};

}  // namespace qwen
