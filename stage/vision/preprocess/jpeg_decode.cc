// JPEG through libjpeg-turbo, with its defaults: islow DCT, fancy upsampling, block smoothing, as PIL uses it. libjpeg
// reports errors by longjmp, so every function that calls it between setjmp and return holds only trivial objects.
#include <csetjmp>
#include <cstddef>
#include <cstdio>  // jpeglib.h needs size_t and FILE
#include <jpeglib.h>
#include <jerror.h>

#include <string>
#include <string_view>
#include <vector>

#include "stage/vision/preprocess/codecs.h"
#include "stage/vision/preprocess/orientation.h"

namespace qwen::preprocess::codecs {
namespace {

class JpegFile {
 public:
  JpegFile(std::span<const std::byte> bytes, int max_scans) : max_scans_(max_scans) {
    cinfo_.err = jpeg_std_error(&errors_);
    errors_.error_exit = [](j_common_ptr cinfo) {
      JpegFile* self = static_cast<JpegFile*>(cinfo->client_data);
      cinfo->err->format_message(cinfo, self->message_);
      std::longjmp(self->jump_, 1);
    };
    errors_.emit_message = [](j_common_ptr cinfo, int) {
      JpegFile* self = static_cast<JpegFile*>(cinfo->client_data);
      if (cinfo->err->msg_code == JWRN_JPEG_EOF) self->cut_short_ = true;
    };
    progress_.progress_monitor = [](j_common_ptr cinfo) {
      JpegFile* self = static_cast<JpegFile*>(cinfo->client_data);
      if (self->cinfo_.input_scan_number <= self->max_scans_) return;
      std::snprintf(self->message_, sizeof(self->message_), "more than %d scans", self->max_scans_);
      std::longjmp(self->jump_, 1);
    };
    cinfo_.client_data = this;
    bytes_ = bytes;
  }
  JpegFile(const JpegFile&) = delete;
  JpegFile& operator=(const JpegFile&) = delete;
  ~JpegFile() {
    if (created_) jpeg_destroy_decompress(&cinfo_);
  }

  // Up to the first scan. False: message() says why.
  bool ReadHeader() {
    if (setjmp(jump_) != 0) return false;
    void* const self = cinfo_.client_data;  // jpeg_create_decompress clears all but err and client_data
    jpeg_create_decompress(&cinfo_);
    cinfo_.client_data = self;
    created_ = true;
    cinfo_.progress = &progress_;
    jpeg_mem_src(&cinfo_, reinterpret_cast<const unsigned char*>(bytes_.data()), bytes_.size());
    jpeg_save_markers(&cinfo_, JPEG_APP0 + 1, 0xFFFF);  // EXIF and XMP
    jpeg_read_header(&cinfo_, TRUE);
    return true;
  }
  // All rows into `pixels`: (height, width, components()).
  bool ReadPixels(uint8_t* pixels) {
    if (setjmp(jump_) != 0) return false;
    cinfo_.out_color_space = components() == 1 ? JCS_GRAYSCALE : components() == 3 ? JCS_RGB : JCS_CMYK;
    jpeg_start_decompress(&cinfo_);
    const size_t row_bytes = size_t{cinfo_.output_width} * cinfo_.output_components;
    while (cinfo_.output_scanline < cinfo_.output_height) {
      JSAMPROW row = pixels + row_bytes * cinfo_.output_scanline;
      jpeg_read_scanlines(&cinfo_, &row, 1);
    }
    if (!cut_short_) return true;
    std::snprintf(message_, sizeof(message_), "the file is cut short");  // libjpeg would leave the rest gray
    return false;
  }

  int width() const { return static_cast<int>(cinfo_.image_width); }
  int height() const { return static_cast<int>(cinfo_.image_height); }
  int components() const { return cinfo_.num_components; }
  const char* message() const { return message_; }
  int orientation() const {
    constexpr std::string_view kExif("Exif\0\0", 6), kXmp("http://ns.adobe.com/xap/1.0/\0", 29);
    std::string exif;
    std::string_view xmp;
    for (auto* marker = cinfo_.marker_list; marker != nullptr; marker = marker->next) {
      std::string_view data(reinterpret_cast<const char*>(marker->data), marker->data_length);
      if (data.starts_with(kExif)) {
        exif += data.substr(exif.empty() ? 0 : kExif.size());  // a long block goes on in the next marker
      } else if (data.starts_with(kXmp)) {
        xmp = data.substr(kXmp.size());
      }
    }
    return Orientation(exif, xmp);
  }

 private:
  jpeg_decompress_struct cinfo_ = {};
  jpeg_error_mgr errors_ = {};
  jpeg_progress_mgr progress_ = {};
  std::jmp_buf jump_;
  std::span<const std::byte> bytes_;
  const int max_scans_;
  bool created_ = false;
  bool cut_short_ = false;
  char message_[JMSG_LENGTH_MAX] = {};
};

// PIL's MULDIV255: a * b / 255, rounded.
int MulDiv255(int a, int b) {
  const int product = a * b + 128;
  return ((product >> 8) + product) >> 8;
}

// PIL reads every 4-component JPEG as inverted CMYK (Adobe's way) and converts with cmyk2rgb of libImaging/Convert.c.
void CmykToRgb(const uint8_t* cmyk, int64_t pixels, uint8_t* rgb) {
  for (int64_t i = 0; i < pixels; ++i, cmyk += 4) {
    const int white = cmyk[3];  // 255 - k, where the file holds 255 - k
    for (int c = 0; c < 3; ++c) *rgb++ = static_cast<uint8_t>(white - MulDiv255(255 - cmyk[c], white));
  }
}

}  // namespace

Result<Decoded> DecodeJpeg(std::span<const std::byte> bytes, const DecodeLimits& limits) {
  JpegFile file(bytes, limits.max_jpeg_scans);
  if (!file.ReadHeader()) return BrokenFile("JPEG", file.message());
  RETURN_IF_ERROR(CheckSize(file.width(), file.height(), limits));
  const int components = file.components();
  if (components != 1 && components != 3 && components != 4) {
    return InvalidArgumentError("a JPEG image with " + std::to_string(components) + " components is not supported");
  }
  const int64_t pixels = int64_t{file.width()} * file.height();
  std::vector<uint8_t> samples(static_cast<size_t>(pixels * components));
  if (!file.ReadPixels(samples.data())) return BrokenFile("JPEG", file.message());
  Decoded decoded{.image = {.width = file.width(), .height = file.height(), .rgb = {}}, .orientation = file.orientation()};
  if (components == 3) {
    decoded.image.rgb = std::move(samples);
    return decoded;
  }
  decoded.image.rgb.resize(static_cast<size_t>(pixels * 3));
  if (components == 4) {
    CmykToRgb(samples.data(), pixels, decoded.image.rgb.data());
  } else {
    for (int64_t i = 0; i < pixels * 3; ++i) decoded.image.rgb[i] = samples[i / 3];
  }
  return decoded;
}

}  // namespace qwen::preprocess::codecs
