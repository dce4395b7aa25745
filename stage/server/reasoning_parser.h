// stage/server/reasoning_parser.h — splits streamed output into what stands before </think> and what stands after it.
//
// The rules of vLLM's deepseek_r1 parser: a leading <think> is dropped; without </think> everything is reasoning; no
// whitespace is trimmed. Two starts: the prompt ended in <think> (Thinking templates), so the output begins inside; or it
// did not, and only an output that itself begins with <think> (after white space) has any reasoning.
// Thread safety: none; one per choice.
#pragma once
#include <string>
#include <string_view>

namespace qwen::server {

class ReasoningParser {
 public:
  enum class Start { kInside, kIfTagged };
  explicit ReasoningParser(Start start);

  struct Delta {
    std::string reasoning, content;
  };
  Delta Push(std::string_view text);
  Delta Finish();  // what was held back as a possible tag

 private:
  enum class State { kUndecided, kReasoning, kContent };
  State state_;
  bool at_start_ = true;  // in kReasoning: a <think> may still come first
  std::string held_;
};

}  // namespace qwen::server
