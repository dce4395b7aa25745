// stage/worker/worker.h — one stage at work: joins the head, builds its edges, executes plans in order, and gets back into
// line after a fault without ever dropping its weights.
//
// Threads: the caller's (control: dials the head, reads messages), compute (loads, assembles edges, executes plans),
// watchdog, and one writer inside each channel and sending edge. Only the compute thread touches the StageCompute.
//
//   control --Assemble--> target --compute--> edges up --Assembled--> plans: receive -> Forward -> send | StepResult
//   Any fault of an edge, a neighbour or the head: the epoch's edges and queued work go, the weights stay.
//
// Thread safety: Run by one thread, once; Stop and health from any (not from a signal handler).
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "stage/base/clock.h"
#include "stage/base/status.h"
#include "stage/contract/layer_plan.h"
#include "stage/contract/pod_contract.h"
#include "stage/transport/codec.h"
#include "stage/transport/control_channel.h"
#include "stage/transport/edge.h"
#include "stage/transport/handshake.h"
#include "stage/worker/stage_compute.h"
#include "stage/worker/watchdog.h"
#include "stage/worker/worker_metrics.h"

namespace qwen::worker {

struct WorkerOptions {
  transport::Endpoint head;          // dialled until it answers
  transport::Endpoint data_listen;   // port 0: any free one
  std::string data_advertise;        // host that the previous stage dials; empty: the address by which we reach the head
  transport::Secret secret = transport::Secret::InsecureLoopback();
  std::string pipeline_uid;
  std::string config_hash;           // contract::ConfigHash
  int32_t stage = 0;
  int32_t stages = 1;
  contract::LayerRange layers;
  uint64_t pod_epoch = 0;            // at which the operator made this process; 0 without one
  std::chrono::microseconds heartbeat_interval{std::chrono::seconds(1)};
  std::chrono::microseconds stall_timeout{std::chrono::seconds(10)};  // silence of the head that counts as its loss
  std::chrono::microseconds step_timeout{std::chrono::seconds(30)};   // of one plan's compute, or of a group without progress
  std::chrono::microseconds head_timeout{0};                          // without a head for so long: give up; 0 = never
  std::chrono::microseconds reconnect_backoff_max{std::chrono::seconds(2)};
  // After a plan, how long the two threads that pass plans on look for the next one before they sleep (Socket::set_spin).
  std::chrono::microseconds spin{0};
  uint64_t vision_input_bytes_max = 512ull << 20;   // one image or video
  uint64_t vision_waiting_bytes_max = 1ull << 30;   // received, not yet encoded; beyond it the control channel waits
  contract::ExitCode compute_fault_code = contract::ExitCode::kInternal;  // kGpuFault on a GPU
  // The own compute hangs. Does not return in production (default: exits with kStalled, at once); tests look on.
  std::function<void()> on_hung;
};

struct WorkerExit {
  contract::ExitCode code = contract::ExitCode::kOk;
  Status status;  // why, when the code is not kOk
};

struct WorkerHealth {
  bool loaded = false;
  bool in_group = false;  // edges of `epoch` are up
  bool connected = false;
  uint64_t epoch = 0;
  uint64_t steps_done = 0;
  Phase phase = Phase::kLoading;
  double seconds_in_phase = 0.0;
  bool overdue = false;   // in a computing phase for longer than step_timeout
};

class Worker {
 public:
  // `metrics` outlives the worker.
  Worker(WorkerOptions options, ComputeLoader loader, WorkerMetrics& metrics);
  ~Worker();
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  // Returns when the head says Shutdown, Stop() is called (both kOk), or going on is pointless.
  WorkerExit Run();
  // Leaves cleanly: tells the head, drops the edges, lets Run return once the compute thread is through with its plan.
  void Stop();
  WorkerHealth health() const;

 private:
  // What the head last asked for. A new one voids everything of the one before.
  struct Target {
    transport::Assemble assemble;
    std::shared_ptr<transport::Interrupt> over;  // triggered when the epoch ends; shared with the assembling compute thread
    uint64_t next_step = 0;                      // expected of the next plan
    bool failed = false;                         // this stage has reported Failure: what still arrives is dropped
  };
  using Work = std::variant<step::StepPlan, step::VisionInput>;
  // What the compute thread does at once: a plan, or inputs for the vision tower.
  using Next = std::variant<step::StepPlan, std::vector<step::VisionInput>>;

  // Control thread.
  bool Connect();                       // one attempt; false: try again
  transport::Hello MakeHello(const transport::Socket& socket);
  void Serve(std::unique_ptr<transport::MessageStream> stream, bool said_loading);
  Status Handle(transport::Message message, transport::VisionAssembler& vision);
  Status TakeAssemble(const transport::Assemble& assemble);
  Status TakePlan(step::StepPlan plan);
  Status TakeVision(step::VisionInput input);

  // Compute thread.
  void ComputeLoop();
  void SpinForNews(uint64_t known) const;
  bool Load();
  Next TakeNextLocked();  // REQUIRES: queue_ is not empty
  void ExecuteNext(uint64_t generation, Next next);
  void Assemble(uint64_t generation);
  Status BuildEdges(const Target& target);
  Status Execute(const step::StepPlan& plan);
  void DropEdges();
  void ReportFailure(uint64_t generation, const Status& reason);

  // Watchdog thread.
  void WatchdogLoop();

  // Any thread.
  void EndEpochLocked(const Status& reason, std::optional<Target> next);
  void AbortEdgesLocked(const Status& reason);
  void ClearQueueLocked();
  void Leave(const std::string& reason);  // tells the head
  void FlushChannel();                    // REQUIRES: mutex_ is not held
  void Finish(contract::ExitCode code, Status status);
  void SetPhase(Phase phase);
  void SendLocked(const transport::Message& message);
  step::PlanLimits LimitsLocked() const;

  const WorkerOptions options_;
  const ComputeLoader loader_;
  WorkerMetrics& metrics_;
  const SteadyClock clock_;
  const std::string instance_;
  transport::Interrupt stop_interrupt_;
  std::atomic<uint64_t> steps_done_{0};
  std::atomic<uint64_t> news_{0};  // for the compute thread, to look without the lock: counts what it may have to act on

  // Compute thread only (created before it starts, or by it).
  std::unique_ptr<transport::EdgeListener> edge_listener_;
  std::unique_ptr<StageCompute> compute_;
  std::unique_ptr<transport::EdgeSender> sender_;      // to the next stage; null on the last
  std::unique_ptr<transport::EdgeReceiver> receiver_;  // from the previous; null on stage 0

  // Control thread only.
  bool welcomed_once_ = false;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  // Guarded by mutex_.
  bool stopping_ = false;
  WorkerExit exit_;
  std::shared_ptr<transport::ControlChannel> channel_;  // shared with its reader, the control thread
  bool announce_loaded_ = false;                         // Hello said `loading`, Loaded has not been sent
  std::optional<transport::StageCapacity> capacity_;     // once loaded
  int32_t vocab_size_ = 0;
  uint64_t generation_ = 0;          // counts changes of target_
  std::optional<Target> target_;
  uint64_t assembled_generation_ = 0;  // the generation whose edges are up
  uint64_t last_epoch_ = 0;            // that this stage was asked to serve
  std::deque<Work> queue_;
  uint64_t vision_waiting_bytes_ = 0;
  transport::EdgeSender* abortable_sender_ = nullptr;      // == sender_.get() while it may be aborted
  transport::EdgeReceiver* abortable_receiver_ = nullptr;  // == receiver_.get()
  Phase phase_ = Phase::kLoading;
  int64_t phase_since_micros_ = 0;

  std::thread compute_thread_, watchdog_thread_;
};

}  // namespace qwen::worker
