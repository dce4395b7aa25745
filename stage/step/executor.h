// stage/step/executor.h — the only virtual class between the engine and the stages.
//
// The head's implementation is pipeline/ (all stages over the network); tests use one in memory.
// Thread safety: called by the engine thread only.
#pragma once
#include <chrono>
#include <memory>
#include <variant>

#include "stage/base/status.h"
#include "stage/step/step_plan.h"
#include "stage/step/step_result.h"

namespace qwen::step {

// The group of stages (re)assembled: all KV content and all stage state is void, plans of earlier epochs will give no
// result. The engine starts over with every live sequence from its tokens.
struct GroupReady {
  uint64_t epoch = 0;
  PlanLimits limits;    // block_count is the smallest stage's
  int32_t stages = 0;   // up to this many plans in flight keep all stages busy
};
// A stage was lost or hangs; nothing can be submitted until GroupReady.
struct GroupLost {
  uint64_t epoch = 0;
  std::string reason;
};
using ExecutorEvent = std::variant<std::monostate, StepResult, GroupReady, GroupLost>;

// The epoch changes for the caller when Poll() returns GroupReady: from the loss of a group until then both Submit calls
// give kUnavailable, even if the stages have assembled again meanwhile. Else pixels (which carry no epoch) of a caller that
// still believes in the old epoch would reach the new one, to be sent again and never released.
// Every plan of a living epoch gives one StepResult, in the order of submission, also when nothing was sampled.
class Executor {
 public:
  virtual ~Executor() = default;
  // Queues pixels for stage 0, to arrive there before any later plan. kUnavailable when the group is lost (not an error
  // for the request: the engine sends again after GroupReady).
  virtual Status SubmitVision(std::shared_ptr<const VisionInput> input) = 0;
  // Queues a plan. Plans are executed in the order of submission. kUnavailable when the group is lost.
  virtual Status Submit(const StepPlan& plan) = 0;
  // The next event, waiting up to `timeout`; std::monostate on timeout. Wake() makes a waiting Poll return early.
  virtual ExecutorEvent Poll(std::chrono::microseconds timeout) = 0;
  virtual void Wake() = 0;  // any thread
};

}  // namespace qwen::step
