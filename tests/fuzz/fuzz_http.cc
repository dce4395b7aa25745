// Goal: no request body, URL or model output makes the head crash, and what is accepted is in bounds. The first byte picks
// the entry, the rest is the input.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "stage/server/api_keys.h"
#include "stage/server/chat_request.h"
#include "stage/server/data_url.h"
#include "stage/server/reasoning_parser.h"
#include "stage/server/request_id.h"
#include "stage/server/stop_checker.h"
#include "stage/server/tool_parser.h"
#include "stage/server/url_fetcher.h"

namespace {
using namespace qwen::server;  // NOLINT: a fuzz target

void Require(bool condition) {
  if (!condition) std::abort();
}

const GenerationDefaults kDefaults{.eos_tokens = {3}};
const OptionLimits kLimits{.vocab_size = 320, .tokenizer_size = 300};

void CheckOptions(const GenerationOptions& options) {
  const auto& p = options.params;
  Require(p.temperature >= 0 && p.temperature <= 2 && p.top_p > 0 && p.top_p <= 1 && p.min_p >= 0 && p.min_p < 1 && p.top_k >= 0);
  Require(p.repetition_penalty > 0 && p.no_repeat_ngram_size >= 0 && p.min_tokens >= 0 && p.logprobs >= -1 && p.logprobs <= kLogprobsMax);
  Require(options.n >= 1 && options.n <= kLimits.choices_max && options.stops.size() <= kStopsMax);
  Require(!options.max_tokens || *options.max_tokens > 0);
  for (const int32_t id : p.stop_tokens) Require(id >= 0 && id < kLimits.vocab_size);
  for (const auto& [id, bias] : p.logit_bias) Require(id >= 0 && id < kLimits.vocab_size && bias >= -100 && bias <= 100);
}

void Bodies(std::string_view text) {
  auto json = ParseJson(text, {});
  if (!json.ok()) return;
  auto again = ParseJson(DumpJson(*json), {});
  Require(again.ok());
  if (!json->is_object()) return;
  if (auto chat = ParseChatRequest(*json, kDefaults, kLimits); chat.ok()) {
    CheckOptions(chat.value().options);
    Require(!chat.value().prompt.messages.empty() && chat.value().prompt.media.size() <= kMediaPartsMax);
  } else {
    Require(chat.error().status == 400);
    ErrorJson(chat.error());
  }
  if (auto completion = ParseCompletionRequest(*json, kDefaults, kLimits); completion.ok()) {
    CheckOptions(completion.value().options);
    Require(completion.value().options.max_tokens.has_value());
  }
}

// Streams must say the same however the text is cut: whole against cut in two at a place that the input chooses.
void Streams(std::string_view text) {
  if (text.empty()) return;
  const size_t cut = static_cast<uint8_t>(text[0]) % text.size();
  const auto tools = [](std::initializer_list<std::string_view> pieces) {
    ToolParser parser;
    std::string all;
    const auto add = [&](const ToolParser::Delta& delta) {
      all += delta.content;
      for (const auto& call : delta.calls) all += "\x01" + call.name + "\x02" + call.arguments;
    };
    for (const auto piece : pieces) add(parser.Push(piece));
    add(parser.Finish());
    return all.size();  // calls and text may interleave differently between deltas, their sizes may not
  };
  Require(tools({text}) == tools({text.substr(0, cut), text.substr(cut)}));
  for (const auto start : {ReasoningParser::Start::kInside, ReasoningParser::Start::kIfTagged}) {
    const auto reason = [start](std::initializer_list<std::string_view> pieces) {
      ReasoningParser parser(start);
      std::string reasoning, content;
      for (const auto piece : pieces) {
        auto delta = parser.Push(piece);
        reasoning += delta.reasoning;
        content += delta.content;
      }
      auto delta = parser.Finish();
      return std::make_pair(reasoning + delta.reasoning, content + delta.content);
    };
    Require(reason({text}) == reason({text.substr(0, cut), text.substr(cut)}));
  }
  const auto stop = [](std::initializer_list<std::string_view> pieces) {
    StopChecker checker({"ab", "b\n\n", "</"}, false);
    std::string out;
    for (const auto piece : pieces) out += checker.Push(piece);
    return out + checker.Finish();
  };
  Require(stop({text}) == stop({text.substr(0, cut), text.substr(cut)}));
}

void Urls(std::string_view text) {
  if (auto url = ParseUrl(text); url.ok()) {
    Require(!url->host.empty() && url->target.starts_with("/") && url->target.find_first_of("\r\n ") == std::string::npos);
  }
  (void)DecodeDataUrl(text);
  if (auto keys = ApiKeys::Parse(text); keys.ok()) Require(keys->required() && !keys->Allows("Bearer "));
  const std::string id = SaneRequestId(text);
  Require(id.empty() || id == text);
  (void)ParseGenerationDefaults(text);
}
}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string_view text(reinterpret_cast<const char*>(data) + 1, size - 1);
  switch (data[0] % 3) {
    case 0: Bodies(text); break;
    case 1: Streams(text); break;
    default: Urls(text); break;
  }
  return 0;
}
