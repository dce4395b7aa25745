#include "stage/server/tool_parser.h"

#include <utility>

#include "stage/server/json_text.h"
#include "stage/server/request_id.h"
#include "stage/server/stop_checker.h"

namespace qwen::server {
namespace {
constexpr std::string_view kOpen = "<tool_call>";
constexpr std::string_view kClose = "</tool_call>";
constexpr std::string_view kSpace = " \t\r\n";

// {"name": string, `arguments_key`: object or JSON text}; arguments may be absent (a function without parameters).
bool ParseCall(const Json& object, const char* arguments_key, ToolCall& call) {
  if (!object.is_object()) return false;
  const auto name = object.find("name");
  if (name == object.end() || !name->is_string() || name->get_ref<const std::string&>().empty()) return false;
  call.name = name->get<std::string>();
  const auto arguments = object.find(arguments_key);
  if (arguments == object.end() || arguments->is_null()) {
    call.arguments = "{}";
  } else if (arguments->is_string()) {
    call.arguments = arguments->get<std::string>();
  } else {
    call.arguments = DumpJson(*arguments);
  }
  call.id = NewToolCallId();
  return true;
}
}  // namespace

std::string NewToolCallId() { return "call_" + NewRequestId().substr(0, 24); }

void ToolParser::Emit(std::string_view text, Delta& delta) {
  const size_t last = text.find_last_not_of(kSpace);
  if (last == std::string_view::npos) {
    space_ += text;
    return;
  }
  delta.content += std::exchange(space_, "");
  delta.content += text.substr(0, last + 1);
  space_ = text.substr(last + 1);
}

void ToolParser::TakeCall(std::string_view body, bool closed, Delta& delta) {
  ToolCall call;
  auto json = ParseJson(body, {});
  if (json.ok() && ParseCall(*json, "arguments", call)) {
    space_.clear();
    ++calls_;
    delta.calls.push_back(std::move(call));
    return;
  }
  Emit(std::string(kOpen) + std::string(body) + (closed ? std::string(kClose) : ""), delta);
}

ToolParser::Delta ToolParser::Push(std::string_view text) {
  Delta delta;
  held_ += text;
  for (;;) {
    const std::string_view tag = inside_ ? kClose : kOpen;
    const size_t at = held_.find(tag);
    if (at == std::string::npos) break;
    if (inside_) {
      TakeCall(std::string_view(held_).substr(0, at), /*closed=*/true, delta);
    } else {
      Emit(std::string_view(held_).substr(0, at), delta);
    }
    held_.erase(0, at + tag.size());
    inside_ = !inside_;
  }
  if (!inside_) {
    const size_t shown = held_.size() - PartialSuffix(held_, kOpen);
    Emit(std::string_view(held_).substr(0, shown), delta);
    held_.erase(0, shown);
  }
  return delta;
}

ToolParser::Delta ToolParser::Finish() {
  Delta delta;
  const std::string rest = std::exchange(held_, "");
  if (std::exchange(inside_, false)) {
    TakeCall(rest, /*closed=*/false, delta);
  } else {
    Emit(rest, delta);
  }
  if (calls_ == 0) delta.content += space_;  // no call: the text stays as it was
  space_.clear();
  return delta;
}

std::vector<ToolCall> ParseRequiredCalls(std::string_view json_text) {
  std::vector<ToolCall> calls;
  auto json = ParseJson(json_text, {});
  if (!json.ok() || !json->is_array()) return calls;
  for (const auto& item : *json) {
    ToolCall call;
    if (ParseCall(item, "parameters", call)) calls.push_back(std::move(call));
  }
  return calls;
}

}  // namespace qwen::server
