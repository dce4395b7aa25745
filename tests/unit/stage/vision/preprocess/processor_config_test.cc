// Reading preprocessor_config.json; parity with transformers' own reader is in tests/parity.
#include "stage/vision/preprocess/processor_config.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

namespace qwen::preprocess {
namespace {

constexpr char kImage[] =
    R"({"size": {"longest_edge": 16777216, "shortest_edge": 65536}, "patch_size": 16, "temporal_patch_size": 2,
        "merge_size": 2, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]})";

TEST(ProcessorConfig, ReadsTheReleasedImageFile) {
  const auto config = ParseImageProcessorConfig(kImage);
  ASSERT_TRUE(config.ok()) << config.status().ToString();
  EXPECT_EQ(config->budget.min_pixels, 65536);
  EXPECT_EQ(config->budget.max_pixels, 16777216);
  EXPECT_EQ(config->factor(), 32);
  EXPECT_EQ(config->normalization.mean, (std::array<float, 3>{127.5f, 127.5f, 127.5f}));
  EXPECT_EQ(config->normalization.std, (std::array<float, 3>{127.5f, 127.5f, 127.5f}));
}

TEST(ProcessorConfig, LetsTheOlderSpellingWin) {
  const auto config = ParseImageProcessorConfig(R"({"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 16})");
  EXPECT_EQ(config->budget.min_pixels, 3136);
  EXPECT_EQ(config->budget.max_pixels, 12845056);
}

TEST(ProcessorConfig, TakesNullAsAbsent) {
  const auto config = ParseVideoProcessorConfig(R"({"fps": null, "cap_pixels_per_frame": null, "max_frames": 10})");
  ASSERT_TRUE(config.ok()) << config.status().ToString();
  EXPECT_EQ(config->fps, 2.0);
  EXPECT_EQ(config->max_frames, 10);
  EXPECT_FALSE(config->cap_pixels_per_frame);
}

TEST(ProcessorConfig, NamesTheKeyThatIsWrong) {
  const std::pair<const char*, const char*> cases[] = {{R"({"patch_size": 0})", "patch_size"},
                                                       {R"({"patch_size": "16"})", "patch_size"},
                                                       {R"({"size": {"shortest_edge": 5}})", "size"},
                                                       {R"({"size": 224})", "size"},
                                                       {R"({"image_std": [0.5, 0, 0.5]})", "image_std"},
                                                       {R"({"image_mean": [0.5, 0.5]})", "image_mean"},
                                                       {R"({"rescale_factor": -1})", "rescale_factor"},
                                                       {R"({"do_normalize": false})", "do_normalize"},
                                                       {R"({"do_resize": 1})", "do_resize"},
                                                       {R"({"resample": 2})", "resample"},
                                                       {"[]", "not a JSON object"},
                                                       {"{", "not a JSON object"}};
  for (const auto& [json, part] : cases) {
    const auto config = ParseImageProcessorConfig(json);
    ASSERT_FALSE(config.ok()) << json;
    EXPECT_EQ(config.status().code(), StatusCode::kInvalidArgument);
    EXPECT_NE(config.status().message().find(part), std::string::npos) << config.status().ToString();
  }
}

TEST(ProcessorConfig, PrefersTheJointFileAndFallsBackToTheImageFile) {
  std::string dir = std::filesystem::temp_directory_path() / "qp_config_XXXXXX";
  ASSERT_NE(mkdtemp(dir.data()), nullptr);
  EXPECT_EQ(LoadProcessorConfig(dir).status().code(), StatusCode::kNotFound);
  std::ofstream(dir + "/preprocessor_config.json") << kImage;
  auto config = LoadProcessorConfig(dir);
  ASSERT_TRUE(config.ok()) << config.status().ToString();
  EXPECT_EQ(config->video.budget.max_pixels, 16777216);
  std::ofstream(dir + "/video_preprocessor_config.json") << R"({"max_frames": 5})";
  EXPECT_EQ(LoadProcessorConfig(dir)->video.max_frames, 5);
  std::ofstream(dir + "/processor_config.json") << R"({"image_processor": {"patch_size": 8}, "video_processor": {"max_frames": 7}})";
  config = LoadProcessorConfig(dir);
  EXPECT_EQ(config->image.patch_size, 8);
  EXPECT_EQ(config->video.max_frames, 7);
  std::ofstream(dir + "/video_preprocessor_config.json") << "broken";
  EXPECT_NE(LoadProcessorConfig(dir).status().message().find("video_preprocessor_config.json"), std::string::npos);
  std::filesystem::remove_all(dir);
}

}  // namespace
}  // namespace qwen::preprocess
