// stage/server/admission.h — who is let in: draining refuses all, and the pixels of all requests together are bounded.
// The number of waiting sequences is the engine's own bound (Engine::Options::queue_capacity).
//
// Thread safety: all members from any thread.
#pragma once
#include <atomic>
#include <cstdint>
#include <utility>

namespace qwen::server {

// Bytes that are given back by the destructor.
class ByteReservation {
 public:
  ByteReservation() = default;
  ByteReservation(std::atomic<int64_t>& counter, int64_t bytes) : counter_(&counter), bytes_(bytes) {}
  ByteReservation(ByteReservation&& other) noexcept : counter_(std::exchange(other.counter_, nullptr)), bytes_(other.bytes_) {}
  ByteReservation& operator=(ByteReservation&& other) noexcept {
    std::swap(counter_, other.counter_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~ByteReservation() {
    if (counter_) *counter_ -= bytes_;
  }

 private:
  std::atomic<int64_t>* counter_ = nullptr;
  int64_t bytes_ = 0;
};

class Admission {
 public:
  // `vision_bytes_max`: pixels of requests between their preprocessing and their end. The head's memory is what it bounds.
  explicit Admission(int64_t vision_bytes_max) : vision_bytes_max_(vision_bytes_max) {}

  // False when the budget is used up; one request alone always fits.
  bool Reserve(int64_t bytes, ByteReservation& out) {
    const int64_t before = vision_bytes_.fetch_add(bytes);
    if (before > 0 && before + bytes > vision_bytes_max_) {
      vision_bytes_ -= bytes;
      return false;
    }
    out = ByteReservation(vision_bytes_, bytes);
    return true;
  }
  int64_t vision_bytes() const { return vision_bytes_; }
  void StartDraining() { draining_ = true; }
  bool draining() const { return draining_; }

 private:
  const int64_t vision_bytes_max_;
  std::atomic<int64_t> vision_bytes_{0};
  std::atomic<bool> draining_{false};
};

}  // namespace qwen::server
