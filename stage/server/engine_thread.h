// stage/server/engine_thread.h — the one thread that calls Engine::Step, for ever. Lifetime: `engine` and `clock` outlive it.
//
// Thread safety: last_step_micros from any thread; the rest by the owner.
#pragma once
#include <atomic>
#include <thread>

#include "stage/base/clock.h"
#include "stage/engine/engine.h"

namespace qwen::server {

class EngineThread {
 public:
  EngineThread(engine::Engine& engine, const Clock& clock) : engine_(engine), clock_(clock), last_step_micros_(clock.NowMicros()) {
    thread_ = std::thread([this] { Run(); });
  }
  ~EngineThread() {
    stopping_ = true;
    thread_.join();
  }
  // When the last step began. A step that waits for nothing takes at most kPollTimeout, so a much older one means that
  // the thread is stuck: /healthz says so.
  int64_t last_step_micros() const { return last_step_micros_; }
  bool alive() const { return clock_.NowMicros() - last_step_micros_ < kStuckMicros; }

 private:
  static constexpr std::chrono::milliseconds kPollTimeout{20};
  static constexpr int64_t kStuckMicros = 30'000'000;
  void Run() {
    while (!stopping_) {
      last_step_micros_ = clock_.NowMicros();
      engine_.Step(last_step_micros_, kPollTimeout);
    }
  }

  engine::Engine& engine_;
  const Clock& clock_;
  std::atomic<bool> stopping_{false};
  std::atomic<int64_t> last_step_micros_;
  std::thread thread_;
};

}  // namespace qwen::server
