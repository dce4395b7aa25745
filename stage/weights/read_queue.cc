#include "stage/weights/read_queue.h"

#include <liburing.h>

#include <cerrno>
#include <utility>

#include "stage/base/check.h"

namespace qwen::weights {
namespace {

class BlockingQueue final : public ReadQueue {
 public:
  int32_t depth() const override { return 1; }
  void Submit(QueuedRead* read) override {
    QP_CHECK(next_ == nullptr);
    next_ = read;
  }
  QueuedRead* Wait() override {
    QP_CHECK(next_ != nullptr);
    const ssize_t got = ::preadv(next_->fd, next_->memory.data(), static_cast<int>(next_->memory.size()), next_->offset);
    next_->result = got < 0 ? -errno : got;
    return std::exchange(next_, nullptr);
  }

 private:
  QueuedRead* next_ = nullptr;
};

class UringQueue final : public ReadQueue {
 public:
  static std::unique_ptr<ReadQueue> Make(int32_t depth) {
    std::unique_ptr<UringQueue> queue(new UringQueue(depth));
    queue->open_ = io_uring_queue_init(static_cast<unsigned>(depth), &queue->ring_, 0) == 0;
    if (!queue->open_) return nullptr;
    return queue;
  }
  ~UringQueue() override {
    while (in_flight_ > 0) Wait();  // the kernel writes into memory that is somebody's
    if (open_) io_uring_queue_exit(&ring_);
  }

  int32_t depth() const override { return depth_; }
  void Submit(QueuedRead* read) override {
    QP_CHECK(in_flight_ < depth_);
    io_uring_sqe* entry = io_uring_get_sqe(&ring_);
    QP_CHECK(entry != nullptr);
    io_uring_prep_readv(entry, read->fd, read->memory.data(), static_cast<unsigned>(read->memory.size()), static_cast<uint64_t>(read->offset));
    io_uring_sqe_set_data(entry, read);
    int submitted = 0;
    do submitted = io_uring_submit(&ring_);
    while (submitted == -EINTR || submitted == -EAGAIN || submitted == -EBUSY);
    QP_CHECK_EQ(submitted, 1);
    ++in_flight_;
  }
  QueuedRead* Wait() override {
    QP_CHECK(in_flight_ > 0);
    io_uring_cqe* done = nullptr;
    int waited = 0;
    do waited = io_uring_wait_cqe(&ring_, &done);
    while (waited == -EINTR || waited == -EAGAIN);
    QP_CHECK_EQ(waited, 0);
    auto* read = static_cast<QueuedRead*>(io_uring_cqe_get_data(done));
    read->result = done->res;
    io_uring_cqe_seen(&ring_, done);
    --in_flight_;
    return read;
  }

 private:
  explicit UringQueue(int32_t depth) : depth_(depth) {}
  const int32_t depth_;
  int32_t in_flight_ = 0;
  bool open_ = false;
  io_uring ring_ = {};
};

}  // namespace

std::unique_ptr<ReadQueue> MakeUringQueue(int32_t depth) { return UringQueue::Make(depth); }
std::unique_ptr<ReadQueue> MakeBlockingQueue() { return std::make_unique<BlockingQueue>(); }

}  // namespace qwen::weights
