// Fuzzes DecodeImage: any bytes give pixels of the size they claim, or kInvalidArgument. Small limits keep inputs fast.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>

#include "stage/vision/preprocess/image_decode.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const qwen::preprocess::DecodeLimits limits{
      .max_bytes = 1 << 16, .max_pixels = 1 << 16, .max_side = 4096, .max_jpeg_scans = 8};
  const auto image = qwen::preprocess::DecodeImage(std::as_bytes(std::span(data, size)), limits);
  if (!image.ok()) {
    if (image.status().code() != qwen::StatusCode::kInvalidArgument) std::abort();
    return 0;
  }
  const int64_t pixels = int64_t{image->width} * image->height;
  if (pixels < 1 || pixels > limits.max_pixels || static_cast<int64_t>(image->rgb.size()) != 3 * pixels) std::abort();
  return 0;
}
