// controller/kube/controller.h — workers that take keys from a queue and reconcile them: controller-runtime's loop.
//
// Thread safety: Start and Stop by the owner; queue() from any thread (handlers of informers add to it).
#pragma once
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "controller/kube/metrics.h"
#include "controller/kube/work_queue.h"
#include "stage/base/clock.h"
#include "stage/base/status.h"

namespace qwen::kube {

struct Requeue {
  std::optional<int64_t> after_micros;  // absent: when something changes
};

class Controller {
 public:
  struct Options {
    std::string name;     // label of the metrics
    int32_t workers = 4;  // reconciles at once, each of another key
    RateLimiter::Options limits;
  };
  // An error is tried again with back-off. Called by several threads, never twice at once for one key.
  using Reconcile = std::function<Result<Requeue>(const ObjectKey&)>;

  Controller(Options options, Reconcile reconcile, const Clock& clock, Metrics& metrics);
  ~Controller();

  WorkQueue& queue() { return queue_; }
  void Start();  // REQUIRES: not started. Informers should have synced.
  void Stop();   // lets the reconciles in progress end; idempotent

 private:
  void Work();

  const Options options_;
  const Reconcile reconcile_;
  const Clock& clock_;
  Metrics& metrics_;
  WorkQueue queue_;
  std::vector<std::thread> workers_;
};

}  // namespace qwen::kube
