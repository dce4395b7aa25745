#include "stage/transport/nccl_edge.h"

#include <cuda_runtime.h>
#include <nccl.h>
#include <poll.h>

#include <atomic>
#include <cstring>
#include <mutex>
#include <thread>
#include <utility>

#include "stage/base/bytes.h"
#include "stage/base/check.h"

namespace qwen::transport {
namespace {

constexpr uint32_t kNcclMagic = 0x3143434e;  // "NCC1": after the edge's handshake, receiver -> sender with the unique id
constexpr auto kJoinTimeout = std::chrono::seconds(60);   // of the communicator: the first one loads NCCL's kernels
constexpr auto kWatchInterval = std::chrono::milliseconds(100);
constexpr int kBuffers = 2;

Status CudaStatus(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return OkStatus();
  return InternalError(std::string(what) + ": " + cudaGetErrorString(error));
}
Status NcclStatus(ncclResult_t result, const char* what) {
  if (result == ncclSuccess || result == ncclInProgress) return OkStatus();
  return UnavailableError(std::string(what) + ": " + ncclGetErrorString(result));
}

// One communicator, its stream, and the thread that watches the other end. Aborted once, by anybody.
class Link {
 public:
  static Result<std::unique_ptr<Link>> Join(Socket socket, int rank, cudaStream_t compute, Deadline deadline, const Interrupt& interrupt) {
    ncclUniqueId id{};
    if (rank == 1) {
      RETURN_IF_ERROR(NcclStatus(ncclGetUniqueId(&id), "ncclGetUniqueId"));
      std::string hello;
      AppendBytes(hello, kNcclMagic);
      hello.append(id.internal, sizeof(id.internal));
      RETURN_IF_ERROR(socket.WriteAll(std::as_bytes(std::span(hello.data(), hello.size())), deadline, interrupt));
    } else {
      std::string hello(4 + sizeof(id.internal), '\0');
      RETURN_IF_ERROR(socket.ReadAll(std::as_writable_bytes(std::span(hello.data(), hello.size())), std::min(deadline, DeadlineIn(kJoinTimeout)), interrupt)
                          .WithContext("the next stage's NCCL id"));
      uint32_t magic = 0;
      std::memcpy(&magic, hello.data(), 4);
      if (magic != kNcclMagic) return DataLossError("edge: the next stage does not speak NCCL");
      std::memcpy(id.internal, hello.data() + 4, sizeof(id.internal));
    }
    std::unique_ptr<Link> link(new Link(std::move(socket), compute));
    RETURN_IF_ERROR(CudaStatus(cudaGetDevice(&link->device_), "cudaGetDevice"));
    RETURN_IF_ERROR(CudaStatus(cudaStreamCreateWithFlags(&link->stream_, cudaStreamNonBlocking), "edge stream"));
    for (int i = 0; i < kBuffers; ++i) {
      RETURN_IF_ERROR(CudaStatus(cudaEventCreateWithFlags(&link->ready_[i], cudaEventDisableTiming), "event"));
      RETURN_IF_ERROR(CudaStatus(cudaEventCreateWithFlags(&link->done_[i], cudaEventDisableTiming), "event"));
    }
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    RETURN_IF_ERROR(NcclStatus(ncclCommInitRankConfig(&link->comm_, 2, id, rank, &config), "ncclCommInitRank"));
    RETURN_IF_ERROR(link->Finish("ncclCommInitRank", std::min(deadline, DeadlineIn(kJoinTimeout)), interrupt));
    link->watcher_ = std::thread([raw = link.get()] { raw->Watch(); });
    return link;
  }

  ~Link() {
    Abort(CancelledError("edge destroyed"));
    if (watcher_.joinable()) watcher_.join();
    for (int i = 0; i < kBuffers; ++i) {
      if (ready_[i] != nullptr) cudaEventDestroy(ready_[i]);
      if (done_[i] != nullptr) cudaEventDestroy(done_[i]);
    }
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  void Abort(Status reason) {
    QP_CHECK(!reason.ok());
    std::lock_guard<std::mutex> lock(mutex_);
    if (!aborted_.ok()) return;
    aborted_ = std::move(reason);
    stop_.Trigger();
    socket_.Shutdown();  // the other end notices at once
    if (comm_ != nullptr) ncclCommAbort(comm_);
    comm_ = nullptr;
  }
  Status aborted() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return aborted_;
  }

  // Sends on this link's stream what the compute stream has written by now; the compute stream may write the other buffer
  // once the send before is done.
  Status Send(uint64_t step, std::span<const std::byte> data) {
    const size_t slot = step % kBuffers, other = (step + 1) % kBuffers;
    RETURN_IF_ERROR(CudaStatus(cudaEventRecord(ready_[slot], compute_), "edge send"));
    RETURN_IF_ERROR(CudaStatus(cudaStreamWaitEvent(stream_, ready_[slot], 0), "edge send"));
    RETURN_IF_ERROR(Transfer("ncclSend", [&](ncclComm_t comm) { return ncclSend(data.data(), data.size(), ncclUint8, 1, comm, stream_); }));
    RETURN_IF_ERROR(CudaStatus(cudaEventRecord(done_[slot], stream_), "edge send"));
    return CudaStatus(cudaStreamWaitEvent(compute_, done_[other], 0), "edge send");
  }

  Status Receive(uint64_t step, std::span<std::byte> data) {
    const size_t slot = step % kBuffers, other = (step + 1) % kBuffers;
    // Everything enqueued so far includes the compute of step - 1; the buffer of this step was read by that of step - 2,
    // which the event of the call before marks.
    RETURN_IF_ERROR(CudaStatus(cudaStreamWaitEvent(stream_, ready_[other], 0), "edge receive"));
    RETURN_IF_ERROR(CudaStatus(cudaEventRecord(ready_[slot], compute_), "edge receive"));
    RETURN_IF_ERROR(Transfer("ncclRecv", [&](ncclComm_t comm) { return ncclRecv(data.data(), data.size(), ncclUint8, 0, comm, stream_); }));
    RETURN_IF_ERROR(CudaStatus(cudaEventRecord(done_[slot], stream_), "edge receive"));
    RETURN_IF_ERROR(CudaStatus(cudaStreamWaitEvent(compute_, done_[slot], 0), "edge receive"));
    return Await(done_[slot]);
  }

 private:
  Link(Socket socket, cudaStream_t compute) : socket_(std::move(socket)), compute_(compute) {}

  // Until the GPU is past `event`: waiting for a neighbour is not computing, and the caller must know which of the two it does.
  Status Await(cudaEvent_t event) {
    const auto start = std::chrono::steady_clock::now();
    for (;;) {
      const cudaError_t state = cudaEventQuery(event);
      if (state == cudaSuccess) return OkStatus();
      if (state != cudaErrorNotReady) return CudaStatus(state, "edge receive");
      if (const Status over = aborted(); !over.ok()) return over;
      // A decode step is a few milliseconds: spin through that, and be gentle afterwards.
      if (std::chrono::steady_clock::now() - start < std::chrono::milliseconds(20)) {
        std::this_thread::yield();
      } else {
        std::this_thread::sleep_for(std::chrono::microseconds(200));
      }
    }
  }

  // Enqueues while nobody can abort the communicator, and waits until NCCL has taken it (non-blocking communicators).
  template <typename F>
  Status Transfer(const char* what, F&& enqueue) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!aborted_.ok()) return aborted_;
      const Status status = NcclStatus(enqueue(comm_), what);
      if (!status.ok()) return status;
    }
    return Finish(what, kNoDeadline, stop_);
  }

  // Until the communicator is idle. The first transfer connects the pair, which takes a while.
  Status Finish(const char* what, Deadline deadline, const Interrupt& interrupt) {
    for (;;) {
      ncclResult_t state = ncclSuccess;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        if (!aborted_.ok()) return aborted_;
        if (const ncclResult_t asked = ncclCommGetAsyncError(comm_, &state); asked != ncclSuccess) state = asked;
      }
      if (state == ncclSuccess) return OkStatus();
      if (state != ncclInProgress) return NcclStatus(state, what);
      if (std::chrono::steady_clock::now() > deadline) return DeadlineExceededError(std::string(what) + ": the neighbour did not join");
      if (interrupt.triggered()) return aborted().ok() ? CancelledError("interrupted") : aborted();
      std::this_thread::yield();
    }
  }

  // Nothing is ever sent over the connection after the id: what can be read is its end.
  void Watch() {
    cudaSetDevice(device_);
    std::byte none{};
    while (!stop_.triggered()) {
      const Result<size_t> read = socket_.ReadSome({&none, 1}, DeadlineIn(kWatchInterval), stop_);
      if (read.ok()) {
        Abort(DataLossError("edge: unexpected bytes from the neighbour"));
      } else if (read.status().code() != StatusCode::kDeadlineExceeded) {
        Abort(read.status().WithContext("edge"));
      } else {
        ncclResult_t state = ncclSuccess;
        {
          std::lock_guard<std::mutex> lock(mutex_);
          if (!aborted_.ok()) return;
          ncclCommGetAsyncError(comm_, &state);
        }
        if (state != ncclSuccess && state != ncclInProgress) Abort(NcclStatus(state, "edge"));
      }
    }
  }

  Socket socket_;
  const cudaStream_t compute_;
  int device_ = 0;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t ready_[kBuffers] = {}, done_[kBuffers] = {};
  Interrupt stop_;
  mutable std::mutex mutex_;
  Status aborted_;             // guarded by mutex_
  ncclComm_t comm_ = nullptr;  // guarded by mutex_; null once aborted
  std::thread watcher_;
};

class NcclSender final : public EdgeSender {
 public:
  NcclSender(std::unique_ptr<Link> link, OnTransfer on_transfer) : link_(std::move(link)), on_transfer_(std::move(on_transfer)) {}
  Status Send(uint64_t step, std::span<const std::byte> data) override {
    const auto start = std::chrono::steady_clock::now();
    const Status status = link_->Send(step, data);
    if (!status.ok()) link_->Abort(status);
    else if (on_transfer_) on_transfer_(data.size(), std::chrono::steady_clock::now() - start);  // the time to enqueue: the GPU's is not waited for
    return status;
  }
  void Abort(Status reason) override { link_->Abort(std::move(reason)); }

 private:
  const std::unique_ptr<Link> link_;
  const OnTransfer on_transfer_;
};

class NcclReceiver final : public EdgeReceiver {
 public:
  NcclReceiver(std::unique_ptr<Link> link, OnTransfer on_transfer) : link_(std::move(link)), on_transfer_(std::move(on_transfer)) {}
  Status Receive(uint64_t step, std::span<std::byte> data) override {
    const auto start = std::chrono::steady_clock::now();
    const Status status = link_->Receive(step, data);
    if (!status.ok()) link_->Abort(status);
    else if (on_transfer_) on_transfer_(data.size(), std::chrono::steady_clock::now() - start);
    return status;
  }
  void Abort(Status reason) override { link_->Abort(std::move(reason)); }

 private:
  const std::unique_ptr<Link> link_;
  const OnTransfer on_transfer_;
};

class NcclTransport final : public EdgeTransport {
 public:
  explicit NcclTransport(cudaStream_t compute) : compute_(compute) {}
  Result<std::unique_ptr<EdgeSender>> MakeSender(Socket socket, const EdgeIdentity&, OnTransfer on_transfer, Deadline deadline,
                                                 const Interrupt& interrupt) override {
    ASSIGN_OR_RETURN(std::unique_ptr<Link> link, Link::Join(std::move(socket), 0, compute_, deadline, interrupt));
    return std::unique_ptr<EdgeSender>(new NcclSender(std::move(link), std::move(on_transfer)));
  }
  Result<std::unique_ptr<EdgeReceiver>> MakeReceiver(Socket socket, const EdgeIdentity&, OnTransfer on_transfer, Deadline deadline,
                                                     const Interrupt& interrupt) override {
    ASSIGN_OR_RETURN(std::unique_ptr<Link> link, Link::Join(std::move(socket), 1, compute_, deadline, interrupt));
    return std::unique_ptr<EdgeReceiver>(new NcclReceiver(std::move(link), std::move(on_transfer)));
  }

 private:
  const cudaStream_t compute_;
};

}  // namespace

std::unique_ptr<EdgeTransport> MakeNcclEdges(void* stream) { return std::make_unique<NcclTransport>(static_cast<cudaStream_t>(stream)); }

}  // namespace qwen::transport

// What the stage finds after opening the library.
extern "C" __attribute__((visibility("default"))) qwen::transport::EdgeTransport* qwen_nccl_edges(void* stream) {
  return qwen::transport::MakeNcclEdges(stream).release();
}
