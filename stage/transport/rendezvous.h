// stage/transport/rendezvous.h — the head's view of who is there: waits for all stages, raises the epoch, tells everybody
// to build the edges, and starts over when one is lost. Pure: no socket, thread or clock; time is an argument, and what
// is to be sent comes back as Actions. The caller (pipeline/) owns the connections.
//
//   Waiting --all joined and loaded, back-off over--> Assembling(epoch) --all Assembled--> Ready
//      ^---- a stage leaves, fails or is too slow ---------'------------------------------------'
//
// Thread safety: none.
// Invariants: (1) an epoch is never used twice and is above every epoch that any member has served;
//             (2) ready and lost alternate, ready first.
#pragma once
#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "stage/step/executor.h"
#include "stage/step/step_plan.h"
#include "stage/transport/handshake.h"
#include "stage/transport/message.h"

namespace qwen::transport {

class Rendezvous {
 public:
  struct Options {
    int32_t stages = 1;
    int32_t layers = 0;              // the stages' ranges must cover [0, layers)
    uint64_t initial_epoch = 0;      // the first group's epoch is above this
    // The head's own bounds; a 0 leaves the bound to the stages. vocab_size is taken from here.
    step::PlanLimits limits{.block_tokens = 0, .block_count = 0, .max_slots = 0, .max_batch_tokens = 0, .max_sequence_tokens = 0};
    int64_t assemble_timeout_micros = 30'000'000;
    int64_t backoff_min_micros = 100'000;  // between failed assemblies, doubled each time
    int64_t backoff_max_micros = 5'000'000;
  };
  struct Actions {
    std::vector<std::pair<int32_t, Failure>> notify;    // stage stays connected, drops the epoch
    std::vector<std::pair<int32_t, Failure>> drop;      // tell, then close its connection (its Leave is already done)
    std::vector<std::pair<int32_t, Assemble>> assemble;
    std::optional<step::GroupLost> lost;                // handed on before `ready`
    std::optional<step::GroupReady> ready;
  };

  explicit Rendezvous(const Options& options);  // REQUIRES: stages > 0

  // May this (authenticated) stage join? kUnspecified: yes; a connected member of the same index must then Leave first.
  Refusal CheckJoin(const Hello& hello) const;
  // REQUIRES: CheckJoin said yes and no member of this index is connected.
  Actions Join(const Hello& hello, int64_t now_micros);
  Actions Loaded(int32_t stage, const StageCapacity& capacity, int64_t now_micros);
  Actions Assembled(int32_t stage, uint64_t epoch, int64_t now_micros);
  Actions Failed(int32_t stage, uint64_t epoch, const std::string& reason, int64_t now_micros);  // its edges, not its connection
  Actions Leave(int32_t stage, const std::string& reason, int64_t now_micros);                   // its connection is gone
  Actions Tick(int64_t now_micros);  // at least every 100 ms: back-off and time-out of an assembly

  uint64_t epoch() const { return epoch_; }  // of the current or last attempt
  bool ready() const { return state_ == State::kReady; }
  bool connected(int32_t stage) const { return members_.at(static_cast<size_t>(stage)).has_value(); }

 private:
  enum class State { kWaiting, kAssembling, kReady };
  void Lose(const std::string& reason, int64_t now_micros, bool back_off, Actions& actions);
  void TryAssemble(int64_t now_micros, Actions& actions);
  std::optional<std::string> FindMismatch(int32_t& stage) const;
  step::PlanLimits GroupLimits() const;

  const Options options_;
  State state_ = State::kWaiting;
  uint64_t epoch_;
  std::vector<std::optional<Hello>> members_;  // by stage; capacity filled in by Loaded
  std::vector<uint64_t> pod_epoch_max_;        // by stage: the youngest process ever seen
  std::set<int32_t> assembled_;
  int64_t assemble_deadline_micros_ = 0;
  int64_t next_attempt_micros_ = 0;
  int64_t backoff_micros_;
};

}  // namespace qwen::transport
