// stage/server/metrics.h — what the head counts, in the registry that main hands down (docs/metrics.md lists the names).
//
// Every series carries the label model_name. Gauges of the engine are copied from its stats when a scrape comes.
// Thread safety: all members from any thread. Lifetime: `registry` outlives this.
#pragma once
#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>

#include "stage/engine/engine.h"

namespace prometheus {
class Counter;
class Gauge;
class Histogram;
template <typename T>
class Family;
class Registry;
}  // namespace prometheus

namespace qwen::server {

class Metrics {
 public:
  Metrics(prometheus::Registry& registry, const std::string& model_name);
  Metrics(const Metrics&) = delete;
  Metrics& operator=(const Metrics&) = delete;

  void CountResponse(int status);
  void CountPrompt(int64_t tokens);
  void CountGenerated(int64_t tokens);
  // `reason`: stop, length, tool_calls, abort, error. One per choice.
  void CountFinished(const std::string& reason);
  void ObserveFirstToken(double seconds);
  void ObserveInterToken(double seconds);
  void ObserveRequest(double seconds);
  void ObserveQueue(double seconds);       // in the engine, before the first admission
  void ObservePreprocess(double seconds);  // from the parsed header to the engine's inbox

  // The text of GET /metrics, engine gauges brought up to date first.
  std::string Scrape(const engine::EngineStats& stats, int connections);

 private:
  // Raises a counter to a total that somebody else keeps.
  void Advance(prometheus::Counter& counter, uint64_t total);

  prometheus::Registry& registry_;
  const std::string model_name_;
  prometheus::Family<prometheus::Counter>& responses_;
  prometheus::Family<prometheus::Counter>& finished_;
  prometheus::Counter& prompt_tokens_;
  prometheus::Counter& generation_tokens_;
  prometheus::Counter& preemptions_;
  prometheus::Counter& prefix_queries_;
  prometheus::Counter& prefix_hits_;
  prometheus::Counter& plans_;
  prometheus::Gauge& running_;
  prometheus::Gauge& waiting_;
  prometheus::Gauge& oldest_waiting_;
  prometheus::Gauge& kv_used_;
  prometheus::Gauge& kv_cached_;
  prometheus::Gauge& kv_free_;
  prometheus::Gauge& kv_usage_;
  prometheus::Gauge& group_epoch_;
  prometheus::Gauge& group_ready_;
  prometheus::Gauge& connections_;
  prometheus::Histogram& first_token_;
  prometheus::Histogram& inter_token_;
  prometheus::Histogram& request_;
  prometheus::Histogram& queue_;
  prometheus::Histogram& preprocess_;
  std::mutex scrape_mutex_;  // two scrapes at once must not both add a counter's difference
};

}  // namespace qwen::server
