// stage/server/openai_format.h — the JSON of answers: chat completions and text completions, whole and in chunks.
//
// Thread safety: const functions of values; Collected is a local of one exchange.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "stage/server/choice_stream.h"
#include "stage/text/tokenizer.h"

namespace qwen::server {

struct Usage {
  int64_t prompt_tokens = 0, completion_tokens = 0, cached_tokens = 0;
};
Json UsageJson(const Usage& usage);

// What stays the same over all chunks of an answer.
struct AnswerHeader {
  enum class Kind { kChat, kCompletion };
  Kind kind = Kind::kChat;
  std::string id;  // "chatcmpl-…" or "cmpl-…"
  int64_t created = 0;
  std::string model;
  bool logprobs = false;
  bool token_ids = false;
  bool named_call = false;  // a tool call whose arguments come in pieces
};

// One choice of an answer that is sent in one piece.
struct Collected {
  std::string content, reasoning;
  std::vector<ToolCall> calls;
  std::vector<engine::TokenEvent> tokens;
  std::vector<size_t> text_offsets;
  std::string finish_reason;
  Json stop_reason;
  void Add(ChoiceDelta delta, bool named_call);
};

class OpenAiFormat {
 public:
  // `tokenizer` outlives it.
  OpenAiFormat(AnswerHeader header, const text::Tokenizer& tokenizer) : header_(std::move(header)), tokenizer_(tokenizer) {}

  // The first chunk of a choice: the role (chat), or the echoed prompt (completions; may be empty: then no chunk is needed).
  Json FirstChunk(int32_t index, const std::string& echo, const std::vector<int32_t>* prompt_token_ids) const;
  // `calls_before`: tool calls that this choice has sent already; they are numbered on from there.
  Json DeltaChunk(int32_t index, const ChoiceDelta& delta, int32_t calls_before) const;
  Json FinishChunk(int32_t index, const ChoiceDelta& last, const std::string& finish_reason, const Json& stop_reason,
                   int32_t calls_before) const;
  Json UsageChunk(const Usage& usage) const;
  // `prompts`: token ids of each choice's prompt, null when not asked for.
  Json Whole(const std::vector<Collected>& choices, const Usage& usage, const std::vector<const std::vector<int32_t>*>& prompts) const;

  const AnswerHeader& header() const { return header_; }

 private:
  Json Envelope(bool chunk) const;
  Json ChatLogprobs(const std::vector<engine::TokenEvent>& tokens) const;
  Json CompletionLogprobs(const std::vector<engine::TokenEvent>& tokens, const std::vector<size_t>& offsets) const;
  void AddTokens(Json& choice, const std::vector<engine::TokenEvent>& tokens, const std::vector<size_t>& offsets) const;
  std::string TokenText(int32_t token) const;

  const AnswerHeader header_;
  const text::Tokenizer& tokenizer_;
};

std::string SseEvent(const Json& json);         // "data: {…}\n\n"
inline constexpr char kSseDone[] = "data: [DONE]\n\n";

}  // namespace qwen::server
