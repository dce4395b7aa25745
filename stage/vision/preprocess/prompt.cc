#include "stage/vision/preprocess/prompt.h"

#include <algorithm>
#include <cstdio>

namespace qwen::preprocess {
namespace {

int64_t MergedTokens(int64_t height, int64_t width, int32_t merge) { return height * width / (int64_t{merge} * merge); }

void AppendRepeated(std::string& out, std::string_view token, int64_t count) {
  out.reserve(out.size() + token.size() * count);
  for (int64_t i = 0; i < count; ++i) out += token;
}

int64_t CountOf(std::string_view text, std::string_view token) {
  int64_t count = 0;
  for (size_t at = text.find(token); at != text.npos; at = text.find(token, at + token.size())) ++count;
  return count;
}

Status CheckCount(std::string_view text, std::string_view token, size_t given, std::string_view what) {
  const int64_t found = CountOf(text, token);
  if (found == static_cast<int64_t>(given)) return OkStatus();
  return InvalidArgumentError("the prompt has " + std::to_string(found) + " " + std::string(what) +
                              " placeholders for " + std::to_string(given) + " given");
}

}  // namespace

std::string FormatSeconds(double seconds) {
  char text[400];  // the largest double has 309 digits
  std::snprintf(text, sizeof(text), "%.1f", seconds);
  return text;
}

Result<std::string> ExpandPlaceholders(std::string_view text, std::span<const ImageMedia> images,
                                       std::span<const VideoMedia> videos, int32_t merge_size,
                                       const VisionTokens& tokens) {
  RETURN_IF_ERROR(CheckCount(text, tokens.image_pad, images.size(), "image"));
  RETURN_IF_ERROR(CheckCount(text, tokens.video_pad, videos.size(), "video"));
  std::string out;
  size_t next_image = 0, next_video = 0, at = 0;
  while (true) {
    const size_t image_at = text.find(tokens.image_pad, at), video_at = text.find(tokens.video_pad, at);
    const size_t found = std::min(image_at, video_at);
    out += text.substr(at, found == text.npos ? text.npos : found - at);
    if (found == text.npos) return out;
    if (found == image_at) {
      const auto& grid = images[next_image++].grid;
      AppendRepeated(out, tokens.image_pad, grid[0] * MergedTokens(grid[1], grid[2], merge_size));
      at = found + tokens.image_pad.size();
      continue;
    }
    const VideoMedia& video = videos[next_video++];
    if (video.timestamps.size() != static_cast<size_t>(video.grid[0])) {
      return InvalidArgumentError("a video of " + std::to_string(video.grid[0]) + " frame pairs came with " +
                                  std::to_string(video.timestamps.size()) + " timestamps");
    }
    for (const double seconds : video.timestamps) {
      out.append("<").append(FormatSeconds(seconds)).append(" seconds>").append(tokens.vision_start);
      AppendRepeated(out, tokens.video_pad, MergedTokens(video.grid[1], video.grid[2], merge_size));
      out += tokens.vision_end;
    }
    at = found + tokens.video_pad.size();
  }
}

}  // namespace qwen::preprocess
