#include "stage/server/prompt_builder.h"

#include <algorithm>
#include <array>
#include <span>

#include "stage/server/data_url.h"
#include "stage/vision/preprocess/image_decode.h"
#include "stage/vision/preprocess/patches.h"
#include "stage/vision/preprocess/positions.h"
#include "stage/vision/preprocess/prompt.h"
#include "stage/vision/preprocess/video_decode.h"

namespace qwen::server {
namespace {

// The longest token of the Qwen vocabulary is 128 bytes: text longer than this cannot fit, and need not be tokenized to
// find out.
constexpr size_t kTokenBytesMax = 128;
constexpr char kContinueTag[] = "CONTINUE_FINAL_MESSAGE_TAG ";  // as in transformers' chat_template_utils.py

std::span<const std::byte> AsBytes(const std::string& text) { return std::as_bytes(std::span(text.data(), text.size())); }

struct PreparedMedia {
  std::vector<preprocess::ImageMedia> images;
  std::vector<preprocess::VideoMedia> videos;
  std::vector<std::shared_ptr<step::VisionInput>> image_inputs, video_inputs;
  int64_t bytes = 0;
};

OrError<preprocess::VideoInput> PrepareFrames(const MediaPart& part, const UrlFetcher& fetcher, const ModelAssets& assets) {
  std::vector<preprocess::Image> frames;
  int64_t frame_bytes = 0;
  for (size_t i = 0; i < part.urls.size(); ++i) {
    const std::string param = part.param + "[" + std::to_string(i) + "]";
    auto file = fetcher.Fetch(part.urls[i]);
    if (!file.ok()) return FromStatus(file.status(), param);
    auto image = preprocess::DecodeImage(AsBytes(*file));
    if (!image.ok()) return FromStatus(image.status(), param);
    frame_bytes += static_cast<int64_t>(image->rgb.size());
    if (frame_bytes > kVisionBytesMax) return BadRequest(part.param + " has too many pixels in all", part.param);
    frames.push_back(std::move(*image));
  }
  auto video = preprocess::MakeVideoInput(frames, part.fps, assets.processor->video);
  if (!video.ok()) return FromStatus(video.status(), part.param);
  return std::move(*video);
}

std::optional<ApiError> PrepareMedia(const std::vector<MediaPart>& media, const UrlFetcher& fetcher, const ModelAssets& assets,
                                     PreparedMedia& out) {
  for (const MediaPart& part : media) {
    if (part.kind == MediaPart::Kind::kImage) {
      auto file = fetcher.Fetch(part.urls[0]);
      if (!file.ok()) return FromStatus(file.status(), part.param);
      auto image = preprocess::DecodeImage(AsBytes(*file));
      if (!image.ok()) return FromStatus(image.status(), part.param);
      auto input = preprocess::MakeImageInput(*image, assets.processor->image);
      if (!input.ok()) return FromStatus(input.status(), part.param);
      out.bytes += static_cast<int64_t>(input->patches.size());
      out.images.push_back({input->grid});
      out.image_inputs.push_back(std::make_shared<step::VisionInput>(std::move(*input)));
    } else {
      preprocess::VideoInput video;
      if (part.kind == MediaPart::Kind::kFrames) {
        auto frames = PrepareFrames(part, fetcher, assets);
        if (!frames.ok()) return frames.error();
        video = std::move(frames.value());
      } else {
        auto file = fetcher.Fetch(part.urls[0]);
        if (!file.ok()) return FromStatus(file.status(), part.param);
        auto made = preprocess::MakeVideoInputFromFile(AsBytes(*file), assets.processor->video);
        if (!made.ok()) return FromStatus(made.status(), part.param);
        video = std::move(*made);
      }
      out.bytes += static_cast<int64_t>(video.input.patches.size());
      out.videos.push_back({video.input.grid, std::move(video.timestamps)});
      out.video_inputs.push_back(std::make_shared<step::VisionInput>(std::move(video.input)));
    }
    if (out.bytes > kVisionBytesMax) return BadRequest("the images and videos of the request have too many pixels in all", part.param);
  }
  return std::nullopt;
}

// Text-only templates expect strings where clients may send a list of text parts; vLLM joins them with a newline.
Json FlattenParts(Json messages) {
  for (auto& message : messages) {
    Json& content = message["content"];
    if (!content.is_array()) continue;
    std::string text;
    for (const auto& part : content) {
      if (!text.empty()) text += "\n";
      text += part["text"].get_ref<const std::string&>();
    }
    content = std::move(text);
  }
  return messages;
}

// Marks the end of the final message's text; false when it has none.
bool AppendTag(Json& message) {
  Json& content = message["content"];
  if (content.is_string()) {
    content = content.get<std::string>() + kContinueTag;
    return true;
  }
  for (auto part = content.rbegin(); part != content.rend(); ++part) {
    if (!part->contains("text")) continue;
    (*part)["text"] = (*part)["text"].get<std::string>() + kContinueTag;
    return true;
  }
  return false;
}

std::string_view StripRight(std::string_view text) {
  const size_t last = text.find_last_not_of(" \t\r\n");
  return last == std::string_view::npos ? std::string_view() : text.substr(0, last + 1);
}

void PlainPositions(BuiltPrompt& prompt) {
  prompt.positions.resize(prompt.tokens.size());
  for (int32_t i = 0; i < static_cast<int32_t>(prompt.tokens.size()); ++i) prompt.positions[i] = {i, i, i};
}

}  // namespace

OrError<std::string> PromptBuilder::Render(const ChatPrompt& prompt) const {
  if (!assets_.chat_template) return BadRequest("this model has no chat template: use /v1/completions", "messages");
  Json context = prompt.template_kwargs.is_object() ? prompt.template_kwargs : Json::object();
  Json messages = assets_.processor ? prompt.messages : FlattenParts(prompt.messages);
  if (prompt.continue_final_message && !AppendTag(messages.back())) {
    return BadRequest("continue_final_message: the last message has no text", "continue_final_message");
  }
  context["messages"] = std::move(messages);
  if (prompt.tools.is_array()) context["tools"] = prompt.tools;
  context["add_generation_prompt"] = prompt.add_generation_prompt;
  auto rendered = assets_.chat_template->Render(DumpJson(context));
  if (!rendered.ok()) return FromStatus(rendered.status().WithContext("chat template"), "messages");
  std::string text = std::move(*rendered);
  if (prompt.continue_final_message) {
    const std::string_view tag = kContinueTag;
    const size_t at = text.rfind(StripRight(tag));
    if (at == std::string::npos) {
      return BadRequest("continue_final_message: the chat template drops the last message", "continue_final_message");
    }
    const bool kept = std::string_view(text).substr(at).starts_with(tag);
    text.resize(at);
    if (!kept) text.resize(StripRight(text).size());  // the template trims the message, so it trims what we continue
  }
  return text;
}

OrError<std::vector<int32_t>> PromptBuilder::Encode(const std::string& text, bool add_special_tokens, const std::string& param) const {
  const auto too_long = [&](const std::string& asked) {
    return BadRequest("this model's maximum context length is " + std::to_string(assets_.max_model_len) + " tokens, but the prompt has " + asked,
                      param, "context_length_exceeded");
  };
  if (text.size() > static_cast<size_t>(assets_.max_model_len) * kTokenBytesMax) {
    return too_long("more than " + std::to_string(text.size() / kTokenBytesMax));
  }
  auto tokens = assets_.tokenizer->Encode(text, add_special_tokens);
  if (!tokens.ok()) return FromStatus(tokens.status(), param);
  if (tokens->empty()) return BadRequest("the prompt is empty", param);
  if (tokens->size() >= static_cast<size_t>(assets_.max_model_len)) return too_long(std::to_string(tokens->size()));
  return std::move(*tokens);
}

OrError<BuiltPrompt> PromptBuilder::BuildText(const std::string& text, bool add_special_tokens, const std::string& param) const {
  auto tokens = Encode(text, add_special_tokens, param);
  if (!tokens.ok()) return tokens.error();
  return BuildTokens(std::move(tokens.value()), param);
}

OrError<BuiltPrompt> PromptBuilder::BuildTokens(std::vector<int32_t> tokens, const std::string& param) const {
  if (tokens.empty()) return BadRequest("the prompt is empty", param);
  if (tokens.size() >= static_cast<size_t>(assets_.max_model_len)) {
    return BadRequest("this model's maximum context length is " + std::to_string(assets_.max_model_len) + " tokens, but the prompt has " +
                          std::to_string(tokens.size()),
                      param, "context_length_exceeded");
  }
  BuiltPrompt prompt{.tokens = std::move(tokens)};
  PlainPositions(prompt);
  return prompt;
}

OrError<BuiltPrompt> PromptBuilder::BuildChat(const ChatPrompt& chat) const {
  if (!chat.media.empty() && !assets_.processor) {
    return BadRequest("this model reads text only", chat.media.front().param);
  }
  auto rendered = Render(chat);
  if (!rendered.ok()) return rendered.error();
  std::string text = std::move(rendered.value());
  BuiltPrompt prompt;
  prompt.ends_in_think = StripRight(text).ends_with("<think>");
  PreparedMedia media;
  if (assets_.processor) {
    if (auto error = PrepareMedia(chat.media, fetcher_, assets_, media)) return *error;
    auto expanded = preprocess::ExpandPlaceholders(text, media.images, media.videos, assets_.processor->image.merge_size);
    if (!expanded.ok()) return FromStatus(expanded.status(), "messages");
    text = std::move(*expanded);
  }
  auto tokens = Encode(text, /*add_special_tokens=*/false, "messages");
  if (!tokens.ok()) return tokens.error();
  prompt.tokens = std::move(tokens.value());
  if (media.images.empty() && media.videos.empty()) {
    PlainPositions(prompt);
    return prompt;
  }

  std::vector<std::array<int32_t, 3>> images, videos;
  for (const auto& image : media.images) images.push_back(image.grid);
  for (const auto& video : media.videos) videos.push_back(video.grid);
  auto positions = preprocess::ComputePositions(prompt.tokens, {assets_.shape.image_token, assets_.shape.video_token}, images, videos,
                                                assets_.processor->image.merge_size);
  if (!positions.ok()) return FromStatus(positions.status(), "messages");
  prompt.positions = std::move(positions->positions);
  prompt.position_delta = positions->delta;
  prompt.vision_bytes = media.bytes;
  const auto add = [&](const auto& inputs, auto& runs) {
    for (size_t i = 0; i < inputs.size(); ++i) {
      prompt.vision.push_back({.input = inputs[i], .runs = std::move(runs[i]), .content_hash = preprocess::ContentHash(*inputs[i])});
    }
  };
  add(media.image_inputs, positions->image_runs);
  add(media.video_inputs, positions->video_runs);
  std::ranges::sort(prompt.vision, {}, [](const engine::VisionSpan& span) { return span.runs.front().first; });
  return prompt;
}

}  // namespace qwen::server
