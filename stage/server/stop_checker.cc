#include "stage/server/stop_checker.h"

#include <algorithm>
#include <utility>

#include "stage/base/check.h"

namespace qwen::server {

size_t PartialSuffix(std::string_view text, std::string_view tag) {
  for (size_t n = std::min(text.size(), tag.size() - 1); n > 0; --n) {
    if (text.substr(text.size() - n) == tag.substr(0, n)) return n;
  }
  return 0;
}

StopChecker::StopChecker(std::vector<std::string> stops, bool include) : stops_(std::move(stops)), include_(include) {
  for (const auto& stop : stops_) QP_CHECK(!stop.empty());
}

std::string StopChecker::Push(std::string_view text) {
  if (stopped()) return "";
  if (stops_.empty()) return std::string(text);
  held_ += text;
  // The match that is complete first wins, of several that end together the longest: a rule that does not depend on how
  // the text was cut into pieces.
  size_t begin = std::string::npos, end = std::string::npos;
  for (size_t i = 0; i < stops_.size(); ++i) {
    const size_t found = held_.find(stops_[i]);
    if (found == std::string::npos) continue;
    const size_t found_end = found + stops_[i].size();
    if (found_end < end || (found_end == end && found < begin)) {
      begin = found;
      end = found_end;
      match_ = static_cast<int>(i);
    }
  }
  size_t shown = include_ ? end : begin;
  if (!stopped()) {
    size_t partial = 0;
    for (const auto& stop : stops_) partial = std::max(partial, PartialSuffix(held_, stop));
    shown = held_.size() - partial;
  }
  std::string out = held_.substr(0, shown);
  held_.erase(0, shown);
  return out;
}

std::string StopChecker::Finish() { return stopped() ? "" : std::exchange(held_, ""); }

}  // namespace qwen::server
