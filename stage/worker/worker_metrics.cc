#include "stage/worker/worker_metrics.h"

#include <map>
#include <string>

namespace qwen::worker {
namespace {

// A decode step is 1–50 ms on GPUs, a large prefill on a CPU a minute: 0.5 ms … 64 s by factors of two.
prometheus::Histogram::BucketBoundaries StepBuckets() {
  prometheus::Histogram::BucketBoundaries buckets;
  for (double bound = 0.0005; bound < 70.0; bound *= 2.0) buckets.push_back(bound);
  return buckets;
}
// 8 KB over loopback is 20 us; 16 MB over 10 Gb/s is 13 ms.
prometheus::Histogram::BucketBoundaries TransferBuckets() {
  prometheus::Histogram::BucketBoundaries buckets;
  for (double bound = 0.00001; bound < 6.0; bound *= 2.5) buckets.push_back(bound);
  return buckets;
}

using Labels = std::map<std::string, std::string>;

prometheus::Family<prometheus::Histogram>& HistogramFamily(prometheus::Registry& registry, const char* name, const char* help) {
  return prometheus::BuildHistogram().Name(name).Help(help).Register(registry);
}
prometheus::Family<prometheus::Counter>& CounterFamily(prometheus::Registry& registry, const char* name, const char* help) {
  return prometheus::BuildCounter().Name(name).Help(help).Register(registry);
}
prometheus::Gauge& AddGauge(prometheus::Registry& registry, const char* name, const char* help, const Labels& labels) {
  return prometheus::BuildGauge().Name(name).Help(help).Register(registry).Add(labels);
}
Labels With(Labels labels, const char* key, const char* value) {
  labels[key] = value;
  return labels;
}

constexpr const char* kStepHelp = "Compute time of one plan on this stage, without waiting for its input.";
constexpr const char* kTransferHelp = "Time of one transfer of activations, from its first byte to its last.";
constexpr const char* kBytesHelp = "Activation bytes moved to and from the neighbouring stages.";
constexpr const char* kKvHelp = "KV cache blocks of this stage: held, and named by the last plan.";

}  // namespace

WorkerMetrics::WorkerMetrics(prometheus::Registry& registry, int32_t stage, const contract::LayerRange& layers)
    : prefill_seconds_(HistogramFamily(registry, "qwen_stage_step_seconds", kStepHelp)
                           .Add({{"stage", std::to_string(stage)}, {"phase", "prefill"}}, StepBuckets())),
      decode_seconds_(HistogramFamily(registry, "qwen_stage_step_seconds", kStepHelp)
                          .Add({{"stage", std::to_string(stage)}, {"phase", "decode"}}, StepBuckets())),
      send_seconds_(HistogramFamily(registry, "qwen_stage_transfer_seconds", kTransferHelp)
                        .Add({{"stage", std::to_string(stage)}, {"direction", "send"}}, TransferBuckets())),
      receive_seconds_(HistogramFamily(registry, "qwen_stage_transfer_seconds", kTransferHelp)
                           .Add({{"stage", std::to_string(stage)}, {"direction", "receive"}}, TransferBuckets())),
      sent_bytes_(CounterFamily(registry, "qwen_stage_transfer_bytes_total", kBytesHelp)
                      .Add({{"stage", std::to_string(stage)}, {"direction", "send"}})),
      received_bytes_(CounterFamily(registry, "qwen_stage_transfer_bytes_total", kBytesHelp)
                          .Add({{"stage", std::to_string(stage)}, {"direction", "receive"}})),
      steps_(CounterFamily(registry, "qwen_stage_steps_total", "Plans that this stage has finished.").Add({{"stage", std::to_string(stage)}})),
      weight_bytes_(AddGauge(registry, "qwen_stage_weight_bytes", "Bytes of weights on this stage's device.", {{"stage", std::to_string(stage)}})),
      load_progress_(AddGauge(registry, "qwen_stage_load_progress", "Share of the weights that is loaded, 0 to 1.", {{"stage", std::to_string(stage)}})),
      kv_total_(AddGauge(registry, "qwen_stage_kv_blocks", kKvHelp, With({{"stage", std::to_string(stage)}}, "state", "total"))),
      kv_used_(AddGauge(registry, "qwen_stage_kv_blocks", kKvHelp, With({{"stage", std::to_string(stage)}}, "state", "used"))),
      epoch_(AddGauge(registry, "qwen_stage_epoch", "Epoch that this stage serves; 0 before the first.", {{"stage", std::to_string(stage)}})) {
  AddGauge(registry, "qwen_stage_layers", "Decoder layers [begin, end) of this stage; always 1.",
           {{"stage", std::to_string(stage)}, {"begin", std::to_string(layers.begin)}, {"end", std::to_string(layers.end)}})
      .Set(1);
}

void WorkerMetrics::Step(bool decode, std::chrono::duration<double> time) {
  (decode ? decode_seconds_ : prefill_seconds_).Observe(time.count());
  steps_.Increment();
}
void WorkerMetrics::Sent(size_t bytes, std::chrono::duration<double> time) {
  send_seconds_.Observe(time.count());
  sent_bytes_.Increment(static_cast<double>(bytes));
}
void WorkerMetrics::Received(size_t bytes, std::chrono::duration<double> time) {
  receive_seconds_.Observe(time.count());
  received_bytes_.Increment(static_cast<double>(bytes));
}
void WorkerMetrics::Loading(int64_t bytes_done, int64_t bytes_total) {
  if (bytes_total > 0) load_progress_.Set(static_cast<double>(bytes_done) / static_cast<double>(bytes_total));
}
void WorkerMetrics::Loaded(int64_t weight_bytes, int32_t kv_blocks) {
  load_progress_.Set(1.0);
  weight_bytes_.Set(static_cast<double>(weight_bytes));
  kv_total_.Set(kv_blocks);
}

}  // namespace qwen::worker
