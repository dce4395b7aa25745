// controller/kube/metrics.h — the operator's metrics under the names of client-go and controller-runtime, so that dashboards
// and alerts made for any Go operator read this one too.
//
// Thread safety: all members from any thread. The registry outlives this.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

namespace prometheus {
class Registry;
}

namespace qwen::kube {

class Metrics {
 public:
  // `host` is the label of rest_client_*: "host:port" of the API server.
  Metrics(prometheus::Registry& registry, std::string host);
  ~Metrics();

  // rest_client_requests_total{code,method,host}, rest_client_request_duration_seconds{verb,host}. code 0: "<error>".
  // micros < 0: not measured (a watch lasts as long as it is wanted).
  void RestRequest(std::string_view method, int32_t code, int64_t micros);

  // workqueue_*{name,controller}: adds_total, retries_total, depth, queue_duration_seconds, work_duration_seconds,
  // unfinished_work_seconds, longest_running_processor_seconds.
  void QueueAdd(const std::string& queue, size_t depth);
  void QueueRetry(const std::string& queue);
  void QueueGet(const std::string& queue, size_t depth, int64_t waited_micros);
  void QueueDone(const std::string& queue, int64_t worked_micros);
  void QueueUnfinished(const std::string& queue, int64_t sum_micros, int64_t longest_micros);

  // controller_runtime_reconcile_total{controller,result}, _reconcile_errors_total, _reconcile_time_seconds, _active_workers,
  // _max_concurrent_reconciles. `result` is success, error, requeue or requeue_after.
  void Workers(const std::string& controller, int32_t count);
  void ReconcileStart(const std::string& controller);
  void ReconcileEnd(const std::string& controller, std::string_view result, int64_t micros);

  void Leader(const std::string& lease, bool is_leader);  // leader_election_master_status{name}
  void LeaderSlowpath(const std::string& lease);          // leader_election_slowpath_total{name}

  // reflector_lists_total, reflector_watches_total, reflector_watch_errors_total {name=plural}
  void ReflectorList(const std::string& plural);
  void ReflectorWatch(const std::string& plural);
  void ReflectorError(const std::string& plural);
  void EventDropped();  // event_recorder_dropped_total

 private:
  struct Families;
  std::unique_ptr<Families> families_;
};

}  // namespace qwen::kube
