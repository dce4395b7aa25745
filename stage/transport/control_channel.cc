#include "stage/transport/control_channel.h"

#include "stage/base/check.h"
#include "stage/transport/codec.h"

namespace qwen::transport {
namespace {

constexpr size_t kReadBufferBytes = size_t{256} << 10;

int64_t NowMicros() {
  return std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

MessageStream::MessageStream(Socket socket, size_t payload_bytes_max)
    : socket_(std::move(socket)), parser_(payload_bytes_max), buffer_(kReadBufferBytes) {}

Result<Message> MessageStream::Read(Deadline deadline, const Interrupt& interrupt, const std::function<void()>& bytes_seen) {
  for (;;) {
    ASSIGN_OR_RETURN(std::optional<std::string> payload, parser_.Next());
    if (payload) return DecodeMessage(*payload);
    auto count = socket_.ReadSome(buffer_, deadline, interrupt);
    if (!count.ok()) {
      if (count.status().code() == StatusCode::kUnavailable && parser_.buffered_bytes() > 0) {
        return DataLossError("frame: the connection ended inside a frame");
      }
      return count.status();
    }
    if (bytes_seen) bytes_seen();
    parser_.Feed(std::span(buffer_).first(*count));
  }
}

Status MessageStream::Write(const Message& message, Deadline deadline, const Interrupt& interrupt) {
  ASSIGN_OR_RETURN(const std::string frame, EncodeFramedMessage(message));
  return WriteFrame(frame, deadline, interrupt);
}

Status MessageStream::WriteFrame(const std::string& frame, Deadline deadline, const Interrupt& interrupt) {
  return socket_.WriteAll(std::as_bytes(std::span(frame.data(), frame.size())), deadline, interrupt);
}

Result<size_t> MessageStream::WriteNow(const std::string& frame) { return socket_.WriteNow(std::as_bytes(std::span(frame.data(), frame.size()))); }

ControlChannel::ControlChannel(std::unique_ptr<MessageStream> stream, Options options)
    : options_(std::move(options)), peer_(stream->socket().peer()), stream_(std::move(stream)), last_heard_micros_(NowMicros()) {
  QP_CHECK(options_.heartbeat_interval.count() > 0 && options_.queue_frames_max > 0);
  next_heartbeat_ = std::chrono::steady_clock::now();
  writer_ = std::thread([this] { WriterLoop(); });
}

ControlChannel::~ControlChannel() {
  Close(CancelledError("channel destroyed"));
  writer_.join();
}

Status ControlChannel::Send(const Message& message) {
  ASSIGN_OR_RETURN(std::string frame, EncodeFramedMessage(message));
  return SendFrame(std::make_shared<const std::string>(std::move(frame)));
}
Status ControlChannel::SendFrame(std::shared_ptr<const std::string> frame) { return Enqueue({std::move(frame), nullptr}); }
Status ControlChannel::SendSource(FrameSource source) { return Enqueue({nullptr, std::move(source)}); }

Status ControlChannel::Enqueue(Outgoing item) {
  const size_t bytes = item.frame ? item.frame->size() : 0;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    if (!closed_.ok()) return closed_;
    if (item.frame && !writing_ && rest_.empty() && queue_.empty() && WriteAtOnce(*item.frame, lock)) return OkStatus();
    if (!closed_.ok()) return closed_;
    // One frame always fits, however large: the bound is on what waits behind others.
    if (queue_.size() >= options_.queue_frames_max || (!queue_.empty() && queue_bytes_ + bytes > options_.queue_bytes_max)) {
      return ResourceExhaustedError("send queue to " + peer_ + " is full");
    }
    queue_.push_back(std::move(item));
    queue_bytes_ += bytes;
  }
  changed_.notify_all();
  return OkStatus();
}

// True when `frame` needs nothing more: it was written, or has begun to leave and its rest waits for the writer thread.
bool ControlChannel::WriteAtOnce(const std::string& frame, std::unique_lock<std::mutex>& lock) {
  writing_ = true;
  lock.unlock();
  const Result<size_t> written = stream_->WriteNow(frame);
  lock.lock();
  writing_ = false;
  const bool begun = written.ok() && *written > 0;  // a fault of the socket is met again, and reported, by the writer thread
  if (begun) rest_ = frame.substr(*written);
  if (!rest_.empty() || !queue_.empty() || awaiting_turn_ > 0) changed_.notify_all();
  return begun;
}

void ControlChannel::ClearQueue() {
  std::deque<Outgoing> dropped;  // destroyed without the lock: a source may own much
  {
    std::lock_guard<std::mutex> lock(mutex_);
    dropped.swap(queue_);
    queue_bytes_ = 0;
  }
  changed_.notify_all();
}

void ControlChannel::Heard() { last_heard_micros_.store(NowMicros()); }

std::chrono::steady_clock::time_point ControlChannel::last_heard() const {
  return std::chrono::steady_clock::time_point(std::chrono::microseconds(last_heard_micros_.load()));
}

Result<Message> ControlChannel::Receive() {
  for (;;) {
    // Counted from now when the caller was away for long: bytes may be waiting that nobody has read yet.
    const auto since = std::max(last_heard(), std::chrono::steady_clock::now() - options_.stall_timeout / 2);
    auto message = stream_->Read(since + options_.stall_timeout, closed_interrupt_, [this] { Heard(); });
    if (!message.ok()) {
      Status status = message.status();
      if (status.code() == StatusCode::kDeadlineExceeded) {
        if (std::chrono::steady_clock::now() < last_heard() + options_.stall_timeout) continue;  // bytes of a long message came
        status = DeadlineExceededError(
            peer_ + " was silent for " +
            std::to_string(std::chrono::duration_cast<std::chrono::milliseconds>(options_.stall_timeout).count()) + " ms");
      }
      Close(status);
      std::lock_guard<std::mutex> lock(mutex_);
      return closed_;  // the first reason: the one given to Close, if it was called
    }
    if (const auto* heartbeat = std::get_if<Heartbeat>(&*message)) {
      peer_steps_done_.store(heartbeat->steps_done);
      continue;
    }
    return message;
  }
}

void ControlChannel::Close(Status reason) {
  QP_CHECK(!reason.ok());
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!closed_.ok()) return;
    closed_ = std::move(reason);
  }
  closed_interrupt_.Trigger();
  stream_->socket().Shutdown();
  changed_.notify_all();
}

bool ControlChannel::Flush(std::chrono::microseconds timeout) {
  std::unique_lock<std::mutex> lock(mutex_);
  const auto empty = [&] { return queue_.empty() && rest_.empty() && !writing_; };
  ++awaiting_turn_;
  changed_.wait_for(lock, timeout, [&] { return !closed_.ok() || empty(); });
  --awaiting_turn_;
  return empty();
}

Status ControlChannel::WriteFrame(const std::string& frame) {
  return stream_->WriteFrame(frame, DeadlineIn(options_.stall_timeout), closed_interrupt_);
}

Status ControlChannel::WriteHeartbeatIfDue() {
  const auto now = std::chrono::steady_clock::now();
  if (now < next_heartbeat_) return OkStatus();
  next_heartbeat_ = now + options_.heartbeat_interval;
  const Heartbeat heartbeat{.sent_micros = static_cast<uint64_t>(NowMicros()),
                            .steps_done = options_.steps_done ? options_.steps_done() : 0};
  ASSIGN_OR_RETURN(const std::string frame, EncodeFramedMessage(heartbeat));
  return WriteFrame(frame);
}

Status ControlChannel::WriteOut(const Outgoing& item) {
  if (item.frame) return WriteFrame(*item.frame);
  for (size_t index = 0;; ++index) {
    std::optional<std::string> frame = item.source(index);
    if (!frame) return OkStatus();
    RETURN_IF_ERROR(WriteFrame(*frame));
    RETURN_IF_ERROR(WriteHeartbeatIfDue());  // a video is many frames; the peer counts heartbeats for progress
  }
}

void ControlChannel::WriterLoop() {
  for (;;) {
    Outgoing item;
    bool begun = false;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait_until(lock, next_heartbeat_, [&] { return !closed_.ok() || (!writing_ && !(queue_.empty() && rest_.empty())); });
      ++awaiting_turn_;
      changed_.wait(lock, [&] { return !closed_.ok() || !writing_; });
      --awaiting_turn_;
      if (!closed_.ok()) return;
      writing_ = true;
      begun = !rest_.empty();
      if (begun) {
        item.frame = std::make_shared<const std::string>(std::exchange(rest_, {}));
      } else if (!queue_.empty()) {
        item = std::move(queue_.front());
        queue_.pop_front();
        if (item.frame) queue_bytes_ -= item.frame->size();
      }
    }
    Status status = begun ? OkStatus() : WriteHeartbeatIfDue();  // not inside a frame
    if (status.ok() && (item.frame || item.source)) status = WriteOut(item);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      writing_ = false;
    }
    if (!status.ok()) {
      Close(status.WithContext("to " + peer_));
      return;
    }
    changed_.notify_all();
  }
}

}  // namespace qwen::transport
