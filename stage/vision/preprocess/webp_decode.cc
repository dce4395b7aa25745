// WebP through libwebp's animation decoder, as PIL: a still picture is its one frame; of an animation the first frame
// counts, on a transparent black canvas; alpha is dropped afterwards.
#include <webp/decode.h>
#include <webp/demux.h>

#include <memory>
#include <string_view>

#include "stage/vision/preprocess/codecs.h"
#include "stage/vision/preprocess/orientation.h"

namespace qwen::preprocess::codecs {
namespace {

std::string_view Chunk(const WebPDemuxer* demuxer, const char fourcc[4]) {
  WebPChunkIterator it;
  std::string_view data;
  if (WebPDemuxGetChunk(demuxer, fourcc, 1, &it)) {
    data = std::string_view(reinterpret_cast<const char*>(it.chunk.bytes), it.chunk.size);  // points into the file
    WebPDemuxReleaseChunkIterator(&it);
  }
  return data;
}

}  // namespace

Result<Decoded> DecodeWebp(std::span<const std::byte> bytes, const DecodeLimits& limits) {
  const WebPData data = {reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()};
  WebPBitstreamFeatures features;
  if (WebPGetFeatures(data.bytes, data.size, &features) != VP8_STATUS_OK) return BrokenFile("WebP", "bad header");
  RETURN_IF_ERROR(CheckSize(features.width, features.height, limits));
  // The demuxer only indexes the file; it tells the canvas that the decoder is going to allocate.
  const std::unique_ptr<WebPDemuxer, void (*)(WebPDemuxer*)> demuxer(WebPDemux(&data), WebPDemuxDelete);
  if (demuxer == nullptr) return BrokenFile("WebP", "bad or incomplete chunks");
  const int64_t width = WebPDemuxGetI(demuxer.get(), WEBP_FF_CANVAS_WIDTH);
  const int64_t height = WebPDemuxGetI(demuxer.get(), WEBP_FF_CANVAS_HEIGHT);
  RETURN_IF_ERROR(CheckSize(width, height, limits));

  WebPAnimDecoderOptions options;
  if (!WebPAnimDecoderOptionsInit(&options)) return InternalError("libwebp has another version than its header");
  options.color_mode = MODE_RGBA;
  const std::unique_ptr<WebPAnimDecoder, void (*)(WebPAnimDecoder*)> decoder(WebPAnimDecoderNew(&data, &options),
                                                                             WebPAnimDecoderDelete);
  uint8_t* rgba = nullptr;
  int timestamp = 0;
  if (decoder == nullptr || !WebPAnimDecoderGetNext(decoder.get(), &rgba, &timestamp)) {
    return BrokenFile("WebP", "the picture does not decode");
  }
  Decoded decoded{.image = {.width = static_cast<int32_t>(width), .height = static_cast<int32_t>(height), .rgb = {}},
                  .orientation = Orientation(Chunk(demuxer.get(), "EXIF"), Chunk(demuxer.get(), "XMP "))};
  decoded.image.rgb.resize(static_cast<size_t>(width * height * 3));
  for (int64_t i = 0; i < width * height; ++i) {
    for (int c = 0; c < 3; ++c) decoded.image.rgb[3 * i + c] = rgba[4 * i + c];
  }
  return decoded;
}

}  // namespace qwen::preprocess::codecs
