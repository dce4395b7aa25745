// controller/ctl/gpus.h — which GPU each local stage gets. Thread safety: pure apart from reading the file system.
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace qwen::ctl {

// The names that CUDA_VISIBLE_DEVICES may hold here: those of `visible` (the variable as this process has it) when it is
// set, else 0 … n-1 for the n devices /dev/nvidia0, … under `dev`. Empty when there is none.
std::vector<std::string> UsableGpus(const char* visible, const std::string& dev = "/dev");

// Of `stages` stages, the GPU of stage `stage`: neighbours lie together when there are fewer GPUs than stages.
const std::string& GpuOfStage(const std::vector<std::string>& gpus, size_t stage, size_t stages);

}  // namespace qwen::ctl
