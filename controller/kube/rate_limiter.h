// controller/kube/rate_limiter.h — how long a failed key waits: the longer of its own exponential back-off and a token bucket
// shared by all keys (client-go's DefaultTypedControllerRateLimiter, but to 30 s: 5 ms doubled; 10 a second, 100 at once).
//
// Pure: time is an argument. Thread safety: none.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <unordered_map>

#include "controller/kube/object.h"

namespace qwen::kube {

// Tokens that flow in at a rate, up to a burst. Take() may borrow from the future: it says when the token is there.
class TokenBucket {
 public:
  TokenBucket(double per_second, double burst) : per_second_(per_second), burst_(burst), tokens_(burst) {}

  int64_t Take(int64_t now_micros) {  // micros to wait
    Refill(now_micros);
    tokens_ -= 1;
    return tokens_ >= -kRounding ? 0 : static_cast<int64_t>(std::ceil(-tokens_ / per_second_ * 1e6));
  }
  bool TryTake(int64_t now_micros) {  // false: none now, and none was taken
    Refill(now_micros);
    if (tokens_ < 1 - kRounding) return false;
    tokens_ -= 1;
    return true;
  }

 private:
  void Refill(int64_t now_micros) {
    if (now_micros > last_micros_) {
      tokens_ = std::min(burst_, tokens_ + static_cast<double>(now_micros - last_micros_) * 1e-6 * per_second_);
      last_micros_ = now_micros;
    }
  }
  static constexpr double kRounding = 1e-6;  // of sums of micros; far below one token
  const double per_second_;
  const double burst_;
  double tokens_;
  int64_t last_micros_ = 0;
};

class RateLimiter {
 public:
  struct Options {
    int64_t base_micros = 5'000;
    // client-go waits up to 1,000 s. But every event of a failing key is a try of its own, so in a storm failures count up faster than
    // time passes, and whoever waits here for a pod to be replaced has waited for long enough.
    int64_t max_micros = 30'000'000;
    double per_second = 10;
    double burst = 100;
  };
  explicit RateLimiter(const Options& options) : options_(options), bucket_(options.per_second, options.burst) {}

  // Counts one more failure of `key` and says how long it waits.
  int64_t When(const ObjectKey& key, int64_t now_micros) {
    const int32_t failures = failures_[key]++;
    // 2^38 * 5 ms is beyond any limit; a larger shift would overflow.
    const int64_t own = failures > 38 ? options_.max_micros : std::min(options_.max_micros, options_.base_micros << failures);
    return std::max(own, bucket_.Take(now_micros));
  }
  int32_t Failures(const ObjectKey& key) const {
    const auto found = failures_.find(key);
    return found == failures_.end() ? 0 : found->second;
  }
  void Forget(const ObjectKey& key) { failures_.erase(key); }

 private:
  const Options options_;
  TokenBucket bucket_;
  std::unordered_map<ObjectKey, int32_t> failures_;  // of keys that fail now; Forget removes
};

}  // namespace qwen::kube
