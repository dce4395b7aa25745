#include "stage/weights/reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <list>
#include <memory>
#include <mutex>
#include <thread>

#include "stage/weights/read_queue.h"

namespace qwen::weights {
namespace {

constexpr int64_t kBlock = kRingAlignment;
constexpr size_t kCacheProbes = 64;  // of a file: an error of a quarter changes nothing

int64_t RoundDown(int64_t value) { return value / kBlock * kBlock; }
int64_t RoundUp(int64_t value) { return RoundDown(value + kBlock - 1); }

// A file of the plan, with the way in which it is read.
class SourceFile {
 public:
  SourceFile(const SafetensorsFile& file, ReadPartsOptions::Cache cache, const std::vector<const ReadRequest*>& requests) : file_(file) {
    const bool wanted = cache == ReadPartsOptions::Cache::kDirect || (cache == ReadPartsOptions::Cache::kAuto && !MostlyCached(requests));
    if (!wanted) return;
    direct_ = ::open(file.path().c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);  // EINVAL: not on this file system
    struct stat a {}, b {};
    const bool same = direct_ >= 0 && ::fstat(direct_, &a) == 0 && ::fstat(file.descriptor(), &b) == 0 && a.st_dev == b.st_dev && a.st_ino == b.st_ino;
    use_direct_ = same;
  }
  ~SourceFile() {
    if (direct_ >= 0) ::close(direct_);
  }
  SourceFile(const SourceFile&) = delete;
  SourceFile& operator=(const SourceFile&) = delete;

  const SafetensorsFile& file() const { return file_; }
  bool direct() const { return use_direct_; }
  int direct_descriptor() const { return direct_; }
  void RefuseDirect() { use_direct_ = false; }  // it could be opened so, but not read

 private:
  // Whether the page cache has most of what will be read. A file system that cannot say counts as cached.
  bool MostlyCached(const std::vector<const ReadRequest*>& requests) const {
    size_t asked = 0, cached = 0;
    const size_t step = std::max<size_t>(1, requests.size() / kCacheProbes);
    for (size_t i = 0; i < requests.size(); i += step) {
      char byte = 0;
      iovec memory{&byte, 1};
      const ssize_t got = ::preadv2(file_.descriptor(), &memory, 1, requests[i]->offset + requests[i]->bytes / 2, RWF_NOWAIT);
      if (got < 0 && errno != EAGAIN) return true;
      ++asked;
      cached += got == 1;
    }
    return cached * 2 >= asked;
  }

  const SafetensorsFile& file_;
  int direct_ = -1;
  std::atomic<bool> use_direct_{false};
};

// A request on its way into memory.
struct InFlight {
  QueuedRead read;
  const ReadRequest* request = nullptr;
  SourceFile* source = nullptr;
  bool direct = false, scattered = false;  // scattered: into the parts' destinations
  int32_t buffer = -1;                     // of the ring, unless scattered
  std::byte* memory = nullptr;             // of that buffer
  int64_t begin = 0, need = 0;             // first byte asked for, and how many from there the request needs
  int64_t filled = 0;
};

class Reading {
 public:
  Reading(const Checkpoint& checkpoint, const StageTensors& weights, const ReadPlan& plan, ReadSink& sink, const ReadPartsOptions& options)
      : weights_(weights), plan_(plan), sink_(sink), options_(options) {
    std::vector<std::vector<const ReadRequest*>> by_file(plan.files.size());
    for (const ReadRequest& request : plan.requests) by_file[static_cast<size_t>(request.file)].push_back(&request);
    for (size_t i = 0; i < plan.files.size(); ++i) {
      sources_.push_back(std::make_unique<SourceFile>(checkpoint.file(plan.files[i]), options.cache, by_file[i]));
      any_direct_ |= sources_.back()->direct();
    }
  }

  Result<ReadStats> Run() {
    for (const auto& source : sources_) RETURN_IF_ERROR(source->file().CheckUnchanged());
    const bool scatter_all = std::all_of(plan_.requests.begin(), plan_.requests.end(), [&](const ReadRequest& request) { return Scatters(request); });
    if (!scatter_all || any_direct_) {
      stats_.ring_bytes = ReadRingBytes(plan_, options_);
      ASSIGN_OR_RETURN(ring_, sink_.Ring(static_cast<size_t>(stats_.ring_bytes)));
      QP_CHECK_EQ(reinterpret_cast<uintptr_t>(ring_) % kRingAlignment, 0u);
    }
    std::vector<std::thread> lanes;
    for (int32_t lane = 1; lane < options_.lanes; ++lane) lanes.emplace_back([this, lane] { Lane(lane); });
    Lane(0);
    for (std::thread& lane : lanes) lane.join();
    RETURN_IF_ERROR(error_);
    for (const auto& source : sources_) RETURN_IF_ERROR(source->file().CheckUnchanged());
    QP_CHECK_EQ(stats_.bytes, plan_.bytes);
    return stats_;
  }

  int64_t BufferBytes() const { return RoundUp(plan_.request_bytes_max) + 2 * kBlock; }

 private:
  bool Scatters(const ReadRequest& request) const {
    return std::all_of(request.parts.begin(), request.parts.end(), [&](const ReadPart& part) { return sink_.Destination(part) != nullptr; });
  }

  void Lane(int32_t lane) {
    const bool uring = options_.io == ReadPartsOptions::Io::kUring || (options_.io == ReadPartsOptions::Io::kAuto && any_direct_);
    std::unique_ptr<ReadQueue> queue = uring ? MakeUringQueue(options_.depth) : nullptr;
    if (queue) {
      std::lock_guard<std::mutex> lock(mutex_);
      ++stats_.uring_lanes;
    } else {
      queue = MakeBlockingQueue();
    }
    // The buffer that was handed on longest ago is filled next; one more than can be in flight, so that a sink that copies
    // asynchronously has the time of a read to end.
    std::list<int32_t> free_buffers;
    for (int32_t i = 0; i <= queue->depth(); ++i) free_buffers.push_back(lane * (options_.depth + 1) + i);
    std::list<InFlight> in_flight;  // stable addresses: the kernel holds them
    for (;;) {
      while (static_cast<int32_t>(in_flight.size()) < queue->depth() && !stop_.load()) {
        const size_t next = next_.fetch_add(1);
        if (next >= plan_.requests.size()) break;
        in_flight.emplace_back();
        if (const Status status = Begin(plan_.requests[next], free_buffers, in_flight.back()); !status.ok()) {
          in_flight.pop_back();
          Fail(status);
          break;
        }
        queue->Submit(&in_flight.back().read);
      }
      if (in_flight.empty()) return;
      QueuedRead* read = queue->Wait();
      const auto done = std::find_if(in_flight.begin(), in_flight.end(), [&](const InFlight& flight) { return &flight.read == read; });
      QP_CHECK(done != in_flight.end());
      Status status = Advance(*done);
      if (status.ok() && done->filled < done->need && !stop_.load()) {
        queue->Submit(&done->read);  // the rest of it
        continue;
      }
      if (status.ok() && !stop_.load()) status = HandOn(*done);
      if (!status.ok()) Fail(status);
      if (done->buffer >= 0) free_buffers.push_back(done->buffer);
      in_flight.erase(done);
    }
  }

  Status Begin(const ReadRequest& request, std::list<int32_t>& free_buffers, InFlight& flight) {
    flight.request = &request;
    flight.source = sources_[static_cast<size_t>(request.file)].get();
    flight.direct = flight.source->direct();
    flight.scattered = !flight.direct && Scatters(request);
    if (!flight.scattered) {
      flight.buffer = free_buffers.front();
      free_buffers.pop_front();
      flight.memory = ring_ + flight.buffer * BufferBytes();
      RETURN_IF_ERROR(sink_.Settle(flight.buffer));
    }
    Aim(flight);
    return OkStatus();
  }

  // Points the read at what is still missing.
  void Aim(InFlight& flight) const {
    const ReadRequest& request = *flight.request;
    QueuedRead& read = flight.read;
    flight.begin = flight.direct ? RoundDown(request.offset) : request.offset;
    flight.need = request.offset + request.bytes - flight.begin;
    read.fd = flight.direct ? flight.source->direct_descriptor() : flight.source->file().descriptor();
    read.offset = flight.begin + flight.filled;
    read.memory.clear();
    if (!flight.scattered) {
      const int64_t end = flight.direct ? RoundUp(flight.need) : flight.need;
      read.memory.push_back({flight.memory + flight.filled, static_cast<size_t>(end - flight.filled)});
      return;
    }
    int64_t at = 0;
    for (const ReadPart& part : request.parts) {
      const int64_t skip = std::clamp<int64_t>(flight.filled - at, 0, part.bytes);
      if (skip < part.bytes) read.memory.push_back({sink_.Destination(part) + skip, static_cast<size_t>(part.bytes - skip)});
      at += part.bytes;
    }
  }

  // Takes a read's result; what is missing afterwards has to be asked for again.
  Status Advance(InFlight& flight) {
    int64_t result = flight.read.result;
    if (options_.fault) {
      if (const int fault = options_.fault(flight.source->file().path(), flight.request->offset); fault != 0) result = -fault;
    }
    if (result == -EINVAL && flight.direct) {
      flight.source->RefuseDirect();
      flight.direct = false, flight.filled = 0;
      Aim(flight);
      return OkStatus();
    }
    if (result < 0 && result != -EINTR && result != -EAGAIN) {
      return UnavailableError(Where(flight) + ": " + std::strerror(static_cast<int>(-result)));
    }
    if (result > 0) flight.filled += result;
    if (flight.filled >= flight.need) return OkStatus();
    // O_DIRECT goes on at a block only; an end of file that is not at one has been met then.
    const int64_t whole = flight.direct ? RoundDown(flight.filled) : flight.filled;
    if (result == 0 || (flight.direct && result > 0 && whole != flight.filled)) {
      const SafetensorsFile& file = flight.source->file();
      struct stat info {};
      const int64_t size = ::fstat(file.descriptor(), &info) == 0 ? info.st_size : flight.begin + flight.filled;
      return DataLossError(Where(flight) + ": the file ends at byte " + std::to_string(size) + ", " + std::to_string(file.file_bytes()) +
                           " bytes were there when it was opened");
    }
    Aim(flight);
    return OkStatus();
  }

  // "PATH: tensor KEY at offset N": of the part that the first missing byte belongs to.
  std::string Where(const InFlight& flight) const {
    const int64_t missing = std::max(flight.begin + flight.filled, flight.request->offset);
    int64_t at = flight.request->offset;
    const ReadPart* part = &flight.request->parts.back();
    for (const ReadPart& candidate : flight.request->parts) {
      at += candidate.bytes;
      if (missing < at) {
        part = &candidate;
        break;
      }
    }
    const Entry& entry = weights_.entries[static_cast<size_t>(part->entry)];
    return flight.source->file().path() + ": tensor " + entry.pieces[static_cast<size_t>(part->piece)].key + " at offset " + std::to_string(missing);
  }

  Status HandOn(const InFlight& flight) {
    if (!flight.scattered) {
      const std::byte* bytes = flight.memory + (flight.request->offset - flight.begin);
      for (const ReadPart& part : flight.request->parts) {
        if (std::byte* destination = sink_.Destination(part)) {
          std::memcpy(destination, bytes, static_cast<size_t>(part.bytes));
        } else {
          RETURN_IF_ERROR(sink_.Take(part, {bytes, static_cast<size_t>(part.bytes)}, flight.buffer));
        }
        bytes += part.bytes;
      }
    }
    std::lock_guard<std::mutex> lock(mutex_);
    stats_.bytes += flight.request->bytes;
    if (flight.direct) stats_.direct_bytes += flight.request->bytes;
    if (options_.progress && error_.ok()) error_ = options_.progress(stats_.bytes);  // here: another lane must not ask once more
    return error_;
  }

  void Fail(const Status& status) {
    stop_ = true;
    std::lock_guard<std::mutex> lock(mutex_);
    if (error_.ok()) error_ = status;
  }

  const StageTensors& weights_;
  const ReadPlan& plan_;
  ReadSink& sink_;
  const ReadPartsOptions& options_;
  std::vector<std::unique_ptr<SourceFile>> sources_;
  bool any_direct_ = false;
  std::byte* ring_ = nullptr;  // the sink's
  std::atomic<size_t> next_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  ReadStats stats_;  // guarded by mutex_
  Status error_;     // guarded by mutex_; the first
};

}  // namespace

int64_t ReadRingBytes(const ReadPlan& plan, const ReadPartsOptions& options) {
  return (RoundUp(plan.request_bytes_max) + 2 * kBlock) * options.lanes * (options.depth + 1);
}

Result<ReadStats> ReadAllParts(const Checkpoint& checkpoint, const StageTensors& weights, const ReadPlan& plan, ReadSink& sink,
                               const ReadPartsOptions& options) {
  QP_CHECK(options.lanes > 0 && options.depth > 0);
  return Reading(checkpoint, weights, plan, sink, options).Run();
}

}  // namespace qwen::weights
