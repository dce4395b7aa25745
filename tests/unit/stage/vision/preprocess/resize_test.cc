// Sizes against a table that the reference's smart_resize printed; the filter against hashes that torchvision computed.
#include "stage/vision/preprocess/resize.h"

#include <gtest/gtest.h>

#include "tests/unit/stage/vision/preprocess/fixtures.h"

namespace qwen::preprocess {
namespace {

TEST(SmartResize, EqualsTheReferencesTable) {
  for (const auto& row : fixtures::Expected("smart_resize")) {
    const int32_t frames = std::stoi(row[0]);
    const Size size{std::stoi(row[1]), std::stoi(row[2])};
    const PixelBudget budget{std::stoll(row[3]), std::stoll(row[4])};
    const Size expected{std::stoi(row[5]), std::stoi(row[6])};  // 0 x 0: refused
    const auto result = frames == 0 ? SmartResizeImage(size, 32, budget) : SmartResizeVideo(frames, size, 32, 2, budget);
    const std::string name = row[0] + " frames " + row[1] + "x" + row[2];
    ASSERT_EQ(result.ok(), expected.height > 0) << name;
    if (!result.ok()) {
      EXPECT_EQ(result.status().code(), StatusCode::kInvalidArgument);
      continue;
    }
    EXPECT_EQ(result->height, expected.height) << name;
    EXPECT_EQ(result->width, expected.width) << name;
  }
}

TEST(SmartResize, RoundsHalvesToEvenMultiples) {
  const PixelBudget any{1, int64_t{1} << 40};
  // 1.5 -> 2, 2.5 -> 2, 3.5 -> 4, 4.5 -> 4 times 32
  EXPECT_EQ(*SmartResizeImage({48, 80}, 32, any), (Size{64, 64}));
  EXPECT_EQ(*SmartResizeImage({112, 144}, 32, any), (Size{128, 128}));
}

TEST(SmartResize, RefusesEmptyAndOverlongPictures) {
  const PixelBudget any{1, int64_t{1} << 40};
  EXPECT_FALSE(SmartResizeImage({0, 5}, 32, any).ok());
  EXPECT_TRUE(SmartResizeImage({10, 2000}, 32, any).ok());
  EXPECT_FALSE(SmartResizeImage({10, 2001}, 32, any).ok());
  EXPECT_FALSE(SmartResizeVideo(1, {64, 64}, 32, 2, any).ok());
}

TEST(ResizeBicubic, EqualsTorchvisionToTheBit) {
  for (const auto& row : fixtures::Expected("resize")) {
    const int32_t height = std::stoi(row[1]), width = std::stoi(row[2]);
    const Image image{.width = width,
                      .height = height,
                      .rgb = fixtures::LcgPixels(size_t{3} * height * width, static_cast<uint32_t>(std::stoul(row[0])))};
    const Image resized = ResizeBicubic(image, {std::stoi(row[3]), std::stoi(row[4])});
    ASSERT_EQ(resized.rgb.size(), size_t{3} * resized.height * resized.width);
    EXPECT_EQ(fixtures::Hex(fixtures::Fnv1a(resized.rgb)), row[5]) << row[1] << "x" << row[2];
  }
}

TEST(ResizeBicubic, LeavesAFlatPictureFlat) {
  for (const int value : {0, 1, 127, 254, 255}) {
    const Image image{.width = 37, .height = 19, .rgb = std::vector<uint8_t>(37 * 19 * 3, static_cast<uint8_t>(value))};
    for (const uint8_t pixel : ResizeBicubic(image, {64, 32}).rgb) ASSERT_EQ(pixel, value);
  }
}

}  // namespace
}  // namespace qwen::preprocess
