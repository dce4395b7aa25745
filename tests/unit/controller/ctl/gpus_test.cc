// Which GPU each stage of a local run gets.
#include "controller/ctl/gpus.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

namespace qwen::ctl {
namespace {

using Names = std::vector<std::string>;

TEST(Gpus, TheVariableNamesThemOrTheDeviceFilesDo) {
  EXPECT_EQ(UsableGpus("2,GPU-8a,0"), (Names{"2", "GPU-8a", "0"}));
  EXPECT_EQ(UsableGpus(""), Names());  // CUDA's own meaning: none
  const std::filesystem::path dev = std::filesystem::path(::testing::TempDir()) / "gpus_test_dev";
  std::filesystem::remove_all(dev);
  std::filesystem::create_directories(dev);
  EXPECT_EQ(UsableGpus(nullptr, dev.string()), Names());
  for (const char* name : {"nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "nvidia3"}) std::ofstream(dev / name).put('x');
  EXPECT_EQ(UsableGpus(nullptr, dev.string()), (Names{"0", "1"}));
  std::filesystem::remove_all(dev);
}

TEST(Gpus, EachStageHasItsOwnOrNeighboursShareOne) {
  const Names four = {"a", "b", "c", "d"}, two = {"a", "b"};
  EXPECT_EQ(GpuOfStage(four, 2, 3), "c");
  Names given;
  for (size_t s = 0; s < 5; ++s) given.push_back(GpuOfStage(two, s, 5));
  EXPECT_EQ(given, (Names{"a", "a", "a", "b", "b"}));
}

}  // namespace
}  // namespace qwen::ctl
