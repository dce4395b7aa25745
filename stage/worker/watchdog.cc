#include "stage/worker/watchdog.h"

#include <algorithm>

namespace qwen::worker {

const char* PhaseName(Phase phase) {
  switch (phase) {
    case Phase::kIdle: return "idle";
    case Phase::kLoading: return "loading";
    case Phase::kAssembling: return "assembling";
    case Phase::kReceiving: return "receiving";
    case Phase::kComputing: return "computing";
    case Phase::kSending: return "sending";
  }
  return "?";
}

Watchdog::Verdict Watchdog::Check(const Observation& observation, int64_t now_micros) {
  if (observation.own_steps != own_steps_ || observation.group_progress != group_progress_) {
    own_steps_ = observation.own_steps;
    group_progress_ = observation.group_progress;
    progress_micros_ = now_micros;
  }
  const int64_t in_phase = now_micros - observation.phase_since_micros;
  switch (observation.phase) {
    case Phase::kComputing: return in_phase > timeout_micros_ ? Verdict::kHung : Verdict::kFine;
    case Phase::kReceiving:
    case Phase::kSending: {
      const int64_t stuck = std::min(in_phase, now_micros - progress_micros_);
      return stuck > timeout_micros_ ? Verdict::kAbortEpoch : Verdict::kFine;
    }
    // Loading takes what the disk takes; an assembly is timed by the head.
    case Phase::kIdle:
    case Phase::kLoading:
    case Phase::kAssembling: return Verdict::kFine;
  }
  return Verdict::kFine;
}

}  // namespace qwen::worker
