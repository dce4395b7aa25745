#include "controller/ctl/children.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>

#include "stage/base/check.h"
#include "stage/contract/pod_contract.h"

extern char** environ;

namespace qwen::ctl {
namespace {

// Between fork and exec only async-signal-safe calls: everything is prepared before.
[[noreturn]] void ExecChild(const char* program, char* const* argv, char* const* envp, int output, int failure, pid_t parent) {
  ::setpgid(0, 0);
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != parent) ::_exit(127);  // the parent ended before prctl
  sigset_t none;
  ::sigemptyset(&none);
  ::sigprocmask(SIG_SETMASK, &none, nullptr);  // `run` blocks signals for its signalfd; a blocked SIGTERM would be inherited
  ::signal(SIGPIPE, SIG_DFL);
  const int null = ::open("/dev/null", O_RDONLY);
  if (null >= 0) ::dup2(null, 0);
  ::dup2(output, 1);
  ::dup2(output, 2);
  ::execve(program, argv, envp);
  const int error = errno;
  [[maybe_unused]] const ssize_t ignored = ::write(failure, &error, sizeof(error));
  ::_exit(127);
}

}  // namespace

Status Children::Start(const ChildSpec& spec) {
  ASSIGN_OR_RETURN(Child child, Launch(spec));
  children_.push_back(std::move(child));
  return OkStatus();
}

Status Children::StartAgain(size_t index, const std::map<std::string, std::string>& env) {
  QP_CHECK(!running(index));
  ChildSpec spec = children_[index].spec;
  for (const auto& [name, value] : env) spec.env[name] = value;
  ASSIGN_OR_RETURN(children_[index], Launch(spec));
  return OkStatus();
}

Result<Children::Child> Children::Launch(const ChildSpec& spec) {
  std::vector<std::string> words{spec.program};
  words.insert(words.end(), spec.args.begin(), spec.args.end());
  std::vector<std::string> variables;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text(*entry);
    if (!spec.env.count(std::string(text.substr(0, text.find('='))))) variables.emplace_back(text);
  }
  for (const auto& [name, value] : spec.env) variables.push_back(name + "=" + value);
  std::vector<char*> argv, envp;
  for (std::string& word : words) argv.push_back(word.data());
  for (std::string& variable : variables) envp.push_back(variable.data());
  argv.push_back(nullptr);
  envp.push_back(nullptr);

  int output[2], failure[2];
  if (::pipe2(output, O_CLOEXEC) != 0) return ErrnoError("pipe", errno);
  if (::pipe2(failure, O_CLOEXEC) != 0) {
    const int error = errno;
    ::close(output[0]);
    ::close(output[1]);
    return ErrnoError("pipe", error);
  }
  const pid_t parent = ::getpid();
  const pid_t pid = ::fork();
  if (pid == 0) ExecChild(spec.program.c_str(), argv.data(), envp.data(), output[1], failure[1], parent);
  const int fork_error = errno;
  ::close(output[1]);
  ::close(failure[1]);
  int exec_error = pid < 0 ? fork_error : 0;
  if (pid > 0) {
    ::setpgid(pid, pid);  // both sides: whoever comes first
    // Ends at once when exec succeeds: the pipe is close-on-exec.
    ssize_t got;
    while ((got = ::read(failure[0], &exec_error, sizeof(exec_error))) < 0 && errno == EINTR) {
    }
    if (got == 0) exec_error = 0;
  }
  ::close(failure[0]);
  if (exec_error != 0) {
    ::close(output[0]);
    if (pid > 0) ::waitpid(pid, nullptr, 0);
    return ErrnoError(spec.program, exec_error);
  }
  ::fcntl(output[0], F_SETFL, O_NONBLOCK);
  return Child{.spec = spec, .pid = pid, .group = pid, .output = output[0]};
}

Children::~Children() {
  for (Child& child : children_) {
    if (child.group > 0) ::kill(-child.group, SIGKILL);
    if (child.pid > 0) ::waitpid(child.pid, nullptr, 0);
    if (child.output >= 0) ::close(child.output);
  }
}

bool Children::any_running() const {
  return std::any_of(children_.begin(), children_.end(), [](const Child& child) { return child.pid > 0; });
}

void Children::Drain(size_t index, std::vector<ChildEvent>& events) {
  Child& child = children_[index];
  char buffer[8192];
  for (int reads = 0; reads < 128; ++reads) {  // 1 MiB a turn: a child that writes without end must not starve the others
    const ssize_t got = ::read(child.output, buffer, sizeof(buffer));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) {
      if (got == 0 || errno != EAGAIN) {
        ::close(child.output);
        child.output = -1;
      }
      break;
    }
    for (const char c : std::string_view(buffer, static_cast<size_t>(got))) {
      if (c != '\n') child.partial.push_back(c);
      if (c == '\n' || child.partial.size() >= kLineBytesMax) {
        events.push_back({.kind = ChildEvent::Kind::kLine, .child = index, .line = std::exchange(child.partial, {})});
      }
    }
  }
  if (child.output < 0 && !child.partial.empty()) events.push_back({.kind = ChildEvent::Kind::kLine, .child = index, .line = std::exchange(child.partial, {})});
}

std::vector<ChildEvent> Children::Poll(int timeout_ms, int wake_fd) {
  std::vector<pollfd> waits;
  for (const Child& child : children_)
    if (child.output >= 0) waits.push_back({child.output, POLLIN, 0});
  if (wake_fd >= 0) waits.push_back({wake_fd, POLLIN, 0});
  // A child whose output is closed can only be noticed by waitpid: look at least every 100 ms. (The end of a child closes its
  // output, so in the usual case poll returns at once.)
  ::poll(waits.data(), waits.size(), std::min(timeout_ms, 100));

  std::vector<ChildEvent> events;
  for (size_t i = 0; i < children_.size(); ++i) {
    Child& child = children_[i];
    if (child.output >= 0) Drain(i, events);
    if (child.pid <= 0) continue;
    int status = 0;
    if (::waitpid(child.pid, &status, WNOHANG) != child.pid) continue;
    child.pid = 0;
    if (child.output >= 0) Drain(i, events);  // what it wrote between the first read and its end
    // Descendants that it left behind hold the pipe open; they end with it, and what they still say is not waited for.
    ::kill(-child.group, SIGKILL);
    child.group = 0;
    if (child.output >= 0) {
      ::close(child.output);
      child.output = -1;
    }
    if (!child.partial.empty()) events.push_back({.kind = ChildEvent::Kind::kLine, .child = i, .line = std::exchange(child.partial, {})});
    events.push_back({.kind = ChildEvent::Kind::kExit, .child = i, .wait_status = status});
  }
  return events;
}

void Children::Signal(size_t child, int signal) {
  if (children_[child].pid > 0) ::kill(children_[child].pid, signal);
}

void Children::SignalAll(int signal) {
  for (size_t i = 0; i < children_.size(); ++i) Signal(i, signal);
}

std::string DescribeExit(int wait_status) {
  if (WIFSIGNALED(wait_status)) {
    const int signal = WTERMSIG(wait_status);
    return "was killed by signal " + std::to_string(signal) + " (" + ::strsignal(signal) + ")";
  }
  const int code = WEXITSTATUS(wait_status);
  const std::string_view reason = contract::ExitReason(code);
  return "exited with code " + std::to_string(code) + (reason.empty() ? "" : " (" + std::string(reason) + ")");
}

}  // namespace qwen::ctl
