// stage/engine/block_pool.h — a fixed set of KV blocks handed out by id. Bookkeeping only: no device memory.
//
// Thread safety: none; owned by the engine thread.
// Invariants: (1) free_count() + used_count() == capacity() at every return.
//             (2) a block is on the free list iff its reference count is 0.
#pragma once
#include <cstdint>
#include <optional>
#include <vector>

#include "stage/step/step_plan.h"  // BlockId

namespace qwen::engine {

using step::BlockId;
using BlockList = std::vector<BlockId>;

class BlockPool {
 public:
  struct Options {
    int32_t block_count = 0;
    int32_t block_tokens = 0;
  };
  explicit BlockPool(const Options& options);  // REQUIRES: both > 0.

  // Takes `count` blocks, each with one reference, or none at all. Full is a value, not a wait.
  std::optional<BlockList> Take(int32_t count);
  void Share(BlockId id);  // Adds a reference. REQUIRES: `id` is in use.
  // Drops a reference. REQUIRES: `id` is in use; if it is the last, no StepPlan in flight names `id`.
  void Release(BlockId id);

  int32_t references(BlockId id) const;
  int32_t capacity() const { return options_.block_count; }
  int32_t block_tokens() const { return options_.block_tokens; }
  int32_t free_count() const { return static_cast<int32_t>(free_.size()); }
  int32_t used_count() const { return capacity() - free_count(); }

 private:
  const Options options_;
  std::vector<int32_t> references_;  // (block_count)
  BlockList free_;                   // a stack, lowest id on top at the start: the same calls give the same ids
};

}  // namespace qwen::engine
