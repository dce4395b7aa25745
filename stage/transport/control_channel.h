// stage/transport/control_channel.h — one control connection, seen from either end: framed messages, a bounded send queue,
// heartbeats both ways, and an end that is noticed.
//
// A connection is first a MessageStream (blocking, for the handshake), then a ControlChannel around it. Silence for longer
// than `stall_timeout` is the loss of the peer, whatever TCP thinks: a half-open connection (power loss, cut network)
// makes no FIN.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <condition_variable>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "stage/base/status.h"
#include "stage/transport/frame.h"
#include "stage/transport/message.h"
#include "stage/transport/socket.h"

namespace qwen::transport {

// Messages over a socket, one at a time. Thread safety: one reader and one writer at a time.
class MessageStream {
 public:
  explicit MessageStream(Socket socket, size_t payload_bytes_max = kFrameBytesMax);
  // `bytes_seen` (may be null) is called after every read, so that a long message counts as a sign of life.
  Result<Message> Read(Deadline deadline, const Interrupt& interrupt, const std::function<void()>& bytes_seen = nullptr);
  Status Write(const Message& message, Deadline deadline, const Interrupt& interrupt);
  Status WriteFrame(const std::string& frame, Deadline deadline, const Interrupt& interrupt);
  // As much of a frame as goes without waiting; how many bytes that was. The rest has to follow before anything else.
  Result<size_t> WriteNow(const std::string& frame);
  // Strangers are held to small frames until the handshake is over. Call between reads.
  void set_payload_bytes_max(size_t bytes) { parser_.set_payload_bytes_max(bytes); }
  Socket& socket() { return socket_; }

 private:
  Socket socket_;
  FrameParser parser_;
  std::vector<std::byte> buffer_;
};

// Thread safety: Send*, Close and the getters from any thread; Receive by one thread.
class ControlChannel {
 public:
  struct Options {
    std::chrono::microseconds heartbeat_interval{std::chrono::seconds(1)};
    std::chrono::microseconds stall_timeout{std::chrono::seconds(10)};  // silence, or a send that makes no progress
    size_t queue_frames_max = 1024;
    size_t queue_bytes_max = size_t{256} << 20;  // of frames that wait; vision inputs are counted by their owner
    std::function<uint64_t()> steps_done;        // goes into heartbeats; null = 0. Called on the writer thread.
  };
  // A frame generator: called on the writer thread with 0, 1, 2 … until it gives nullopt. Owns what it captures.
  using FrameSource = std::function<std::optional<std::string>(size_t index)>;

  ControlChannel(std::unique_ptr<MessageStream> stream, Options options);
  ~ControlChannel();  // closes and joins the writer thread

  // Never waits for the network: what the kernel takes at once leaves on this thread (a handover to the writer thread would
  // cost each token two wake-ups), the rest is queued. Messages leave in the order of the calls. kResourceExhausted when the
  // queue is full (or the message larger than a frame), else the reason why the channel is closed.
  Status Send(const Message& message);
  // The same for a frame that is already encoded: a plan is serialised once and queued on the channels of all stages,
  // which is why it is shared.
  Status SendFrame(std::shared_ptr<const std::string> frame);
  Status SendSource(FrameSource source);

  // Forgets what waits (not what is being written): messages of an epoch that is over must not delay the next one's.
  void ClearQueue();

  // The next message that is no heartbeat. Blocks until one comes, the peer is silent for stall_timeout
  // (kDeadlineExceeded), the connection ends (kUnavailable, kDataLoss, kInvalidArgument) or Close() is called (kCancelled).
  Result<Message> Receive();

  // Sticky: the first reason stays. Receive and Send fail from now on.
  void Close(Status reason);
  // Waits until the queue is empty and written, at most `timeout`; false if it is not by then.
  bool Flush(std::chrono::microseconds timeout);

  uint64_t peer_steps_done() const { return peer_steps_done_.load(); }
  std::chrono::steady_clock::time_point last_heard() const;
  std::string peer() const { return peer_; }

 private:
  struct Outgoing {
    std::shared_ptr<const std::string> frame;  // or
    FrameSource source;
  };
  Status Enqueue(Outgoing item);
  bool WriteAtOnce(const std::string& frame, std::unique_lock<std::mutex>& lock);
  void WriterLoop();
  Status WriteOut(const Outgoing& item);
  Status WriteFrame(const std::string& frame);
  Status WriteHeartbeatIfDue();
  void Heard();

  const Options options_;
  const std::string peer_;
  const std::unique_ptr<MessageStream> stream_;  // read by the receiver, written by whoever has set `writing_`
  Interrupt closed_interrupt_;
  std::atomic<uint64_t> peer_steps_done_{0};
  std::atomic<int64_t> last_heard_micros_;
  std::chrono::steady_clock::time_point next_heartbeat_;  // the writer thread's

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Outgoing> queue_;     // guarded by mutex_
  size_t queue_bytes_ = 0;         // guarded by mutex_
  std::string rest_;               // guarded by mutex_: of a frame that has begun to leave, before all that waits
  bool writing_ = false;           // guarded by mutex_: one thread writes to the stream
  int awaiting_turn_ = 0;          // guarded by mutex_: threads that wait for the end of a sender's own write
  Status closed_;                  // guarded by mutex_; OK while open
  std::thread writer_;
};

}  // namespace qwen::transport
