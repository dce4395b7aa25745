// stage/worker/watchdog.h — decides whether a stage that has work still gets on with it. Pure: the worker's watchdog thread
// hands observations in and acts on the verdict.
//
// Two cases, since only one of them is our own fault (design: a neighbour's fault costs an epoch, never the weights):
//   computing for longer than the timeout                          -> kHung: this device or library does not come back
//   waiting for a neighbour, and nobody in the group gets on       -> kAbortEpoch: back to rendezvous
// A receive that waits while earlier stages compute is normal, so waiting alone proves nothing: the head's heartbeats
// carry the group's progress, and only when that stands still too is the epoch given up.
#pragma once
#include <cstdint>

namespace qwen::worker {

enum class Phase { kIdle, kLoading, kAssembling, kReceiving, kComputing, kSending };
const char* PhaseName(Phase phase);

class Watchdog {
 public:
  struct Observation {
    Phase phase = Phase::kIdle;
    int64_t phase_since_micros = 0;
    uint64_t own_steps = 0;       // finished by this stage
    uint64_t group_progress = 0;  // of the head's last heartbeat
  };
  enum class Verdict { kFine, kAbortEpoch, kHung };

  explicit Watchdog(int64_t timeout_micros) : timeout_micros_(timeout_micros) {}
  Verdict Check(const Observation& observation, int64_t now_micros);

 private:
  const int64_t timeout_micros_;
  uint64_t own_steps_ = 0, group_progress_ = 0;  // of the last observation
  int64_t progress_micros_ = 0;                  // when either last changed
};

}  // namespace qwen::worker
