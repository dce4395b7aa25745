#include "stage/server/choice_stream.h"

#include <algorithm>
#include <utility>

namespace qwen::server {

ChoiceStream::ChoiceStream(const text::Tokenizer& tokenizer, Options options)
    : options_(std::move(options)),
      detokenizer_(tokenizer, options_.skip_special_tokens),
      stops_(options_.stops, options_.include_stop) {
  if (options_.form.reasoning) reasoning_.emplace(*options_.form.reasoning);
}

bool ChoiceStream::Contains(const std::vector<int32_t>& list, int32_t token) const {
  return std::ranges::find(list, token) != list.end();
}

ChoiceDelta ChoiceStream::Push(engine::TokenEvent event) {
  ChoiceDelta delta;
  if (stopped()) return delta;
  ++completion_tokens_;
  const int32_t token = event.token;
  if (options_.keep_tokens) {
    delta.tokens.push_back(std::move(event));
    delta.text_offsets.push_back(text_characters_);
  }
  if (Contains(options_.stop_tokens, token) && !options_.include_stop) return delta;  // the end, not text
  std::string text = detokenizer_.Push(token);
  text_characters_ += static_cast<size_t>(std::ranges::count_if(text, [](char c) { return (c & 0xc0) != 0x80; }));
  Route(stops_.Push(text), delta);
  return delta;
}

ChoiceDelta ChoiceStream::Finish(const engine::FinishEvent& event) {
  ChoiceDelta delta;
  if (!stopped()) Route(stops_.Push(detokenizer_.Finish()), delta);
  if (!stopped()) Route(stops_.Finish(), delta);
  if (reasoning_) {
    auto rest = reasoning_->Finish();
    delta.reasoning += rest.reasoning;
    RouteContent(std::move(rest.content), delta);
  }
  using Calls = OutputForm::Calls;
  bool called = false;
  if (options_.form.calls == Calls::kHermes) {
    auto rest = tools_.Finish();
    delta.content += rest.content;
    std::ranges::move(rest.calls, std::back_inserter(delta.calls));
    called = tools_.calls() > 0;
  } else if (options_.form.calls == Calls::kRequiredList) {
    auto calls = ParseRequiredCalls(forced_);
    called = !calls.empty();
    if (!called) delta.content += forced_;  // cut short by the length limit
    std::ranges::move(calls, std::back_inserter(delta.calls));
  } else if (options_.form.calls == Calls::kNamed) {
    called = named_begun_;
  }

  using Reason = engine::FinishReason;
  if (stopped()) {
    finish_reason_ = "stop";
    stop_reason_ = stops_.match();
  } else if (event.reason == Reason::kStop) {
    finish_reason_ = "stop";
    if (event.stop_token >= 0 && !Contains(options_.eos_tokens, event.stop_token)) stop_reason_ = event.stop_token;
  } else {
    finish_reason_ = event.reason == Reason::kLength ? "length" : event.reason == Reason::kCancelled ? "abort" : "error";
  }
  if (called && finish_reason_ == "stop") finish_reason_ = "tool_calls";
  return delta;
}

void ChoiceStream::Route(std::string text, ChoiceDelta& delta) {
  if (text.empty()) return;
  if (!reasoning_) return RouteContent(std::move(text), delta);
  auto split = reasoning_->Push(text);
  delta.reasoning += split.reasoning;
  RouteContent(std::move(split.content), delta);
}

void ChoiceStream::RouteContent(std::string text, ChoiceDelta& delta) {
  if (text.empty()) return;
  using Calls = OutputForm::Calls;
  switch (options_.form.calls) {
    case Calls::kPlain:
      delta.content += text;
      return;
    case Calls::kHermes: {
      auto found = tools_.Push(text);
      delta.content += found.content;
      std::ranges::move(found.calls, std::back_inserter(delta.calls));
      return;
    }
    case Calls::kRequiredList:
      forced_ += text;
      return;
    case Calls::kNamed: {
      // The whole output is the arguments: they stream as they come, the name goes with the first piece.
      ToolCall call{.arguments = std::move(text)};
      if (!std::exchange(named_begun_, true)) {
        call.id = NewToolCallId();
        call.name = options_.form.function;
      }
      delta.calls.push_back(std::move(call));
      return;
    }
  }
}

}  // namespace qwen::server
