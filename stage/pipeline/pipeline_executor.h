// stage/pipeline/pipeline_executor.h — the head's step::Executor: the stages over the network. Stages dial `listen`; plans
// are serialised once and sent to all of them; results come from the last; a lost stage becomes GroupLost, and the group
// assembles again by itself when it is back.
//
// Threads: one accepts (and ticks the rendezvous every 50 ms), one per connection reads, one per connection writes. They
// meet under one mutex, which no thread holds while it touches a socket.
// Thread safety: the Executor part by the engine thread; Wake, status, port and Shutdown by any thread.
#pragma once
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "stage/base/status.h"
#include "stage/step/executor.h"
#include "stage/transport/control_channel.h"
#include "stage/transport/handshake.h"
#include "stage/transport/rendezvous.h"
#include "stage/transport/socket.h"

namespace qwen::pipeline {

struct PipelineOptions {
  transport::Endpoint listen;           // port 0: any free one; port() says which
  transport::Secret secret = transport::Secret::InsecureLoopback();
  transport::GroupIdentity identity;    // pipeline uid, config hash, number of stages
  int32_t layers = 0;                   // of the model: the stages' ranges must cover [0, layers)
  uint64_t initial_epoch = 0;           // the first group's epoch is above this
  // The head's own bounds; 0 = as the stages allow; vocab_size must be set.
  step::PlanLimits limits{.block_tokens = 0, .block_count = 0, .max_slots = 0, .max_batch_tokens = 0, .max_sequence_tokens = 0};
  std::chrono::microseconds heartbeat_interval{std::chrono::seconds(1)};
  std::chrono::microseconds stall_timeout{std::chrono::seconds(10)};     // silence of a stage that counts as its loss
  std::chrono::microseconds assemble_timeout{std::chrono::seconds(30)};  // Assemble to Assembled, then once more
  int32_t plans_in_flight_max = 256;                 // beyond it Submit gives kResourceExhausted
  uint64_t vision_bytes_waiting_max = 1ull << 30;    // pixels queued for stage 0; beyond it kResourceExhausted
};

// What is known of one stage; for /metrics and status.
struct StageStatus {
  int32_t stage = 0;
  bool connected = false;
  bool loaded = false;          // weights are on the device
  std::string peer;             // address of its control connection
  int32_t layer_begin = 0, layer_end = 0;
  int64_t weight_bytes = 0;
  int64_t load_bytes_done = 0, load_bytes_total = 0;
  int64_t load_percent() const { return loaded ? 100 : load_bytes_total > 0 ? 100 * load_bytes_done / load_bytes_total : 0; }
  int32_t kv_blocks = 0;
  uint64_t steps_done = 0;      // of the current connection
  double seconds_since_heard = 0.0;
  std::string last_error;       // why it was lost or refused last; empty if never
};
struct PipelineStatus {
  bool ready = false;
  uint64_t epoch = 0;
  std::string waiting_for;      // when not ready: "stage 2 (loading 41 %), stage 3 (not connected)"
  int32_t plans_in_flight = 0;
  uint64_t groups_lost_total = 0;
  std::vector<StageStatus> stages;
};

class PipelineExecutor final : public step::Executor {
 public:
  // kUnavailable when the address cannot be listened on. REQUIRES: identity.stages > 0, limits.vocab_size > 0.
  static Result<std::unique_ptr<PipelineExecutor>> Start(const PipelineOptions& options);
  ~PipelineExecutor() override;  // closes everything without telling the stages to exit: they wait for a new head

  Status SubmitVision(std::shared_ptr<const step::VisionInput> input) override;
  Status Submit(const step::StepPlan& plan) override;
  step::ExecutorEvent Poll(std::chrono::microseconds timeout) override;
  void Wake() override;

  // The drain is over: tells every stage to exit with 0 and closes. At most `timeout`. No group forms after this.
  void Shutdown(std::chrono::microseconds timeout);

  uint16_t port() const;
  PipelineStatus status() const;

 private:
  class Impl;
  explicit PipelineExecutor(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace qwen::pipeline
