// The order of patches against the reference's reshape and permute, done here on indices, one axis at a time.
#include "stage/vision/preprocess/patches.h"

#include <gtest/gtest.h>

#include <numeric>

#include "tests/unit/stage/vision/preprocess/fixtures.h"

namespace qwen::preprocess {
namespace {

// Row-major (dims) -> row-major after permuting the axes, as torch's view(dims).permute(order).reshape(-1).
std::vector<uint8_t> Permute(const std::vector<uint8_t>& data, const std::vector<int>& dims, const std::vector<int>& order) {
  std::vector<int64_t> stride(dims.size(), 1);
  for (int i = static_cast<int>(dims.size()) - 2; i >= 0; --i) stride[i] = stride[i + 1] * dims[i + 1];
  std::vector<uint8_t> out;
  std::vector<int> index(dims.size(), 0);  // of the output, in `order`
  while (true) {
    int64_t at = 0;
    for (size_t i = 0; i < order.size(); ++i) at += index[i] * stride[order[i]];
    out.push_back(data[at]);
    int axis = static_cast<int>(order.size()) - 1;
    while (axis >= 0 && ++index[axis] == dims[order[axis]]) index[axis--] = 0;
    if (axis < 0) return out;
  }
}

Image NoiseImage(int32_t height, int32_t width, uint32_t seed) {
  return {.width = width, .height = height, .rgb = fixtures::LcgPixels(size_t{3} * height * width, seed)};
}

ImageProcessorConfig NoResizeImage() {
  ImageProcessorConfig config;
  config.patch_size = 16;
  config.do_resize = false;
  return config;
}
VideoProcessorConfig NoResizeVideo() {
  VideoProcessorConfig config;
  config.do_resize = false;
  return config;
}

// Qwen3VLVideoProcessor.patchify: view(grid_t, 2, C, gh/2, 2, 16, gw/2, 2, 16).permute(0, 3, 6, 4, 7, 2, 1, 5, 8), here on
// frames that are stored (frame, y, x, channel).
std::vector<uint8_t> ReferencePatches(const std::vector<Image>& frames) {
  std::vector<uint8_t> all;
  for (const Image& frame : frames) all.insert(all.end(), frame.rgb.begin(), frame.rgb.end());
  const int pairs = static_cast<int>(frames.size()) / 2, rows = frames[0].height / 32, columns = frames[0].width / 32;
  // axes:           0      1  2     3  4   5        6  7   8
  return Permute(all, {pairs, 2, rows, 2, 16, columns, 2, 16, 3}, {0, 2, 5, 3, 6, 8, 1, 4, 7});
}

TEST(Patches, FollowTheReferencesOrder) {
  const std::vector<Image> frames = {NoiseImage(64, 96, 1), NoiseImage(64, 96, 2), NoiseImage(64, 96, 3), NoiseImage(64, 96, 4)};
  const auto video = MakeVideoInput(frames, 2.0, NoResizeVideo());
  ASSERT_TRUE(video.ok()) << video.status().ToString();
  EXPECT_EQ(video->input.grid, (std::array<int32_t, 3>{2, 4, 6}));
  EXPECT_EQ(video->input.patches, ReferencePatches(frames));
}

TEST(Patches, FirstRowHoldsTheTopLeftPatchChannelByChannelAndFrameByFrame) {
  const Image image = NoiseImage(32, 32, 9);
  const auto input = MakeImageInput(image, NoResizeImage());
  ASSERT_EQ(input->patches.size(), size_t{4} * 1536);
  const auto pixel = [&image](int y, int x, int c) { return image.rgb[(y * 32 + x) * 3 + c]; };
  EXPECT_EQ(input->patches[0], pixel(0, 0, 0));
  EXPECT_EQ(input->patches[1], pixel(0, 1, 0));         // x runs fastest
  EXPECT_EQ(input->patches[16], pixel(1, 0, 0));        // then y
  EXPECT_EQ(input->patches[256], pixel(0, 0, 0));       // then the frame: the second slot repeats the picture
  EXPECT_EQ(input->patches[512], pixel(0, 0, 1));       // then the channel
  EXPECT_EQ(input->patches[1536], pixel(0, 16, 0));     // the patch to the right
  EXPECT_EQ(input->patches[2 * 1536], pixel(16, 0, 0)); // the patch below
}

TEST(Patches, AStillPictureIsAVideoOfItselfTwice) {
  const Image image = NoiseImage(96, 64, 3);
  const auto still = MakeImageInput(image, NoResizeImage());
  EXPECT_EQ(still->grid, (std::array<int32_t, 3>{1, 6, 4}));
  EXPECT_EQ(still->patches, ReferencePatches({image, image}));
  EXPECT_EQ(still->patch_count(), 24);
  EXPECT_EQ(still->token_count(), 6);
}

TEST(Patches, AnOddVideoRepeatsItsLastFrame) {
  const std::vector<Image> three = {NoiseImage(32, 32, 1), NoiseImage(32, 32, 2), NoiseImage(32, 32, 3)};
  const std::vector<Image> four = {three[0], three[1], three[2], three[2]};
  EXPECT_EQ(MakeVideoInput(three, 2.0, NoResizeVideo())->input.patches, ReferencePatches(four));
}

TEST(Patches, ResizedPicturesHaveWholeBlocksWithinTheBudget) {
  ImageProcessorConfig config;
  config.patch_size = 16;
  config.budget = {4096, 65536};
  for (const auto& [height, width] : std::vector<std::pair<int, int>>{{17, 33}, {500, 3}, {400, 700}, {64, 64}}) {
    const auto input = MakeImageInput(NoiseImage(height, width, 5), config);
    ASSERT_TRUE(input.ok()) << input.status().ToString();
    EXPECT_EQ(input->grid[1] % 2 + input->grid[2] % 2, 0);
    EXPECT_LE(input->patch_count() * 256, 65536);
    EXPECT_GE(input->patch_count() * 256, 4096);
    EXPECT_EQ(input->patches.size(), static_cast<size_t>(input->patch_count()) * 1536);
  }
  EXPECT_FALSE(MakeImageInput(NoiseImage(1, 300, 5), config).ok());
}

TEST(Timestamps, AreTheMeanOfEachPair) {
  const std::vector<Image> frames(5, NoiseImage(32, 32, 1));
  const std::vector<int64_t> indices = {0, 15, 29, 44, 60};
  const auto video = MakeVideoInput(frames, indices, 30.0, NoResizeVideo());
  EXPECT_EQ(video->timestamps, (std::vector<double>{0.25, (29 / 30.0 + 44 / 30.0) / 2, 2.0}));
  // without a rate: 24 frames a second
  EXPECT_EQ(MakeVideoInput(frames, std::nullopt, NoResizeVideo())->timestamps,
            (std::vector<double>{1 / 24.0 / 2, (2 / 24.0 + 3 / 24.0) / 2, 4 / 24.0}));
}

TEST(MakeVideoInput, RefusesWhatTheReferenceRefuses) {
  const VideoProcessorConfig config;
  EXPECT_FALSE(MakeVideoInput(std::vector<Image>{}, 2.0, config).ok());
  EXPECT_FALSE(MakeVideoInput(std::vector<Image>{NoiseImage(32, 32, 1)}, 2.0, config).ok());
  EXPECT_FALSE(MakeVideoInput(std::vector<Image>{NoiseImage(32, 32, 1), NoiseImage(32, 64, 1)}, 2.0, config).ok());
  EXPECT_FALSE(MakeVideoInput(std::vector<Image>(2, NoiseImage(32, 32, 1)), 0.0, config).ok());
}

TEST(ContentHash, IsShaOfGridAndPatchesAndNotOfTheId) {
  step::VisionInput input;
  input.grid = {1, 2, 4};
  input.patches = fixtures::LcgPixels(8 * 1536, 7);
  EXPECT_EQ(ContentHash(input), fixtures::Expected("content_hash")[0][0]);
  step::VisionInput other = input;
  other.id = 5;
  EXPECT_EQ(ContentHash(other), ContentHash(input));
  other.grid = {1, 4, 2};
  EXPECT_NE(ContentHash(other), ContentHash(input));
}

}  // namespace
}  // namespace qwen::preprocess
