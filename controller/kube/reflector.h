// controller/kube/reflector.h — keeps a local copy of one resource equal to the API server's: the decisions, without the I/O.
//
// A pure state machine: Next(now) says what to do (list, watch or wait), the On... members take what came of it, and the Sink
// receives the objects. informer.h drives it on a thread; tests drive it with canned answers and a made-up time.
//
//   list (WatchList stream, or pages when the server cannot) -> watch from its version -> watch again where the last ended
//   410 Gone, as a status or in the stream                    -> list anew
//   connection lost, silence, 5xx                             -> wait (0.8 s doubling to 30 s, full jitter), watch again
//   a watch that lasted 2 minutes                             -> the back-off starts anew
//
// Thread safety: none; one thread drives it.
#pragma once
#include <cstdint>
#include <random>
#include <string>
#include <string_view>

#include "controller/kube/object.h"
#include "controller/kube/requests.h"
#include "stage/base/status.h"

namespace qwen::kube {

// Pieces of a stream -> lines. A line longer than the bound is an error, not a growing buffer.
class LineSplitter {
 public:
  explicit LineSplitter(size_t line_bytes_max = 16 << 20) : line_bytes_max_(line_bytes_max) {}
  // Calls `on_line` (without the newline) for every complete line; stops when it says false. kDataLoss: a line is too long.
  template <typename OnLine>
  Status Feed(std::string_view chunk, OnLine&& on_line);

 private:
  const size_t line_bytes_max_;
  std::string rest_;  // of the last line, not yet complete
};

class Reflector {
 public:
  struct Options {
    Resource resource;
    Selection selection;
    int32_t page_items = 500;
    bool watch_list = true;  // try sendInitialEvents first; a server that refuses it is not asked again
    uint64_t seed = 1;       // of the jitter
  };
  // REQUIRES of an implementation: no blocking; called on the driving thread.
  class Sink {
   public:
    virtual ~Sink() = default;
    virtual void BeginReplace() = 0;           // a complete new list follows; forget an unfinished one
    virtual void ReplaceItem(Json object) = 0;
    virtual void EndReplace() = 0;             // what was not in the list is gone
    virtual void Upsert(Json object) = 0;
    virtual void Erase(Json object) = 0;       // its last state
    virtual void SeenVersion(const std::string& resource_version) = 0;  // everything up to it has been delivered
  };
  struct Action {
    enum class Kind { kList, kWatch, kWait } kind;
    HttpRequest request;            // kList, kWatch
    int64_t wait_until_micros = 0;  // kWait
  };

  Reflector(Options options, Sink& sink);

  Action Next(int64_t now_micros);
  void OnList(int64_t now_micros, const Result<HttpResponse>& response);  // after kList
  bool OnWatchLine(int64_t now_micros, std::string_view line);            // during kWatch; false: end the stream now
  void OnWatchEnd(int64_t now_micros, const Result<HttpResponse>& end);   // after kWatch; OK with status 200: a clean end

  bool synced() const { return synced_; }  // at least one complete list was delivered
  const std::string& resource_version() const { return version_; }
  const Status& last_error() const { return last_error_; }  // OK after the next success
  const std::string& name() const { return options_.resource.plural; }

 private:
  void Fail(int64_t now_micros, Status why);
  void StartOver(int64_t now_micros);
  bool OnErrorEvent(int64_t now_micros, const Json& status);
  void FinishList(std::string version);

  const Options options_;
  Sink& sink_;
  std::minstd_rand random_;
  std::string version_;           // where the next watch starts; empty: list first
  std::string continue_token_;    // of the list in progress
  bool listing_ = false;          // BeginReplace was called, EndReplace not yet
  bool streaming_list_ = false;   // the watch in progress began with sendInitialEvents
  bool watch_list_works_;
  bool synced_ = false;
  bool failed_in_stream_ = false;  // OnWatchLine has dealt with the end already
  int64_t watch_started_micros_ = 0;
  int64_t events_in_watch_ = 0;
  int64_t wait_until_micros_ = 0;
  int64_t backoff_micros_;
  Status last_error_;
};

template <typename OnLine>
Status LineSplitter::Feed(std::string_view chunk, OnLine&& on_line) {
  for (size_t end; (end = chunk.find('\n')) != std::string_view::npos; chunk.remove_prefix(end + 1)) {
    if (rest_.size() + end > line_bytes_max_) return DataLossError("a line of the watch is too long");
    if (rest_.empty()) {
      if (!on_line(chunk.substr(0, end))) return OkStatus();
    } else {
      rest_.append(chunk.substr(0, end));
      const bool more = on_line(std::string_view(rest_));
      rest_.clear();
      if (!more) return OkStatus();
    }
  }
  if (rest_.size() + chunk.size() > line_bytes_max_) return DataLossError("a line of the watch is too long");
  rest_.append(chunk);
  return OkStatus();
}

}  // namespace qwen::kube
