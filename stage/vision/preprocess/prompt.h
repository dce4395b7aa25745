// stage/vision/preprocess/prompt.h — fills the placeholders of a rendered chat text, as Qwen3VLProcessor.__call__ of
// transformers 5.17.0: the k-th "<|image_pad|>" becomes as many as image k has merged tokens; the k-th "<|video_pad|>"
// becomes, per frame pair, "<{t:.1f} seconds><|vision_start|>" + "<|video_pad|>" * (h*w/4) + "<|vision_end|>".
//
// 5.17 replaces the pad token alone: the <|vision_start|> and <|vision_end|> that the template wrote around it stay.
// Thread safety: pure functions.
#pragma once
#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "stage/base/status.h"

namespace qwen::preprocess {

struct ImageMedia {
  std::array<int32_t, 3> grid;  // VisionInput::grid
};
struct VideoMedia {
  std::array<int32_t, 3> grid;
  std::vector<double> timestamps;  // grid[0] of them
};

// The special tokens as they are spelt in the chat text; the defaults are those of every Qwen3-VL tokenizer.
struct VisionTokens {
  std::string image_pad = "<|image_pad|>";
  std::string video_pad = "<|video_pad|>";
  std::string vision_start = "<|vision_start|>";
  std::string vision_end = "<|vision_end|>";
};

// kInvalidArgument when the text does not hold exactly one placeholder per given image and video (a user's own text that
// spells a placeholder is caught here).
Result<std::string> ExpandPlaceholders(std::string_view text, std::span<const ImageMedia> images,
                                       std::span<const VideoMedia> videos, int32_t merge_size = 2,
                                       const VisionTokens& tokens = {});

// Python's f"{seconds:.1f}" (round half to even on the exact binary value).
std::string FormatSeconds(double seconds);

}  // namespace qwen::preprocess
