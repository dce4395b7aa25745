// stage/vision/preprocess/resize.h — target sizes (smart_resize) and the resampling filter, both as transformers 5.17.0.
//
// Thread safety: pure functions.
#pragma once
#include <cstdint>

#include "stage/base/status.h"
#include "stage/vision/preprocess/image_decode.h"

namespace qwen::preprocess {

struct Size {
  int32_t height = 0, width = 0;
  bool operator==(const Size&) const = default;
};

struct PixelBudget {
  int64_t min_pixels = 0;  // JSON size.shortest_edge
  int64_t max_pixels = 0;  // JSON size.longest_edge; for videos of all frames together
};

// models/qwen2_vl/image_processing_qwen2_vl.py smart_resize: multiples of `factor` (Python's round half to even), the
// product within the budget. kInvalidArgument when the sides differ by more than 200 times.
Result<Size> SmartResizeImage(Size size, int32_t factor, const PixelBudget& budget);

// models/qwen3_vl/video_processing_qwen3_vl.py smart_resize; `frames` before padding to whole temporal patches.
// kInvalidArgument also when frames < temporal_factor.
Result<Size> SmartResizeVideo(int32_t frames, Size size, int32_t factor, int32_t temporal_factor,
                              const PixelBudget& budget);

// Antialiased bicubic (a = -0.5), uint8 in and out: bit-equal to torchvision.transforms.v2.functional.resize(uint8,
// BICUBIC, antialias=True) on a CPU, that is ATen's fixed-point port of PIL's filter: weights rounded to int16 with the
// largest precision that fits, horizontal pass first, each pass rounded and clamped to uint8.
// REQUIRES: image and size not empty.
Image ResizeBicubic(const Image& image, Size size);

}  // namespace qwen::preprocess
