// M-RoPE positions, written out by hand from the rule in positions.h.
#include "stage/vision/preprocess/positions.h"

#include <gtest/gtest.h>

namespace qwen::preprocess {
namespace {

constexpr int32_t kImage = 100, kVideo = 200;
constexpr MediaTokenIds kIds{.image_pad = kImage, .video_pad = kVideo};
using Grids = std::vector<std::array<int32_t, 3>>;
using Runs = std::vector<std::pair<int32_t, int32_t>>;

TEST(ComputePositions, CountsTextOnAllAxes) {
  const std::vector<int32_t> tokens = {5, 6, 7};
  const auto result = ComputePositions(tokens, kIds, {}, {});
  EXPECT_EQ(result->positions, (std::vector<step::Position>{{0, 0, 0}, {1, 1, 1}, {2, 2, 2}}));
  EXPECT_EQ(result->delta, 0);
}

TEST(ComputePositions, LaysAnImageOutAsAGridAndGoesOnAfterItsLongerSide) {
  const std::vector<int32_t> tokens = {1, 2, kImage, kImage, kImage, kImage, kImage, kImage, 3};
  const auto result = ComputePositions(tokens, kIds, Grids{{1, 4, 6}}, {});  // 2 x 3 merged
  ASSERT_TRUE(result.ok()) << result.status().ToString();
  EXPECT_EQ(result->positions, (std::vector<step::Position>{{0, 0, 0},
                                                            {1, 1, 1},
                                                            {2, 2, 2},
                                                            {2, 2, 3},
                                                            {2, 2, 4},
                                                            {2, 3, 2},
                                                            {2, 3, 3},
                                                            {2, 3, 4},
                                                            {5, 5, 5}}));
  EXPECT_EQ(result->delta, 6 - 9);
  EXPECT_EQ(result->image_runs, (std::vector<Runs>{{{2, 6}}}));
}

TEST(ComputePositions, GivesEachFramePairOfAVideoItsOwnRun) {
  const std::vector<int32_t> tokens = {9, kVideo, kVideo, 9, kVideo, kVideo};
  const auto result = ComputePositions(tokens, kIds, {}, Grids{{2, 2, 4}});
  ASSERT_TRUE(result.ok()) << result.status().ToString();
  EXPECT_EQ(result->positions,
            (std::vector<step::Position>{{0, 0, 0}, {1, 1, 1}, {1, 1, 2}, {3, 3, 3}, {4, 4, 4}, {4, 4, 5}}));
  EXPECT_EQ(result->delta, 0);
  EXPECT_EQ(result->video_runs, (std::vector<Runs>{{{1, 2}, {4, 2}}}));
}

TEST(ComputePositions, KeepsImagesAndVideosApart) {
  const std::vector<int32_t> tokens = {kVideo, 9, kImage, 9, kVideo, 9, kImage, kImage};
  const auto result = ComputePositions(tokens, kIds, Grids{{1, 2, 2}, {1, 4, 2}}, Grids{{2, 2, 2}});
  ASSERT_TRUE(result.ok()) << result.status().ToString();
  EXPECT_EQ(result->image_runs, (std::vector<Runs>{{{2, 1}}, {{6, 2}}}));
  EXPECT_EQ(result->video_runs, (std::vector<Runs>{{{0, 1}, {4, 1}}}));
  EXPECT_EQ(result->positions.back(), (step::Position{6, 7, 6}));
}

TEST(ComputePositions, RefusesTokensThatDoNotMatchTheGrids) {
  const std::vector<int32_t> two = {kImage, kImage};
  EXPECT_TRUE(ComputePositions(two, kIds, Grids{{1, 4, 2}}, {}).ok());
  EXPECT_FALSE(ComputePositions(two, kIds, Grids{{1, 2, 2}}, {}).ok());                // run too long
  EXPECT_FALSE(ComputePositions(two, kIds, Grids{{1, 4, 4}}, {}).ok());                // run too short
  EXPECT_FALSE(ComputePositions(two, kIds, {}, {}).ok());                              // no picture
  EXPECT_FALSE(ComputePositions(two, kIds, Grids{{1, 4, 2}, {1, 2, 2}}, {}).ok());     // a picture without tokens
  EXPECT_FALSE(ComputePositions(two, kIds, Grids{{1, 2, 2}, {1, 2, 2}}, {}).ok());     // two pictures without a border
  EXPECT_FALSE(ComputePositions(two, kIds, Grids{{1, 4, 3}}, {}).ok());                // not in merge blocks
  EXPECT_FALSE(ComputePositions(two, kIds, Grids{{0, 4, 2}}, {}).ok());
  EXPECT_FALSE(ComputePositions(std::vector<int32_t>{kVideo}, kIds, {}, Grids{{2, 2, 2}}).ok());
}

}  // namespace
}  // namespace qwen::preprocess
