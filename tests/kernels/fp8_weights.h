// tests/kernels/fp8_weights.h — block-FP8 matrices for kernel tests: random codes and scales, packed by the order's own statement, and
// the bf16 weights that the reference makes of them, by arithmetic that shares nothing with the kernels.
#pragma once
#include <cmath>
#include <random>
#include <vector>

#include "stage/kernels/common/fp8.h"
#include "tests/kernels/harness.h"

namespace qwen::kernels::testing {

// E4M3 by its definition: bias 7, subnormals, all ones is NaN.
inline double CodeValue(uint8_t code) {
  const int exponent = code >> 3 & 15, fraction = code & 7;
  if ((code & 0x7F) == 0x7F) return std::nan("");
  const double magnitude = exponent == 0 ? std::ldexp(fraction / 8.0, -6) : std::ldexp(1 + fraction / 8.0, exponent - 7);
  return code & 0x80 ? -magnitude : magnitude;
}

// In harness.cu. Codes of values that are spread as weights are, with a deviation of about 24; no NaN.
void FillFp8Noise(Fp8* codes, size_t count, uint64_t seed, cudaStream_t stream);
// One thread a code: packed[...Fp8PlaceOf...] = plain, and bf16 = value[code] * its block's scale.
void PackAndMultiplyOut(const Fp8* plain, const float* value, const float* scales, Fp8* packed, __nv_bfloat16* bf16, size_t rows, int columns);

// (rows, columns), both multiples of 128; several matrices one below the other are one.
struct Fp8Weights {
  DeviceBuffer<__nv_bfloat16> bf16;  // multiplied out, in the order of columns
  DeviceBuffer<Fp8> plain;           // codes in the order of columns
  DeviceBuffer<Fp8> codes;           // packed
  DeviceBuffer<float> scales;
  Fp8Matrix matrix() const { return {codes.get(), scales.get()}; }
};
// Weights of about `scale`, so that products are of the size that bf16 tests use. Scales are no bf16 numbers.
inline Fp8Weights RandomFp8(size_t rows, int columns, double scale, uint32_t seed) {
  std::mt19937 random(seed);
  const int stride = Fp8ScaleStride(columns);
  std::vector<float> scales(rows / kFp8Block * stride, NAN), values;  // what pads a row of scales is never read
  for (size_t r = 0; r < rows / kFp8Block; ++r) {
    for (int b = 0; b < columns / kFp8Block; ++b) scales[r * stride + b] = static_cast<float>(scale / 24.0 * (0.5 + random() / 4294967296.0));
  }
  for (int code = 0; code < 256; ++code) values.push_back(static_cast<float>(CodeValue(static_cast<uint8_t>(code))));
  Fp8Weights w{DeviceBuffer<__nv_bfloat16>(rows * columns), DeviceBuffer<Fp8>(rows * columns), DeviceBuffer<Fp8>(rows * columns), DeviceBuffer(scales)};
  const DeviceBuffer value(values);
  FillFp8Noise(w.plain.get(), rows * columns, seed, nullptr);
  PackAndMultiplyOut(w.plain.get(), value.get(), w.scales.get(), w.codes.get(), w.bf16.get(), rows, columns);
  CUDA_MUST(cudaDeviceSynchronize());
  return w;
}
// Packed codes alone, for timing.
inline Fp8Weights NoiseFp8(size_t rows, int columns, float scale, uint64_t seed) {
  Fp8Weights w;
  w.codes = DeviceBuffer<Fp8>(rows * columns);
  FillFp8Noise(w.codes.get(), rows * columns, seed, nullptr);
  w.scales = DeviceBuffer(std::vector<float>(rows / kFp8Block * Fp8ScaleStride(columns), scale / 24));
  return w;
}

}  // namespace qwen::kernels::testing
