#include "stage/engine/block_pool.h"

#include "stage/base/check.h"

namespace qwen::engine {

BlockPool::BlockPool(const Options& options) : options_(options) {
  QP_CHECK_GT(options.block_count, 0);
  QP_CHECK_GT(options.block_tokens, 0);
  references_.resize(static_cast<size_t>(options.block_count));
  free_.reserve(static_cast<size_t>(options.block_count));
  for (BlockId id = options.block_count - 1; id >= 0; --id) free_.push_back(id);
}

std::optional<BlockList> BlockPool::Take(int32_t count) {
  QP_CHECK_GE(count, 0);
  if (count > free_count()) return std::nullopt;
  BlockList taken;
  taken.reserve(static_cast<size_t>(count));
  for (int32_t i = 0; i < count; ++i) {
    const BlockId id = free_.back();
    free_.pop_back();
    QP_CHECK_EQ(references(id), 0) << "block " << id;
    references_[static_cast<size_t>(id)] = 1;
    taken.push_back(id);
  }
  return taken;
}

void BlockPool::Share(BlockId id) {
  QP_CHECK_GT(references(id), 0) << "block " << id;
  ++references_[static_cast<size_t>(id)];
}

void BlockPool::Release(BlockId id) {
  QP_CHECK_GT(references(id), 0) << "block " << id;
  if (--references_[static_cast<size_t>(id)] == 0) free_.push_back(id);
}

int32_t BlockPool::references(BlockId id) const {
  QP_CHECK(id >= 0 && id < capacity()) << "block " << id;
  return references_[static_cast<size_t>(id)];
}

}  // namespace qwen::engine
