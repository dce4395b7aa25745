#include "stage/vision/preprocess/frame_to_rgb.h"

extern "C" {
#include <libavutil/frame.h>
#include <libavutil/opt.h>
#include <libavutil/pixdesc.h>
#include <libswscale/swscale.h>
}

#include <algorithm>

namespace qwen::preprocess {
namespace {

// One conversion between formats at the same size. Chroma positions in 1/256 of the distance between luma samples.
struct Step {
  AVPixelFormat from = AV_PIX_FMT_NONE, to = AV_PIX_FMT_NONE;
  int flags = SWS_BILINEAR;
  int from_chroma_x = kDefault, from_chroma_y = kDefault, to_chroma_x = kDefault;
  bool to_full_range = true;
  static constexpr int kDefault = -513;  // swscale's "not given": centred
};

int ChromaX(AVChromaLocation location) {
  const bool is_left = location == AVCHROMA_LOC_LEFT || location == AVCHROMA_LOC_TOPLEFT ||
                       location == AVCHROMA_LOC_BOTTOMLEFT;
  return is_left ? 0 : 128;
}
int ChromaY(AVChromaLocation location) {
  if (location == AVCHROMA_LOC_TOPLEFT || location == AVCHROMA_LOC_TOP) return 0;
  return location == AVCHROMA_LOC_BOTTOMLEFT || location == AVCHROMA_LOC_BOTTOM ? 256 : 128;
}

// The "J" formats are the plain ones with full range.
AVPixelFormat WithoutRange(AVPixelFormat format) {
  switch (format) {
    case AV_PIX_FMT_YUVJ420P: return AV_PIX_FMT_YUV420P;
    case AV_PIX_FMT_YUVJ422P: return AV_PIX_FMT_YUV422P;
    case AV_PIX_FMT_YUVJ440P: return AV_PIX_FMT_YUV440P;
    case AV_PIX_FMT_YUVJ444P: return AV_PIX_FMT_YUV444P;
    default: return format;
  }
}

bool IsFullRange(const AVFrame& frame) {
  return frame.color_range == AVCOL_RANGE_JPEG ||
         WithoutRange(static_cast<AVPixelFormat>(frame.format)) != frame.format;
}

// The planar format whose chroma has full height and no fewer bits: 4:2:2, or 4:4:4 where half columns would be cut off.
// 16 bits keep the interpolated chroma whole, so that it is rounded once, by the second step; 8-bit 4:2:2 goes to RGB
// through tables over 8-bit values, and there the first step rounds.
AVPixelFormat TallChroma(const AVPixFmtDescriptor& from, int width) {
  if (from.log2_chroma_w != 1 || width % 2 != 0) return AV_PIX_FMT_YUV444P16;
  return from.comp[0].depth <= 8 ? AV_PIX_FMT_YUV422P : AV_PIX_FMT_YUV422P16;
}

SwsContext* MakeScaler(const Step& step, const AVFrame& frame) {
  SwsContext* scaler = sws_alloc_context();
  QP_CHECK(scaler != nullptr) << "out of memory";
  const std::pair<const char*, int64_t> options[] = {
      {"srcw", frame.width},       {"srch", frame.height},      {"src_format", step.from},
      {"dstw", frame.width},       {"dsth", frame.height},      {"dst_format", step.to},
      {"sws_flags", step.flags},   {"src_h_chr_pos", step.from_chroma_x},
      {"src_v_chr_pos", step.from_chroma_y}, {"dst_h_chr_pos", step.to_chroma_x}};
  for (const auto& [name, value] : options) av_opt_set_int(scaler, name, value, 0);
  if (sws_init_context(scaler, nullptr, nullptr) < 0) {
    sws_freeContext(scaler);
    return nullptr;
  }
  // sws_getCoefficients takes AVColorSpace numbers and gives 601 for those that it does not know.
  const int* matrix = sws_getCoefficients(frame.colorspace);
  sws_setColorspaceDetails(scaler, matrix, IsFullRange(frame), matrix, step.to_full_range, 0, 1 << 16, 1 << 16);
  return scaler;
}

}  // namespace

FrameToRgb::FrameToRgb() = default;
FrameToRgb::~FrameToRgb() = default;
void FrameToRgb::FreeScaler::operator()(SwsContext* scaler) const { sws_freeContext(scaler); }
void FrameToRgb::FreeFrame::operator()(AVFrame* frame) const { av_frame_free(&frame); }

Status FrameToRgb::MakeScalers(const AVFrame& frame) {
  to_planar_.reset();
  to_rgb_.reset();
  planar_.reset();
  const AVPixelFormat format = WithoutRange(static_cast<AVPixelFormat>(frame.format));
  const AVPixFmtDescriptor* descriptor = av_pix_fmt_desc_get(format);
  if (descriptor == nullptr) return InvalidArgumentError("the video has no pixel format");
  const bool has_fast_path = format == AV_PIX_FMT_YUV420P && frame.height % 2 == 0;
  Step step{.from = format, .to = AV_PIX_FMT_RGB24};
  if (descriptor->log2_chroma_w > 0) step.from_chroma_x = ChromaX(frame.chroma_location);
  if (descriptor->log2_chroma_h > 0) step.from_chroma_y = ChromaY(frame.chroma_location);
  if (descriptor->log2_chroma_h > 0 && descriptor->comp[0].depth >= 8 && !has_fast_path) {
    step.to = TallChroma(*descriptor, frame.width);
    step.flags |= SWS_ACCURATE_RND;  // else the SIMD vertical filter rounds in its own way
    step.to_full_range = IsFullRange(frame);
    if (step.to == AV_PIX_FMT_YUV422P || step.to == AV_PIX_FMT_YUV422P16) {
      step.to_chroma_x = 128;  // where the second step wants it: both filters then run before the one rounding
    }
    planar_.reset(av_frame_alloc());
    QP_CHECK(planar_ != nullptr) << "out of memory";
    planar_->width = frame.width;
    planar_->height = frame.height;
    planar_->format = step.to;
    to_planar_.reset(MakeScaler(step, frame));
    if (to_planar_ == nullptr || av_frame_get_buffer(planar_.get(), 0) < 0) {
      return InvalidArgumentError("the video's pixel format cannot be turned into RGB");
    }
    step = {.from = step.to, .to = AV_PIX_FMT_RGB24, .flags = SWS_BILINEAR | SWS_ACCURATE_RND};
  }
  to_rgb_.reset(MakeScaler(step, frame));
  if (to_rgb_ == nullptr) return InvalidArgumentError("the video's pixel format cannot be turned into RGB");
  like_.reset(av_frame_alloc());
  QP_CHECK(like_ != nullptr) << "out of memory";
  like_->width = frame.width;
  like_->height = frame.height;
  like_->format = frame.format;
  like_->colorspace = frame.colorspace;
  like_->color_range = frame.color_range;
  like_->chroma_location = frame.chroma_location;
  return OkStatus();
}

Result<Image> FrameToRgb::Convert(const AVFrame& frame) {
  const bool is_alike = like_ != nullptr && like_->width == frame.width && like_->height == frame.height &&
                        like_->format == frame.format && like_->colorspace == frame.colorspace &&
                        like_->color_range == frame.color_range && like_->chroma_location == frame.chroma_location;
  if (!is_alike) {
    like_.reset();
    RETURN_IF_ERROR(MakeScalers(frame));
  }
  const AVFrame* source = &frame;
  if (to_planar_ != nullptr) {
    sws_scale(to_planar_.get(), frame.data, frame.linesize, 0, frame.height, planar_->data, planar_->linesize);
    source = planar_.get();
  }
  const int stride = (frame.width * 3 + 127) / 64 * 64;
  padded_.resize(static_cast<size_t>(stride) * frame.height + 64);
  uint8_t* const planes[4] = {padded_.data()};
  const int strides[4] = {stride};
  const int rows = sws_scale(to_rgb_.get(), source->data, source->linesize, 0, frame.height, planes, strides);
  if (rows != frame.height) return InvalidArgumentError("the video's frames cannot be turned into RGB");
  Image image{.width = frame.width, .height = frame.height, .rgb = {}};
  const size_t row_bytes = size_t{3} * frame.width;
  image.rgb.resize(row_bytes * frame.height);
  for (int y = 0; y < frame.height; ++y) {
    std::copy_n(padded_.data() + static_cast<size_t>(stride) * y, row_bytes, image.rgb.data() + row_bytes * y);
  }
  return image;
}

}  // namespace qwen::preprocess
