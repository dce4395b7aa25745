// PNG through libpng. libpng reports errors by longjmp, so every function that calls it between setjmp and return holds
// only trivial objects. Pixels as PIL's convert("RGB"): alpha and tRNS dropped, gray and palettes expanded, of 16-bit
// samples the high byte; only 16-bit gray is different: PIL reads it as "I;16" and clips (256 and more become 255).
#include <png.h>

#include <algorithm>
#include <csetjmp>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "stage/vision/preprocess/codecs.h"
#include "stage/vision/preprocess/orientation.h"

namespace qwen::preprocess::codecs {
namespace {

class PngFile {
 public:
  explicit PngFile(std::span<const std::byte> bytes) : rest_(bytes) {}
  PngFile(const PngFile&) = delete;
  PngFile& operator=(const PngFile&) = delete;
  ~PngFile() { png_destroy_read_struct(&png_, &info_, &end_info_); }

  // Up to the first IDAT, and the transformations. False: message() says why.
  bool ReadHeader() {
    png_ = png_create_read_struct(PNG_LIBPNG_VER_STRING, this, OnError, [](png_structp, png_const_charp) {});
    if (png_ == nullptr) return false;
    if (setjmp(png_jmpbuf(png_)) != 0) return false;
    info_ = png_create_info_struct(png_);
    end_info_ = png_create_info_struct(png_);
    if (info_ == nullptr || end_info_ == nullptr) return false;
    png_set_chunk_malloc_max(png_, 8 << 20);  // a chunk of text or profile, unpacked
    png_set_chunk_cache_max(png_, 128);       // chunks of text kept
    png_set_read_fn(png_, this, OnRead);
    png_read_info(png_, info_);
    const int type = png_get_color_type(png_, info_);
    deep_gray_ = type == PNG_COLOR_TYPE_GRAY && png_get_bit_depth(png_, info_) == 16;
    if (!deep_gray_) {
      png_set_strip_16(png_);
      if (type == PNG_COLOR_TYPE_PALETTE) png_set_palette_to_rgb(png_);
      if (type == PNG_COLOR_TYPE_GRAY) png_set_expand_gray_1_2_4_to_8(png_);
      if ((type & PNG_COLOR_MASK_COLOR) == 0) png_set_gray_to_rgb(png_);
      png_set_strip_alpha(png_);
    }
    png_set_interlace_handling(png_);
    png_read_update_info(png_, info_);
    return true;
  }
  bool ReadPixels(png_bytepp rows) {
    if (setjmp(png_jmpbuf(png_)) != 0) return false;
    png_read_image(png_, rows);
    return true;
  }
  // What stands behind the picture. Its errors do not spoil the picture (PIL stops reading there as well).
  void ReadEnd() {
    if (setjmp(png_jmpbuf(png_)) != 0) return;
    png_read_end(png_, end_info_);
  }

  size_t row_bytes() const { return png_get_rowbytes(png_, info_); }
  bool deep_gray() const { return deep_gray_; }
  const char* message() const { return message_; }
  int orientation() {
    std::string exif, xmp;
    for (png_infop info : {info_, end_info_}) {
      png_uint_32 length = 0;
      png_bytep data = nullptr;
      if (png_get_eXIf_1(png_, info, &length, &data) != 0) exif.assign(reinterpret_cast<const char*>(data), length);
    }
    for (png_infop info : {info_, end_info_}) {
      png_textp texts = nullptr;
      const int count = png_get_text(png_, info, &texts, nullptr);
      for (int i = 0; i < count; ++i) {
        const std::string_view key(texts[i].key);
        const std::string_view text(texts[i].text, std::max(texts[i].text_length, texts[i].itxt_length));
        if (key == "XML:com.adobe.xmp") xmp = text;
        if (key == "Raw profile type exif" && exif.empty()) exif = FromHexProfile(text);
      }
    }
    return Orientation(exif, xmp);
  }

 private:
  [[noreturn]] static void OnError(png_structp png, png_const_charp message) {
    PngFile* self = static_cast<PngFile*>(png_get_error_ptr(png));
    std::strncpy(self->message_, message, sizeof(self->message_) - 1);
    png_longjmp(png, 1);
  }
  static void OnRead(png_structp png, png_bytep out, size_t count) {
    PngFile* self = static_cast<PngFile*>(png_get_io_ptr(png));
    if (self->rest_.size() < count) png_error(png, "the file is cut short");
    std::memcpy(out, self->rest_.data(), count);
    self->rest_ = self->rest_.subspan(count);
  }
  // ImageMagick's form: "\nexif\n   <length>\n" and then hexadecimal lines.
  static std::string FromHexProfile(std::string_view text) {
    for (int line = 0; line < 3; ++line) {
      const size_t end = text.find('\n');
      if (end == text.npos) return {};
      text.remove_prefix(end + 1);
    }
    std::string bytes;
    int high = -1;
    for (const char c : text) {
      const size_t digit = std::string_view("0123456789abcdef").find(c >= 'A' && c <= 'F' ? c - 'A' + 'a' : c);
      if (digit == std::string_view::npos) continue;
      if (high >= 0) bytes += static_cast<char>(high << 4 | static_cast<int>(digit));
      high = high >= 0 ? -1 : static_cast<int>(digit);
    }
    return bytes;
  }

  std::span<const std::byte> rest_;
  png_structp png_ = nullptr;
  png_infop info_ = nullptr, end_info_ = nullptr;
  bool deep_gray_ = false;
  char message_[128] = {};
};

// The size in IHDR, which must be the first chunk. Zero when it is not.
struct HeaderSize {
  int64_t width = 0, height = 0;
};
HeaderSize PeekSize(std::span<const std::byte> bytes) {
  if (bytes.size() < 24 || std::memcmp(bytes.data() + 12, "IHDR", 4) != 0) return {};
  const auto big_endian = [&bytes](size_t at) {
    int64_t value = 0;
    for (size_t i = at; i < at + 4; ++i) value = value << 8 | std::to_integer<int64_t>(bytes[i]);
    return value;
  };
  return {big_endian(16), big_endian(20)};
}

}  // namespace

Result<Decoded> DecodePng(std::span<const std::byte> bytes, const DecodeLimits& limits) {
  const auto [width, height] = PeekSize(bytes);
  if (width == 0 && height == 0) return BrokenFile("PNG", "the header is missing");
  RETURN_IF_ERROR(CheckSize(width, height, limits));
  PngFile file(bytes);
  if (!file.ReadHeader()) return BrokenFile("PNG", file.message());
  const size_t row_bytes = file.row_bytes();
  QP_CHECK_EQ(row_bytes, static_cast<size_t>(width * (file.deep_gray() ? 2 : 3)));
  std::vector<uint8_t> samples(row_bytes * height);
  std::vector<png_bytep> rows(height);
  for (int64_t y = 0; y < height; ++y) rows[y] = samples.data() + row_bytes * y;
  if (!file.ReadPixels(rows.data())) return BrokenFile("PNG", file.message());
  file.ReadEnd();
  Decoded decoded{.image = {.width = static_cast<int32_t>(width), .height = static_cast<int32_t>(height), .rgb = {}},
                  .orientation = file.orientation()};
  if (!file.deep_gray()) {
    decoded.image.rgb = std::move(samples);
    return decoded;
  }
  decoded.image.rgb.resize(static_cast<size_t>(width * height * 3));
  for (int64_t i = 0; i < width * height; ++i) {
    const uint8_t gray = samples[2 * i] != 0 ? 255 : samples[2 * i + 1];
    std::fill_n(&decoded.image.rgb[3 * i], 3, gray);
  }
  return decoded;
}

}  // namespace qwen::preprocess::codecs
