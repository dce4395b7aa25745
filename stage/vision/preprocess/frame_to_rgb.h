// stage/vision/preprocess/frame_to_rgb.h — one decoded frame -> RGB, as PyAV's VideoFrame.to_ndarray(format="rgb24") does it
// with the swscale of FFmpeg 8: bilinear, and the matrix, range and chroma position that the frame declares (ITU-R 601,
// limited and centred when it does not).
//
// Bit-equal in tests/parity for 8 and 10 bits, 4:2:0, 4:2:2, 4:4:4 and gray; for 4:2:0 with both sides odd fewer than 1 %
// of the samples differ, by 1. The swscale that we link (FFmpeg 5.1) has a fast path for 8-bit 4:2:0 of even height that
// is the same code in both versions. In all other 4:2:0 cases it averages two chroma rows where FFmpeg 8 interpolates;
// those go through planar 4:2:2 (4:4:4 for an odd width) first, whose vertical filter is exact.
// Thread safety: none; one converter per decoder. REQUIRES: a frame in system memory.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "stage/base/status.h"
#include "stage/vision/preprocess/image_decode.h"

struct AVFrame;
struct SwsContext;

namespace qwen::preprocess {

class FrameToRgb {
 public:
  FrameToRgb();
  ~FrameToRgb();
  // kInvalidArgument when the pixel format has no way to RGB.
  Result<Image> Convert(const AVFrame& frame);

 private:
  struct FreeScaler {
    void operator()(SwsContext* scaler) const;
  };
  struct FreeFrame {
    void operator()(AVFrame* frame) const;
  };
  using Scaler = std::unique_ptr<SwsContext, FreeScaler>;

  Status MakeScalers(const AVFrame& frame);

  std::unique_ptr<AVFrame, FreeFrame> like_;     // properties of the frames that the scalers are made for
  Scaler to_planar_, to_rgb_;                    // to_planar_ is null where one step does
  std::unique_ptr<AVFrame, FreeFrame> planar_;   // between the two
  std::vector<uint8_t> padded_;                  // RGB rows with room for whole SIMD vectors
};

}  // namespace qwen::preprocess
