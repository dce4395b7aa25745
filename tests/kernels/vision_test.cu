// Goal: what stands around the vision tower's products equals plain loops in double: the position table stretched over grids of any
// size, and the 2-D rotation of q and k, for patches of several frames one after the other.
#include <array>

#include "stage/kernels/vision.h"
#include "tests/kernels/harness.h"

namespace qwen::kernels::testing {
namespace {

// Frames of these sizes in raster order (the kernels do not care about the order of patches).
std::vector<PatchPlace> Places(const std::vector<std::array<int, 2>>& frames) {
  std::vector<PatchPlace> places;
  for (const auto& [height, width] : frames) {
    for (int row = 0; row < height; ++row) {
      for (int column = 0; column < width; ++column) places.push_back({row, column, height, width});
    }
  }
  return places;
}

// By its meaning: the table's corners lie on the frame's corners, and a point between four entries is mixed by its distances.
TEST(VisionPosition, StretchesTheTableOverEveryFrame) {
  const int side = 7;
  for (const int width : {8, 72, 1024, 1152, 1288, 2568}) {
    const auto places = Places({{2, 2}, {1, 1}, {7, 7}, {4, 30}, {16, 6}, {1, 5}});
    const auto table = RandomBf16(size_t(side) * side * width, 1.0, 1), before = RandomBf16(places.size() * width, 1.0, 2);
    DeviceBuffer dp(places);
    DeviceBuffer dt(table), dh(before);
    CUDA_OK(VisionPosition({.places = dp.get(), .table = dt.get(), .hidden = dh.get(), .patches = int64_t(places.size()), .side = side, .width = width}, nullptr));
    const auto got = dh.Download();
    std::vector<double> want(before.size());
    for (size_t p = 0; p < places.size(); ++p) {
      const PatchPlace& at = places[p];
      const double y = at.height > 1 ? at.row * (side - 1.0) / (at.height - 1) : 0, x = at.width > 1 ? at.column * (side - 1.0) / (at.width - 1) : 0;
      for (int i = 0; i < width; ++i) {
        double sum = 0;
        for (int ty = 0; ty < side; ++ty) {
          for (int tx = 0; tx < side; ++tx) {
            const double weight = std::max(0.0, 1 - std::abs(y - ty)) * std::max(0.0, 1 - std::abs(x - tx));
            sum += weight * ToFloat(table[(size_t(ty) * side + tx) * width + i]);
          }
        }
        want[p * width + i] = RoundToBf16(ToFloat(before[p * width + i]) + RoundToBf16(sum));
      }
    }
    const Difference d = Compare(got, want);
    EXPECT_EQ(d.nan, 0u);
    EXPECT_LT(d.relative(), 1e-3) << width;  // a rounding may fall the other way in a few of a thousand values
    EXPECT_LT(d.max_abs, 0.07) << width;     // two roundings of a value below 8
  }
}

TEST(VisionRope, TurnsQueriesAndKeysByRowAndColumnAndLeavesValuesAlone) {
  for (const auto& [heads, head_dim] : {std::pair{16, 72}, {16, 64}, {2, 8}, {3, 128}, {5, 80}, {1, 256}}) {
    const auto places = Places({{2, 2}, {6, 40}, {1, 1}, {50, 3}});
    const int sides = 50, quarter = head_dim / 4, half = head_dim / 2, width = 3 * heads * head_dim;
    std::vector<float> cosines(size_t(sides) * quarter), sines(cosines.size());
    for (int s = 0; s < sides; ++s) {
      for (int i = 0; i < quarter; ++i) {
        const double angle = s * std::pow(10000.0, -double(i) / quarter);
        cosines[size_t(s) * quarter + i] = static_cast<float>(std::cos(angle));
        sines[size_t(s) * quarter + i] = static_cast<float>(std::sin(angle));
      }
    }
    const auto qkv = RandomBf16(places.size() * width, 1.0, 3);
    DeviceBuffer dp(places);
    DeviceBuffer dc(cosines), ds(sines);
    DeviceBuffer dq(qkv);
    CUDA_OK(VisionRope({.places = dp.get(), .cosines = dc.get(), .sines = ds.get(), .qkv = dq.get(), .patches = int64_t(places.size()), .heads = heads, .head_dim = head_dim}, nullptr));
    const auto got = dq.Download();
    std::vector<double> want(qkv.size());
    for (size_t p = 0; p < places.size(); ++p) {
      for (int h = 0; h < 3 * heads; ++h) {
        const size_t at = p * width + size_t(h) * head_dim;
        for (int i = 0; i < head_dim; ++i) want[at + i] = ToFloat(qkv[at + i]);
        if (h >= 2 * heads) {
          for (int i = 0; i < head_dim; ++i) ASSERT_EQ(ToFloat(got[at + i]), want[at + i]) << "v " << p << " " << h << " " << i;
          continue;
        }
        for (int i = 0; i < half; ++i) {
          const double angle = (i < quarter ? places[p].row : places[p].column) * std::pow(10000.0, -double(i % quarter) / quarter);
          const double a = ToFloat(qkv[at + i]), b = ToFloat(qkv[at + half + i]);
          want[at + i] = RoundToBf16(a * std::cos(angle) - b * std::sin(angle));
          want[at + half + i] = RoundToBf16(b * std::cos(angle) + a * std::sin(angle));
        }
      }
    }
    const Difference d = Compare(got, want);
    EXPECT_EQ(d.nan, 0u);
    EXPECT_LT(d.relative(), 1e-3) << head_dim;
    EXPECT_LT(d.max_abs, 0.04) << head_dim;  // one rounding of a value below 8
  }
}

TEST(Vision, WhatDoesNotFitIsRefused) {
  EXPECT_EQ(VisionPosition({.patches = 4, .side = 48, .width = 1156}, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(VisionPosition({.patches = 0, .side = 48, .width = 1152}, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(VisionRope({.patches = 4, .heads = 16, .head_dim = 36}, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(VisionRope({.patches = 4, .heads = 1, .head_dim = 264}, nullptr), cudaErrorInvalidValue);
}

// 16 pictures of 448 x 448 in the 30B's tower.
TEST(SpeedVision, PrintsRows) {
  const int width = 1152, heads = 16, head_dim = 72, side = 48;
  const auto places = Places(std::vector<std::array<int, 2>>(16, {28, 28}));
  DeviceBuffer dp(places);
  DeviceBuffer<__nv_bfloat16> table(size_t(side) * side * width), hidden(places.size() * width), qkv(places.size() * 3 * width), more(places.size() * 3 * width);
  DeviceBuffer<float> cosines(std::vector<float>(28 * 18, 0.8f)), sines(std::vector<float>(28 * 18, 0.6f));
  FillNoise(table.get(), table.count(), 1.0f, 1, nullptr);
  FillNoise(hidden.get(), hidden.count(), 1.0f, 2, nullptr);
  FillNoise(qkv.get(), qkv.count(), 1.0f, 3, nullptr);
  FillNoise(more.get(), more.count(), 1.0f, 4, nullptr);
  const auto patches = int64_t(places.size());
  PrintRow("vision_position.16x784", TimeGraph([&](int i, cudaStream_t stream) {  // hidden in turn in other memory: 87 MB do not fit into the L2 cache
             __nv_bfloat16* rows = i % 3 == 0 ? hidden.get() : i % 3 == 1 ? qkv.get() : more.get();
             CUDA_MUST(VisionPosition({.places = dp.get(), .table = table.get(), .hidden = rows, .patches = patches, .side = side, .width = width}, stream));
           }, 30), 4.0 * patches * width);
  PrintRow("vision_rope.16x784", TimeGraph([&](int i, cudaStream_t stream) {
             __nv_bfloat16* rows = i % 2 == 0 ? qkv.get() : more.get();
             CUDA_MUST(VisionRope({.places = dp.get(), .cosines = cosines.get(), .sines = sines.get(), .qkv = rows, .patches = patches, .heads = heads, .head_dim = head_dim}, stream));
           }, 30), 8.0 * patches * heads * head_dim);
}

}  // namespace
}  // namespace qwen::kernels::testing
