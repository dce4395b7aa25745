// stage/transport/edge.h — hidden states from one stage to the next: one directed edge per epoch.
//
// The interface is what any transport gives (TCP here; NCCL between GPUs); both ends know from the plan how many bytes a
// step carries, so a length on the wire is only ever compared, never believed. An edge serves one epoch: any error, and
// Abort(), ends it for good, and the stages build new ones in the next epoch.
#pragma once
#include <array>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "stage/base/status.h"
#include "stage/transport/handshake.h"
#include "stage/transport/socket.h"

namespace qwen::transport {

// Thread safety: Send by one thread; Abort by any.
class EdgeSender {
 public:
  virtual ~EdgeSender() = default;
  // Sends the activations of `step`. Returns as soon as `data` may be overwritten, normally before the bytes are out: two
  // messages can be under way, so that sending overlaps the next step's compute; with both under way it waits.
  // REQUIRES: !data.empty(); `step` grows from call to call.
  virtual Status Send(uint64_t step, std::span<const std::byte> data) = 0;
  virtual void Abort(Status reason) = 0;  // sticky; a waiting Send returns it
};

// Thread safety: Receive by one thread; Abort by any.
class EdgeReceiver {
 public:
  virtual ~EdgeReceiver() = default;
  // Waits for the activations of `step` and puts them into `data`, whose size the plan gave. kDataLoss when what comes is
  // another step, another size or damaged; kUnavailable when the sender is gone.
  virtual Status Receive(uint64_t step, std::span<std::byte> data) = 0;
  virtual void Abort(Status reason) = 0;
};

// Which edge: checked by both ends before anything else is sent.
struct EdgeIdentity {
  std::string pipeline_uid;
  uint64_t epoch = 0;
  int32_t from = 0;  // stage index of the sender
  int32_t to = 0;    // of the receiver
};

// Called after each transfer with its bytes and the time it took (a receiver's waiting for the first byte not counted).
// On the sender's own thread, or inside Receive.
using OnTransfer = std::function<void(size_t bytes, std::chrono::duration<double> time)>;

// What makes an edge out of a connection whose two ends have proved who they are. TCP sends the activations over it. NCCL
// (nccl_edge.h) agrees over it on a communicator and then watches it: that the other end is gone shows there first.
// Thread safety: one thread.
class EdgeTransport {
 public:
  virtual ~EdgeTransport() = default;
  virtual Result<std::unique_ptr<EdgeSender>> MakeSender(Socket socket, const EdgeIdentity& identity, OnTransfer on_transfer, Deadline deadline,
                                                         const Interrupt& interrupt) = 0;
  virtual Result<std::unique_ptr<EdgeReceiver>> MakeReceiver(Socket socket, const EdgeIdentity& identity, OnTransfer on_transfer, Deadline deadline,
                                                             const Interrupt& interrupt) = 0;
};
EdgeTransport& TcpEdges();

// The receiving end: listens for the life of the process, accepts one connection per epoch. Thread safety: one thread.
class EdgeListener {
 public:
  static Result<std::unique_ptr<EdgeListener>> Listen(const Endpoint& endpoint, const Secret& secret);
  // Waits for the previous stage's dial of exactly `identity`. Dials of older epochs are told that they are stale, of
  // newer ones to try again, wrong secrets and other stages to go away; none of them ends the wait.
  Result<std::unique_ptr<EdgeReceiver>> Accept(const EdgeIdentity& identity, OnTransfer on_transfer, Deadline deadline,
                                               const Interrupt& interrupt, EdgeTransport& transport = TcpEdges());
  uint16_t port() const { return listener_.port(); }

 private:
  EdgeListener(Listener listener, Secret secret) : listener_(std::move(listener)), secret_(std::move(secret)) {}
  Status Admit(Socket& socket, const EdgeIdentity& identity, Deadline deadline, const Interrupt& interrupt);

  Listener listener_;
  const Secret secret_;
};

// The sending end. Tries again with back-off (20 ms … 1 s) while the next stage is not there yet, until `deadline`.
// kFailedPrecondition when it says that this epoch is over, kUnauthenticated when the secrets differ; at the deadline what the last
// attempt that was answered said, or kDeadlineExceeded when none was.
Result<std::unique_ptr<EdgeSender>> DialEdge(const Endpoint& endpoint, const Secret& secret, const EdgeIdentity& identity,
                                             OnTransfer on_transfer, Deadline deadline, const Interrupt& interrupt,
                                             EdgeTransport& transport = TcpEdges());

// The message on a TCP edge (docs/wire.md "Edge"): header, payload, u32 crc32c of the payload. All little-endian.
//   u32 magic 0x31455751 ("QWE1") | u32 version | u64 epoch | u64 step | u64 bytes | u32 crc32c of the 32 bytes before
inline constexpr uint32_t kEdgeMagic = 0x31455751;
inline constexpr uint32_t kEdgeVersion = 1;
inline constexpr size_t kEdgeHeaderBytes = 36;
std::array<std::byte, kEdgeHeaderBytes> EncodeEdgeHeader(uint64_t epoch, uint64_t step, uint64_t bytes);
// OK when `header` announces exactly this; else kDataLoss naming the field.
Status CheckEdgeHeader(std::span<const std::byte> header, uint64_t epoch, uint64_t step, uint64_t bytes);

}  // namespace qwen::transport
