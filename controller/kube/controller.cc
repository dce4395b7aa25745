#include "controller/kube/controller.h"

#include "stage/base/check.h"
#include "stage/base/log.h"

namespace qwen::kube {

Controller::Controller(Options options, Reconcile reconcile, const Clock& clock, Metrics& metrics)
    : options_(std::move(options)),
      reconcile_(std::move(reconcile)),
      clock_(clock),
      metrics_(metrics),
      queue_(options_.name, clock, metrics, options_.limits) {
  QP_CHECK_GT(options_.workers, 0);
}

Controller::~Controller() { Stop(); }

void Controller::Start() {
  QP_CHECK(workers_.empty());
  metrics_.Workers(options_.name, options_.workers);
  for (int32_t i = 0; i < options_.workers; ++i) workers_.emplace_back([this] { Work(); });
}

void Controller::Stop() {
  queue_.ShutDown();
  for (std::thread& worker : workers_) worker.join();
  workers_.clear();
}

void Controller::Work() {
  while (const auto item = queue_.Get()) {
    const int64_t started = clock_.NowMicros();
    metrics_.ReconcileStart(options_.name);
    const Result<Requeue> result = reconcile_(item->key);
    const int64_t micros = clock_.NowMicros() - started;
    if (!result.ok()) {
      log::Warning("reconcile failed; trying again later",
                   {{"controller", options_.name}, {"object", item->key.ToString()}, {"error", result.status().ToString()},
                    {"failures", queue_.Failures(item->key) + 1}});
      queue_.AddRateLimited(item->key, item->priority);
      metrics_.ReconcileEnd(options_.name, "error", micros);
    } else {
      queue_.Forget(item->key);
      if (result->after_micros) queue_.AddAfter(item->key, *result->after_micros, item->priority);
      metrics_.ReconcileEnd(options_.name, result->after_micros ? "requeue_after" : "success", micros);
    }
    queue_.Done(item->key);
  }
}

}  // namespace qwen::kube
