// stage/vision/preprocess/processor_config.h — what preprocessor_config.json and video_preprocessor_config.json say, with
// the defaults of transformers 5.17.0's Qwen2VLImageProcessor and Qwen3VLVideoProcessor for keys that are absent.
//
// Thread safety: values.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "stage/base/status.h"
#include "stage/vision/preprocess/resize.h"

namespace qwen::preprocess {

// Stage 0 turns a uint8 pixel x of channel c into (float(x) - mean[c]) / std[c], all in fp32: the fused form of
// TorchvisionBackend.rescale_and_normalize, mean = image_mean * (1 / rescale_factor), std likewise. For the released
// models both are 127.5. With "do_rescale": false they are image_mean and image_std as they stand.
struct PixelNormalization {
  std::array<float, 3> mean = {127.5f, 127.5f, 127.5f};
  std::array<float, 3> std = {127.5f, 127.5f, 127.5f};
  bool operator==(const PixelNormalization&) const = default;
};

struct ImageProcessorConfig {
  PixelBudget budget = {56 * 56, 28 * 28 * 1280};
  int32_t patch_size = 14, temporal_patch_size = 2, merge_size = 2;  // released models: 16, 2, 2
  bool do_resize = true;
  PixelNormalization normalization;
  int32_t factor() const { return patch_size * merge_size; }
};

struct VideoProcessorConfig {
  PixelBudget budget = {128 * 32 * 32, 32 * 32 * 768};
  int32_t patch_size = 16, temporal_patch_size = 2, merge_size = 2;
  bool do_resize = true;
  PixelNormalization normalization;
  double fps = 2.0;                   // frames to sample per second; 0 = num_frames alone decides
  int32_t num_frames = 0;             // 0 = from fps (the two exclude each other)
  int32_t min_frames = 4, max_frames = 768;
  bool cap_pixels_per_frame = false;  // null in the JSON means false in 5.17
  int32_t max_video_tokens = 768;     // per frame, with cap_pixels_per_frame
  int32_t factor() const { return patch_size * merge_size; }
};

struct ProcessorConfig {
  ImageProcessorConfig image;
  VideoProcessorConfig video;
};

// kInvalidArgument names the key that is of the wrong type, out of range or not supported (resample other than bicubic,
// do_normalize false, ...). A key that is null counts as absent, as in the reference.
Result<ImageProcessorConfig> ParseImageProcessorConfig(std::string_view json);
Result<VideoProcessorConfig> ParseVideoProcessorConfig(std::string_view json);

// From a checkpoint's folder, in transformers' order: the "image_processor" / "video_processor" objects of
// processor_config.json when it has them, else preprocessor_config.json and video_preprocessor_config.json (which falls
// back to preprocessor_config.json). kNotFound when there is nothing to read.
Result<ProcessorConfig> LoadProcessorConfig(const std::string& checkpoint_dir);

}  // namespace qwen::preprocess
