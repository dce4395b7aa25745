#include "stage/worker/worker.h"

#include <algorithm>
#include <cstdlib>

#include "stage/base/check.h"
#include "stage/base/log.h"
#include "stage/step/activation_shape.h"

namespace qwen::worker {
namespace {

using contract::ExitCode;
using transport::FailureCode;
using transport::Message;

constexpr auto kConnectTimeout = std::chrono::seconds(5);  // also of the handshake
constexpr auto kBackoffMin = std::chrono::milliseconds(50);
constexpr auto kFlushTimeout = std::chrono::milliseconds(500);      // a last word to the head is not worth more
constexpr int64_t kProgressIntervalMicros = 250'000;                // of Loading messages
constexpr size_t kQueuedPlansMax = 1024;  // the head keeps fewer in flight (PipelineOptions::plans_in_flight_max)

ExitCode LoadExitCode(const Status& status, ExitCode compute_fault_code) {
  switch (status.code()) {
    case StatusCode::kResourceExhausted: return ExitCode::kDoesNotFit;
    case StatusCode::kInternal: return compute_fault_code;
    default: return ExitCode::kBadCheckpoint;
  }
}

bool IsDecode(const step::StepPlan& plan) {
  return std::all_of(plan.spans.begin(), plan.spans.end(), [](const step::SequenceSpan& span) { return span.tokens.size() == 1; });
}

int32_t DistinctBlocks(const step::StepPlan& plan, int32_t block_count) {
  std::vector<bool> seen(static_cast<size_t>(block_count), false);  // one bit a block: 16k blocks are 2 KB
  int32_t count = 0;
  for (const step::SequenceSpan& span : plan.spans) {
    for (const step::BlockId block : span.blocks) {
      if (!seen[static_cast<size_t>(block)]) {
        seen[static_cast<size_t>(block)] = true;
        ++count;
      }
    }
  }
  return count;
}

}  // namespace

Worker::Worker(WorkerOptions options, ComputeLoader loader, WorkerMetrics& metrics)
    : options_(std::move(options)), loader_(std::move(loader)), metrics_(metrics), instance_(transport::RandomHex(8)) {
  QP_CHECK(options_.stages > 0 && options_.stage >= 0 && options_.stage < options_.stages);
  QP_CHECK(options_.layers.count() > 0);
  phase_since_micros_ = clock_.NowMicros();
}

Worker::~Worker() {
  Finish(ExitCode::kOk, OkStatus());
  if (compute_thread_.joinable()) compute_thread_.join();
  if (watchdog_thread_.joinable()) watchdog_thread_.join();
}

// ---- control thread

WorkerExit Worker::Run() {
  if (options_.stage > 0) {
    auto listener = transport::EdgeListener::Listen(options_.data_listen, options_.secret);
    if (!listener.ok()) return {ExitCode::kPortInUse, listener.status().WithContext("data port")};
    edge_listener_ = std::move(listener).value();
  }
  compute_thread_ = std::thread([this] { ComputeLoop(); });
  watchdog_thread_ = std::thread([this] { WatchdogLoop(); });
  auto backoff = std::chrono::microseconds(kBackoffMin);
  int64_t last_contact_micros = clock_.NowMicros();
  while (!stop_interrupt_.triggered()) {
    if (Connect()) {
      backoff = kBackoffMin;
      last_contact_micros = clock_.NowMicros();
    } else if (options_.head_timeout.count() > 0 && clock_.NowMicros() - last_contact_micros > options_.head_timeout.count()) {
      Finish(ExitCode::kHeadUnreachable, UnavailableError("no head at " + ToString(options_.head)));
    }
    (void)transport::SleepUntil(transport::DeadlineIn(backoff), stop_interrupt_);
    backoff = std::min(backoff * 2, options_.reconnect_backoff_max);
  }
  compute_thread_.join();
  watchdog_thread_.join();
  std::lock_guard<std::mutex> lock(mutex_);
  return exit_;
}

// True when the head was reached and had accepted us: the next attempt starts with a short back-off again.
bool Worker::Connect() {
  const auto deadline = transport::DeadlineIn(kConnectTimeout);
  auto socket = transport::Socket::Connect(options_.head, deadline, stop_interrupt_);
  if (!socket.ok()) {
    log::Debug("head not reached", {{"reason", socket.status().message()}});
    return false;
  }
  auto stream = std::make_unique<transport::MessageStream>(std::move(socket).value());
  stream->socket().set_spin(options_.spin);
  const transport::Hello hello = MakeHello(stream->socket());
  const transport::JoinResult join = transport::JoinAsStage(*stream, options_.secret, hello, deadline, stop_interrupt_);
  if (join.status.ok()) {
    welcomed_once_ = true;
    log::Info("joined the head", {{"head", ToString(options_.head)}, {"epoch", join.welcome.epoch}, {"loading", hello.loading}});
    Serve(std::move(stream), hello.loading);
    return true;
  }
  const StatusCode code = join.status.code();
  if (code == StatusCode::kCancelled) return false;
  log::Warning("could not join the head", {{"reason", join.status.ToString()}});
  if (join.refused_by_head && code != StatusCode::kUnavailable) {
    Finish(ExitCode::kProtocol, join.status);
  } else if (code == StatusCode::kUnauthenticated && !welcomed_once_) {
    // Unproven, so it counts only at the start, when there is nothing to lose but time.
    Finish(ExitCode::kAuth, join.status);
  }
  return false;
}

transport::Hello Worker::MakeHello(const transport::Socket& socket) {
  std::lock_guard<std::mutex> lock(mutex_);
  transport::Hello hello;
  hello.pipeline_uid = options_.pipeline_uid;
  hello.stage = options_.stage;
  hello.stages = options_.stages;
  hello.layer_begin = options_.layers.begin;
  hello.layer_end = options_.layers.end;
  hello.config_hash = options_.config_hash;
  if (edge_listener_) {
    const std::string host = options_.data_advertise.empty() ? socket.local_address() : options_.data_advertise;
    hello.data_address = ToString(transport::Endpoint{host, edge_listener_->port()});
  }
  hello.loading = !capacity_.has_value();
  if (capacity_) hello.capacity = *capacity_;
  hello.epoch = last_epoch_;
  hello.pod_epoch = options_.pod_epoch;
  hello.instance = instance_;
  return hello;
}

void Worker::Serve(std::unique_ptr<transport::MessageStream> stream, bool said_loading) {
  const auto channel = std::make_shared<transport::ControlChannel>(
      std::move(stream), transport::ControlChannel::Options{.heartbeat_interval = options_.heartbeat_interval,
                                                            .stall_timeout = options_.stall_timeout,
                                                            .steps_done = [this] { return steps_done_.load(); }});
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (stopping_) return;
    channel_ = channel;
    announce_loaded_ = said_loading && !capacity_;
    if (said_loading && capacity_) SendLocked(Message(transport::Loaded{*capacity_}));  // became ready during the handshake
  }
  transport::VisionAssembler vision(options_.vision_input_bytes_max);
  Status ended;
  while (ended.ok()) {
    auto message = channel->Receive();
    ended = message.ok() ? Handle(std::move(message).value(), vision) : message.status();
    if (message.ok() && !ended.ok()) {
      (void)channel->Send(Message(transport::Failure{.epoch = 0, .code = FailureCode::kProtocol, .reason = ended.message(), .fatal = false, .hmac = {}}));
      (void)channel->Flush(kFlushTimeout);
    }
  }
  std::lock_guard<std::mutex> lock(mutex_);
  if (!stopping_) log::Warning("head lost", {{"reason", ended.ToString()}});
  EndEpochLocked(ended.WithContext("head lost"), std::nullopt);
  channel->Close(ended);
  channel_.reset();
}

Status Worker::Handle(Message message, transport::VisionAssembler& vision) {
  if (auto* plan = std::get_if<step::StepPlan>(&message)) return TakePlan(std::move(*plan));
  if (auto* chunk = std::get_if<transport::VisionChunk>(&message)) {
    if (options_.stage != 0) return InvalidArgumentError("vision: this is not stage 0");
    ASSIGN_OR_RETURN(auto input, vision.Add(std::move(*chunk)));
    return input ? TakeVision(std::move(*input)) : OkStatus();
  }
  if (const auto* assemble = std::get_if<transport::Assemble>(&message)) return TakeAssemble(*assemble);
  if (std::holds_alternative<transport::Shutdown>(message)) {
    log::Info("the head says goodbye");
    Finish(ExitCode::kOk, OkStatus());
    return CancelledError("shut down by the head");
  }
  if (const auto* failure = std::get_if<transport::Failure>(&message)) {
    if (failure->fatal) {
      Finish(ExitCode::kProtocol, FailedPreconditionError("dropped by the head: " + failure->reason));
      return CancelledError("dropped by the head");
    }
    std::lock_guard<std::mutex> lock(mutex_);
    if (target_ && failure->epoch == target_->assemble.epoch) {
      log::Warning("epoch lost", {{"epoch", failure->epoch}, {"reason", failure->reason}});
      EndEpochLocked(CancelledError(failure->reason), std::nullopt);
    }
    return OkStatus();
  }
  return InvalidArgumentError("the head may not send " + std::string(transport::MessageName(message)));
}

Status Worker::TakeAssemble(const transport::Assemble& assemble) {
  const bool last = options_.stage + 1 == options_.stages;
  if (assemble.next_address.empty() != last) return InvalidArgumentError("assemble.next_address: does not fit this stage");
  if (!last) RETURN_IF_ERROR(transport::ParseEndpoint(assemble.next_address).status());
  std::lock_guard<std::mutex> lock(mutex_);
  if (assemble.epoch <= last_epoch_) {
    return FailedPreconditionError("assemble.epoch: stale, " + std::to_string(assemble.epoch) + " after " + std::to_string(last_epoch_));
  }
  if (!capacity_ || assemble.block_count > capacity_->block_count) return InvalidArgumentError("assemble.block_count: more than this stage has");
  last_epoch_ = assemble.epoch;
  EndEpochLocked(CancelledError("a new epoch begins"), Target{.assemble = assemble, .over = std::make_shared<transport::Interrupt>()});
  return OkStatus();
}

Status Worker::TakePlan(step::StepPlan plan) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!target_ || plan.epoch != target_->assemble.epoch) return FailedPreconditionError("plan.epoch: " + std::to_string(plan.epoch) + " is not the current one");
  if (target_->failed) return OkStatus();  // sent before the head heard of it
  if (assembled_generation_ != generation_) return FailedPreconditionError("plan: before Assembled");
  if (plan.step != target_->next_step) return InvalidArgumentError("plan.step: " + std::to_string(plan.step) + ", expected " + std::to_string(target_->next_step));
  RETURN_IF_ERROR(step::ValidatePlan(plan, LimitsLocked()));
  if (queue_.size() >= kQueuedPlansMax) return ResourceExhaustedError("plan: too many in flight");
  ++target_->next_step;
  queue_.emplace_back(std::move(plan));
  news_.fetch_add(1);
  changed_.notify_all();
  return OkStatus();
}

Status Worker::TakeVision(step::VisionInput input) {
  const uint64_t bytes = input.patches.size();
  std::unique_lock<std::mutex> lock(mutex_);
  const uint64_t generation = generation_;
  // Waiting here stops reading, so the head's own queue fills and its bound holds. Should the compute thread be stuck on a
  // neighbour meanwhile, the watchdog ends that.
  changed_.wait(lock, [&] {
    return stopping_ || generation_ != generation || !target_ || target_->failed || vision_waiting_bytes_ == 0 ||
           vision_waiting_bytes_ + bytes <= options_.vision_waiting_bytes_max;
  });
  if (stopping_ || generation_ != generation || !target_ || target_->failed) return OkStatus();  // nobody waits for it any more
  if (assembled_generation_ != generation_) return FailedPreconditionError("vision: before Assembled");
  vision_waiting_bytes_ += bytes;
  queue_.emplace_back(std::move(input));
  news_.fetch_add(1);
  changed_.notify_all();
  return OkStatus();
}

step::PlanLimits Worker::LimitsLocked() const {
  return {.block_tokens = capacity_->block_tokens,
          .block_count = target_->assemble.block_count,
          .max_slots = capacity_->max_slots,
          .max_batch_tokens = capacity_->max_batch_tokens,
          .max_sequence_tokens = capacity_->max_sequence_tokens,
          .vocab_size = vocab_size_};
}

// ---- compute thread

bool Worker::Load() {
  int64_t last_report_micros = 0;
  const auto progress = [&](int64_t bytes_done, int64_t bytes_total) -> Status {
    metrics_.Loading(bytes_done, bytes_total);
    const int64_t now = clock_.NowMicros();
    std::lock_guard<std::mutex> lock(mutex_);
    if (stopping_) return CancelledError("the stage stops");
    if (now - last_report_micros < kProgressIntervalMicros && bytes_done < bytes_total) return OkStatus();
    last_report_micros = now;
    SendLocked(Message(transport::Loading{.bytes_done = bytes_done, .bytes_total = bytes_total}));
    return OkStatus();
  };
  auto compute = loader_(progress);
  if (!compute.ok()) {
    Leave(compute.status().message());
    Finish(LoadExitCode(compute.status(), options_.compute_fault_code), compute.status());
    return false;
  }
  compute_ = std::move(compute).value();
  const transport::StageCapacity capacity = compute_->capacity();
  QP_CHECK(capacity.block_tokens > 0 && capacity.block_count > 0 && capacity.max_slots > 0 && capacity.max_batch_tokens > 0);
  metrics_.Loaded(capacity.weight_bytes, capacity.block_count);
  log::Info("weights loaded", {{"stage", options_.stage}, {"layers", contract::ToString(options_.layers)},
                               {"weight_bytes", capacity.weight_bytes}, {"kv_blocks", capacity.block_count}});
  std::lock_guard<std::mutex> lock(mutex_);
  capacity_ = capacity;
  vocab_size_ = compute_->vocab_size();
  if (announce_loaded_) {
    announce_loaded_ = false;
    SendLocked(Message(transport::Loaded{capacity}));
  }
  return true;
}

void Worker::ComputeLoop() {
  if (!Load()) return;
  uint64_t generation = 0, known = 0;  // known: of news_
  for (;;) {
    SetPhase(Phase::kIdle);
    SpinForNews(known);
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return stopping_ || generation_ != generation || !queue_.empty(); });
    if (stopping_) break;
    if (generation_ != generation) {
      generation = generation_;
      const bool wanted = target_.has_value();
      lock.unlock();
      DropEdges();
      if (wanted) Assemble(generation);
      continue;
    }
    Next next = TakeNextLocked();
    known = queue_.empty() ? news_.load() : 0;
    changed_.notify_all();  // room for TakeVision
    lock.unlock();
    ExecuteNext(generation, std::move(next));
  }
  DropEdges();
}

void Worker::SpinForNews(uint64_t known) const {
  if (options_.spin.count() == 0) return;
  const auto until = std::chrono::steady_clock::now() + options_.spin;
  while (news_.load() == known && std::chrono::steady_clock::now() < until) std::this_thread::yield();
}

// Inputs that have come while something else was computed go through the tower together; nothing waits for company.
Worker::Next Worker::TakeNextLocked() {
  std::vector<step::VisionInput> inputs;
  for (int64_t patches = 0; !queue_.empty(); queue_.pop_front()) {
    auto* input = std::get_if<step::VisionInput>(&queue_.front());
    if (input == nullptr) break;
    patches += input->patch_count();
    if (!inputs.empty() && patches > compute_->vision_patches_together()) break;
    vision_waiting_bytes_ -= input->patches.size();
    inputs.push_back(std::move(*input));
  }
  if (!inputs.empty()) return Next(std::move(inputs));
  Next plan(std::get<step::StepPlan>(std::move(queue_.front())));
  queue_.pop_front();
  return plan;
}

void Worker::ExecuteNext(uint64_t generation, Next next) {
  Status status;
  if (const auto* inputs = std::get_if<std::vector<step::VisionInput>>(&next)) {
    SetPhase(Phase::kComputing);
    status = compute_->AddVision(*inputs).WithContext("vision");
  } else {
    status = Execute(std::get<step::StepPlan>(next));
  }
  if (status.ok()) return;
  if (status.code() == StatusCode::kInternal) {
    Leave(status.message());
    Finish(options_.compute_fault_code, status);
    return;
  }
  ReportFailure(generation, status);
  FlushChannel();  // the cause should reach the head before the neighbours' complaints about the closed edge
  DropEdges();     // so that they notice now and not when the head tells them
}

void Worker::Assemble(uint64_t generation) {
  SetPhase(Phase::kAssembling);
  Target target;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (generation_ != generation || !target_) return;
    target = *target_;
  }
  compute_->Reset();
  const Status built = BuildEdges(target);
  if (!built.ok()) {
    ReportFailure(generation, built);
    DropEdges();
    return;
  }
  std::lock_guard<std::mutex> lock(mutex_);
  if (generation_ != generation) return;  // the loop drops the edges
  abortable_sender_ = sender_.get();
  abortable_receiver_ = receiver_.get();
  assembled_generation_ = generation;
  metrics_.Epoch(target.assemble.epoch);
  log::Info("edges up", {{"epoch", target.assemble.epoch}});
  SendLocked(Message(transport::Assembled{target.assemble.epoch}));
}

Status Worker::BuildEdges(const Target& target) {
  const auto identity = [&](int32_t from) {
    return transport::EdgeIdentity{.pipeline_uid = options_.pipeline_uid, .epoch = target.assemble.epoch, .from = from, .to = from + 1};
  };
  if (options_.stage > 0) {
    ASSIGN_OR_RETURN(receiver_, edge_listener_->Accept(identity(options_.stage - 1), [this](size_t bytes, auto time) { metrics_.Received(bytes, time); },
                                                       transport::kNoDeadline, *target.over, compute_->edges()));
  }
  if (options_.stage + 1 < options_.stages) {
    ASSIGN_OR_RETURN(const transport::Endpoint next, transport::ParseEndpoint(target.assemble.next_address));
    ASSIGN_OR_RETURN(sender_, transport::DialEdge(next, options_.secret, identity(options_.stage), [this](size_t bytes, auto time) { metrics_.Sent(bytes, time); },
                                                  transport::kNoDeadline, *target.over, compute_->edges()));
  }
  return OkStatus();
}

Status Worker::Execute(const step::StepPlan& plan) {
  const step::ActivationSizes sizes = compute_->activation_sizes();
  const auto bytes = [&](int32_t layer) { return static_cast<size_t>(step::ActivationsBefore(layer, plan, sizes).total_bytes()); };
  const std::span<std::byte> in = receiver_ ? compute_->InputBuffer(plan.step, bytes(options_.layers.begin)) : std::span<std::byte>();
  const std::span<std::byte> out = sender_ ? compute_->OutputBuffer(plan.step, bytes(options_.layers.end)) : std::span<std::byte>();
  if (receiver_) {
    SetPhase(Phase::kReceiving);
    RETURN_IF_ERROR(receiver_->Receive(plan.step, in));
  }
  SetPhase(Phase::kComputing);
  const auto start = std::chrono::steady_clock::now();
  step::StepResult result{.epoch = plan.epoch, .step = plan.step, .samples = {}};
  RETURN_IF_ERROR(compute_->Forward(plan, in, out, result.samples).WithContext("step " + std::to_string(plan.step)));
  metrics_.Step(IsDecode(plan), std::chrono::steady_clock::now() - start);
  metrics_.KvBlocksUsed(DistinctBlocks(plan, compute_->capacity().block_count));
  if (sender_) {
    SetPhase(Phase::kSending);
    RETURN_IF_ERROR(sender_->Send(plan.step, out));
  }
  steps_done_.fetch_add(1);
  if (options_.stage + 1 < options_.stages) return OkStatus();
  std::lock_guard<std::mutex> lock(mutex_);
  // Of an epoch that ended meanwhile: the head has forgotten the plan.
  if (target_ && target_->assemble.epoch == plan.epoch) SendLocked(Message(std::move(result)));
  return OkStatus();
}

void Worker::DropEdges() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    abortable_sender_ = nullptr;
    abortable_receiver_ = nullptr;
  }
  sender_.reset();
  receiver_.reset();
}

void Worker::ReportFailure(uint64_t generation, const Status& reason) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (stopping_ || generation_ != generation || !target_ || target_->failed) return;  // the epoch ended for another reason
  // A neighbour that goes may be lost or may have been told to stop with all of us, a moment before we are: only the head
  // knows. It answers a loss with a Failure, which is logged as the warning.
  const auto level = reason.code() == StatusCode::kUnavailable ? log::Level::kInfo : log::Level::kWarning;
  log::Write(level, "epoch ended here", {{"epoch", target_->assemble.epoch}, {"reason", reason.ToString()}});
  target_->failed = true;
  ClearQueueLocked();
  SendLocked(Message(transport::Failure{
      .epoch = target_->assemble.epoch, .code = FailureCode::kEpochLost, .reason = reason.ToString(), .fatal = false, .hmac = {}}));
}

// ---- watchdog thread

void Worker::WatchdogLoop() {
  Watchdog watchdog(options_.step_timeout.count());
  const auto period = std::clamp<std::chrono::microseconds>(options_.step_timeout / 20, std::chrono::milliseconds(5), std::chrono::milliseconds(500));
  while (transport::SleepUntil(transport::DeadlineIn(period), stop_interrupt_).ok()) {
    std::unique_lock<std::mutex> lock(mutex_);
    const Watchdog::Observation observation{.phase = phase_,
                                            .phase_since_micros = phase_since_micros_,
                                            .own_steps = steps_done_.load(),
                                            .group_progress = channel_ ? channel_->peer_steps_done() : 0};
    switch (watchdog.Check(observation, clock_.NowMicros())) {
      case Watchdog::Verdict::kFine: break;
      case Watchdog::Verdict::kAbortEpoch:
        // The compute thread finds its edge aborted and reports; that is the one road for all edge faults.
        AbortEdgesLocked(DeadlineExceededError(std::string("no progress while ") + PhaseName(phase_)));
        break;
      case Watchdog::Verdict::kHung:
        lock.unlock();
        log::Error("compute hangs: giving the process up", {{"timeout_ms", options_.step_timeout.count() / 1000}});
        if (!options_.on_hung) std::_Exit(static_cast<int>(ExitCode::kStalled));  // threads cannot be joined: they hang
        options_.on_hung();
        return;
    }
  }
}

// ---- any thread

void Worker::SetPhase(Phase phase) {
  std::lock_guard<std::mutex> lock(mutex_);
  phase_ = phase;
  phase_since_micros_ = clock_.NowMicros();
}

void Worker::SendLocked(const Message& message) {
  if (!channel_) return;
  const Status sent = channel_->Send(message);
  if (!sent.ok()) channel_->Close(sent);
}

void Worker::AbortEdgesLocked(const Status& reason) {
  if (abortable_sender_ != nullptr) abortable_sender_->Abort(reason);
  if (abortable_receiver_ != nullptr) abortable_receiver_->Abort(reason);
}

void Worker::ClearQueueLocked() {
  queue_.clear();
  vision_waiting_bytes_ = 0;
  news_.fetch_add(1);
  changed_.notify_all();
}

void Worker::EndEpochLocked(const Status& reason, std::optional<Target> next) {
  if (!target_ && !next) return;
  if (target_) target_->over->Trigger();
  AbortEdgesLocked(reason);
  target_ = std::move(next);
  ++generation_;
  ClearQueueLocked();
}

void Worker::Leave(const std::string& reason) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    SendLocked(Message(transport::Failure{.epoch = 0, .code = FailureCode::kLeaving, .reason = reason.substr(0, 1024), .fatal = false, .hmac = {}}));
  }
  FlushChannel();
}

void Worker::FlushChannel() {
  std::shared_ptr<transport::ControlChannel> channel;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    channel = channel_;
  }
  if (channel) (void)channel->Flush(kFlushTimeout);
}

void Worker::Stop() {
  Leave("told to stop");
  Finish(ExitCode::kOk, OkStatus());
}

void Worker::Finish(ExitCode code, Status status) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (stopping_) return;
  stopping_ = true;
  exit_ = {code, std::move(status)};
  EndEpochLocked(CancelledError("the stage stops"), std::nullopt);
  if (channel_) channel_->Close(CancelledError("the stage stops"));
  stop_interrupt_.Trigger();
  news_.fetch_add(1);
  changed_.notify_all();
}

WorkerHealth Worker::health() const {
  std::lock_guard<std::mutex> lock(mutex_);
  WorkerHealth health{.loaded = capacity_.has_value(),
                      .in_group = target_ && !target_->failed && assembled_generation_ == generation_,
                      .connected = channel_ != nullptr,
                      .epoch = last_epoch_,
                      .steps_done = steps_done_.load(),
                      .phase = phase_};
  health.seconds_in_phase = static_cast<double>(clock_.NowMicros() - phase_since_micros_) / 1e6;
  health.overdue = phase_ == Phase::kComputing && clock_.NowMicros() - phase_since_micros_ > options_.step_timeout.count();
  return health;
}

}  // namespace qwen::worker
