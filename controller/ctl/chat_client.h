// controller/ctl/chat_client.h — one streamed chat completion, with its times; what `run --ask`, `chat` and `bench` share.
// Thread safety: calls are independent; any thread.
#pragma once
#include <chrono>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "controller/ctl/http_client.h"
#include "stage/base/status.h"

namespace qwen::ctl {

// Splits a text/event-stream into the payloads of its "data:" lines. Thread safety: none.
class SseParser {
 public:
  static constexpr size_t kEventBytesMax = 4 << 20;
  // Calls on_data for every complete event; kDataLoss when one grows beyond kEventBytesMax.
  Status Feed(std::string_view bytes, const std::function<void(std::string_view)>& on_data);

 private:
  std::string line_;
  std::string data_;
};

struct ChatMessage {
  std::string role;  // "system", "user", "assistant"
  std::string text;
  std::vector<std::string> image_urls;  // data: or http(s):, before the text
};
struct ChatRequest {
  std::string model;  // empty: the server's first model
  std::vector<ChatMessage> messages;
  std::string api_key;  // empty: none
  int32_t max_tokens = 0;  // 0: the server's default
  std::optional<double> temperature;
  bool ignore_eos = false;  // bench: every answer has max_tokens tokens
};
struct ChatResult {
  std::string text;
  std::string finish_reason;
  int64_t prompt_tokens = 0, completion_tokens = 0;  // as the server's usage says
  double first_token_seconds = 0;                    // from sending the request to the first piece of text
  double total_seconds = 0;
  std::vector<double> gaps_seconds;  // between two pieces of text
  // After the first token; 0 with fewer than two tokens.
  double tokens_per_second() const;
};
// `on_text` gets each piece as it comes; returning false ends the answer early. kUnavailable, kDeadlineExceeded, or the server's own
// error message as kInvalidArgument (4xx), kResourceExhausted (429), kInternal (5xx).
Result<ChatResult> StreamChat(const Url& url, const ChatRequest& request, const std::function<bool(std::string_view)>& on_text);

// The id of the first model that the server lists.
Result<std::string> FirstModel(const Url& url, const std::string& api_key);
// "data:image/png;base64,..." of a PNG, JPEG or WebP file of at most 20 MiB.
Result<std::string> ImageDataUrl(const std::string& path);

}  // namespace qwen::ctl
