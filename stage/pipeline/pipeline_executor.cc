#include "stage/pipeline/pipeline_executor.h"

#include <algorithm>
#include <atomic>
#include <list>
#include <map>

#include "stage/base/check.h"
#include "stage/base/clock.h"
#include "stage/base/log.h"
#include "stage/transport/codec.h"

namespace qwen::pipeline {
namespace {

using transport::ControlChannel;
using transport::FailureCode;
using transport::Message;
using transport::Rendezvous;

constexpr auto kTick = std::chrono::milliseconds(50);
constexpr auto kHandshakeTimeout = std::chrono::seconds(5);
// Strangers and stages that dial again while their old connection is being noticed as dead.
constexpr size_t kSpareConnections = 16;

// The group's plan that the last stage has not answered yet: what its result must look like.
struct InFlight {
  uint64_t step = 0;
  std::vector<step::SequenceId> samples;
};

Status CheckVision(const step::VisionInput& input) {
  for (int32_t side : input.grid) {
    if (side <= 0 || side > (1 << 20)) return InvalidArgumentError("vision.grid: out of range");
  }
  if (input.grid[1] % 2 != 0 || input.grid[2] % 2 != 0) return InvalidArgumentError("vision.grid: h and w must be even");
  if (input.patches.size() != static_cast<uint64_t>(input.patch_count()) * transport::kPatchBytes) {
    return InvalidArgumentError("vision.patches: size does not fit the grid");
  }
  return OkStatus();
}

}  // namespace

class PipelineExecutor::Impl {
 public:
  Impl(const PipelineOptions& options, transport::Listener listener)
      : options_(options),
        listener_(std::move(listener)),
        rendezvous_({.stages = options.identity.stages,
                     .layers = options.layers,
                     .initial_epoch = options.initial_epoch,
                     .limits = options.limits,
                     .assemble_timeout_micros = options.assemble_timeout.count()}),
        slots_(static_cast<size_t>(options.identity.stages)),
        vision_bytes_waiting_(std::make_shared<std::atomic<uint64_t>>(0)) {
    for (size_t i = 0; i < slots_.size(); ++i) slots_[i].status.stage = static_cast<int32_t>(i);
    acceptor_ = std::thread([this] { AcceptLoop(); });
  }

  ~Impl() {
    stop_.Trigger();
    acceptor_.join();
    CloseAll(CancelledError("the head is closing"));
    for (auto& connection : connections_) connection->thread.join();
  }

  Status Submit(const step::StepPlan& plan) {
    auto encoded = transport::EncodeFramedMessage(Message(plan));
    if (!encoded.ok()) return encoded.status();
    const auto frame = std::make_shared<const std::string>(std::move(encoded).value());
    std::lock_guard<std::mutex> lock(mutex_);
    if (!group_) return UnavailableError("the group is not assembled");
    if (plan.epoch != group_->epoch) return UnavailableError("the plan's epoch is over");
    // A plan that the stages would refuse must not cost the group: it is stopped here.
    RETURN_IF_ERROR(step::ValidatePlan(plan, group_->limits));
    if (plan.step != next_step_) return InvalidArgumentError("plan.step: expected " + std::to_string(next_step_));
    if (in_flight_.size() >= static_cast<size_t>(options_.plans_in_flight_max)) return ResourceExhaustedError("too many plans in flight");
    InFlight entry{.step = plan.step, .samples = {}};
    for (const step::SequenceSpan& span : plan.spans) {
      if (span.sample) entry.samples.push_back(span.sequence);
    }
    for (Slot& slot : slots_) {
      const Status sent = slot.channel->SendFrame(frame);
      if (sent.ok()) continue;
      slot.channel->Close(sent);  // too slow or gone: its reader reports the loss
      return UnavailableError(sent.message());
    }
    in_flight_.push_back(std::move(entry));
    ++next_step_;
    return OkStatus();
  }

  Status SubmitVision(std::shared_ptr<const step::VisionInput> input) {
    QP_CHECK(input != nullptr);
    RETURN_IF_ERROR(CheckVision(*input));
    const uint64_t bytes = input->patches.size();
    std::lock_guard<std::mutex> lock(mutex_);
    if (!group_) return UnavailableError("the group is not assembled");
    const uint64_t waiting = vision_bytes_waiting_->load();
    if (waiting > 0 && waiting + bytes > options_.vision_bytes_waiting_max) return ResourceExhaustedError("too many pixels wait for stage 0");
    vision_bytes_waiting_->fetch_add(bytes);
    // Shared because the source may die in the channel's writer after this object forgot the channel.
    const std::shared_ptr<void> release(nullptr, [counter = vision_bytes_waiting_, bytes](void*) { counter->fetch_sub(bytes); });
    const Status sent = slots_[0].channel->SendSource(
        [input = std::move(input), release](size_t index) { return transport::EncodeVisionChunk(*input, index); });
    if (sent.ok() || sent.code() == StatusCode::kResourceExhausted) return sent;
    return UnavailableError(sent.message());
  }

  step::ExecutorEvent Poll(std::chrono::microseconds timeout) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_for(lock, timeout, [&] { return woken_ || !events_.empty(); });
    woken_ = false;
    if (events_.empty()) return std::monostate();
    step::ExecutorEvent event = std::move(events_.front());
    events_.pop_front();
    return event;
  }

  void Wake() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      woken_ = true;
    }
    changed_.notify_all();
  }

  void Shutdown(std::chrono::microseconds timeout) {
    std::unique_lock<std::mutex> lock(mutex_);
    shutting_down_ = true;
    group_.reset();
    for (Slot& slot : slots_) {
      if (slot.channel) (void)slot.channel->Send(Message(transport::Shutdown{}));
    }
    // A stage closes its connection when it has read the message.
    changed_.wait_for(lock, timeout, [&] { return std::none_of(slots_.begin(), slots_.end(), [](const Slot& s) { return s.channel != nullptr; }); });
    lock.unlock();
    CloseAll(CancelledError("shut down"));
  }

  uint16_t port() const { return listener_.port(); }
  PipelineStatus status() const;

 private:
  struct Slot {
    std::shared_ptr<ControlChannel> channel;  // null: not connected. Shared with its reader thread, which outlives a replacement
    bool leaving = false;                     // it said that it was told to stop
    StageStatus status;
  };
  struct Connection {
    std::thread thread;
    std::atomic<bool> done{false};
  };

  // ---- accept thread
  void AcceptLoop() {
    while (!stop_.triggered()) {
      auto socket = listener_.Accept(transport::DeadlineIn(kTick), stop_);
      Reap();
      if (socket.ok()) {
        if (connections_.size() >= slots_.size() + kSpareConnections) {
          log::Warning("control connection refused: too many", {{"peer", socket->peer()}});
        } else {
          auto connection = std::make_unique<Connection>();
          Connection* raw = connection.get();
          // Shared because a thread's function must be copyable; the socket has one user.
          auto shared = std::make_shared<transport::Socket>(std::move(socket).value());
          connection->thread = std::thread([this, raw, shared] {
            Serve(std::move(*shared));
            raw->done.store(true);
          });
          connections_.push_back(std::move(connection));
        }
      } else if (socket.status().code() == StatusCode::kResourceExhausted) {
        (void)transport::SleepUntil(transport::DeadlineIn(kTick), stop_);
      }
      std::lock_guard<std::mutex> lock(mutex_);
      if (!shutting_down_) Execute(rendezvous_.Tick(clock_.NowMicros()));
    }
  }

  void Reap() {
    connections_.remove_if([](const std::unique_ptr<Connection>& connection) {
      if (!connection->done.load()) return false;
      connection->thread.join();
      return true;
    });
  }

  // ---- one thread per connection
  void Serve(transport::Socket socket) {
    auto stream = std::make_unique<transport::MessageStream>(std::move(socket));
    const std::string peer = stream->socket().peer();
    const auto deadline = transport::DeadlineIn(kHandshakeTimeout);
    const auto admit = [this](const transport::Hello& hello) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (shutting_down_) return transport::Refusal{FailureCode::kBusy, "the head is draining"};
      return rendezvous_.CheckJoin(hello);
    };
    auto hello = transport::AcceptStage(*stream, options_.secret, options_.identity, admit, deadline, stop_);
    Status welcomed = hello.status();
    if (hello.ok()) welcomed = transport::SendWelcome(*stream, options_.secret, *hello, epoch(), deadline, stop_);
    if (!welcomed.ok()) {
      if (welcomed.code() != StatusCode::kCancelled) log::Warning("stage refused", {{"peer", peer}, {"reason", welcomed.ToString()}});
      return;
    }
    const ControlChannel::Options channel_options{.heartbeat_interval = options_.heartbeat_interval,
                                                  .stall_timeout = options_.stall_timeout,
                                                  .steps_done = [this] { return GroupProgress(); }};
    const auto channel = std::make_shared<ControlChannel>(std::move(stream), channel_options);
    if (!TakePlace(*hello, channel)) return;
    log::Info("stage connected", {{"stage", hello->stage}, {"peer", peer}, {"loading", hello->loading}});
    const Status ended = ReadLoop(hello->stage, *channel);
    LeavePlace(hello->stage, channel, ended);
  }

  bool TakePlace(const transport::Hello& hello, const std::shared_ptr<ControlChannel>& channel) {
    std::lock_guard<std::mutex> lock(mutex_);
    // Asked again: another connection may have come first since the handshake.
    const transport::Refusal refusal = shutting_down_ || stop_.triggered() ? transport::Refusal{FailureCode::kBusy, "closing"}
                                                                           : rendezvous_.CheckJoin(hello);
    if (refusal.code != FailureCode::kUnspecified) return false;
    Slot& slot = slots_[static_cast<size_t>(hello.stage)];
    if (slot.channel) {
      slot.channel->Close(FailedPreconditionError("replaced by a newer connection"));
      slot.channel.reset();
      Execute(rendezvous_.Leave(hello.stage, "it connected anew", clock_.NowMicros()));
    }
    slot.channel = channel;
    slot.leaving = false;
    slot.status = {.stage = hello.stage,
                   .connected = true,
                   .loaded = !hello.loading,
                   .peer = channel->peer(),
                   .layer_begin = hello.layer_begin,
                   .layer_end = hello.layer_end,
                   .weight_bytes = hello.capacity.weight_bytes,
                   .kv_blocks = hello.capacity.block_count,
                   .last_error = slot.status.last_error};
    Execute(rendezvous_.Join(hello, clock_.NowMicros()));
    return true;
  }

  void LeavePlace(int32_t stage, const std::shared_ptr<ControlChannel>& channel, const Status& ended) {
    std::lock_guard<std::mutex> lock(mutex_);
    Slot& slot = slots_[static_cast<size_t>(stage)];
    if (slot.channel != channel) return;  // replaced or dropped already
    if (shutting_down_) {
      log::Info("stage stopped with the head", {{"stage", stage}});
    } else if (slot.leaving) {
      log::Info("stage drained", {{"stage", stage}, {"reason", ended.message()}});
    } else {
      log::Warning("stage disconnected", {{"stage", stage}, {"reason", ended.ToString()}});
    }
    slot.channel.reset();
    slot.status.connected = slot.status.loaded = false;
    slot.status.last_error = ended.ToString();
    if (!shutting_down_) Execute(rendezvous_.Leave(stage, ended.message(), clock_.NowMicros()));
    changed_.notify_all();
  }

  Status ReadLoop(int32_t stage, ControlChannel& channel) {
    for (;;) {
      auto message = channel.Receive();
      if (!message.ok()) return message.status();
      const Status handled = Handle(stage, channel, std::move(message).value());
      if (!handled.ok()) {
        channel.Close(handled);
        return handled;
      }
    }
  }

  Status Handle(int32_t stage, const ControlChannel& channel, Message message) {
    std::lock_guard<std::mutex> lock(mutex_);
    Slot& slot = slots_[static_cast<size_t>(stage)];
    if (slot.channel.get() != &channel) return FailedPreconditionError("the connection was replaced");
    if (shutting_down_) return OkStatus();
    const int64_t now = clock_.NowMicros();
    if (auto* result = std::get_if<step::StepResult>(&message)) return TakeResult(stage, std::move(*result));
    if (const auto* loading = std::get_if<transport::Loading>(&message)) {
      slot.status.load_bytes_done = loading->bytes_done;
      slot.status.load_bytes_total = loading->bytes_total;
      return OkStatus();
    }
    if (const auto* loaded = std::get_if<transport::Loaded>(&message)) {
      slot.status.loaded = true;
      slot.status.weight_bytes = loaded->capacity.weight_bytes;
      slot.status.kv_blocks = loaded->capacity.block_count;
      Execute(rendezvous_.Loaded(stage, loaded->capacity, now));
      return OkStatus();
    }
    if (const auto* assembled = std::get_if<transport::Assembled>(&message)) {
      Execute(rendezvous_.Assembled(stage, assembled->epoch, now));
      return OkStatus();
    }
    if (const auto* failure = std::get_if<transport::Failure>(&message)) {
      slot.status.last_error = failure->reason;
      slot.leaving = failure->code == FailureCode::kLeaving;
      if (slot.leaving) return UnavailableError("it leaves: " + failure->reason);
      log::Warning("stage reports a fault", {{"stage", stage}, {"epoch", failure->epoch}, {"reason", failure->reason}});
      Execute(rendezvous_.Failed(stage, failure->epoch, failure->reason, now));
      return OkStatus();
    }
    return InvalidArgumentError("a stage may not send " + std::string(transport::MessageName(message)));
  }

  Status TakeResult(int32_t stage, step::StepResult result) {
    if (stage + 1 != options_.identity.stages) return InvalidArgumentError("result: not from the last stage");
    if (!group_ || result.epoch < group_->epoch) return OkStatus();  // of an epoch that is over: nobody waits for it
    if (result.epoch > group_->epoch) return InvalidArgumentError("result.epoch: from the future");
    if (in_flight_.empty() || result.step != in_flight_.front().step) {
      return InvalidArgumentError("result.step: " + std::to_string(result.step) + " is out of order");
    }
    const std::vector<step::SequenceId>& expected = in_flight_.front().samples;
    if (result.samples.size() != expected.size()) return InvalidArgumentError("result.samples: not as many as the plan asked for");
    for (size_t i = 0; i < expected.size(); ++i) {
      if (result.samples[i].sequence != expected[i]) return InvalidArgumentError("result.samples: of another sequence");
      if (result.samples[i].token >= group_->limits.vocab_size) return InvalidArgumentError("result.samples.token: out of the vocabulary");
    }
    in_flight_.pop_front();
    ++results_total_;
    events_.emplace_back(std::move(result));
    changed_.notify_all();
    return OkStatus();
  }

  // ---- any thread, with mutex_ held. Sending only queues; a full queue means a stage that does not keep up: it is closed.
  void Execute(const Rendezvous::Actions& actions) {
    if (actions.lost) LoseGroup(*actions.lost);
    for (const auto& [stage, failure] : actions.notify) {
      slots_[static_cast<size_t>(stage)].channel->ClearQueue();
      SendTo(stage, Message(failure));
    }
    for (const auto& [stage, failure] : actions.drop) {
      log::Error("stage dropped", {{"stage", stage}, {"reason", failure.reason}});
      SendTo(stage, Message(failure));
      Slot& slot = slots_[static_cast<size_t>(stage)];
      slot.status.connected = slot.status.loaded = false;
      slot.status.last_error = failure.reason;
      slot.channel.reset();  // its reader keeps the connection until the stage closes it
    }
    for (const auto& [stage, assemble] : actions.assemble) SendTo(stage, Message(assemble));
    if (!actions.assemble.empty()) log::Info("assembling", {{"epoch", rendezvous_.epoch()}});
    if (actions.ready) {
      group_ = *actions.ready;
      in_flight_.clear();
      next_step_ = 0;
      log::Info("group ready", {{"epoch", group_->epoch}, {"stages", group_->stages}, {"kv_blocks", group_->limits.block_count}});
      events_.emplace_back(*actions.ready);
      changed_.notify_all();
    }
  }

  // A GroupReady that nobody has seen yet cancels out, so that the queue stays bounded while the engine is busy.
  void LoseGroup(const step::GroupLost& lost) {
    log::Warning("group lost", {{"epoch", lost.epoch}, {"reason", lost.reason}});
    group_.reset();
    in_flight_.clear();
    ++groups_lost_total_;
    if (!events_.empty() && std::holds_alternative<step::GroupReady>(events_.back())) {
      events_.pop_back();
      return;  // for the engine the group has been lost all the time
    }
    events_.emplace_back(lost);
    changed_.notify_all();
  }

  void SendTo(int32_t stage, const Message& message) {
    const auto& channel = slots_[static_cast<size_t>(stage)].channel;
    if (!channel) return;
    const Status sent = channel->Send(message);
    if (!sent.ok()) channel->Close(sent);
  }

  void CloseAll(const Status& reason) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (Slot& slot : slots_) {
      if (slot.channel) slot.channel->Close(reason);
    }
  }

  // What heartbeats tell the stages: a number that stands still when nobody makes progress.
  uint64_t GroupProgress() const {
    std::lock_guard<std::mutex> lock(mutex_);
    uint64_t sum = results_total_;
    for (const Slot& slot : slots_) sum += slot.channel ? slot.channel->peer_steps_done() : 0;
    return sum;
  }
  uint64_t epoch() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return rendezvous_.epoch();
  }

  const PipelineOptions options_;
  const SteadyClock clock_;
  transport::Listener listener_;  // accept thread
  transport::Interrupt stop_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  // Guarded by mutex_.
  Rendezvous rendezvous_;
  std::vector<Slot> slots_;
  std::optional<step::GroupReady> group_;  // while plans can be submitted
  std::deque<InFlight> in_flight_;
  std::deque<step::ExecutorEvent> events_;  // at most plans_in_flight_max results, one loss and one ready
  uint64_t next_step_ = 0;
  uint64_t results_total_ = 0;
  uint64_t groups_lost_total_ = 0;
  bool woken_ = false;
  bool shutting_down_ = false;

  const std::shared_ptr<std::atomic<uint64_t>> vision_bytes_waiting_;
  std::list<std::unique_ptr<Connection>> connections_;  // accept thread, then the destructor
  std::thread acceptor_;
};

PipelineStatus PipelineExecutor::Impl::status() const {
  std::lock_guard<std::mutex> lock(mutex_);
  PipelineStatus out{.ready = group_.has_value(),
                     .epoch = rendezvous_.epoch(),
                     .waiting_for = {},
                     .plans_in_flight = static_cast<int32_t>(in_flight_.size()),
                     .groups_lost_total = groups_lost_total_,
                     .stages = {}};
  const auto now = std::chrono::steady_clock::now();
  const auto wait_for = [&out](int32_t stage, const std::string& why) {
    out.waiting_for += (out.waiting_for.empty() ? "stage " : ", stage ") + std::to_string(stage) + " (" + why + ")";
  };
  for (const Slot& slot : slots_) {
    StageStatus stage = slot.status;
    if (slot.channel) {
      stage.steps_done = slot.channel->peer_steps_done();
      stage.seconds_since_heard = std::chrono::duration<double>(now - slot.channel->last_heard()).count();
    }
    if (!stage.connected) {
      wait_for(stage.stage, "not connected");
    } else if (!stage.loaded) {
      wait_for(stage.stage, "loading " + std::to_string(stage.load_percent()) + " %");
    }
    out.stages.push_back(std::move(stage));
  }
  if (!out.ready && out.waiting_for.empty()) out.waiting_for = "the edges between the stages";
  if (out.ready) out.waiting_for.clear();
  return out;
}

PipelineExecutor::PipelineExecutor(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
PipelineExecutor::~PipelineExecutor() = default;

Result<std::unique_ptr<PipelineExecutor>> PipelineExecutor::Start(const PipelineOptions& options) {
  QP_CHECK(options.identity.stages > 0 && options.limits.vocab_size > 0 && options.layers >= options.identity.stages);
  auto listener = transport::Listener::Listen(options.listen);
  if (!listener.ok()) return listener.status();
  return std::unique_ptr<PipelineExecutor>(new PipelineExecutor(std::make_unique<Impl>(options, std::move(listener).value())));
}

Status PipelineExecutor::SubmitVision(std::shared_ptr<const step::VisionInput> input) { return impl_->SubmitVision(std::move(input)); }
Status PipelineExecutor::Submit(const step::StepPlan& plan) { return impl_->Submit(plan); }
step::ExecutorEvent PipelineExecutor::Poll(std::chrono::microseconds timeout) { return impl_->Poll(timeout); }
void PipelineExecutor::Wake() { impl_->Wake(); }
void PipelineExecutor::Shutdown(std::chrono::microseconds timeout) { impl_->Shutdown(timeout); }
uint16_t PipelineExecutor::port() const { return impl_->port(); }
PipelineStatus PipelineExecutor::status() const { return impl_->status(); }

}  // namespace qwen::pipeline
