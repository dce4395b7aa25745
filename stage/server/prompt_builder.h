// stage/server/prompt_builder.h — from a parsed prompt to what the engine takes: text → template → placeholders → tokens,
// pictures → patches, positions.
//
// Thread safety: immutable; Build* block for as long as decoding takes, so they belong on the worker pool.
// Lifetime: `assets` and `fetcher` outlive the builder.
#pragma once
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "stage/engine/request.h"
#include "stage/server/chat_request.h"
#include "stage/server/model_assets.h"
#include "stage/server/url_fetcher.h"

namespace qwen::server {

struct BuiltPrompt {
  std::vector<int32_t> tokens;
  std::vector<step::Position> positions;  // one per token
  int32_t position_delta = 0;
  std::vector<engine::VisionSpan> vision;  // inputs have id 0 until a request is made of them
  int64_t vision_bytes = 0;
  bool ends_in_think = false;  // the template opened <think>: the output begins inside it
};
// Of one request, all pictures and frames together, as patches. A 16-megapixel image is 96 MiB.
inline constexpr int64_t kVisionBytesMax = 1ll << 30;

class PromptBuilder {
 public:
  PromptBuilder(const ModelAssets& assets, const UrlFetcher& fetcher) : assets_(assets), fetcher_(fetcher) {}

  OrError<BuiltPrompt> BuildChat(const ChatPrompt& prompt) const;
  OrError<BuiltPrompt> BuildText(const std::string& text, bool add_special_tokens, const std::string& param) const;
  OrError<BuiltPrompt> BuildTokens(std::vector<int32_t> tokens, const std::string& param) const;

 private:
  OrError<std::string> Render(const ChatPrompt& prompt) const;
  OrError<std::vector<int32_t>> Encode(const std::string& text, bool add_special_tokens, const std::string& param) const;

  const ModelAssets& assets_;
  const UrlFetcher& fetcher_;
};

}  // namespace qwen::server
