// stage/server/tool_parser.h — finds Hermes tool calls, <tool_call>{"name":…,"arguments":{…}}</tool_call>, in streamed text.
//
// A call leaves in one piece when its end tag has come: a client never sees half a call that turns out to be malformed.
// Text around calls is content; white space before a call and after the last one is dropped. What stands
// between the tags but is no such JSON object is given back as content, tags included.
// Thread safety: none; one per choice.
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace qwen::server {

struct ToolCall {
  std::string id;  // "call_" and 24 hex digits
  std::string name;
  std::string arguments;  // JSON text
};
std::string NewToolCallId();

class ToolParser {
 public:
  struct Delta {
    std::string content;
    std::vector<ToolCall> calls;
  };
  Delta Push(std::string_view text);
  Delta Finish();  // an end tag that is missing at the end of the output is forgiven

  int calls() const { return calls_; }

 private:
  void TakeCall(std::string_view body, bool closed, Delta& delta);
  void Emit(std::string_view text, Delta& delta);

  bool inside_ = false;
  int calls_ = 0;
  std::string held_;
  std::string space_;  // white space that is content only if more content follows
};

// Output that a JSON schema forced (tool_choice "required"): [{"name":…,"parameters":{…}}, …]. Empty when it is not that.
std::vector<ToolCall> ParseRequiredCalls(std::string_view json_text);

}  // namespace qwen::server
