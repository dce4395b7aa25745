// stage/vision/preprocess/image_decode.h — bytes of a PNG, JPEG or WebP file -> upright RGB pixels, equal to what
// transformers 5.17.0's image_utils.load_image gives: PIL open, ImageOps.exif_transpose, convert("RGB").
//
// Alpha is dropped, not blended (that is what convert("RGB") does); gray is repeated; 16-bit samples follow PIL; of an
// animation the first frame counts. docs/vision.md lists what is bit-equal to PIL and what is not.
// Thread safety: pure functions. Memory: at most 12 bytes a pixel plus what the codec needs, and nothing of the order of
// the picture is allocated before its header passed the limits.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "stage/base/status.h"

namespace qwen::preprocess {

struct Image {
  int32_t width = 0, height = 0;
  std::vector<uint8_t> rgb;  // (height, width, 3)
};

struct DecodeLimits {
  int64_t max_bytes = 64 << 20;           // of the encoded file
  int64_t max_pixels = 64 * 1024 * 1024;  // width * height; PIL's own bomb limit is 89 Mpixel (warning) / 179 (error)
  int32_t max_side = 32768;
  int32_t max_jpeg_scans = 64;            // a progressive file repeats the whole picture per scan; encoders write ~10
};

// kInvalidArgument: not one of the formats, broken or cut short, or over a limit; the message says which and never
// contains bytes of the file.
Result<Image> DecodeImage(std::span<const std::byte> bytes, const DecodeLimits& limits = {});

// EXIF orientation 1..8 as ImageOps.exif_transpose; any other value leaves the picture as it is.
Image ApplyOrientation(Image image, int orientation);

}  // namespace qwen::preprocess
