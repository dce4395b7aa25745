// controller/ctl/runner.h — a pipeline as local processes: start, wait until it serves, watch, drain. What `qwenctl run` does.
//
//   starting --/ready is 200--> serving --signal or answered--> draining --all ended--> done
//   A stage that ends while the pipeline serves is started again as spec.restart says (budget, back-off), under an epoch of its own: the
//     others keep their weights and the head its requests, as in a cluster. Unless its exit code says that it would be the same again.
//   Any other child that ends before the drain: stopping (SIGTERM, kStopGrace, SIGKILL), and its end is the reason and the exit code.
//
// Drain: SIGTERM to the head alone, which finishes its requests and tells the stages to end; stages that are still there
// kStageGrace after it get SIGTERM. A second signal ends everything at once. Threads: Run's own, and one for the question.
#pragma once
#include <chrono>
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "controller/ctl/children.h"
#include "controller/ctl/http_client.h"
#include "controller/plan/desired.h"
#include "controller/plan/group.h"
#include "stage/base/status.h"

namespace qwen::ctl {

struct RunnerOptions {
  std::vector<plan::Process> processes;  // head first
  std::string bin_dir;                   // folder of qwen-head and qwen-stage
  Url api;                               // of the head
  std::vector<uint16_t> metrics_ports;   // one per stage
  std::chrono::seconds ready_timeout{900};  // a 118 GB shard from a cold disk at 0.2 GB/s takes 10 minutes
  std::chrono::seconds drain_timeout{60};
  api::Restart restart{.budget = 0};  // of stages that end while the pipeline serves
  // Called once on a thread of its own when the pipeline serves; when it returns, the pipeline is drained. Its status becomes the
  // run's. Empty: serve until a signal comes.
  std::function<Status()> when_ready;
  std::FILE* out = stdout;  // "ready URL"
  std::FILE* log = stderr;  // the children's lines with their names in front
  bool colour = false;
};

class Runner {
 public:
  static constexpr std::chrono::seconds kStopGrace{5};
  static constexpr std::chrono::seconds kStageGrace{3};

  explicit Runner(RunnerOptions options);
  ~Runner();  // no child outlives it

  // Blocks SIGINT, SIGTERM, SIGHUP for the calling thread while it runs and treats them as the wish to drain. The exit code: 0
  // after a drain in which every child ended with 0; else that of the first child that failed (1 when it has none of its own).
  // The reason of a failure is the last line on `log`.
  int Run();

 private:
  using Clock = std::chrono::steady_clock;
  enum class Phase { kStarting, kServing, kDraining, kStopping };

  Status StartAll();
  void Handle(const ChildEvent& event);
  bool MayComeBack(const ChildEvent& end, const std::string& why);  // true: it will be started again
  void StartAgain();                                                 // whose time has come
  void HandleSignal();
  void Tick();               // what time alone makes happen
  void ProbeReady();
  void ShowLoading();
  void Drain();
  void Stop(Status why, int code);
  void Log(size_t child, const std::string& line);
  void LogHeld();
  void Say(const std::string& line);

  const RunnerOptions options_;
  Children children_;
  Phase phase_ = Phase::kStarting;
  Clock::time_point started_, phase_since_, next_probe_, next_progress_;
  std::optional<Clock::time_point> head_ended_;
  std::map<size_t, Clock::time_point> due_;  // stages that ended -> when they are started again
  int32_t failures_ = 0;                     // of stages, since the last quiet time of plan::kStableSeconds
  Clock::time_point last_failure_;
  int64_t epoch_ = 0;                        // of the youngest stage
  bool stages_told_ = false, killed_ = false;
  std::string last_progress_;
  std::vector<std::string> last_error_line_;  // per child: the last line that says ERROR, else the last line
  static constexpr size_t kHeldLinesMax = 1000;
  std::vector<std::pair<size_t, std::string>> held_;  // log lines that came while the question was being answered
  Status failure_;
  int exit_code_ = 0;

  std::thread question_;
  int question_done_ = -1;  // eventfd
  Status question_status_;  // written by question_ before question_done_ is readable
  int signals_ = -1;        // signalfd
};

}  // namespace qwen::ctl
