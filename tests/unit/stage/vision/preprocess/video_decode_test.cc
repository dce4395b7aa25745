// Videos against hashes that PyAV computed (fixtures/expected.txt), and against files that want to do harm.
#include "stage/vision/preprocess/video_decode.h"

#include <gtest/gtest.h>

#include <random>

#include "tests/unit/stage/vision/preprocess/fixtures.h"

namespace qwen::preprocess {
namespace {

using fixtures::Load;

TEST(SampleFrameIndices, EqualsTheReferencesTable) {
  for (const auto& row : fixtures::Expected("sample")) {
    const auto indices = SampleFrameIndices(std::stoll(row[0]), std::stod(row[1]), {});
    ASSERT_TRUE(indices.ok());
    EXPECT_EQ(*indices, fixtures::SplitNumbers(row[2])) << row[0] << " frames at " << row[1];
  }
  EXPECT_FALSE(SampleFrameIndices(0, 30.0, {}).ok());
  EXPECT_FALSE(SampleFrameIndices(10, 0.0, {}).ok());
}

TEST(DecodeVideo, GivesTheFramesThatPyAvGives) {
  for (const auto& row : fixtures::Expected("video")) {
    const auto video = DecodeVideo(Load(row[0]), {});
    ASSERT_TRUE(video.ok()) << row[0] << ": " << video.status().ToString();
    EXPECT_EQ(video->total_frames, std::stoll(row[1])) << row[0];
    EXPECT_EQ(video->fps, std::stod(row[2])) << row[0];
    EXPECT_EQ(video->indices, fixtures::SplitNumbers(row[3])) << row[0];
    ASSERT_EQ(video->frames.size(), video->indices.size()) << row[0];
    uint64_t hash = fixtures::Fnv1a({});
    for (const Image& frame : video->frames) hash = fixtures::Fnv1a(frame.rgb, hash);
    EXPECT_EQ(fixtures::Hex(hash), row[4]) << row[0];
  }
}

TEST(MakeVideoInputFromFile, EqualsDecodingFirstAndResizingAfterwards) {
  for (const auto& row : fixtures::Expected("video")) {
    const auto direct = MakeVideoInputFromFile(Load(row[0]), {});
    ASSERT_TRUE(direct.ok()) << direct.status().ToString();
    const auto sampled = DecodeVideo(Load(row[0]), {});
    const auto later = MakeVideoInput(sampled->frames, sampled->indices, sampled->fps, {});
    EXPECT_EQ(direct->input.grid, later->input.grid);
    EXPECT_EQ(direct->input.patches, later->input.patches);
    EXPECT_EQ(direct->timestamps, later->timestamps);
  }
}

void ExpectRefused(std::span<const std::byte> bytes, const std::string& part, const VideoLimits& limits = {}) {
  for (const Status& status : {DecodeVideo(bytes, {}, limits).status(), MakeVideoInputFromFile(bytes, {}, limits).status()}) {
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << part;
    EXPECT_NE(status.message().find(part), std::string::npos) << status.ToString();
  }
}

TEST(DecodeVideo, ChecksItsLimits) {
  const auto file = Load("h264.mp4");  // 45 frames of 64x48 at 29.97
  ExpectRefused(file, "bytes is over the limit", {.max_bytes = 100});
  ExpectRefused(file, "video frames of 64x48", {.max_frame_pixels = 64 * 48 - 1});
  ExpectRefused(file, "45 frames is over the limit", {.max_source_frames = 44});
  ExpectRefused(file, "longer than 1 s", {.max_duration_s = 1.0});
  ExpectRefused(file, "pixels", {.max_decoded_pixels = 45 * 64 * 48 - 1});
  EXPECT_FALSE(DecodeVideo(file, {}, {.max_sampled_pixels = 4 * 64 * 48 - 1}).ok());
  EXPECT_TRUE(DecodeVideo(file, {}, {.max_frame_pixels = 64 * 48, .max_source_frames = 45, .max_duration_s = 2.0,
                                     .max_decoded_pixels = 45 * 64 * 48, .max_sampled_pixels = 4 * 64 * 48}).ok());
}

TEST(DecodeVideo, OpensNothingButTheGivenBytes) {
  // Playlists and scripts that libavformat would follow to other files, were they not shut out.
  const std::string hls = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n";
  const std::string concat = "ffconcat version 1.0\nfile '/etc/passwd'\n";
  for (const std::string& text : {hls, concat, std::string("not a video"), std::string()}) {
    ExpectRefused(std::as_bytes(std::span(text)), "");
  }
  ExpectRefused(Load("rgb.png"), "");
}

TEST(DecodeVideo, SurvivesTruncationAndFlippedBits) {
  std::mt19937 random(20260101);
  const VideoLimits limits{.max_frame_pixels = 1 << 16, .max_source_frames = 1000, .max_decoded_pixels = 1 << 26};
  for (const auto& row : fixtures::Expected("video")) {
    const auto whole = Load(row[0]);
    for (int round = 0; round < 40; ++round) {
      auto broken = whole;
      if (round % 4 == 0) broken.resize(random() % broken.size());
      for (int flips = round % 7; flips > 0 && !broken.empty(); --flips) {
        broken[random() % broken.size()] ^= std::byte(1 << random() % 8);
      }
      const auto video = MakeVideoInputFromFile(broken, {}, limits);
      if (video.ok()) {
        EXPECT_EQ(video->timestamps.size(), static_cast<size_t>(video->input.grid[0]));
        EXPECT_EQ(video->input.patches.size(), static_cast<size_t>(video->input.patch_count()) * 1536);
      } else {
        EXPECT_EQ(video.status().code(), StatusCode::kInvalidArgument) << video.status().ToString();
      }
    }
  }
}

}  // namespace
}  // namespace qwen::preprocess
