// stage/vision/preprocess/positions.h — M-RoPE positions of a prompt, as Qwen3VLModel.get_rope_index of transformers
// 5.17.0 (qwen3_vl and qwen3_vl_moe are alike): text counts up on all three axes; the placeholders of an image or of one
// frame pair of a video get (start, start + row, start + column), after which counting goes on at start + max(rows, columns).
//
// Thread safety: pure functions.
#pragma once
#include <array>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "stage/base/status.h"
#include "stage/step/step_plan.h"

namespace qwen::preprocess {

struct PromptPositions {
  std::vector<step::Position> positions;  // one per token
  int32_t delta = 0;                      // max + 1 - tokens: token i >= tokens has position i + delta on all axes
  // Per image and per video, in prompt order: its placeholder runs (first token, count), as engine::VisionSpan::runs.
  // An image has one run, a video grid[0] of them.
  std::vector<std::vector<std::pair<int32_t, int32_t>>> image_runs;
  std::vector<std::vector<std::pair<int32_t, int32_t>>> video_runs;
};

struct MediaTokenIds {
  int32_t image_pad = -1;  // ModelShape::image_token
  int32_t video_pad = -1;  // ModelShape::video_token
};

// `images` and `videos` are the grids in prompt order. kInvalidArgument when the runs of placeholder tokens do not match
// the grids (count of runs or length of a run).
Result<PromptPositions> ComputePositions(std::span<const int32_t> tokens, const MediaTokenIds& ids,
                                         std::span<const std::array<int32_t, 3>> images,
                                         std::span<const std::array<int32_t, 3>> videos, int32_t merge_size = 2);

}  // namespace qwen::preprocess
