// stage/vision/preprocess/orientation.h — the EXIF orientation of a picture, from the metadata blocks that its container
// holds, found as PIL's Image.getexif finds it. Thread safety: pure functions; input is hostile, every read is bounded.
#pragma once
#include <optional>
#include <string_view>

namespace qwen::preprocess {

// Tag 0x0112 of IFD 0 in a TIFF block (with or without "Exif\0\0" in front). Empty when the block does not parse or has
// no such tag with one integer value.
std::optional<int> OrientationFromExif(std::string_view exif);

// `tiff:Orientation="6"` or `<tiff:Orientation>6` in an XMP packet; PIL looks here only when EXIF has no orientation.
std::optional<int> OrientationFromXmp(std::string_view xmp);

// 1 (upright) when neither says.
inline int Orientation(std::string_view exif, std::string_view xmp) {
  if (const auto found = OrientationFromExif(exif)) return *found;
  return OrientationFromXmp(xmp).value_or(1);
}

}  // namespace qwen::preprocess
