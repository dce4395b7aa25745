// stage/server/chat_request.h — POST /v1/chat/completions and POST /v1/completions as structs, parsed and checked.
//
// Unknown fields are ignored (OpenAI clients send many); a wrong type or range is a 400 that names the field.
// Thread safety: values and pure functions.
#pragma once
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "stage/server/generation_options.h"

namespace qwen::server {

// One picture or video of a message, in prompt order. The template sees only a placeholder part in its place.
struct MediaPart {
  enum class Kind { kImage, kVideo, kFrames };
  Kind kind = Kind::kImage;
  std::vector<std::string> urls;  // one; kFrames: one per frame
  std::optional<double> fps;      // kFrames
  std::string param;              // "messages[0].content[1].image_url"
};
inline constexpr int kMediaPartsMax = 256;
inline constexpr int kVideoFramesMax = 768;  // what the video processor samples at most

// The prompt half of a chat request; POST /tokenize takes it as well.
struct ChatPrompt {
  Json messages;  // ready for the template
  std::vector<MediaPart> media;
  Json tools;            // null or a list
  Json template_kwargs;  // null or an object
  bool add_generation_prompt = true;
  bool continue_final_message = false;
};

struct ToolChoice {
  enum class Kind { kNone, kAuto, kRequired, kNamed };
  Kind kind = Kind::kNone;
  std::string name;  // kNamed
};

struct ChatRequest {
  std::string model;  // empty when absent
  ChatPrompt prompt;
  ToolChoice tool_choice;
  GenerationOptions options;
  bool logprobs = false;
  int32_t top_logprobs = 0;
};

struct CompletionRequest {
  using Prompt = std::variant<std::string, std::vector<int32_t>>;
  std::string model;
  std::vector<Prompt> prompts;  // at least one
  GenerationOptions options;    // max_tokens is set (OpenAI's default here is 16)
  std::optional<int32_t> logprobs;
  bool echo = false;
};

OrError<ChatPrompt> ParseChatPrompt(const Json& body);
OrError<ChatRequest> ParseChatRequest(const Json& body, const GenerationDefaults& defaults, const OptionLimits& limits);
OrError<CompletionRequest> ParseCompletionRequest(const Json& body, const GenerationDefaults& defaults,
                                                  const OptionLimits& limits);
// A list of token ids below `vocab_size`, named `param` in errors.
OrError<std::vector<int32_t>> ParseTokenIds(const Json& list, const std::string& param, int32_t vocab_size);

}  // namespace qwen::server
