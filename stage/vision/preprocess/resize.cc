#include "stage/vision/preprocess/resize.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

namespace qwen::preprocess {
namespace {

constexpr double kMaxAspect = 200.0;  // smart_resize in both reference files

// Python's round(): nearest integer, ties to even, which is the default floating-point rounding mode.
int64_t RoundHalfEven(double value) { return static_cast<int64_t>(std::nearbyint(value)); }

Status CheckAspect(int64_t height, int64_t width) {
  const double aspect = static_cast<double>(std::max(height, width)) / static_cast<double>(std::min(height, width));
  if (aspect <= kMaxAspect) return OkStatus();
  return InvalidArgumentError("absolute aspect ratio must be smaller than 200, got " + std::to_string(height) + "x" +
                              std::to_string(width) + " (height x width)");
}

// Both variants differ only in how many frames weigh on the two sides of the comparison.
struct Weights {
  int64_t compared_frames;  // multiplies the rounded sides in the comparison with the budget
  int64_t scaled_frames;    // multiplies the unrounded sides under the square root
};

Size FitBudget(int64_t height, int64_t width, int32_t factor, const PixelBudget& budget, const Weights& weights) {
  int64_t h = RoundHalfEven(static_cast<double>(height) / factor) * factor;
  int64_t w = RoundHalfEven(static_cast<double>(width) / factor) * factor;
  const double pixels = static_cast<double>(weights.scaled_frames * height * width);
  if (weights.compared_frames * h * w > budget.max_pixels) {
    const double beta = std::sqrt(pixels / static_cast<double>(budget.max_pixels));
    h = std::max<int64_t>(factor, static_cast<int64_t>(std::floor(height / beta / factor)) * factor);
    w = std::max<int64_t>(factor, static_cast<int64_t>(std::floor(width / beta / factor)) * factor);
  } else if (weights.compared_frames * h * w < budget.min_pixels) {
    const double beta = std::sqrt(static_cast<double>(budget.min_pixels) / pixels);
    h = static_cast<int64_t>(std::ceil(height * beta / factor)) * factor;
    w = static_cast<int64_t>(std::ceil(width * beta / factor)) * factor;
  }
  return {static_cast<int32_t>(h), static_cast<int32_t>(w)};
}

Status CheckPositive(Size size) {
  if (size.height > 0 && size.width > 0) return OkStatus();
  return InvalidArgumentError("a picture needs at least one pixel");
}

// --- the filter -----------------------------------------------------------------------------------------------------

// Which input pixels make one output pixel, and with what int16 weights (scaled by 1 << Taps::precision).
struct Span {
  int32_t begin = 0, count = 0;
};
struct Taps {
  std::vector<Span> spans;       // one per output pixel
  std::vector<int16_t> weights;  // (output pixels, stride)
  int32_t stride = 0;
  int precision = 0;
};

double Cubic(double x) {  // the convolution kernel of Keys with a = -0.5, as PIL
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
  if (x < 2.0) return ((a * x - 5.0 * a) * x + 8.0 * a) * x - 4.0 * a;
  return 0.0;
}

// ATen's _compute_index_ranges_int16_weights with antialias (aten/src/ATen/native/cpu/UpSampleKernel.cpp), after PIL's
// precompute_coeffs and normalize_coeffs_8bpc. All in double.
Taps ComputeTaps(int32_t input, int32_t output) {
  const double scale = static_cast<double>(input) / output;
  const double support = scale >= 1.0 ? 2.0 * scale : 2.0;  // the cubic reaches 2 pixels, widened when shrinking
  const double inverse = scale >= 1.0 ? 1.0 / scale : 1.0;
  Taps taps;
  taps.stride = static_cast<int32_t>(std::ceil(support)) * 2 + 1;
  taps.spans.resize(output);
  std::vector<double> weights(static_cast<size_t>(output) * taps.stride, 0.0);
  double largest = 0.0;
  for (int32_t i = 0; i < output; ++i) {
    const double center = scale * (i + 0.5);
    const int64_t begin = std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
    int64_t count = std::min<int64_t>(static_cast<int64_t>(center + support + 0.5), input) - begin;
    count = std::clamp<int64_t>(count, 0, taps.stride);
    double* row = &weights[static_cast<size_t>(i) * taps.stride];
    double total = 0.0;
    for (int64_t j = 0; j < count; ++j) {
      row[j] = Cubic((static_cast<double>(j + begin) - center + 0.5) * inverse);
      total += row[j];
    }
    for (int64_t j = 0; j < count && total != 0.0; ++j) {
      row[j] /= total;
      largest = std::max(largest, row[j]);
    }
    taps.spans[i] = {static_cast<int32_t>(begin), static_cast<int32_t>(count)};
  }
  // The largest precision at which every weight still fits an int16. 22 is PIL's 32 - 8 - 2.
  for (taps.precision = 0; taps.precision < 22; ++taps.precision) {
    if (static_cast<int>(0.5 + largest * (1 << (taps.precision + 1))) >= (1 << 15)) break;
  }
  taps.weights.resize(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const double scaled = weights[i] * (1 << taps.precision);
    taps.weights[i] = static_cast<int16_t>(static_cast<int>(scaled < 0 ? scaled - 0.5 : scaled + 0.5));
  }
  return taps;
}

inline uint8_t Clamp8(int32_t sum, int precision) {
  return static_cast<uint8_t>(std::clamp(sum >> precision, 0, 255));  // arithmetic shift: floor
}

// (rows, input width, 3) -> (rows, output width, 3)
void PassHorizontal(const uint8_t* in, int64_t rows, int32_t in_width, const Taps& taps, uint8_t* out) {
  const int32_t half = 1 << (taps.precision - 1);
  for (int64_t y = 0; y < rows; ++y, in += int64_t{in_width} * 3) {
    const int16_t* weights = taps.weights.data();
    for (const Span& span : taps.spans) {
      int32_t r = half, g = half, b = half;
      const uint8_t* pixel = in + int64_t{span.begin} * 3;
      for (int32_t j = 0; j < span.count; ++j, pixel += 3) {
        r += pixel[0] * weights[j];
        g += pixel[1] * weights[j];
        b += pixel[2] * weights[j];
      }
      *out++ = Clamp8(r, taps.precision);
      *out++ = Clamp8(g, taps.precision);
      *out++ = Clamp8(b, taps.precision);
      weights += taps.stride;
    }
  }
}

// (input rows, row_bytes) -> (output rows, row_bytes)
void PassVertical(const uint8_t* in, int64_t row_bytes, const Taps& taps, uint8_t* out) {
  std::vector<int32_t> sums(row_bytes);
  const int16_t* weights = taps.weights.data();
  for (const Span& span : taps.spans) {
    std::fill(sums.begin(), sums.end(), 1 << (taps.precision - 1));
    for (int32_t j = 0; j < span.count; ++j) {
      const uint8_t* row = in + (span.begin + j) * row_bytes;
      const int32_t weight = weights[j];
      for (int64_t x = 0; x < row_bytes; ++x) sums[x] += row[x] * weight;
    }
    for (int64_t x = 0; x < row_bytes; ++x) *out++ = Clamp8(sums[x], taps.precision);
    weights += taps.stride;
  }
}

}  // namespace

Result<Size> SmartResizeImage(Size size, int32_t factor, const PixelBudget& budget) {
  RETURN_IF_ERROR(CheckPositive(size));
  RETURN_IF_ERROR(CheckAspect(size.height, size.width));
  return FitBudget(size.height, size.width, factor, budget, {.compared_frames = 1, .scaled_frames = 1});
}

Result<Size> SmartResizeVideo(int32_t frames, Size size, int32_t factor, int32_t temporal_factor,
                              const PixelBudget& budget) {
  RETURN_IF_ERROR(CheckPositive(size));
  if (frames < temporal_factor) {
    return InvalidArgumentError("a video needs at least " + std::to_string(temporal_factor) + " frames, got " +
                                std::to_string(frames));
  }
  int64_t height = size.height, width = size.width;
  if (height < factor || width < factor) {  // brings the short side up to one merged patch first
    const double scale = std::max(static_cast<double>(factor) / static_cast<double>(height),
                                  static_cast<double>(factor) / static_cast<double>(width));
    height = static_cast<int64_t>(static_cast<double>(height) * scale);
    width = static_cast<int64_t>(static_cast<double>(width) * scale);
  }
  RETURN_IF_ERROR(CheckPositive({static_cast<int32_t>(height), static_cast<int32_t>(width)}));
  RETURN_IF_ERROR(CheckAspect(height, width));
  const int64_t even = RoundHalfEven(static_cast<double>(frames) / temporal_factor) * temporal_factor;
  return FitBudget(height, width, factor, budget, {.compared_frames = even, .scaled_frames = frames});
}

Image ResizeBicubic(const Image& image, Size size) {
  QP_CHECK(image.width > 0 && image.height > 0 && size.width > 0 && size.height > 0);
  QP_CHECK_EQ(image.rgb.size(), size_t{3} * image.width * image.height);
  Image out{.width = size.width, .height = size.height, .rgb = {}};
  const std::vector<uint8_t>* in = &image.rgb;
  std::vector<uint8_t> between;
  if (size.width != image.width) {
    between.resize(size_t{3} * size.width * image.height);
    PassHorizontal(in->data(), image.height, image.width, ComputeTaps(image.width, size.width), between.data());
    in = &between;
  }
  if (size.height == image.height) {
    out.rgb = in == &between ? std::move(between) : image.rgb;
    return out;
  }
  out.rgb.resize(size_t{3} * size.width * size.height);
  PassVertical(in->data(), int64_t{3} * size.width, ComputeTaps(image.height, size.height), out.rgb.data());
  return out;
}

}  // namespace qwen::preprocess
