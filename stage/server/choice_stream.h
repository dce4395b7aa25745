// stage/server/choice_stream.h — one choice of one request: sampled tokens in, what the client may see out. Detokenises,
// applies stop strings, splits off reasoning and tool calls, keeps the count.
//
// Thread safety: none; used on the exchange's strand.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "stage/engine/request.h"
#include "stage/server/json_text.h"
#include "stage/server/reasoning_parser.h"
#include "stage/server/stop_checker.h"
#include "stage/server/tool_parser.h"
#include "stage/text/detokenizer.h"
#include "stage/text/tokenizer.h"

namespace qwen::server {

// How the output of a chat request is read; text completions are kPlain without reasoning.
struct OutputForm {
  enum class Calls { kPlain, kHermes, kRequiredList, kNamed };
  Calls calls = Calls::kPlain;
  std::string function;  // kNamed
  std::optional<ReasoningParser::Start> reasoning;
};

struct ChoiceDelta {
  std::string content, reasoning;
  std::vector<ToolCall> calls;
  std::vector<engine::TokenEvent> tokens;  // consumed since the last delta, for logprobs and token ids
  std::vector<size_t> text_offsets;        // of each of these tokens, in characters of the choice's text; for completions' logprobs
  bool empty() const { return content.empty() && reasoning.empty() && calls.empty() && tokens.empty(); }
};

class ChoiceStream {
 public:
  struct Options {
    std::vector<std::string> stops;
    bool include_stop = false;
    bool skip_special_tokens = true;
    std::vector<int32_t> stop_tokens;  // end the sequence and are not shown (with include_stop they are)
    std::vector<int32_t> eos_tokens;   // of these, the ones that are no stop_reason worth naming
    bool keep_tokens = false;          // logprobs or token ids are wanted
    OutputForm form;
  };
  // `tokenizer` outlives the stream.
  ChoiceStream(const text::Tokenizer& tokenizer, Options options);

  // After it, stopped() may be true: a stop string came; the sequence is to be cancelled and later tokens are ignored.
  ChoiceDelta Push(engine::TokenEvent event);
  // The sequence ended; the rest of the text. Sets finish_reason().
  ChoiceDelta Finish(const engine::FinishEvent& event);

  bool stopped() const { return stops_.stopped(); }
  int32_t completion_tokens() const { return completion_tokens_; }
  // "stop", "length", "tool_calls", "abort" or "error"; empty before Finish.
  const std::string& finish_reason() const { return finish_reason_; }
  const Json& stop_reason() const { return stop_reason_; }  // the stop string or token that was asked for, or null

 private:
  void Route(std::string text, ChoiceDelta& delta);
  void RouteContent(std::string text, ChoiceDelta& delta);
  bool Contains(const std::vector<int32_t>& list, int32_t token) const;

  const Options options_;
  text::Detokenizer detokenizer_;
  StopChecker stops_;
  std::optional<ReasoningParser> reasoning_;
  ToolParser tools_;
  std::string forced_;  // kRequiredList: parsed when it is complete
  bool named_begun_ = false;
  int32_t completion_tokens_ = 0;
  size_t text_characters_ = 0;  // detokenised so far
  std::string finish_reason_;
  Json stop_reason_;
};

}  // namespace qwen::server
