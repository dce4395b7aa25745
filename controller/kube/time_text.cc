#include "controller/kube/time_text.h"

#include <array>
#include <chrono>
#include <cstdio>
#include <ctime>

namespace qwen::kube {
namespace {
std::string Format(int64_t unix_micros, bool with_micros) {
  const int64_t micros = ((unix_micros % 1'000'000) + 1'000'000) % 1'000'000;
  const time_t seconds = static_cast<time_t>((unix_micros - micros) / 1'000'000);
  tm utc{};
  gmtime_r(&seconds, &utc);
  std::array<char, 40> text{};
  size_t size = strftime(text.data(), text.size(), "%Y-%m-%dT%H:%M:%S", &utc);
  if (with_micros) size += static_cast<size_t>(std::snprintf(text.data() + size, text.size() - size, ".%06d", static_cast<int>(micros)));
  return std::string(text.data(), size) + "Z";
}
}  // namespace

int64_t UnixMicros() {
  return std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::system_clock::now().time_since_epoch()).count();
}

std::string MicroTimeText(int64_t unix_micros) { return Format(unix_micros, true); }
std::string TimeText(int64_t unix_micros) { return Format(unix_micros, false); }

Result<int64_t> ParseTime(const std::string& text) {
  const Status bad = InvalidArgumentError("not an RFC 3339 time: " + text);
  tm utc{};
  const char* at = strptime(text.c_str(), "%Y-%m-%dT%H:%M:%S", &utc);
  if (at == nullptr) return bad;
  int64_t micros = 0;
  if (*at == '.') {
    ++at;
    int64_t unit = 100'000;
    if (*at < '0' || *at > '9') return bad;
    for (; *at >= '0' && *at <= '9'; ++at, unit /= 10) micros += unit * (*at - '0');
  }
  int64_t offset_seconds = 0;
  if (*at == '+' || *at == '-') {
    int hours = 0, minutes = 0, used = 0;
    if (std::sscanf(at + 1, "%2d:%2d%n", &hours, &minutes, &used) != 2 || used != 5) return bad;
    offset_seconds = (*at == '-' ? -1 : 1) * (hours * 3600 + minutes * 60);
    at += 6;
  } else if (*at == 'Z') {
    ++at;
  } else {
    return bad;
  }
  if (*at != '\0') return bad;
  return (static_cast<int64_t>(timegm(&utc)) - offset_seconds) * 1'000'000 + micros;
}

}  // namespace qwen::kube
