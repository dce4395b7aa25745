// controller/ctl/run_command.h — from a manifest on disk to running local processes, and the report of `run --ask`.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "controller/ctl/chat_client.h"
#include "controller/ctl/metrics_text.h"
#include "stage/base/status.h"

namespace qwen::ctl {

struct RunFlags {
  std::string manifest;
  std::string device;           // "", "cpu" or "cuda": instead of the manifest's
  std::optional<int> stages;    // instead of the manifest's
  std::optional<int> port;      // instead of the manifest's; 0: any free one
  std::string ask;              // a question: ask it, print the answer and a table, end
  std::string image;            // a picture that goes with it
  int max_tokens = 0;           // of the answer; 0: the server's default
  std::optional<uint64_t> random_weights;  // seed of noise instead of the checkpoint's weights
  std::string bin_dir;          // empty: where qwenctl itself lies
  std::string log_level = "info";
  int ready_timeout_seconds = 900;
};
// The exit code (runner.h).
int Run(const RunFlags& flags);

// One row of the report, out of a stage's /metrics.
struct StageReport {
  std::string name, layers;
  double weight_bytes = 0, forward_seconds = 0, transfer_seconds = 0, transfer_bytes = 0;
};
StageReport ReportOf(const std::string& name, const Metrics& metrics);
std::string AskReport(const ChatResult& answer, const std::vector<StageReport>& stages);

}  // namespace qwen::ctl
