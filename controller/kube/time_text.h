// controller/kube/time_text.h — the wall clock as the API writes it. Pure but for UnixMicros; thread-safe.
// Leases and back-off count on a monotonic Clock (stage/base/clock.h); wall time is only ever written for others to read.
#pragma once
#include <cstdint>
#include <string>

#include "stage/base/status.h"

namespace qwen::kube {

int64_t UnixMicros();                           // since 1970, UTC
std::string MicroTimeText(int64_t unix_micros);  // metav1.MicroTime: "2026-01-31T10:00:00.123456Z"
std::string TimeText(int64_t unix_micros);       // metav1.Time: "2026-01-31T10:00:00Z"
// RFC 3339 with or without a fraction, "Z" or an offset. kInvalidArgument for anything else.
Result<int64_t> ParseTime(const std::string& text);

}  // namespace qwen::kube
