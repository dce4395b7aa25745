#include "stage/vision/preprocess/positions.h"

#include <algorithm>
#include <string>

namespace qwen::preprocess {
namespace {

// A video is laid out as grid[0] pictures of one frame pair each, since its timestamps stand between them.
struct Picture {
  std::array<int32_t, 3> grid;
  std::vector<std::pair<int32_t, int32_t>>* runs;  // of the input that it belongs to
};

// Gives out the pictures of one modality in order.
class Pictures {
 public:
  void Add(const std::array<int32_t, 3>& grid, int32_t count, std::vector<std::pair<int32_t, int32_t>>* runs) {
    for (int32_t i = 0; i < count; ++i) pictures_.push_back({grid, runs});
  }
  const Picture* Next() { return next_ < pictures_.size() ? &pictures_[next_++] : nullptr; }
  size_t left() const { return pictures_.size() - next_; }

 private:
  std::vector<Picture> pictures_;
  size_t next_ = 0;
};

bool IsGrid(const std::array<int32_t, 3>& grid, int32_t merge) {
  return grid[0] > 0 && grid[1] > 0 && grid[2] > 0 && grid[1] % merge == 0 && grid[2] % merge == 0;
}

}  // namespace

Result<PromptPositions> ComputePositions(std::span<const int32_t> tokens, const MediaTokenIds& ids,
                                         std::span<const std::array<int32_t, 3>> images,
                                         std::span<const std::array<int32_t, 3>> videos, int32_t merge_size) {
  PromptPositions result;
  result.image_runs.resize(images.size());
  result.video_runs.resize(videos.size());
  Pictures image_pictures, video_pictures;
  for (size_t i = 0; i < images.size(); ++i) {
    if (!IsGrid(images[i], merge_size)) return InvalidArgumentError("image " + std::to_string(i) + " has a bad grid");
    image_pictures.Add(images[i], 1, &result.image_runs[i]);
  }
  for (size_t i = 0; i < videos.size(); ++i) {
    if (!IsGrid(videos[i], merge_size)) return InvalidArgumentError("video " + std::to_string(i) + " has a bad grid");
    video_pictures.Add({1, videos[i][1], videos[i][2]}, videos[i][0], &result.video_runs[i]);
  }

  result.positions.reserve(tokens.size());
  int32_t current = 0, largest = -1;
  for (size_t i = 0; i < tokens.size();) {
    const bool is_image = tokens[i] == ids.image_pad, is_video = tokens[i] == ids.video_pad;
    if (!is_image && !is_video) {
      largest = std::max(largest, current);
      result.positions.push_back({current, current, current});
      ++current;
      ++i;
      continue;
    }
    size_t end = i;
    while (end < tokens.size() && tokens[end] == tokens[i]) ++end;
    const Picture* picture = (is_image ? image_pictures : video_pictures).Next();
    if (picture == nullptr) {
      return InvalidArgumentError(std::string("the prompt has more runs of ") + (is_image ? "image" : "video") +
                                  " placeholder tokens than pictures");
    }
    const int32_t frames = picture->grid[0], rows = picture->grid[1] / merge_size, columns = picture->grid[2] / merge_size;
    if (static_cast<int64_t>(end - i) != int64_t{frames} * rows * columns) {
      return InvalidArgumentError("a run of " + std::to_string(end - i) + " placeholder tokens stands for a picture of " +
                                  std::to_string(int64_t{frames} * rows * columns));
    }
    for (int32_t t = 0; t < frames; ++t) {
      for (int32_t h = 0; h < rows; ++h) {
        for (int32_t w = 0; w < columns; ++w) result.positions.push_back({current + t, current + h, current + w});
      }
    }
    largest = std::max(largest, current + std::max({frames, rows, columns}) - 1);
    picture->runs->push_back({static_cast<int32_t>(i), static_cast<int32_t>(end - i)});
    current += std::max(rows, columns);
    i = end;
  }
  if (image_pictures.left() > 0 || video_pictures.left() > 0) {
    return InvalidArgumentError("the prompt has fewer runs of placeholder tokens than pictures");
  }
  result.delta = largest + 1 - static_cast<int32_t>(tokens.size());
  return result;
}

}  // namespace qwen::preprocess
