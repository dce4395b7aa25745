#include "stage/server/reasoning_parser.h"

#include <utility>

#include "stage/server/stop_checker.h"

namespace qwen::server {
namespace {
constexpr std::string_view kOpen = "<think>";
constexpr std::string_view kClose = "</think>";
constexpr std::string_view kSpace = " \t\r\n";
}  // namespace

ReasoningParser::ReasoningParser(Start start) : state_(start == Start::kInside ? State::kReasoning : State::kUndecided) {}

ReasoningParser::Delta ReasoningParser::Push(std::string_view text) {
  Delta delta;
  held_ += text;
  if (at_start_ && state_ != State::kContent) {
    const size_t first = held_.find_first_not_of(kSpace);
    const std::string_view rest = first == std::string::npos ? std::string_view() : std::string_view(held_).substr(first);
    if (rest.size() < kOpen.size() && kOpen.starts_with(rest)) return delta;  // undecided
    if (rest.starts_with(kOpen)) {
      held_.erase(0, first + kOpen.size());
      state_ = State::kReasoning;
    } else if (state_ == State::kUndecided) {
      state_ = State::kContent;
    }
    at_start_ = false;
  }
  if (state_ == State::kReasoning) {
    const size_t end = held_.find(kClose);
    if (end == std::string::npos) {
      const size_t shown = held_.size() - PartialSuffix(held_, kClose);
      delta.reasoning = held_.substr(0, shown);
      held_.erase(0, shown);
      return delta;
    }
    delta.reasoning = held_.substr(0, end);
    held_.erase(0, end + kClose.size());
    state_ = State::kContent;
  }
  delta.content = std::exchange(held_, "");
  return delta;
}

ReasoningParser::Delta ReasoningParser::Finish() {
  Delta delta;
  (state_ == State::kReasoning ? delta.reasoning : delta.content) = std::exchange(held_, "");
  return delta;
}

}  // namespace qwen::server
