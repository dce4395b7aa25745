// stage/vision/preprocess/codecs.h — one decoder per file format, behind DecodeImage (image_decode.h), which has checked the
// size of the file and the signature. Each gives RGB as PIL's convert("RGB"), and the orientation its metadata asks for.
#pragma once
#include <cstddef>
#include <span>
#include <string>

#include "stage/base/status.h"
#include "stage/vision/preprocess/image_decode.h"

namespace qwen::preprocess::codecs {

struct Decoded {
  Image image;          // as stored, not yet turned
  int orientation = 1;  // EXIF 1..8, or anything a hostile file says
};

Result<Decoded> DecodeJpeg(std::span<const std::byte> bytes, const DecodeLimits& limits);
Result<Decoded> DecodePng(std::span<const std::byte> bytes, const DecodeLimits& limits);
Result<Decoded> DecodeWebp(std::span<const std::byte> bytes, const DecodeLimits& limits);

// kInvalidArgument when a picture of that size is empty or over a limit. Every codec calls it on what the header says,
// before it allocates.
Status CheckSize(int64_t width, int64_t height, const DecodeLimits& limits);

// "<format>: <what the library says>", with everything but printable ASCII removed: libraries quote bytes of the file.
Status BrokenFile(std::string_view format, std::string_view message);

}  // namespace qwen::preprocess::codecs
