// stage/vision/preprocess/patches.h — pixels -> step::VisionInput: resize, cut into patches in the reference's order, hash.
//
// Thread safety: pure functions. VisionInput::id stays 0: the caller numbers its inputs.
#pragma once
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "stage/base/status.h"
#include "stage/step/step_plan.h"
#include "stage/vision/preprocess/image_decode.h"
#include "stage/vision/preprocess/processor_config.h"

namespace qwen::preprocess {

struct VideoInput {
  step::VisionInput input;
  std::vector<double> timestamps;  // seconds, one per frame pair (grid[0] of them): mean over the pair of index / fps
};

// A still image fills both temporal slots. kInvalidArgument for a picture that smart_resize refuses.
Result<step::VisionInput> MakeImageInput(const Image& image, const ImageProcessorConfig& config);

// `frames` are all frames to show (sampled already), of equal size; `indices` are their numbers in the source video and
// `fps` its rate, which give the timestamps (an odd count repeats the last). 24 fps when unknown, as the reference.
// kInvalidArgument: fewer than temporal_patch_size frames, unequal sizes, or refused by smart_resize.
Result<VideoInput> MakeVideoInput(std::span<const Image> frames, std::span<const int64_t> indices,
                                  std::optional<double> fps, const VideoProcessorConfig& config);
// Frames that came as separate pictures (an OpenAI-style list): none is dropped, indices count from 0.
Result<VideoInput> MakeVideoInput(std::span<const Image> frames, std::optional<double> fps,
                                  const VideoProcessorConfig& config);

// The size that Qwen3VLVideoProcessor.resize gives to each of `frames` frames, with the optional cap per frame.
Result<Size> VideoFrameSize(int32_t frames, Size size, const VideoProcessorConfig& config);

// SHA-256 (hex) of grid and patches: the key under which equal pictures share KV (engine::VisionSpan.content_hash).
// Not of `id`.
std::string ContentHash(const step::VisionInput& input);

}  // namespace qwen::preprocess
