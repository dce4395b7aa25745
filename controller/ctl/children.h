// controller/ctl/children.h — child processes whose output is read line by line and who never outlive this process.
//
// Each child has its own process group (Ctrl-C reaches only us; we decide what the children hear), dies with us
// (PR_SET_PDEATHSIG), and is killed with its whole group when Children goes. Thread safety: none; by one thread, the one that
// lives longest (PR_SET_PDEATHSIG fires when the *thread* that forked ends).
#pragma once
#include <sys/types.h>

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "stage/base/status.h"

namespace qwen::ctl {

struct ChildSpec {
  std::string name;
  std::string program;  // path of the executable
  std::vector<std::string> args;
  std::map<std::string, std::string> env;  // beside what is inherited
};

struct ChildEvent {
  enum class Kind { kLine, kExit };
  Kind kind = Kind::kLine;
  size_t child = 0;
  std::string line;  // kLine: one line of stdout or stderr, without its end, at most kLineBytesMax
  int wait_status = 0;  // kExit: as of waitpid
};

class Children {
 public:
  static constexpr size_t kLineBytesMax = 16384;  // a longer line is cut into several

  Children() = default;
  ~Children();  // kills and reaps what is left
  Children(const Children&) = delete;
  Children& operator=(const Children&) = delete;

  // kNotFound or kInternal when the program cannot be executed.
  Status Start(const ChildSpec& spec);
  // The same child once more, in the same place, with `env` over its environment. REQUIRES: it has ended.
  Status StartAgain(size_t child, const std::map<std::string, std::string>& env);
  size_t size() const { return children_.size(); }
  const std::string& name(size_t child) const { return children_[child].spec.name; }
  bool running(size_t child) const { return children_[child].pid > 0; }
  bool any_running() const;
  pid_t pid(size_t child) const { return children_[child].pid; }  // 0 once it has been reaped

  // Waits up to `timeout_ms` for output or an end, also until `wake_fd` (-1: none) is readable. An exit is reported after all
  // lines of that child.
  std::vector<ChildEvent> Poll(int timeout_ms, int wake_fd = -1);
  void Signal(size_t child, int signal);  // nothing when it has ended
  void SignalAll(int signal);

 private:
  struct Child {
    ChildSpec spec;
    pid_t pid = 0;
    pid_t group = 0;
    int output = -1;      // read end of stdout and stderr
    std::string partial;  // a line that has not ended yet
  };
  static Result<Child> Launch(const ChildSpec& spec);
  void Drain(size_t index, std::vector<ChildEvent>& events);
  std::vector<Child> children_;
};

// "exited with code 65 (bad checkpoint)" or "was killed by signal 9 (Killed)".
std::string DescribeExit(int wait_status);

}  // namespace qwen::ctl
