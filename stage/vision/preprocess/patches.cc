#include "stage/vision/preprocess/patches.h"

#include <openssl/evp.h>

#include <algorithm>
#include <memory>

namespace qwen::preprocess {
namespace {

// Copies frame pair `t` into its h*w rows of `patches`. `pair` holds temporal_patch_size frames of one size.
// Row order: merge blocks row-major, the merge*merge patches of a block together; within a row (channel, frame, y, x).
void CutPatches(std::span<const Image* const> pair, int32_t patch, int32_t merge, uint8_t* patches) {
  const int32_t rows = pair[0]->height / patch, columns = pair[0]->width / patch;
  for (int32_t block_y = 0; block_y < rows; block_y += merge) {
    for (int32_t block_x = 0; block_x < columns; block_x += merge) {
      for (int32_t i = 0; i < merge * merge; ++i) {
        const int64_t top = int64_t{block_y + i / merge} * patch, left = int64_t{block_x + i % merge} * patch;
        for (int32_t channel = 0; channel < 3; ++channel) {
          for (const Image* frame : pair) {
            for (int32_t y = 0; y < patch; ++y) {
              const uint8_t* pixel = &frame->rgb[((top + y) * frame->width + left) * 3 + channel];
              for (int32_t x = 0; x < patch; ++x) *patches++ = pixel[x * 3];
            }
          }
        }
      }
    }
  }
}

Status CheckDivisible(const Image& image, int32_t factor) {
  if (image.width % factor == 0 && image.height % factor == 0) return OkStatus();
  return InvalidArgumentError("do_resize is off and " + std::to_string(image.width) + "x" +
                              std::to_string(image.height) + " is not a multiple of " + std::to_string(factor));
}

bool IsWellFormed(const Image& image) {
  return image.width > 0 && image.height > 0 && image.rgb.size() == size_t{3} * image.width * image.height;
}

// _calculate_timestamps of models/qwen3_vl/processing_qwen3_vl.py: the mean of the first and last frame of each group.
std::vector<double> GroupTimestamps(std::vector<int64_t> indices, double fps, int32_t group) {
  while (indices.size() % group != 0) indices.push_back(indices.back());
  std::vector<double> timestamps;
  for (size_t i = 0; i < indices.size(); i += group) {
    const double first = static_cast<double>(indices[i]) / fps;
    const double last = static_cast<double>(indices[i + group - 1]) / fps;
    timestamps.push_back((first + last) / 2);
  }
  return timestamps;
}

constexpr double kDefaultFps = 24.0;  // replace_video_token when the metadata has no fps

}  // namespace

Result<step::VisionInput> MakeImageInput(const Image& image, const ImageProcessorConfig& config) {
  QP_CHECK(IsWellFormed(image));
  Size size{image.height, image.width};
  Image resized;
  const Image* source = &image;
  if (config.do_resize) {
    ASSIGN_OR_RETURN(size, SmartResizeImage(size, config.factor(), config.budget));
    if (size != Size{image.height, image.width}) {
      resized = ResizeBicubic(image, size);
      source = &resized;
    }
  }
  RETURN_IF_ERROR(CheckDivisible(*source, config.factor()));
  step::VisionInput input;
  input.grid = {1, size.height / config.patch_size, size.width / config.patch_size};
  input.patches.resize(source->rgb.size() * config.temporal_patch_size);
  const std::vector<const Image*> pair(config.temporal_patch_size, source);
  CutPatches(pair, config.patch_size, config.merge_size, input.patches.data());
  return input;
}

Result<Size> VideoFrameSize(int32_t frames, Size size, const VideoProcessorConfig& config) {
  PixelBudget budget = config.budget;
  if (config.cap_pixels_per_frame && frames > 0) {
    const int64_t cap = int64_t{config.max_video_tokens} * config.factor() * config.factor();
    const int64_t floor = static_cast<int64_t>(static_cast<double>(budget.min_pixels) * 1.05);
    budget.max_pixels = std::max(std::min(cap, budget.max_pixels / frames), floor) * frames;
  }
  return SmartResizeVideo(frames, size, config.factor(), config.temporal_patch_size, budget);
}

Result<VideoInput> MakeVideoInput(std::span<const Image> frames, std::span<const int64_t> indices,
                                  std::optional<double> fps, const VideoProcessorConfig& config) {
  if (frames.empty() || indices.empty()) return InvalidArgumentError("a video needs at least one frame");
  for (const Image& frame : frames) {
    QP_CHECK(IsWellFormed(frame));
    if (frame.width != frames[0].width || frame.height != frames[0].height) {
      return InvalidArgumentError("the frames of a video must be of one size, got " + std::to_string(frames[0].width) +
                                  "x" + std::to_string(frames[0].height) + " and " + std::to_string(frame.width) + "x" +
                                  std::to_string(frame.height));
    }
  }
  const double rate = fps.value_or(kDefaultFps);
  if (!(rate > 0)) return InvalidArgumentError("fps must be positive");
  const int32_t count = static_cast<int32_t>(frames.size());
  Size size{frames[0].height, frames[0].width};
  if (config.do_resize) {
    ASSIGN_OR_RETURN(size, VideoFrameSize(count, size, config));
  } else {
    RETURN_IF_ERROR(CheckDivisible(frames[0], config.factor()));
  }

  const int32_t group = config.temporal_patch_size;
  VideoInput video;
  video.input.grid = {(count + group - 1) / group, size.height / config.patch_size, size.width / config.patch_size};
  video.timestamps = GroupTimestamps({indices.begin(), indices.end()}, rate, group);
  if (video.timestamps.size() < static_cast<size_t>(video.input.grid[0])) {
    return InvalidArgumentError("a video has more frames than frame numbers");
  }
  video.timestamps.resize(video.input.grid[0]);  // a file that ended early has fewer frames than were asked for
  const size_t pair_bytes = size_t{3} * size.height * size.width * group;
  video.input.patches.resize(pair_bytes * video.input.grid[0]);
  std::vector<Image> resized(group);
  std::vector<const Image*> pair(group);
  for (int32_t t = 0; t < video.input.grid[0]; ++t) {  // pair by pair: one pair of resized frames in memory
    for (int32_t k = 0; k < group; ++k) {
      const int32_t index = std::min(t * group + k, count - 1);  // an odd count repeats the last frame
      const Image& frame = frames[index];
      if (size == Size{frame.height, frame.width}) {
        pair[k] = &frame;
      } else if (k > 0 && t * group + k > count - 1) {
        pair[k] = pair[k - 1];
      } else {
        resized[k] = ResizeBicubic(frame, size);
        pair[k] = &resized[k];
      }
    }
    CutPatches(pair, config.patch_size, config.merge_size, &video.input.patches[t * pair_bytes]);
  }
  return video;
}

Result<VideoInput> MakeVideoInput(std::span<const Image> frames, std::optional<double> fps,
                                  const VideoProcessorConfig& config) {
  std::vector<int64_t> indices(frames.size());
  for (size_t i = 0; i < indices.size(); ++i) indices[i] = static_cast<int64_t>(i);
  return MakeVideoInput(frames, indices, fps, config);
}

std::string ContentHash(const step::VisionInput& input) {
  const std::unique_ptr<EVP_MD_CTX, void (*)(EVP_MD_CTX*)> context(EVP_MD_CTX_new(), EVP_MD_CTX_free);
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int length = 0;
  QP_CHECK(context != nullptr && EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr) == 1 &&
           EVP_DigestUpdate(context.get(), input.grid.data(), sizeof(input.grid)) == 1 &&
           EVP_DigestUpdate(context.get(), input.patches.data(), input.patches.size()) == 1 &&
           EVP_DigestFinal_ex(context.get(), digest, &length) == 1);
  std::string hex;
  for (unsigned int i = 0; i < length; ++i) {
    hex += "0123456789abcdef"[digest[i] >> 4];
    hex += "0123456789abcdef"[digest[i] & 15];
  }
  return hex;
}

}  // namespace qwen::preprocess
