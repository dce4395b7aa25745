// stage/kernels/common/fp8.h on the host: every code, the order of the packed codes, where a scale lies. The device's conversion is
// held against this one in tests/kernels/fp8_test.cu.
#include "stage/kernels/common/fp8.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <numeric>
#include <random>
#include <set>
#include <vector>

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

TEST(Fp8, AScaleIsFoundByItsBlock) {
  for (const int columns : {128, 768, 1024, 1536, 2048, 4096, 8192}) {
    size_t last = 0;
    for (size_t row : {0, 127, 128, 5119, 393215}) {
      for (int column = 0; column < columns; column += 64) {
        const size_t at = Fp8ScaleAt(row, column, columns);
        EXPECT_EQ(at, row / 128 * static_cast<size_t>(Fp8ScaleStride(columns)) + static_cast<size_t>(column / 128));
        last = std::max(last, at);
      }
    }
    EXPECT_LT(last, 393216u / 128 * static_cast<size_t>(Fp8ScaleStride(columns)));
  }
}

// decode_layers brings 8 floats with a piece of 1,024 or 768 columns, from a multiple of 4 on; warp w multiplies columns 64w of the piece.
TEST(Fp8, APiecesScalesAreAmongTheEightThatTravelWithIt) {
  for (const auto& [columns, piece] : {std::pair{2048, 1024}, {4096, 1024}, {8192, 1024}, {768, 768}, {1536, 768}}) {
    for (int first = 0; first < columns; first += piece) {
      const size_t row = 640, from = Fp8ScaleAt(row, first, columns) & ~size_t{3};
      EXPECT_LE(from + 8, (row / 128 + 1) * static_cast<size_t>(Fp8ScaleStride(columns))) << "past the row of scales";
      for (int warp = 0; warp < piece / 64; ++warp) {
        const int at = first / 128 % 4 + warp * 64 / 128;
        EXPECT_LT(at, 8);
        EXPECT_EQ(from + static_cast<size_t>(at), Fp8ScaleAt(row, first + warp * 64, columns)) << columns << " at " << first << " warp " << warp;
      }
    }
  }
}

// A tile as the accelerator writes it (address bits 4-6 exchanged by bits 7-9, or 4-5 by 7-8), then read as ldmatrix does: lane l gives the
// address of row l % 8 of matrix l / 8; thread 4g+t receives bytes 4t..4t+3 of row g of each matrix.
template <int kRowBytes>
void CheckOperands() {
  constexpr int kRows = 64;
  std::vector<uint8_t> tile(kRows * kRowBytes);
  const auto code = [](int row, int column) { return static_cast<uint8_t>((row * 31 + column * 7) % 251); };
  for (int row = 0; row < kRows; ++row) {
    for (int place = 0; place < kRowBytes; ++place) {
      uint32_t address = static_cast<uint32_t>(row * kRowBytes + place);
      address ^= (address >> 3) & (kRowBytes == 128 ? 0x70u : 0x30u);
      int column = 0;  // that lies at this place
      while (place / 16 * 16 + Fp8PlaceOf(column % 16) != place || column / 16 != place / 16) ++column;
      tile[address] = code(row, column);
    }
  }
  for (int warp = 0; warp < 4; ++warp) {
    for (int group = 0; group < kRowBytes / 16; group += 2) {
      std::set<uint32_t> banks[4];
      for (int thread = 0; thread < 32; ++thread) {
        for (int matrix = 0; matrix < 4; ++matrix) {
          const int g = thread / 4, t = thread % 4, lane = matrix * 8 + g;  // who gave that row's address
          const uint32_t from = SwizzledAt<kRowBytes>(warp * 16 + OperandRow(lane), group + OperandPiece(lane));
          EXPECT_EQ(from % 16, 0u);
          banks[matrix].insert(from / 16 % 8);
          const uint8_t* bytes = &tile[from + 4 * t];
          const int row = warp * 16 + g + matrix % 2 * 8, column = (group + matrix / 2) * 16;
          EXPECT_EQ(bytes[0], code(row, column + 2 * t));
          EXPECT_EQ(bytes[1], code(row, column + 2 * t + 1));
          EXPECT_EQ(bytes[2], code(row, column + 2 * t + 8));
          EXPECT_EQ(bytes[3], code(row, column + 2 * t + 9));
        }
      }
      for (const auto& used : banks) EXPECT_EQ(used.size(), 8u) << "rows of a matrix share banks";
    }
  }
}
TEST(Fp8, AnOperandOutOfATileHoldsTheColumnsThatWgmmaWants) {
  CheckOperands<128>();
  CheckOperands<64>();
}

}  // namespace
}  // namespace qwen::kernels
