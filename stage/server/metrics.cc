#include "stage/server/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

namespace qwen::server {
namespace {

using prometheus::Histogram;

prometheus::Counter& AddCounter(prometheus::Registry& registry, const std::string& model, const char* name, const char* help) {
  return prometheus::BuildCounter().Name(name).Help(help).Register(registry).Add({{"model_name", model}});
}
prometheus::Gauge& AddGauge(prometheus::Registry& registry, const std::string& model, const char* name, const char* help) {
  return prometheus::BuildGauge().Name(name).Help(help).Register(registry).Add({{"model_name", model}});
}
prometheus::Gauge& AddBlocks(prometheus::Registry& registry, const std::string& model, const char* state) {
  return prometheus::BuildGauge()
      .Name("qwen_kv_blocks")
      .Help("KV blocks by state: used by a sequence, cached for the prefix cache, free")
      .Register(registry)
      .Add({{"model_name", model}, {"state", state}});
}
Histogram& AddHistogram(prometheus::Registry& registry, const std::string& model, const char* name, const char* help,
                        const Histogram::BucketBoundaries& buckets) {
  return prometheus::BuildHistogram().Name(name).Help(help).Register(registry).Add({{"model_name", model}}, buckets);
}

// vLLM's buckets, so that dashboards can show both side by side.
const Histogram::BucketBoundaries kFirstTokenBuckets = {.001, .005, .01, .02, .04, .06, .08, .1,   .25,   .5,    .75,
                                                        1.0,  2.5,  5.0, 7.5, 10,  20,  40,  80.0, 160.0, 640.0, 2560.0};
const Histogram::BucketBoundaries kInterTokenBuckets = {.001, .0025, .005, .01, .025, .05, .075, .1, .15, .2,
                                                        .3,   .4,    .5,   .75, 1.0,  2.5, 5.0,  7.5, 10, 20, 40, 80};
const Histogram::BucketBoundaries kRequestBuckets = {.3, .5, .8, 1,  1.5, 2,  2.5, 5,   10,  15,  20,
                                                     30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680};

}  // namespace

Metrics::Metrics(prometheus::Registry& registry, const std::string& model)
    : registry_(registry),
      model_name_(model),
      responses_(prometheus::BuildCounter().Name("qwen_http_responses_total").Help("HTTP responses by status code").Register(registry)),
      finished_(prometheus::BuildCounter()
                    .Name("qwen_request_success_total")
                    .Help("Finished generations by reason: stop, length, tool_calls, abort, error")
                    .Register(registry)),
      prompt_tokens_(AddCounter(registry, model, "qwen_prompt_tokens_total", "Prompt tokens of admitted requests")),
      generation_tokens_(AddCounter(registry, model, "qwen_generation_tokens_total", "Generated tokens")),
      preemptions_(AddCounter(registry, model, "qwen_engine_preemptions_total", "Sequences preempted for want of KV blocks")),
      prefix_queries_(AddCounter(registry, model, "qwen_prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache")),
      prefix_hits_(AddCounter(registry, model, "qwen_prefix_cache_hits_total", "Prompt tokens found in the prefix cache")),
      plans_(AddCounter(registry, model, "qwen_engine_plans_total", "Step plans submitted to the stages")),
      running_(AddGauge(registry, model, "qwen_requests_running", "Sequences that hold KV blocks")),
      waiting_(AddGauge(registry, model, "qwen_requests_waiting", "Sequences that wait for KV blocks or a slot")),
      oldest_waiting_(AddGauge(registry, model, "qwen_oldest_waiting_seconds", "How long the next sequence to be admitted has waited")),
      kv_used_(AddBlocks(registry, model, "used")),
      kv_cached_(AddBlocks(registry, model, "cached")),
      kv_free_(AddBlocks(registry, model, "free")),
      kv_usage_(AddGauge(registry, model, "qwen_kv_usage_ratio", "Used KV blocks by all KV blocks")),
      group_epoch_(AddGauge(registry, model, "qwen_group_epoch", "Epoch of the group of stages; each change of membership raises it")),
      group_ready_(AddGauge(registry, model, "qwen_group_ready", "1 while all stages are connected and serve")),
      connections_(AddGauge(registry, model, "qwen_http_connections", "Open client connections")),
      first_token_(AddHistogram(registry, model, "qwen_time_to_first_token_seconds", "From the request to its first token", kFirstTokenBuckets)),
      inter_token_(AddHistogram(registry, model, "qwen_inter_token_latency_seconds", "Between two tokens of a sequence", kInterTokenBuckets)),
      request_(AddHistogram(registry, model, "qwen_request_seconds", "From the request to the end of its answer", kRequestBuckets)),
      queue_(AddHistogram(registry, model, "qwen_request_queue_seconds", "Waited in the engine for KV blocks or a slot", kFirstTokenBuckets)),
      preprocess_(AddHistogram(registry, model, "qwen_request_preprocess_seconds",
                               "From the request to the scheduler's queue: parsing, images, template, tokens", kFirstTokenBuckets)) {
  for (const char* reason : {"stop", "length", "tool_calls", "abort", "error"}) {
    finished_.Add({{"model_name", model}, {"finished_reason", reason}});  // so that rates start at 0
  }
}

void Metrics::CountResponse(int status) {
  responses_.Add({{"model_name", model_name_}, {"code", std::to_string(status)}}).Increment();
}
void Metrics::CountPrompt(int64_t tokens) { prompt_tokens_.Increment(static_cast<double>(tokens)); }
void Metrics::CountGenerated(int64_t tokens) { generation_tokens_.Increment(static_cast<double>(tokens)); }
void Metrics::CountFinished(const std::string& reason) {
  finished_.Add({{"model_name", model_name_}, {"finished_reason", reason}}).Increment();
}
void Metrics::ObserveFirstToken(double seconds) { first_token_.Observe(seconds); }
void Metrics::ObserveInterToken(double seconds) { inter_token_.Observe(seconds); }
void Metrics::ObserveRequest(double seconds) { request_.Observe(seconds); }
void Metrics::ObserveQueue(double seconds) { queue_.Observe(seconds); }
void Metrics::ObservePreprocess(double seconds) { preprocess_.Observe(seconds); }

void Metrics::Advance(prometheus::Counter& counter, uint64_t total) {
  if (const double more = static_cast<double>(total) - counter.Value(); more > 0) counter.Increment(more);
}

std::string Metrics::Scrape(const engine::EngineStats& stats, int connections) {
  std::lock_guard<std::mutex> lock(scrape_mutex_);
  running_.Set(stats.running);
  waiting_.Set(stats.waiting);
  oldest_waiting_.Set(static_cast<double>(stats.oldest_waiting_micros) * 1e-6);
  kv_used_.Set(stats.kv_blocks_used);
  kv_cached_.Set(stats.kv_blocks_cached);
  kv_free_.Set(stats.kv_blocks_total - stats.kv_blocks_used - stats.kv_blocks_cached);
  kv_usage_.Set(stats.kv_blocks_total > 0 ? static_cast<double>(stats.kv_blocks_used) / stats.kv_blocks_total : 0);
  group_epoch_.Set(static_cast<double>(stats.epoch));
  group_ready_.Set(stats.group_ready ? 1 : 0);
  connections_.Set(connections);
  Advance(preemptions_, stats.preemptions_total);
  Advance(prefix_queries_, stats.prompt_tokens_total);
  Advance(prefix_hits_, stats.cached_prompt_tokens_total);
  Advance(plans_, stats.plans_total);
  return prometheus::TextSerializer().Serialize(registry_.Collect());
}

}  // namespace qwen::server
