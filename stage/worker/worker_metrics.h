// stage/worker/worker_metrics.h — what a stage tells Prometheus (docs/metrics.md). Thread safety: any thread.
#pragma once
#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <chrono>
#include <cstdint>

#include "stage/contract/layer_plan.h"

namespace qwen::worker {

class WorkerMetrics {
 public:
  // `registry` outlives this object.
  WorkerMetrics(prometheus::Registry& registry, int32_t stage, const contract::LayerRange& layers);

  // Compute of one plan, without waiting for its input. Decode: no span feeds more than one token.
  void Step(bool decode, std::chrono::duration<double> time);
  void Sent(size_t bytes, std::chrono::duration<double> time);
  void Received(size_t bytes, std::chrono::duration<double> time);
  void Loading(int64_t bytes_done, int64_t bytes_total);
  void Loaded(int64_t weight_bytes, int32_t kv_blocks);
  void KvBlocksUsed(int32_t count) { kv_used_.Set(count); }
  void Epoch(uint64_t epoch) { epoch_.Set(static_cast<double>(epoch)); }

 private:
  prometheus::Histogram &prefill_seconds_, &decode_seconds_, &send_seconds_, &receive_seconds_;
  prometheus::Counter &sent_bytes_, &received_bytes_, &steps_;
  prometheus::Gauge &weight_bytes_, &load_progress_, &kv_total_, &kv_used_, &epoch_;
};

}  // namespace qwen::worker
