#include "stage/engine/prefix_cache.h"

#include <string_view>
#include <utility>

#include "stage/base/check.h"

namespace qwen::engine {

PrefixCache::PrefixCache(BlockPool& pool, bool enabled) : pool_(pool), enabled_(enabled) {
  entries_.resize(static_cast<size_t>(pool.capacity()));
}

size_t PrefixCache::KeyHash::operator()(const Key& key) const {
  // 2^64 / golden ratio spreads consecutive parents; equality is always checked on the whole key.
  return std::hash<std::string_view>()(key.content) ^ (key.parent * 0x9E3779B97F4A7C15ull);
}

bool PrefixCache::Alive(const Node& node) const {
  return node.id == 0 || entries_[static_cast<size_t>(node.block)].node == node.id;
}

PrefixCache::Match PrefixCache::Lookup(int32_t limit, const std::function<std::string(int32_t)>& content) const {
  Match match;
  if (!enabled_) return match;
  for (int32_t i = 0; i < limit; ++i) {
    const auto found = blocks_.find(Key{match.tail.id, content(i)});
    if (found == blocks_.end()) break;
    const Entry& entry = entries_[static_cast<size_t>(found->second)];
    match.blocks.push_back(found->second);
    match.tail = {entry.node, found->second};
    match.idle += entry.idle;
  }
  return match;
}

std::optional<PrefixCache::Node> PrefixCache::Publish(const Node& parent, std::string content, BlockId block) {
  if (!enabled_ || !Alive(parent)) return std::nullopt;
  const auto [place, inserted] = blocks_.try_emplace(Key{parent.id, std::move(content)}, block);
  if (!inserted) return Node{entries_[static_cast<size_t>(place->second)].node, place->second};
  Entry& entry = entries_[static_cast<size_t>(block)];
  QP_CHECK_EQ(entry.node, 0u) << "block " << block << " published twice";
  pool_.Share(block);
  entry = {.node = next_node_++, .key = &place->first};
  return Node{entry.node, block};
}

void PrefixCache::Evict() {
  const BlockId block = idle_.front();
  idle_.pop_front();
  Entry& entry = entries_[static_cast<size_t>(block)];
  blocks_.erase(blocks_.find(*entry.key));
  entry = {};
  QP_CHECK_EQ(pool_.references(block), 1) << "block " << block;
  pool_.Release(block);
}

std::optional<BlockList> PrefixCache::Take(int32_t count) {
  if (count > available()) return std::nullopt;
  while (pool_.free_count() < count) Evict();
  return pool_.Take(count);
}

void PrefixCache::Share(const BlockList& blocks) {
  for (const BlockId block : blocks) {
    Entry& entry = entries_[static_cast<size_t>(block)];
    if (entry.idle) idle_.erase(entry.place);
    entry.idle = false;
    pool_.Share(block);
  }
}

void PrefixCache::Release(const BlockList& blocks) {
  for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) {
    pool_.Release(*block);
    Entry& entry = entries_[static_cast<size_t>(*block)];
    if (entry.node == 0 || pool_.references(*block) != 1) continue;
    entry.idle = true;
    entry.place = idle_.insert(idle_.end(), *block);
  }
}

}  // namespace qwen::engine
