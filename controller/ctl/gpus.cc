#include "controller/ctl/gpus.h"

#include <unistd.h>

#include "stage/base/check.h"

namespace qwen::ctl {

std::vector<std::string> UsableGpus(const char* visible, const std::string& dev) {
  std::vector<std::string> gpus;
  if (visible != nullptr) {
    std::string_view rest = visible;
    while (!rest.empty()) {
      const size_t comma = rest.find(',');
      if (const std::string_view one = rest.substr(0, comma); !one.empty()) gpus.emplace_back(one);
      rest = comma == std::string_view::npos ? std::string_view() : rest.substr(comma + 1);
    }
    return gpus;
  }
  while (::access((dev + "/nvidia" + std::to_string(gpus.size())).c_str(), F_OK) == 0) gpus.push_back(std::to_string(gpus.size()));
  return gpus;
}

const std::string& GpuOfStage(const std::vector<std::string>& gpus, size_t stage, size_t stages) {
  QP_CHECK(!gpus.empty() && stage < stages);
  return gpus.size() >= stages ? gpus[stage] : gpus[stage * gpus.size() / stages];
}

}  // namespace qwen::ctl
