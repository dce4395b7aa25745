// A transport whose answers a test writes down beforehand, and which remembers what was asked.
#pragma once
#include <chrono>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "controller/kube/transport.h"

namespace qwen::kube {

class FakeTransport final : public Transport {
 public:
  using Handler = std::function<Result<HttpResponse>(const HttpRequest&)>;
  explicit FakeTransport(Handler handler = {}) : handler_(std::move(handler)) {}

  // Without a handler: what was queued, in order.
  void Reply(Result<HttpResponse> response) {
    std::lock_guard<std::mutex> lock(mutex_);
    replies_.push_back(std::move(response));
  }
  void Reply(int32_t status, std::string body, int32_t retry_after = -1) { Reply(HttpResponse{status, std::move(body), retry_after}); }

  void Send(HttpRequest request, Done done) override {
    Handler handler;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      requests_.push_back(request);
      if (handler_) handler = handler_;
    }
    if (handler) return done(handler(request));
    Result<HttpResponse> next = UnavailableError("the test has no answer to " + request.path);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!replies_.empty()) {
        next = std::move(replies_.front());
        replies_.pop_front();
      }
    }
    done(std::move(next));
  }

  // One stream per entry: its chunks, then its end. When there is none left the stream stays silent until it is stopped.
  struct Script {
    std::vector<std::string> chunks;
    Result<HttpResponse> end;
  };
  void AddStream(Script script) {
    std::lock_guard<std::mutex> lock(mutex_);
    streams_.push_back(std::move(script));
  }
  Result<HttpResponse> Stream(const HttpRequest& request, const OnChunk& on_chunk, std::stop_token stop) override {
    std::unique_lock<std::mutex> lock(mutex_);
    requests_.push_back(request);
    if (streams_.empty()) {
      lock.unlock();
      while (!stop.stop_requested()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      return CancelledError("stopped");
    }
    Script script = std::move(streams_.front());
    streams_.pop_front();
    lock.unlock();
    for (const std::string& chunk : script.chunks) {
      if (!on_chunk(chunk)) return HttpResponse{200, {}, -1};
    }
    return script.end;
  }

  std::vector<HttpRequest> requests() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return requests_;
  }

 private:
  mutable std::mutex mutex_;
  Handler handler_;
  std::deque<Result<HttpResponse>> replies_;
  std::deque<Script> streams_;
  std::vector<HttpRequest> requests_;
};

}  // namespace qwen::kube
