// stage/kernels/common/fp8.h on the host: every code, the order of the packed codes, where a scale lies. The device's conversion is
// held against this one in tests/kernels/fp8_test.cu.
#include "stage/kernels/common/fp8.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <numeric>
#include <random>

namespace qwen::kernels {
namespace {

// E4M3 by its definition: bias 7, subnormals without the hidden bit, no infinities, all ones is NaN.
double CodeValue(int code) {
  const int exponent = (code >> 3) & 15, fraction = code & 7;
  if ((code & 0x7F) == 0x7F) return std::nan("");
  const double magnitude = exponent == 0 ? std::ldexp(fraction / 8.0, -6) : std::ldexp(1 + fraction / 8.0, exponent - 7);
  return code & 0x80 ? -magnitude : magnitude;
}
// To nearest even, by looking at both neighbours.
double NearestBf16(double value) {
  const auto bits = std::bit_cast<uint32_t>(static_cast<float>(value));
  const double low = std::bit_cast<float>(bits & 0xFFFF0000u), high = std::bit_cast<float>((bits & 0xFFFF0000u) + 0x10000u);
  const double below = std::abs(value - low), above = std::abs(value - high);
  if (below != above) return below < above ? low : high;
  return (bits >> 16) % 2 == 0 ? low : high;
}
double Half(uint32_t pair, int which) { return std::bit_cast<float>((which == 0 ? pair << 16 : pair & 0xFFFF0000u)); }

TEST(Fp8, EveryCodeHasItsValue) {
  for (int code = 0; code < 256; ++code) {
    const float got = Fp8ToFloat(static_cast<uint8_t>(code));
    const double want = CodeValue(code);
    if (std::isnan(want)) {
      EXPECT_TRUE(std::isnan(got)) << code;
    } else {
      EXPECT_EQ(got, want) << code;
      EXPECT_EQ(std::signbit(got), code >= 128) << code;
    }
  }
  EXPECT_EQ(Fp8ToFloat(0x7E), 448.0f);
  EXPECT_EQ(Fp8ToFloat(0x01), 1.0f / 512);
}

TEST(Fp8, EveryCodeTimesAScaleIsRoundedOnceInEveryPlace) {
  std::mt19937 random(11);
  for (const float scale : {1.0f, 0.00390625f, 3.0517578e-5f, 0.0123f, 7.25e-4f, 1.9f, -0.5f}) {
    for (int place = 0; place < 4; ++place) {
      for (int code = 0; code < 256; ++code) {
        if ((code & 0x7F) == 0x7F) continue;
        const uint32_t others = random() & 0x3F3F3F3Fu;
        const Bf16Pairs got = MultiplyOut((others & ~(0xFFu << 8 * place)) | static_cast<uint32_t>(code) << 8 * place, scale);
        EXPECT_EQ(Half(place < 2 ? got.low : got.high, place % 2), NearestBf16(static_cast<float>(CodeValue(code)) * scale)) << code << " * " << scale << " at " << place;
      }
    }
  }
  const Bf16Pairs nan = MultiplyOut(0x007F00FFu, 1.0f);
  EXPECT_TRUE(std::isnan(Half(nan.low, 0)) && std::isnan(Half(nan.high, 0)));
}

TEST(Fp8, AWordOfPackedCodesHoldsWhatAThreadOfAQuadHoldsOfAnOperand) {
  Fp8Words plain;
  for (int k = 0; k < 16; ++k) reinterpret_cast<uint8_t*>(plain.word)[k] = static_cast<uint8_t>(k);
  const Fp8Words packed = PackFp8(plain);
  const auto* bytes = reinterpret_cast<const uint8_t*>(packed.word);
  for (int t = 0; t < 4; ++t) {
    EXPECT_EQ(bytes[4 * t], 2 * t);
    EXPECT_EQ(bytes[4 * t + 1], 2 * t + 1);
    EXPECT_EQ(bytes[4 * t + 2], 2 * t + 8);
    EXPECT_EQ(bytes[4 * t + 3], 2 * t + 9);
  }
  for (int k = 0; k < 16; ++k) EXPECT_EQ(bytes[Fp8PlaceOf(k)], k);
  const Fp8Words back = UnpackFp8(packed);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(back.word[i], plain.word[i]);
}

// What a lane does in a product of few tokens (common/weight.cuh): word i of its 16 bytes against words i of its two vectors.
TEST(Fp8, ALanesWordsMeetTheActivationsOfTheirColumns) {
  Fp8Words plain;
  std::mt19937 random(3);
  for (uint32_t& word : plain.word) word = random() & 0x77777777u;
  const Fp8Words packed = PackFp8(plain);
  double want = 0, got = 0;
  float x[16];
  for (int k = 0; k < 16; ++k) {
    x[k] = static_cast<float>(k * k - 40);
    want += x[k] * CodeValue(reinterpret_cast<const uint8_t*>(plain.word)[k]) * 0.5;
  }
  for (int i = 0; i < 4; ++i) {
    const Bf16Pairs w = MultiplyOut(packed.word[i], 0.5f);
    got += Half(w.low, 0) * x[2 * i] + Half(w.low, 1) * x[2 * i + 1];           // word i of the first vector
    got += Half(w.high, 0) * x[8 + 2 * i] + Half(w.high, 1) * x[8 + 2 * i + 1];  // and of the second
  }
  EXPECT_DOUBLE_EQ(got, want);  // codes with two bits of fraction and half of them: exact in bf16
}

TEST(Fp8, ARowOfScalesIsAWholeNumberOf32Bytes) {
  EXPECT_EQ(Fp8ScaleStride(128), 8);
  EXPECT_EQ(Fp8ScaleStride(768), 8);
  EXPECT_EQ(Fp8ScaleStride(1024), 8);
  EXPECT_EQ(Fp8ScaleStride(1536), 16);
  EXPECT_EQ(Fp8ScaleStride(2048), 16);
  EXPECT_EQ(Fp8ScaleStride(4096), 32);
}

}  // namespace
}  // namespace qwen::kernels
