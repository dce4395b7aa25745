#include "stage/weights/place_rows.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "stage/base/check.h"

namespace qwen::weights {
namespace {

// A tile of 64 x 64 elements, read and written, lies in the first-level cache; its rows fill whole cache lines on both sides.
constexpr int64_t kTile = 64;

float FromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// 1 sign, 4 exponent (bias 7), 3 mantissa bits; no infinities, 0x7f and 0xff are NaN.
std::array<float, 256> MakeE4M3() {
  std::array<float, 256> table{};
  for (int code = 0; code < 256; ++code) {
    const int exponent = (code >> 3) & 15, mantissa = code & 7;
    float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9) : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
    if ((code & 0x7f) == 0x7f) value = std::numeric_limits<float>::quiet_NaN();
    table[static_cast<size_t>(code)] = code < 128 ? value : -value;
  }
  return table;
}

struct Float32 {
  using Bits = uint32_t;
  static float Widen(Bits bits) { return FromBits(bits); }
  static Bits Round(float value) {
    Bits bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
  }
};
struct BFloat16 {
  using Bits = uint16_t;
  static float Widen(Bits bits) { return FromBits(static_cast<uint32_t>(bits) << 16); }
  static Bits Round(float value) {
    if (std::isnan(value)) return 0x7fc0;
    const uint32_t bits = Float32::Round(value);
    return static_cast<Bits>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
};
struct E4M3 {
  using Bits = uint8_t;
  static float Widen(Bits bits) {
    static const std::array<float, 256> table = MakeE4M3();
    return table[bits];
  }
};

// `at` may lie anywhere: offsets in a safetensors file are not aligned to what is stored there.
template <typename From, typename To>
typename To::Bits Convert(const std::byte* at, float scale) {
  typename From::Bits bits;
  std::memcpy(&bits, at, sizeof(bits));
  if constexpr (std::is_same_v<From, To>) {
    (void)scale;  // stored as held: never quantised
    return bits;
  } else {
    return To::Round(From::Widen(bits) * scale);
  }
}

template <typename From, typename To>
void Place(const PlaceTarget& t, int64_t first_row, std::span<const std::byte> bytes) {
  using In = typename From::Bits;
  using Out = typename To::Bits;
  const int64_t count = static_cast<int64_t>(bytes.size()) / (t.columns * static_cast<int64_t>(sizeof(In)));
  QP_CHECK_EQ(count * t.columns * static_cast<int64_t>(sizeof(In)), static_cast<int64_t>(bytes.size()));
  // Scales along a stored row change every `step` elements; `across` of the held matrix runs along it when transposed.
  const int64_t held_rows = t.transposed ? t.columns : t.rows, held_columns = t.transposed ? t.rows : t.columns;
  const int64_t scale_rows = (held_rows + t.block_rows - 1) / t.block_rows, scale_columns = (held_columns + t.block_columns - 1) / t.block_columns;
  std::vector<float> scale(static_cast<size_t>(t.columns), 1.0f);  // of the elements of one stored row
  int64_t scaled_for = -1;                                        // which row of blocks `scale` holds, counted through all matrices

  for (int64_t done = 0; done < count;) {
    const int64_t row = first_row + done, matrix = row / t.rows, within = row % t.rows;
    const int64_t block = t.transposed ? t.block_columns : t.block_rows;  // of blocks along the stored rows' axis
    // As many rows as share a matrix, a tile, and their scales.
    int64_t rows = std::min({count - done, t.rows - within, t.transposed ? kTile - within % kTile : kTile});
    if (t.scales != nullptr) {
      rows = std::min(rows, block - within % block);
      const int64_t key = matrix * ((t.rows + block - 1) / block) + within / block;
      if (key != scaled_for) {
        const float* scales = t.scales + matrix * scale_rows * scale_columns;
        for (int64_t j = 0; j < t.columns; ++j) {
          scale[static_cast<size_t>(j)] = t.transposed ? scales[j / t.block_rows * scale_columns + within / t.block_columns]
                                                       : scales[within / t.block_rows * scale_columns + j / t.block_columns];
        }
        scaled_for = key;
      }
    }
    const auto in = [&](int64_t i, int64_t j) { return bytes.data() + ((done + i) * t.columns + j) * static_cast<int64_t>(sizeof(In)); };
    Out* out = reinterpret_cast<Out*>(t.data) + matrix * t.rows * t.columns;
    if (!t.transposed) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < t.columns; ++j) {
          out[(within + i) * t.columns + j] = Convert<From, To>(in(i, j), scale[static_cast<size_t>(j)]);
        }
      }
    } else {
      for (int64_t tile = 0; tile < t.columns; tile += kTile) {
        const int64_t end = std::min(tile + kTile, t.columns);
        for (int64_t j = tile; j < end; ++j) {
          Out* to = out + j * t.rows + within;
          const float s = scale[static_cast<size_t>(j)];
          for (int64_t i = 0; i < rows; ++i) to[i] = Convert<From, To>(in(i, j), s);
        }
      }
    }
    done += rows;
  }
}

template <typename From>
void PlaceFrom(const PlaceTarget& target, int64_t first_row, std::span<const std::byte> bytes) {
  if (target.dtype == StoredDtype::kFloat32) return Place<From, Float32>(target, first_row, bytes);
  if constexpr (std::is_same_v<From, E4M3>) {
    if (target.dtype == StoredDtype::kFloat8E4M3) {
      QP_CHECK(target.scales == nullptr);
      return Place<E4M3, E4M3>(target, first_row, bytes);
    }
  }
  QP_CHECK(target.dtype == StoredDtype::kBFloat16);
  Place<From, BFloat16>(target, first_row, bytes);
}

}  // namespace

void PlaceRows(const PlaceTarget& target, StoredDtype stored, int64_t first_row, std::span<const std::byte> bytes) {
  QP_CHECK(target.data != nullptr && target.rows > 0 && target.columns > 0);
  switch (stored) {
    case StoredDtype::kFloat32: return PlaceFrom<Float32>(target, first_row, bytes);
    case StoredDtype::kBFloat16: return PlaceFrom<BFloat16>(target, first_row, bytes);
    case StoredDtype::kFloat8E4M3: return PlaceFrom<E4M3>(target, first_row, bytes);
    default: QP_CHECK(false) << StoredDtypeName(stored);
  }
}

}  // namespace qwen::weights
