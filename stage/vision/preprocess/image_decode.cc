#include "stage/vision/preprocess/image_decode.h"

#include <string>
#include <string_view>

#include "stage/vision/preprocess/codecs.h"

namespace qwen::preprocess {
namespace {

bool StartsWith(std::span<const std::byte> bytes, std::string_view signature, size_t offset = 0) {
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  return text.size() >= offset && text.substr(offset).starts_with(signature);
}

Result<codecs::Decoded> DecodeAny(std::span<const std::byte> bytes, const DecodeLimits& limits) {
  if (StartsWith(bytes, "\xff\xd8\xff")) return codecs::DecodeJpeg(bytes, limits);
  if (StartsWith(bytes, "\x89PNG\r\n\x1a\n")) return codecs::DecodePng(bytes, limits);
  if (StartsWith(bytes, "RIFF") && StartsWith(bytes, "WEBP", 8)) return codecs::DecodeWebp(bytes, limits);
  if (StartsWith(bytes, "GIF8")) return InvalidArgumentError("GIF images are not supported; send PNG, JPEG or WebP");
  if (StartsWith(bytes, "BM")) return InvalidArgumentError("BMP images are not supported; send PNG, JPEG or WebP");
  return InvalidArgumentError("not a PNG, JPEG or WebP image");
}

}  // namespace

Status codecs::CheckSize(int64_t width, int64_t height, const DecodeLimits& limits) {
  const std::string size = std::to_string(width) + "x" + std::to_string(height);
  if (width < 1 || height < 1) return InvalidArgumentError("an image of " + size + " has no pixels");
  if (width > limits.max_side || height > limits.max_side) {
    return InvalidArgumentError("an image of " + size + " is over the limit of " + std::to_string(limits.max_side) +
                                " pixels a side");
  }
  if (width * height > limits.max_pixels) {
    return InvalidArgumentError("an image of " + size + " is over the limit of " + std::to_string(limits.max_pixels) +
                                " pixels");
  }
  return OkStatus();
}

Status codecs::BrokenFile(std::string_view format, std::string_view message) {
  std::string text;
  for (const char c : message) {
    if (c >= ' ' && c <= '~') text += c;
  }
  return InvalidArgumentError("broken " + std::string(format) + " image: " + text);
}

Image ApplyOrientation(Image image, int orientation) {
  if (orientation < 2 || orientation > 8) return image;
  const int64_t in_width = image.width, in_height = image.height;
  const bool swapped = orientation >= 5;  // rows become columns
  Image out{.width = static_cast<int32_t>(swapped ? in_height : in_width),
            .height = static_cast<int32_t>(swapped ? in_width : in_height),
            .rgb = std::vector<uint8_t>(image.rgb.size())};
  // Where the first output pixel comes from, and how far one step right or down moves in the input (in pixels).
  const int64_t last_x = in_width - 1, last_row = (in_height - 1) * in_width;
  struct Walk {
    int64_t origin, right, down;
  };
  const Walk walks[] = {
      {last_x, -1, in_width},              // 2: mirrored left-right
      {last_row + last_x, -1, -in_width},  // 3: by 180 degrees
      {last_row, 1, -in_width},            // 4: mirrored top-bottom
      {0, in_width, 1},                    // 5: transposed
      {last_row, -in_width, 1},            // 6: by 90 degrees clockwise
      {last_row + last_x, -in_width, -1},  // 7: transversed
      {last_x, in_width, -1},              // 8: by 90 degrees counter-clockwise
  };
  const Walk& walk = walks[orientation - 2];
  uint8_t* to = out.rgb.data();
  for (int64_t y = 0; y < out.height; ++y) {
    const uint8_t* from = image.rgb.data() + (walk.origin + y * walk.down) * 3;
    for (int64_t x = 0; x < out.width; ++x, to += 3) {
      const uint8_t* pixel = from + x * walk.right * 3;
      to[0] = pixel[0];
      to[1] = pixel[1];
      to[2] = pixel[2];
    }
  }
  return out;
}

Result<Image> DecodeImage(std::span<const std::byte> bytes, const DecodeLimits& limits) {
  if (static_cast<int64_t>(bytes.size()) > limits.max_bytes) {
    return InvalidArgumentError("an image file of " + std::to_string(bytes.size()) + " bytes is over the limit of " +
                                std::to_string(limits.max_bytes));
  }
  ASSIGN_OR_RETURN(codecs::Decoded decoded, DecodeAny(bytes, limits));
  return ApplyOrientation(std::move(decoded.image), decoded.orientation);
}

}  // namespace qwen::preprocess
