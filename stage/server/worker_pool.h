// stage/server/worker_pool.h — a few threads for work that must not run on an I/O thread: parsing large bodies, decoding
// images, templates, tokens. The queue is bounded; full is a value. Thread safety: all members from any thread.
#pragma once
#include <functional>
#include <thread>
#include <vector>

#include "stage/base/bounded_queue.h"

namespace qwen::server {

class WorkerPool {
 public:
  WorkerPool(int threads, size_t queue_capacity) : queue_(queue_capacity) {
    for (int i = 0; i < threads; ++i) {
      threads_.emplace_back([this] {
        while (auto task = queue_.Pop()) (*task)();
      });
    }
  }
  ~WorkerPool() { Stop(); }
  bool TryRun(std::function<void()> task) { return queue_.TryPush(std::move(task)); }
  // Runs what is queued, then joins. Idempotent; by the owner.
  void Stop() {
    queue_.Close();
    for (auto& thread : threads_) thread.join();
    threads_.clear();
  }

 private:
  BoundedQueue<std::function<void()>> queue_;
  std::vector<std::thread> threads_;
};

}  // namespace qwen::server
