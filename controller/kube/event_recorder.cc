#include "controller/kube/event_recorder.h"

#include <cstdio>
#include <nlohmann/json.hpp>

#include "controller/kube/time_text.h"
#include "stage/base/log.h"

namespace qwen::kube {
namespace {
constexpr int64_t kSeriesWriteMicros = 360'000'000;  // the API's own rule for a series in progress
constexpr size_t kNoteBytesMax = 1024;
constexpr size_t kQueueMax = 256;
constexpr int64_t kFlushMicros = 2'000'000;

// At most `size` bytes without half a character at the end.
std::string Cut(const std::string& text, size_t size) {
  if (text.size() <= size) return text;
  while (size > 0 && (static_cast<unsigned char>(text[size]) & 0xC0) == 0x80) --size;
  return text.substr(0, size);
}
}  // namespace

std::optional<EventAggregator::Write> EventAggregator::Add(const Event& event, int64_t now_micros, int64_t unix_micros, bool* dropped) {
  *dropped = false;
  const char* type = event.type == EventType::kNormal ? "Normal" : "Warning";
  const std::string note = Cut(event.note, kNoteBytesMax);
  std::string text;
  for (const std::string& part : {event.regarding.uid, event.regarding.key.ToString(), event.reason, event.action, note, std::string(type)}) {
    text += part + '\0';
  }
  if (const auto found = series_.find(text); found != series_.end()) {
    recent_.splice(recent_.begin(), recent_, found->second);
    Series& series = *found->second;
    const bool over = now_micros - series.last_micros >= kSeriesWriteMicros;  // silent for so long: what comes is a new event
    if (!over) {
      ++series.count;
      series.last_micros = now_micros;
      if (series.count > 2 && now_micros - series.written_micros < kSeriesWriteMicros) return std::nullopt;
      series.written_micros = now_micros;
      return Write{false, series.key, {{"series", {{"count", series.count}, {"lastObservedTime", MicroTimeText(unix_micros)}}}}};
    }
    recent_.erase(found->second);
    series_.erase(found);
  }
  const auto [bucket, is_new] = buckets_.try_emplace(event.regarding.uid, options_.per_second, options_.burst);
  if (!bucket->second.TryTake(now_micros)) {
    *dropped = true;
    return std::nullopt;
  }
  if (series_.size() >= static_cast<size_t>(options_.series_max)) {
    series_.erase(recent_.back().text);
    recent_.pop_back();
  }
  if (buckets_.size() > static_cast<size_t>(options_.series_max)) buckets_.erase(bucket == buckets_.begin() ? std::next(bucket) : buckets_.begin());

  // Cluster-scoped objects have their events in "default".
  const ObjectKey& about = event.regarding.key;
  char suffix[24];
  std::snprintf(suffix, sizeof suffix, ".%llx", static_cast<unsigned long long>(unix_micros));
  const ObjectKey key{about.namespace_name.empty() ? "default" : about.namespace_name, about.name + suffix};
  recent_.push_front({text, key, 1, now_micros, now_micros});
  series_[text] = recent_.begin();
  Json regarding = {{"apiVersion", event.regarding.resource.api_version()}, {"kind", event.regarding.resource.kind},
                    {"name", about.name}, {"uid", event.regarding.uid}};
  if (!about.namespace_name.empty()) regarding["namespace"] = about.namespace_name;
  if (!event.regarding.resource_version.empty()) regarding["resourceVersion"] = event.regarding.resource_version;
  return Write{true,
               key,
               {{"apiVersion", resources::kEvents.api_version()},
                {"kind", resources::kEvents.kind},
                {"metadata", {{"namespace", key.namespace_name}, {"name", key.name}}},
                {"eventTime", MicroTimeText(unix_micros)},
                {"reportingController", options_.controller},
                {"reportingInstance", options_.instance},
                {"regarding", std::move(regarding)},
                {"type", type},
                {"reason", event.reason},
                {"action", event.action},
                {"note", note}}};
}

EventRecorder::EventRecorder(EventAggregator::Options options, Client& client, const Clock& clock, Metrics& metrics)
    : aggregator_(std::move(options)), client_(client), clock_(clock), metrics_(metrics), queue_(kQueueMax), thread_([this] { Run(); }) {}

EventRecorder::~EventRecorder() {
  give_up_micros_ = clock_.NowMicros() + kFlushMicros;
  queue_.Close();
  thread_.join();
}

void EventRecorder::Record(Event event) {
  if (!queue_.TryPush(std::move(event))) metrics_.EventDropped();
}

void EventRecorder::Run() {
  while (const auto event = queue_.Pop()) {
    if (clock_.NowMicros() >= give_up_micros_.load()) {
      metrics_.EventDropped();
      continue;
    }
    bool dropped = false;
    const auto write = aggregator_.Add(*event, clock_.NowMicros(), UnixMicros(), &dropped);
    if (dropped) metrics_.EventDropped();
    if (!write) continue;
    const Answer answer = write->create ? client_.Create(resources::kEvents, write->body)
                                        : client_.Do(MergePatchRequest(resources::kEvents, write->key, write->body));
    // An event is a courtesy: a failure is logged and never holds up a reconcile. AlreadyExists: the POST went out twice.
    if (!answer.ok() && !answer.AlreadyExists()) {
      log::Warning("event not written", {{"event", write->key.ToString()}, {"error", answer.status().ToString()}});
    }
  }
}

}  // namespace qwen::kube
