// PlaceRows against loops that index one element at a time.
#include "stage/weights/place_rows.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

namespace qwen::weights {
namespace {

// Out of the definition of the format: sign, 4 bits of exponent with bias 7, 3 of mantissa.
double DecodeE4M3(int code) {
  const double sign = code & 0x80 ? -1 : 1;
  const int exponent = (code >> 3) & 0xf;
  const double fraction = (code & 7) / 8.0;
  if ((code & 0x7f) == 0x7f) return std::nan("");
  return sign * (exponent == 0 ? fraction * std::pow(2.0, -6) : (1 + fraction) * std::pow(2.0, exponent - 7));
}
float OfBf16(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
template <typename T>
std::span<const std::byte> Bytes(const std::vector<T>& values) {
  return std::as_bytes(std::span(values));
}

TEST(PlaceRows, EveryE4M3CodeIsWidenedAsTheFormatSays) {
  std::vector<uint8_t> codes(256);
  for (int i = 0; i < 256; ++i) codes[static_cast<size_t>(i)] = static_cast<uint8_t>(i);
  std::vector<float> out(256);
  PlaceRows({.data = reinterpret_cast<std::byte*>(out.data()), .dtype = StoredDtype::kFloat32, .rows = 1, .columns = 256}, StoredDtype::kFloat8E4M3, 0,
            Bytes(codes));
  for (int i = 0; i < 256; ++i) {
    const double expected = DecodeE4M3(i);
    if (std::isnan(expected)) EXPECT_TRUE(std::isnan(out[static_cast<size_t>(i)])) << i;
    else EXPECT_EQ(out[static_cast<size_t>(i)], expected) << i;
  }
}

TEST(PlaceRows, Float32IsRoundedToTheNearestBfloat16AndTiesToEven) {
  const std::vector<float> in = {1.0f, 1.00390625f /* half way, to even 1.0 */, 1.01171875f /* half way, to even 1.015625 */, 1.00390637f,
                                 -1.00390625f, 3.4e38f, std::nanf(""), 0.0f};
  std::vector<uint16_t> out(in.size());
  PlaceRows({.data = reinterpret_cast<std::byte*>(out.data()), .rows = 1, .columns = static_cast<int64_t>(in.size())}, StoredDtype::kFloat32, 0, Bytes(in));
  EXPECT_EQ(OfBf16(out[0]), 1.0f);
  EXPECT_EQ(OfBf16(out[1]), 1.0f);
  EXPECT_EQ(OfBf16(out[2]), 1.015625f);
  EXPECT_EQ(OfBf16(out[3]), 1.0078125f);
  EXPECT_EQ(OfBf16(out[4]), -1.0f);
  EXPECT_TRUE(std::isinf(OfBf16(out[5])));  // beyond the largest bfloat16, as hardware rounds
  EXPECT_TRUE(std::isnan(OfBf16(out[6])));
  EXPECT_EQ(OfBf16(out[7]), 0.0f);
}

TEST(PlaceRows, BitsOfAnEqualDtypeAreKeptEvenOfNan) {
  const std::vector<uint16_t> in = {0x7f81, 0xffff, 0x8000, 0x0001};
  std::vector<uint16_t> out(4);
  PlaceRows({.data = reinterpret_cast<std::byte*>(out.data()), .rows = 2, .columns = 2, .transposed = true}, StoredDtype::kBFloat16, 0, Bytes(in));
  EXPECT_EQ(out, (std::vector<uint16_t>{0x7f81, 0x8000, 0xffff, 0x0001}));
}

// Random shapes, in random runs of rows, from an odd address, transposed or not, with and without scales.
TEST(PlaceRows, AnyRunsOfRowsGiveWhatOneElementAtATimeGives) {
  const uint32_t seed = std::random_device()();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 chance(seed);
  for (int round = 0; round < 80; ++round) {
    const int64_t matrices = 1 + chance() % 3, rows = 1 + chance() % 200, columns = 1 + chance() % 200;
    const int64_t block_rows = 1 + chance() % 70, block_columns = 1 + chance() % 70;
    const bool transposed = round % 2 == 0, scaled = round % 4 < 2;
    const int64_t held_rows = transposed ? columns : rows, held_columns = transposed ? rows : columns;
    const int64_t scale_rows = (held_rows + block_rows - 1) / block_rows, scale_columns = (held_columns + block_columns - 1) / block_columns;
    std::vector<float> scales(static_cast<size_t>(matrices * scale_rows * scale_columns));
    for (float& scale : scales) scale = 0.25f + static_cast<float>(chance() % 1000) / 500;
    std::vector<uint8_t> stored(static_cast<size_t>(matrices * rows * columns) + 1);
    for (uint8_t& code : stored) code = static_cast<uint8_t>(chance() % 0x7f | (chance() & 0x80));  // no NaN
    const uint8_t* const codes = stored.data() + 1;
    std::vector<float> out(static_cast<size_t>(matrices * rows * columns), -1e9f);
    PlaceTarget target{.data = reinterpret_cast<std::byte*>(out.data()), .dtype = StoredDtype::kFloat32, .rows = rows, .columns = columns, .transposed = transposed,
                       .scales = scaled ? scales.data() : nullptr, .block_rows = block_rows, .block_columns = block_columns};
    for (int64_t row = 0; row < matrices * rows;) {
      const int64_t run = std::min<int64_t>(matrices * rows - row, 1 + chance() % 150);
      PlaceRows(target, StoredDtype::kFloat8E4M3, row, std::as_bytes(std::span(codes + row * columns, static_cast<size_t>(run * columns))));
      row += run;
    }
    for (int64_t m = 0; m < matrices; ++m) {
      for (int64_t r = 0; r < held_rows; ++r) {
        for (int64_t c = 0; c < held_columns; ++c) {
          const int64_t at = transposed ? (m * rows + c) * columns + r : (m * rows + r) * columns + c;
          const auto value = static_cast<float>(DecodeE4M3(codes[at]));
          const float expected = scaled ? value * scales[static_cast<size_t>((m * scale_rows + r / block_rows) * scale_columns + c / block_columns)] : value;
          ASSERT_EQ(out[static_cast<size_t>((m * held_rows + r) * held_columns + c)], expected) << "round " << round << ": " << m << " " << r << " " << c;
        }
      }
    }
  }
}

}  // namespace
}  // namespace qwen::weights
