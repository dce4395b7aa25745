// stage/weights/read_queue.h — reads in flight of one thread: asked for, then awaited. Two kinds: io_uring, and one preadv
// at a time where the kernel has none to give.
//
// Thread safety: one thread.
#pragma once
#include <sys/uio.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace qwen::weights {

// Filled from `offset` of `fd` into `memory`, in order. Lives where it is until Wait has returned it.
struct QueuedRead {
  int fd = -1;
  int64_t offset = 0;
  std::vector<iovec> memory;  // at most IOV_MAX
  int64_t result = 0;         // bytes that came, possibly fewer than asked for; 0: end of file; negative: -errno
};

class ReadQueue {
 public:
  virtual ~ReadQueue() = default;
  virtual int32_t depth() const = 0;  // that may be in flight
  // REQUIRES: fewer than depth() are in flight.
  virtual void Submit(QueuedRead* read) = 0;
  // Blocks until one of them has its result. REQUIRES: one is in flight.
  virtual QueuedRead* Wait() = 0;
};

// Null where the kernel refuses: too old, switched off (kernel.io_uring_disabled), or kept from this container by seccomp.
std::unique_ptr<ReadQueue> MakeUringQueue(int32_t depth);
std::unique_ptr<ReadQueue> MakeBlockingQueue();

}  // namespace qwen::weights
