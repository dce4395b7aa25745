// stage/engine/prefix_cache.h — KV blocks that several sequences may read because they begin alike.
//
// A full block's KV depends on all tokens up to its end, their positions and the pixels behind placeholder tokens, and
// on nothing else. So a block is published under (the node of the block before it, its own content); following nodes
// from the root is following a prefix. Contents are compared byte for byte and nodes are never reused: there is no hash
// to collide, a hit is the same prefix.
//
// The scheduler takes and returns all its blocks here, so that this class knows which cached blocks are idle
// (referenced by no sequence). Idle blocks stay readable until Take() needs them, least recently used first. A list of
// blocks is released last block first, so a node is never evicted before the nodes that hang on it through the same
// sequence.
//
// Thread safety: none; owned by the engine thread.
// Invariants: (1) a cached block has one reference of the cache itself; it is idle iff that is its only one.
//             (2) available() + used_count() == capacity of the pool.
#pragma once
#include <cstdint>
#include <functional>
#include <list>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "stage/engine/block_pool.h"

namespace qwen::engine {

class PrefixCache {
 public:
  // A place in the tree of prefixes. `id` is unique for the life of the cache; the root (no block yet) is id 0.
  struct Node {
    uint64_t id = 0;
    BlockId block = -1;
    bool operator==(const Node&) const = default;
  };
  struct Match {
    BlockList blocks;  // from the first block of the prefix on; no reference is taken
    Node tail;         // of the last of `blocks`, or the root
    int32_t idle = 0;  // how many of them are idle, that is, counted in available()
  };
  // Borrows `pool`, of which it must be the only user. With `enabled` false nothing is ever published.
  PrefixCache(BlockPool& pool, bool enabled);
  PrefixCache(const PrefixCache&) = delete;
  PrefixCache& operator=(const PrefixCache&) = delete;

  // The longest cached prefix of at most `limit` blocks, where content(i) is the content of block i.
  Match Lookup(int32_t limit, const std::function<std::string(int32_t)>& content) const;
  // Makes `block`, which holds `content` after the prefix `parent`, findable: from the next plan on, because plans are
  // executed in order. Returns the node to publish the next block under, which is another block's when equal content
  // was there before; nullopt when `parent` was evicted meanwhile or the cache is disabled.
  std::optional<Node> Publish(const Node& parent, std::string content, BlockId block);

  std::optional<BlockList> Take(int32_t count);  // all or nothing; evicts idle blocks as needed
  void Share(const BlockList& blocks);
  void Release(const BlockList& blocks);

  bool enabled() const { return enabled_; }
  int32_t available() const { return pool_.free_count() + idle_count(); }  // what Take() can give
  int32_t idle_count() const { return static_cast<int32_t>(idle_.size()); }
  int32_t used_count() const { return pool_.capacity() - available(); }  // referenced by a sequence

 private:
  struct Key {
    uint64_t parent;
    std::string content;
    bool operator==(const Key&) const = default;
  };
  struct KeyHash {
    size_t operator()(const Key& key) const;
  };
  struct Entry {
    uint64_t node = 0;         // 0: this block is not cached
    const Key* key = nullptr;  // in blocks_; stable until erased
    bool idle = false;
    std::list<BlockId>::iterator place;  // in idle_, valid while idle
  };
  bool Alive(const Node& node) const;
  void Evict();

  BlockPool& pool_;
  const bool enabled_;
  uint64_t next_node_ = 1;
  std::unordered_map<Key, BlockId, KeyHash> blocks_;
  std::vector<Entry> entries_;  // (pool capacity), by block
  std::list<BlockId> idle_;     // least recently released first
};

}  // namespace qwen::engine
