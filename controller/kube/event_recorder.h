// controller/kube/event_recorder.h — events.k8s.io/v1 events about objects, for `kubectl describe` and `kubectl events`.
//
// The same thing said again (same object, type, reason, action, note) becomes a series: one event whose count grows, written
// when it begins, at its second time, and then at most every 6 minutes while it goes on. An object may have 25 new events at
// once and one more every 5 minutes (the limits of client-go's old recorder); what is beyond is dropped and counted.
// EventAggregator is the pure part. EventRecorder adds a bounded queue and a thread; Record never blocks.
#pragma once
#include <atomic>
#include <cstdint>
#include <list>
#include <map>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>

#include "controller/kube/client.h"
#include "controller/kube/metrics.h"
#include "controller/kube/object.h"
#include "controller/kube/rate_limiter.h"
#include "stage/base/bounded_queue.h"
#include "stage/base/clock.h"

namespace qwen::kube {

struct ObjectReference {
  Resource resource;
  ObjectKey key;
  std::string uid;
  std::string resource_version;
};
enum class EventType { kNormal, kWarning };
struct Event {
  ObjectReference regarding;
  EventType type = EventType::kNormal;
  std::string reason;  // CamelCase, stable: "StageLost"
  std::string action;  // what the controller did: "ReplacePod"
  std::string note;    // for people, at most 1 kB; longer is cut
};

// Thread safety: none.
class EventAggregator {
 public:
  struct Options {
    std::string controller;  // reportingController: "qwenpipeline.dev/controller"
    std::string instance;    // reportingInstance: the pod's name
    int32_t series_max = 1024;  // remembered at once; the one that is silent longest is forgotten
    double burst = 25;          // new events of one object
    double per_second = 1.0 / 300;
  };
  explicit EventAggregator(Options options) : options_(std::move(options)) {}

  struct Write {
    bool create = false;  // else a merge patch of the series
    ObjectKey key;
    Json body;
  };
  // What to send, or nothing: counted in a series that is written later, or dropped (`dropped` is then set).
  std::optional<Write> Add(const Event& event, int64_t now_micros, int64_t unix_micros, bool* dropped);
  size_t size() const { return series_.size(); }

 private:
  struct Series {
    std::string text;  // the identity: all fields
    ObjectKey key;
    int32_t count = 1;
    int64_t last_micros = 0;
    int64_t written_micros = 0;
  };
  const Options options_;
  std::list<Series> recent_;  // front: heard of last
  std::unordered_map<std::string, std::list<Series>::iterator> series_;
  std::map<std::string, TokenBucket> buckets_;  // by the object's uid; emptied with series_
};

// Thread safety: Record from any thread.
class EventRecorder {
 public:
  // Everything borrowed outlives the recorder. The destructor sends what is queued for at most 2 s.
  EventRecorder(EventAggregator::Options options, Client& client, const Clock& clock, Metrics& metrics);
  ~EventRecorder();
  void Record(Event event);  // dropped and counted when 256 are waiting

 private:
  void Run();

  EventAggregator aggregator_;  // owned by the thread
  Client& client_;
  const Clock& clock_;
  Metrics& metrics_;
  BoundedQueue<Event> queue_;
  std::atomic<int64_t> give_up_micros_{INT64_MAX};
  std::thread thread_;
};

}  // namespace qwen::kube
