#include "controller/ctl/runner.h"

#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>

#include "controller/ctl/metrics_text.h"
#include "stage/contract/pod_contract.h"

namespace qwen::ctl {
namespace {

constexpr auto kProbeInterval = std::chrono::milliseconds(200);
constexpr auto kProbeTimeout = std::chrono::milliseconds(500);
constexpr auto kProgressInterval = std::chrono::seconds(2);
// ANSI foregrounds that are readable on light and dark: cyan, green, yellow, magenta, blue.
constexpr int kColours[] = {36, 32, 33, 35, 34};

std::vector<int> StopSignals() { return {SIGINT, SIGTERM, SIGHUP}; }

}  // namespace

Runner::Runner(RunnerOptions options) : options_(std::move(options)) {}

Runner::~Runner() {
  if (question_.joinable()) {
    children_.SignalAll(SIGKILL);  // closes the connection that the question may be waiting on
    question_.join();
  }
  if (question_done_ >= 0) ::close(question_done_);
  if (signals_ >= 0) ::close(signals_);
}

void Runner::Say(const std::string& line) {
  std::fprintf(options_.log, "%s\n", line.c_str());
  std::fflush(options_.log);
}

void Runner::Log(size_t child, const std::string& line) {
  const std::string& name = children_.name(child);
  if (options_.colour) {
    std::fprintf(options_.log, "\x1b[%dm%-8s|\x1b[0m %s\n", kColours[child % std::size(kColours)], name.c_str(), line.c_str());
  } else {
    std::fprintf(options_.log, "%-8s| %s\n", name.c_str(), line.c_str());
  }
  std::fflush(options_.log);
}

void Runner::LogHeld() {
  for (const auto& [child, line] : held_) Log(child, line);
  held_.clear();
}

Status Runner::StartAll() {
  for (const plan::Process& process : options_.processes) {
    const std::string program = options_.bin_dir + "/" + process.program;
    RETURN_IF_ERROR(children_.Start({.name = process.name, .program = program, .args = process.args, .env = process.env}).WithContext("cannot start " + process.name));
    last_error_line_.emplace_back();
  }
  return OkStatus();
}

int Runner::Run() {
  sigset_t mask, before;
  ::sigemptyset(&mask);
  for (const int signal : StopSignals()) ::sigaddset(&mask, signal);
  ::pthread_sigmask(SIG_BLOCK, &mask, &before);
  signals_ = ::signalfd(-1, &mask, SFD_NONBLOCK | SFD_CLOEXEC);
  question_done_ = ::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  QP_CHECK(signals_ >= 0 && question_done_ >= 0) << "errno " << errno;

  started_ = phase_since_ = next_probe_ = Clock::now();
  next_progress_ = started_ + kProgressInterval;
  if (Status status = StartAll(); !status.ok()) Stop(status, static_cast<int>(contract::ExitCode::kInternal));
  while (children_.any_running()) {
    for (const ChildEvent& event : children_.Poll(100, signals_)) Handle(event);
    HandleSignal();
    Tick();
  }
  if (question_.joinable()) question_.join();
  if (!failure_.ok()) Say("error: " + failure_.message());
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return exit_code_;
}

void Runner::Handle(const ChildEvent& event) {
  if (event.kind == ChildEvent::Kind::kLine) {
    if (question_.joinable() && phase_ == Phase::kServing && held_.size() < kHeldLinesMax) {
      held_.emplace_back(event.child, event.line);  // a log line in the middle of the streamed answer would tear it
    } else {
      LogHeld();
      Log(event.child, event.line);
    }
    std::string& last = last_error_line_[event.child];
    if (event.line.find("ERROR") != std::string::npos || last.find("ERROR") == std::string::npos) last = event.line;
    return;
  }
  const std::string& name = children_.name(event.child);
  const bool clean = WIFEXITED(event.wait_status) && WEXITSTATUS(event.wait_status) == 0;
  if (event.child == 0) head_ended_ = Clock::now();
  if (phase_ == Phase::kStopping || (phase_ == Phase::kDraining && clean)) return;
  std::string why = name + " " + DescribeExit(event.wait_status);
  if (clean) why += " although it was not asked to";
  if (!last_error_line_[event.child].empty()) why += ": " + last_error_line_[event.child];
  if (MayComeBack(event, why)) return;
  const int code = WIFEXITED(event.wait_status) && !clean ? WEXITSTATUS(event.wait_status) : static_cast<int>(contract::ExitCode::kInternal);
  Stop(InternalError(why), code);
}

bool Runner::MayComeBack(const ChildEvent& end, const std::string& why) {
  if (phase_ != Phase::kServing || end.child == 0) return false;
  if (WIFEXITED(end.wait_status) && plan::IsHopeless(WEXITSTATUS(end.wait_status))) return false;
  const auto now = Clock::now();
  if (now - last_failure_ > std::chrono::seconds(plan::kStableSeconds)) failures_ = 0;
  if (++failures_ > options_.restart.budget) return false;
  last_failure_ = now;
  const int64_t seconds = plan::BackoffSeconds(options_.restart, failures_);
  due_[end.child] = now + std::chrono::seconds(seconds);
  last_error_line_[end.child].clear();
  Say(why + "; it is started again " + (seconds == 0 ? "at once" : "in " + std::to_string(seconds) + " s") + ", the other stages keep their weights");
  return true;
}

void Runner::StartAgain() {
  for (auto due = due_.begin(); due != due_.end();) {
    if (Clock::now() < due->second) {
      ++due;
      continue;
    }
    const size_t child = due->first;
    due = due_.erase(due);
    const Status started = children_.StartAgain(child, {{std::string(contract::kEnvEpoch), std::to_string(++epoch_)}});
    if (!started.ok()) return Stop(started.WithContext("cannot start " + children_.name(child) + " again"), static_cast<int>(contract::ExitCode::kInternal));
  }
}

void Runner::HandleSignal() {
  signalfd_siginfo info{};
  while (::read(signals_, &info, sizeof(info)) == sizeof(info)) {
    if (phase_ == Phase::kDraining || phase_ == Phase::kStopping) {
      Say("second signal: killing all processes");
      killed_ = true;
      children_.SignalAll(SIGKILL);
      if (failure_.ok()) {
        failure_ = CancelledError("killed by a second signal");
        exit_code_ = static_cast<int>(contract::ExitCode::kDrainTimeout);
      }
      phase_ = Phase::kStopping;
    } else {
      Say("draining: running requests are finished; a second signal ends them");
      Drain();
    }
  }
}

void Runner::Drain() {
  LogHeld();
  const bool serving = phase_ == Phase::kServing;
  phase_ = Phase::kDraining;
  phase_since_ = Clock::now();
  if (serving) {
    children_.Signal(0, SIGTERM);
  } else {
    stages_told_ = true;  // nothing is served yet: nobody to wait for
    children_.SignalAll(SIGTERM);
  }
}

void Runner::Stop(Status why, int code) {
  if (phase_ == Phase::kStopping) return;
  LogHeld();
  failure_ = std::move(why);
  exit_code_ = code;
  phase_ = Phase::kStopping;
  phase_since_ = Clock::now();
  children_.SignalAll(SIGTERM);
}

void Runner::Tick() {
  const auto now = Clock::now();
  const auto in_phase = now - phase_since_;
  uint64_t ignored;
  switch (phase_) {
    case Phase::kStarting:
      if (now >= next_probe_) ProbeReady();
      if (phase_ == Phase::kStarting && now >= next_progress_) ShowLoading();
      if (phase_ == Phase::kStarting && now - started_ > options_.ready_timeout)
        Stop(DeadlineExceededError("not ready after " + std::to_string(options_.ready_timeout.count()) + " s"), static_cast<int>(contract::ExitCode::kInternal));
      break;
    case Phase::kServing:
      StartAgain();
      if (question_.joinable() && ::read(question_done_, &ignored, sizeof(ignored)) == sizeof(ignored)) {
        question_.join();
        if (question_status_.ok()) {
          Drain();
        } else {
          Stop(question_status_, static_cast<int>(contract::ExitCode::kInternal));
        }
      }
      break;
    case Phase::kDraining:
      if (!head_ended_ && !stages_told_) StartAgain();  // requests may be waiting for it
      if (head_ended_ && !stages_told_ && now - *head_ended_ > kStageGrace) {
        stages_told_ = true;
        children_.SignalAll(SIGTERM);
      }
      // The head has drain_timeout of its own; what is given on top is for its goodbye to the stages.
      if (in_phase > options_.drain_timeout + kStopGrace + kStageGrace)
        Stop(DeadlineExceededError("not drained after " + std::to_string(options_.drain_timeout.count()) + " s"),
             static_cast<int>(contract::ExitCode::kDrainTimeout));
      break;
    case Phase::kStopping:
      if (!killed_ && in_phase > kStopGrace) {
        killed_ = true;
        children_.SignalAll(SIGKILL);
      }
      break;
  }
}

void Runner::ProbeReady() {
  const auto answer = HttpGet(options_.api, contract::kReadyPath, kProbeTimeout);
  next_probe_ = Clock::now() + kProbeInterval;
  if (!answer.ok() || answer->status != 200) return;
  phase_ = Phase::kServing;
  phase_since_ = Clock::now();
  char line[512];
  std::snprintf(line, sizeof(line), "ready http://%s:%u", options_.api.host.c_str(), options_.api.port);
  std::fprintf(options_.out, "%s\n", line);
  std::fflush(options_.out);
  if (!options_.when_ready) return;
  question_ = std::thread([this] {
    question_status_ = options_.when_ready();
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = ::write(question_done_, &one, sizeof(one));
  });
}

void Runner::ShowLoading() {
  next_progress_ = Clock::now() + kProgressInterval;
  std::string line;
  for (size_t k = 0; k < options_.metrics_ports.size(); ++k) {
    const Url url{.host = options_.api.host, .port = options_.metrics_ports[k]};
    const auto scrape = HttpGet(url, contract::kMetricsPath, kProbeTimeout / 2);
    const auto share = scrape.ok() ? Metrics::Parse(scrape->body).Sum("qwen_stage_load_progress") : std::nullopt;
    line += "  " + children_.name(k + 1) + " " + (share ? std::to_string(static_cast<int>(*share * 100)) + "%" : "-");
  }
  if (line == last_progress_) return;
  last_progress_ = line;
  Say("loading " + line);
}

}  // namespace qwen::ctl
