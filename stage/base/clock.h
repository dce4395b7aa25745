// stage/base/clock.h — time as a value that is handed in. Nothing in engine/ or plan/ reads a clock of its own.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>

namespace qwen {

// A monotonic clock. Thread safety: all implementations may be read from any thread.
class Clock {
 public:
  virtual ~Clock() = default;
  virtual int64_t NowMicros() const = 0;  // since an arbitrary fixed point; never goes back
};

class SteadyClock final : public Clock {
 public:
  int64_t NowMicros() const override {
    return std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }
};

class FakeClock final : public Clock {
 public:
  explicit FakeClock(int64_t now_micros = 0) : now_micros_(now_micros) {}
  int64_t NowMicros() const override { return now_micros_.load(); }
  void AdvanceMicros(int64_t micros) { now_micros_ += micros; }

 private:
  std::atomic<int64_t> now_micros_;
};

}  // namespace qwen
