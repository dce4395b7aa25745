// stage/weights/reader.h — executes a ReadPlan: many requests in flight, a bounded ring of buffers, bytes handed on as they come.
//
// How a file is read is decided per file, by asking the page cache (preadv2 with RWF_NOWAIT at 64 places of the plan):
//   cached      by a pool of threads that pread: copying out of the cache is work for a CPU, so it takes several
//   not cached  O_DIRECT through io_uring, several requests a thread: one copy less, and other files stay in the cache.
//               Where the kernel refuses io_uring (containers often do) the threads pread; where the file system
//               refuses O_DIRECT, through the cache.
// docs/weights.md has the measurements behind that.
//
//   lane (thread) : next request -> own buffer of the ring, or straight into host memory -> ReadSink, part by part
//
// Memory: ReadRingBytes and nothing else. Thread safety: one call of ReadAllParts uses its sink from all its lanes at once.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "stage/base/status.h"
#include "stage/weights/read_plan.h"

namespace qwen::weights {

struct ReadPartsOptions {
  enum class Cache { kAuto, kBuffered, kDirect };  // kDirect: O_DIRECT where the file system has it
  enum class Io { kAuto, kThreads, kUring };       // kUring: where the kernel has it. kAuto: io_uring for direct reads
  int32_t lanes = 4;
  int32_t depth = 4;  // requests in flight of a lane with io_uring; a lane that preads has one
  Cache cache = Cache::kAuto;
  Io io = Io::kAuto;
  // After every request, one call at a time, with what has been handed on so far: rises to plan.bytes. An error ends the
  // reading with it: within one request's time, and only when the disk has answered what was asked. May be empty.
  std::function<Status(int64_t bytes_done)> progress;
  // For tests: the errno with which a read of `file` at `offset` fails, 0: none. May be empty.
  std::function<int(const std::string& file, int64_t offset)> fault;
};

class ReadSink {
 public:
  virtual ~ReadSink() = default;
  // Host memory of part.bytes bytes where the part belongs just as it is stored, or null: then Take gets it.
  virtual std::byte* Destination(const ReadPart&) { return nullptr; }
  // A part's bytes, valid until it returns, or, of a sink that copies asynchronously, until Settle(buffer) returns.
  virtual Status Take(const ReadPart& part, std::span<const std::byte> bytes, int32_t buffer) = 0;
  // Called before `buffer` (0 ... buffers - 1) is filled again: whatever still reads it must have ended on return.
  virtual Status Settle(int32_t /*buffer*/) { return OkStatus(); }
  // Memory of the ring; kRingAlignment aligned, and alive until ReadAllParts returns. Called once at most, not when every
  // part has a destination.
  virtual Result<std::byte*> Ring(size_t bytes) = 0;
};

struct ReadStats {
  int64_t bytes = 0, direct_bytes = 0;  // handed on; of these read past the page cache
  int32_t uring_lanes = 0;              // the others pread
  int64_t ring_bytes = 0;
};

inline constexpr size_t kRingAlignment = 4096;  // of O_DIRECT: no device in use has larger blocks
// Of the ring: every lane has one buffer more than it has requests in flight, each of the largest request and two blocks.
int64_t ReadRingBytes(const ReadPlan& plan, const ReadPartsOptions& options);

// Reads everything. An error names file, tensor and offset: kDataLoss (file shorter, or changed since it was opened),
// kUnavailable (the system's own, EIO), the sink's or progress's own.
Result<ReadStats> ReadAllParts(const Checkpoint& checkpoint, const StageTensors& weights, const ReadPlan& plan, ReadSink& sink,
                               const ReadPartsOptions& options);

}  // namespace qwen::weights
