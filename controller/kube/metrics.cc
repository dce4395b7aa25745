#include "controller/kube/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

namespace qwen::kube {
namespace {
using prometheus::Counter;
using prometheus::Family;
using prometheus::Gauge;
using prometheus::Histogram;

// The bucket bounds of the Go libraries, so that queries over both agree.
const Histogram::BucketBoundaries kQueueSeconds{1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100, 1000};
const Histogram::BucketBoundaries kReconcileSeconds{0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6,
                                                    0.7,   0.8,  0.9,   1.0,  1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5,
                                                    6,     7,    8,     9,    10,  15,  20,  25,  30,  40,  50,  60};
const Histogram::BucketBoundaries kRestSeconds{0.005, 0.025, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60};

Family<Counter>& MakeCounter(prometheus::Registry& registry, const char* name, const char* help) {
  return prometheus::BuildCounter().Name(name).Help(help).Register(registry);
}
Family<Gauge>& MakeGauge(prometheus::Registry& registry, const char* name, const char* help) {
  return prometheus::BuildGauge().Name(name).Help(help).Register(registry);
}
Family<Histogram>& MakeHistogram(prometheus::Registry& registry, const char* name, const char* help) {
  return prometheus::BuildHistogram().Name(name).Help(help).Register(registry);
}
double Seconds(int64_t micros) { return static_cast<double>(micros) * 1e-6; }
}  // namespace

struct Metrics::Families {
  Families(prometheus::Registry& r, std::string host_name) : host(std::move(host_name)), registry(r) {}
  const std::string host;
  prometheus::Registry& registry;
  Family<Counter>& requests = MakeCounter(registry, "rest_client_requests_total", "HTTP requests by status code, method and host");
  Family<Histogram>& request_seconds = MakeHistogram(registry, "rest_client_request_duration_seconds", "Request latency by verb and host");
  Family<Counter>& adds = MakeCounter(registry, "workqueue_adds_total", "Adds handled by the work queue");
  Family<Counter>& retries = MakeCounter(registry, "workqueue_retries_total", "Retries handled by the work queue");
  Family<Gauge>& depth = MakeGauge(registry, "workqueue_depth", "Items waiting in the work queue");
  Family<Histogram>& waited = MakeHistogram(registry, "workqueue_queue_duration_seconds", "How long an item waits before it is taken");
  Family<Histogram>& worked = MakeHistogram(registry, "workqueue_work_duration_seconds", "How long an item is worked on");
  Family<Gauge>& unfinished = MakeGauge(registry, "workqueue_unfinished_work_seconds", "Sum of the times of work in progress");
  Family<Gauge>& longest = MakeGauge(registry, "workqueue_longest_running_processor_seconds", "Time of the longest work in progress");
  Family<Counter>& reconciles = MakeCounter(registry, "controller_runtime_reconcile_total", "Reconciles by controller and result");
  Family<Counter>& errors = MakeCounter(registry, "controller_runtime_reconcile_errors_total", "Reconciles that failed");
  Family<Histogram>& reconcile_seconds = MakeHistogram(registry, "controller_runtime_reconcile_time_seconds", "Time of one reconcile");
  Family<Gauge>& workers = MakeGauge(registry, "controller_runtime_max_concurrent_reconciles", "Workers of a controller");
  Family<Gauge>& active = MakeGauge(registry, "controller_runtime_active_workers", "Workers that reconcile now");
  Family<Gauge>& leader = MakeGauge(registry, "leader_election_master_status", "1: this process holds the lease");
  Family<Counter>& slowpath = MakeCounter(registry, "leader_election_slowpath_total", "Renewals that first had to read the lease");
  Family<Counter>& lists = MakeCounter(registry, "reflector_lists_total", "Full lists read, streamed or paged");
  Family<Counter>& watches = MakeCounter(registry, "reflector_watches_total", "Watches opened");
  Family<Counter>& watch_errors = MakeCounter(registry, "reflector_watch_errors_total", "Lists and watches that ended with an error");
  Counter& dropped = MakeCounter(registry, "event_recorder_dropped_total", "Events not written: queue full or rate limit").Add({});
};

Metrics::Metrics(prometheus::Registry& registry, std::string host) : families_(std::make_unique<Families>(registry, std::move(host))) {}
Metrics::~Metrics() = default;

void Metrics::RestRequest(std::string_view method, int32_t code, int64_t micros) {
  const std::string name(method);
  families_->requests.Add({{"code", code == 0 ? "<error>" : std::to_string(code)}, {"method", name}, {"host", families_->host}}).Increment();
  if (micros >= 0) families_->request_seconds.Add({{"verb", name}, {"host", families_->host}}, kRestSeconds).Observe(Seconds(micros));
}

void Metrics::QueueAdd(const std::string& queue, size_t depth) {
  families_->adds.Add({{"name", queue}, {"controller", queue}}).Increment();
  families_->depth.Add({{"name", queue}, {"controller", queue}}).Set(static_cast<double>(depth));
}
void Metrics::QueueRetry(const std::string& queue) { families_->retries.Add({{"name", queue}, {"controller", queue}}).Increment(); }
void Metrics::QueueGet(const std::string& queue, size_t depth, int64_t waited_micros) {
  families_->depth.Add({{"name", queue}, {"controller", queue}}).Set(static_cast<double>(depth));
  families_->waited.Add({{"name", queue}, {"controller", queue}}, kQueueSeconds).Observe(Seconds(waited_micros));
}
void Metrics::QueueDone(const std::string& queue, int64_t worked_micros) {
  families_->worked.Add({{"name", queue}, {"controller", queue}}, kQueueSeconds).Observe(Seconds(worked_micros));
}
void Metrics::QueueUnfinished(const std::string& queue, int64_t sum_micros, int64_t longest_micros) {
  families_->unfinished.Add({{"name", queue}, {"controller", queue}}).Set(Seconds(sum_micros));
  families_->longest.Add({{"name", queue}, {"controller", queue}}).Set(Seconds(longest_micros));
}

void Metrics::Workers(const std::string& controller, int32_t count) {
  families_->workers.Add({{"controller", controller}}).Set(count);
  families_->active.Add({{"controller", controller}}).Set(0);
  for (const char* result : {"success", "error", "requeue", "requeue_after"}) {
    families_->reconciles.Add({{"controller", controller}, {"result", result}});
  }
  families_->errors.Add({{"controller", controller}});
}
void Metrics::ReconcileStart(const std::string& controller) { families_->active.Add({{"controller", controller}}).Increment(); }
void Metrics::ReconcileEnd(const std::string& controller, std::string_view result, int64_t micros) {
  families_->active.Add({{"controller", controller}}).Decrement();
  families_->reconciles.Add({{"controller", controller}, {"result", std::string(result)}}).Increment();
  if (result == "error") families_->errors.Add({{"controller", controller}}).Increment();
  families_->reconcile_seconds.Add({{"controller", controller}}, kReconcileSeconds).Observe(Seconds(micros));
}

void Metrics::Leader(const std::string& lease, bool is_leader) { families_->leader.Add({{"name", lease}}).Set(is_leader ? 1 : 0); }
void Metrics::LeaderSlowpath(const std::string& lease) { families_->slowpath.Add({{"name", lease}}).Increment(); }
void Metrics::ReflectorList(const std::string& plural) { families_->lists.Add({{"name", plural}}).Increment(); }
void Metrics::ReflectorWatch(const std::string& plural) { families_->watches.Add({{"name", plural}}).Increment(); }
void Metrics::ReflectorError(const std::string& plural) { families_->watch_errors.Add({{"name", plural}}).Increment(); }
void Metrics::EventDropped() { families_->dropped.Increment(); }

}  // namespace qwen::kube
