// stage/vision/preprocess/video_decode.h — bytes of a video file (mp4, webm, mkv, avi, ... whatever libavformat demuxes from
// memory) -> the frames that Qwen3VLVideoProcessor samples, in RGB, equal to transformers' pyav backend.
//
// A file can name no other file or URL: only self-contained containers and common codecs are opened, and libav's own
// ways to open more are shut. Frames are decoded in order up to the last sampled one, without seeking.
// Thread safety: pure functions; libav's logging is silenced for the process at first use. One decoder thread a call.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "stage/base/status.h"
#include "stage/vision/preprocess/image_decode.h"
#include "stage/vision/preprocess/patches.h"
#include "stage/vision/preprocess/processor_config.h"

namespace qwen::preprocess {

struct VideoLimits {
  int64_t max_bytes = 256 << 20;                   // of the file
  int64_t max_frame_pixels = 3840 * 2160;          // of one frame
  int64_t max_source_frames = 100'000;             // in the file
  double max_duration_s = 3600.0;                  // frames / fps
  int64_t max_decoded_pixels = 40'000'000'000;     // frames * width * height: the work; about 11 min of 1080p at 30 fps
  int64_t max_sampled_pixels = 256 * 1024 * 1024;  // DecodeVideo only: of the frames it returns, 3 bytes each
};

struct SampledVideo {
  std::vector<Image> frames;     // as sampled, in order; fewer than indices when the file ends early
  std::vector<int64_t> indices;  // frame numbers that were asked for
  double fps = 24.0;             // average rate of the source
  int64_t total_frames = 0;      // of the source
};

// Qwen3VLVideoProcessor.sample_frames: how many and which frames of a video with `total_frames` at `fps` are shown.
// kInvalidArgument when fps is not positive or total_frames < 1.
Result<std::vector<int64_t>> SampleFrameIndices(int64_t total_frames, double fps, const VideoProcessorConfig& config);

// kInvalidArgument: not a video, broken, without frames, or over a limit.
Result<SampledVideo> DecodeVideo(std::span<const std::byte> bytes, const VideoProcessorConfig& config,
                                 const VideoLimits& limits = {});
// DecodeVideo, then MakeVideoInput, but each frame is resized as it comes, so that memory stays with the pixel budget of
// `config` and not with the size of the video.
Result<VideoInput> MakeVideoInputFromFile(std::span<const std::byte> bytes, const VideoProcessorConfig& config,
                                          const VideoLimits& limits = {});

}  // namespace qwen::preprocess
