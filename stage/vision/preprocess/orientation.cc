#include "stage/vision/preprocess/orientation.h"

#include <cstdint>

namespace qwen::preprocess {
namespace {

// Integers of either byte order at an offset of a TIFF block; empty past its end.
class TiffView {
 public:
  static std::optional<TiffView> Open(std::string_view bytes) {
    const std::string_view magic = bytes.substr(0, 4);
    if (magic == std::string_view("II*\0", 4)) return TiffView(bytes, false);
    if (magic == std::string_view("MM\0*", 4)) return TiffView(bytes, true);
    return std::nullopt;
  }
  std::optional<uint32_t> Read(uint64_t offset, int size) const {
    if (offset > bytes_.size() || bytes_.size() - offset < static_cast<uint64_t>(size)) return std::nullopt;
    uint32_t value = 0;
    for (int i = 0; i < size; ++i) {
      const uint8_t byte = static_cast<uint8_t>(bytes_[offset + i]);
      value |= static_cast<uint32_t>(byte) << 8 * (big_endian_ ? size - 1 - i : i);
    }
    return value;
  }

 private:
  TiffView(std::string_view bytes, bool big_endian) : bytes_(bytes), big_endian_(big_endian) {}
  std::string_view bytes_;
  bool big_endian_;
};

// Bytes of the integer types that a TIFF field can have; 0 for every other type.
int IntegerSize(uint32_t type) {
  switch (type) {
    case 1: return 1;  // BYTE
    case 3: return 2;  // SHORT
    case 4: return 4;  // LONG
    default: return 0;
  }
}

constexpr std::string_view kExifPrefix("Exif\0\0", 6);
constexpr uint32_t kOrientationTag = 0x0112;

}  // namespace

std::optional<int> OrientationFromExif(std::string_view exif) {
  for (int i = 0; i < 2 && exif.starts_with(kExifPrefix); ++i) exif.remove_prefix(kExifPrefix.size());
  const auto tiff = TiffView::Open(exif);
  if (!tiff) return std::nullopt;
  const auto ifd = tiff->Read(4, 4);
  if (!ifd) return std::nullopt;
  const auto count = tiff->Read(*ifd, 2);
  if (!count) return std::nullopt;
  std::optional<int> orientation;
  for (uint32_t i = 0; i < *count; ++i) {
    const uint64_t entry = uint64_t{*ifd} + 2 + uint64_t{12} * i;
    const auto tag = tiff->Read(entry, 2), type = tiff->Read(entry + 2, 2), values = tiff->Read(entry + 4, 4);
    if (!values) break;
    const int size = IntegerSize(*type);
    if (*tag != kOrientationTag || *values != 1 || size == 0) continue;
    const auto value = tiff->Read(entry + 8, size);
    if (!value || *value > 255) break;
    orientation = static_cast<int>(*value);  // the last one wins, as in PIL's dictionary
  }
  return orientation;
}

std::optional<int> OrientationFromXmp(std::string_view xmp) {
  constexpr std::string_view kName = "tiff:Orientation";
  for (size_t at = xmp.find(kName); at != xmp.npos; at = xmp.find(kName, at + 1)) {
    std::string_view rest = xmp.substr(at + kName.size());
    if (rest.starts_with("=\"")) {
      rest.remove_prefix(2);
    } else if (rest.starts_with(">")) {
      rest.remove_prefix(1);
    } else {
      continue;
    }
    if (!rest.empty() && rest[0] >= '0' && rest[0] <= '9') return rest[0] - '0';
  }
  return std::nullopt;
}

}  // namespace qwen::preprocess
