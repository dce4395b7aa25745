#include "controller/kube/informer.h"

#include <algorithm>

namespace qwen::kube {

ReflectorThread::ReflectorThread(Reflector& reflector, Transport& transport, const Clock& clock, Metrics& metrics, std::atomic<bool>& synced)
    : reflector_(reflector), transport_(transport), clock_(clock), metrics_(metrics), synced_(synced), thread_([this](std::stop_token stop) { Run(stop); }) {}

ReflectorThread::~ReflectorThread() {
  thread_.request_stop();
  thread_.join();
}

bool ReflectorThread::WaitForSync(std::chrono::milliseconds timeout) {
  std::unique_lock<std::mutex> lock(mutex_);
  return changed_.wait_for(lock, timeout, [this] { return synced_.load(); });
}

void ReflectorThread::NoteSync() {
  if (!reflector_.synced() || synced_.load()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  synced_ = true;
  changed_.notify_all();
}

void ReflectorThread::Run(std::stop_token stop) {
  bool was_failing = false;
  while (!stop.stop_requested()) {
    Reflector::Action action = reflector_.Next(clock_.NowMicros());
    switch (action.kind) {
      case Reflector::Action::Kind::kWait: {
        std::unique_lock<std::mutex> lock(mutex_);
        const int64_t micros = action.wait_until_micros - clock_.NowMicros();
        changed_.wait_for(lock, stop, std::chrono::microseconds(std::max<int64_t>(micros, 0)), [] { return false; });
        continue;
      }
      case Reflector::Action::Kind::kList: {
        metrics_.ReflectorList(reflector_.name());
        const int64_t asked_micros = clock_.NowMicros();
        const Result<HttpResponse> response = SendAndWait(transport_, std::move(action.request));
        metrics_.RestRequest("GET", response.ok() ? response->status : 0, clock_.NowMicros() - asked_micros);
        reflector_.OnList(clock_.NowMicros(), response);
        break;
      }
      case Reflector::Action::Kind::kWatch: {
        metrics_.ReflectorWatch(reflector_.name());
        if (reflector_.resource_version().empty()) metrics_.ReflectorList(reflector_.name());
        LineSplitter lines;
        Status broken;
        const Result<HttpResponse> end = transport_.Stream(
            action.request,
            [&](std::string_view chunk) {
              bool more = true;
              broken = lines.Feed(chunk, [&](std::string_view line) {
                more = !stop.stop_requested() && reflector_.OnWatchLine(clock_.NowMicros(), line);
                return more;
              });
              NoteSync();
              return more && broken.ok();
            },
            stop);
        if (stop.stop_requested()) return;
        metrics_.RestRequest("GET", end.ok() ? end->status : 0, -1);
        if (broken.ok()) {
          reflector_.OnWatchEnd(clock_.NowMicros(), end);
        } else {
          reflector_.OnWatchEnd(clock_.NowMicros(), broken);
        }
        break;
      }
    }
    NoteSync();
    const bool failing = !reflector_.last_error().ok();
    if (failing) {
      metrics_.ReflectorError(reflector_.name());
      log::Warning("watching will be tried again", {{"resource", reflector_.name()}, {"error", reflector_.last_error().ToString()}});
    } else if (was_failing) {
      log::Info("watching again", {{"resource", reflector_.name()}});
    }
    was_failing = failing;
  }
}

}  // namespace qwen::kube
