// Expansion of placeholders, written out by hand.
#include "stage/vision/preprocess/prompt.h"

#include <gtest/gtest.h>

#include "tests/unit/stage/vision/preprocess/fixtures.h"

namespace qwen::preprocess {
namespace {

TEST(ExpandPlaceholders, RepeatsAnImagePadPerMergedToken) {
  const ImageMedia images[] = {{{1, 4, 2}}, {{1, 2, 2}}};
  const auto text = ExpandPlaceholders("a<|vision_start|><|image_pad|><|vision_end|>b<|image_pad|>c", images, {});
  EXPECT_EQ(*text, "a<|vision_start|><|image_pad|><|image_pad|><|vision_end|>b<|image_pad|>c");
}

TEST(ExpandPlaceholders, WritesOneTimedSpanPerFramePairInsideTheTemplatesMarkers) {
  const VideoMedia videos[] = {{{2, 2, 4}, {0.25, 1.75}}};
  const auto text = ExpandPlaceholders("<|vision_start|><|video_pad|><|vision_end|>?", {}, videos);
  EXPECT_EQ(*text,
            "<|vision_start|>"
            "<0.2 seconds><|vision_start|><|video_pad|><|video_pad|><|vision_end|>"
            "<1.8 seconds><|vision_start|><|video_pad|><|video_pad|><|vision_end|>"
            "<|vision_end|>?");
}

TEST(ExpandPlaceholders, TakesImagesAndVideosInTheOrderOfTheText) {
  const ImageMedia images[] = {{{1, 2, 2}}, {{1, 2, 4}}};
  const VideoMedia videos[] = {{{1, 2, 2}, {3.0}}};
  const auto text = ExpandPlaceholders("<|image_pad|>-<|video_pad|>-<|image_pad|>", images, videos);
  EXPECT_EQ(*text, "<|image_pad|>-<3.0 seconds><|vision_start|><|video_pad|><|vision_end|>-<|image_pad|><|image_pad|>");
}

TEST(ExpandPlaceholders, LeavesTextWithoutMediaAlone) { EXPECT_EQ(*ExpandPlaceholders("plain <|im_end|>", {}, {}), "plain <|im_end|>"); }

TEST(ExpandPlaceholders, RefusesAMismatchNamingBothCounts) {
  const ImageMedia images[] = {{{1, 2, 2}}};
  const VideoMedia videos[] = {{{1, 2, 2}, {0.0}}};
  for (const auto& result : {ExpandPlaceholders("none", images, {}), ExpandPlaceholders("<|image_pad|>", {}, {}),
                             ExpandPlaceholders("<|image_pad|><|image_pad|>", images, {}),
                             ExpandPlaceholders("<|video_pad|>", images, {}), ExpandPlaceholders("", {}, videos)}) {
    ASSERT_FALSE(result.ok());
    EXPECT_EQ(result.status().code(), StatusCode::kInvalidArgument);
  }
  EXPECT_NE(ExpandPlaceholders("<|image_pad|><|image_pad|>", images, {}).status().message().find("2 image placeholders for 1"),
            std::string::npos);
  const VideoMedia untimed[] = {{{2, 2, 2}, {0.0}}};
  EXPECT_FALSE(ExpandPlaceholders("<|video_pad|>", {}, untimed).ok());
}

TEST(FormatSeconds, EqualsPythonsFormat) {
  for (const auto& row : fixtures::Expected("seconds")) EXPECT_EQ(FormatSeconds(std::stod(row[0])), row[1]) << row[0];
}

}  // namespace
}  // namespace qwen::preprocess
