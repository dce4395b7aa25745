// Goal: a prefix is found iff it was published block by block under the same beginning; idle blocks go in the order in
// which they were last used, never while somebody refers to them, and never before what hangs on them.
#include "stage/engine/prefix_cache.h"

#include <gtest/gtest.h>

namespace qwen::engine {
namespace {

struct Fixture : ::testing::Test {
  BlockPool pool{{.block_count = 4, .block_tokens = 1}};
  PrefixCache cache{pool, true};

  // Publishes one block per letter under the prefix of the letters before it; returns the blocks taken for the letters
  // that were not there. The text's own references stay with the caller.
  BlockList Write(const std::string& text) {
    auto match = Find(text);
    cache.Share(match.blocks);
    BlockList blocks = match.blocks;
    PrefixCache::Node node = match.tail;
    for (size_t i = blocks.size(); i < text.size(); ++i) {
      const auto taken = cache.Take(1);
      EXPECT_TRUE(taken.has_value());
      blocks.push_back(taken->front());
      const auto next = cache.Publish(node, text.substr(i, 1), taken->front());
      EXPECT_TRUE(next.has_value());
      node = *next;
    }
    return blocks;
  }
  PrefixCache::Match Find(const std::string& text) {
    return cache.Lookup(static_cast<int32_t>(text.size()),
                        [&](int32_t i) { return text.substr(static_cast<size_t>(i), 1); });
  }
};
using PrefixCacheTest = Fixture;

TEST_F(PrefixCacheTest, FindsTheLongestCommonBeginningAndNothingElse) {
  const BlockList blocks = Write("abc");
  EXPECT_EQ(Find("abcd").blocks, blocks);
  EXPECT_EQ(Find("abx").blocks, BlockList(blocks.begin(), blocks.begin() + 2));
  EXPECT_TRUE(Find("bc").blocks.empty()) << "the same letters after another beginning are another prefix";
}

TEST_F(PrefixCacheTest, KeepsIdleBlocksReadableUntilTheyAreNeeded) {
  cache.Release(Write("ab"));
  EXPECT_EQ(cache.idle_count(), 2);
  EXPECT_EQ(cache.available(), 4);
  EXPECT_EQ(cache.used_count(), 0);
  EXPECT_EQ(Find("ab").idle, 2);
  EXPECT_TRUE(cache.Take(2).has_value());
  EXPECT_EQ(Find("ab").blocks.size(), 2u) << "free blocks go first";
  EXPECT_TRUE(cache.Take(2).has_value());
  EXPECT_TRUE(Find("ab").blocks.empty());
}

TEST_F(PrefixCacheTest, EvictsTheLeastRecentlyReleasedAndTheEndOfAPrefixFirst) {
  cache.Release(Write("ab"));
  cache.Release(Write("xy"));
  ASSERT_TRUE(cache.Take(1));
  EXPECT_EQ(Find("ab").blocks.size(), 1u) << "the later block of the older prefix";
  EXPECT_EQ(Find("xy").blocks.size(), 2u);
  cache.Release(Write("a"));  // used again: now younger than xy
  ASSERT_TRUE(cache.Take(1));
  EXPECT_EQ(Find("a").blocks.size(), 1u);
  EXPECT_EQ(Find("xy").blocks.size(), 1u);
}

TEST_F(PrefixCacheTest, NeverEvictsWhatASequenceRefersTo) {
  const BlockList blocks = Write("abc");
  EXPECT_EQ(cache.available(), 1);
  EXPECT_FALSE(cache.Take(2).has_value());
  EXPECT_EQ(Find("abc").blocks, blocks);
  cache.Share({blocks[0]});  // a second reader of the first block
  cache.Release(blocks);
  EXPECT_EQ(cache.idle_count(), 2);
  EXPECT_TRUE(cache.Take(3).has_value());
  EXPECT_EQ(Find("abc").blocks, BlockList{blocks[0]});
}

TEST_F(PrefixCacheTest, GivesTheFirstPublisherOfEqualContentAndKeepsTheSecondPrivate) {
  const BlockList first = Write("a");
  const auto second = cache.Take(1);
  ASSERT_TRUE(second);
  const auto node = cache.Publish({}, "a", second->front());
  ASSERT_TRUE(node);
  EXPECT_EQ(node->block, first[0]);
  EXPECT_EQ(Find("a").blocks, first);
  cache.Release(*second);
  EXPECT_EQ(cache.idle_count(), 0) << "the private block is free, not cached";
  EXPECT_EQ(pool.free_count(), 3);
}

TEST_F(PrefixCacheTest, PublishesNothingUnderAnEvictedParent) {
  const BlockList blocks = Write("a");
  const PrefixCache::Node parent = Find("a").tail;
  cache.Release(blocks);
  const auto all = cache.Take(4);
  ASSERT_TRUE(all);
  EXPECT_FALSE(cache.Publish(parent, "b", all->front()).has_value());
  // The block of the dead node holds other content now: the old name must not lead to it.
  ASSERT_TRUE(cache.Publish({}, "z", blocks[0]));
  EXPECT_FALSE(cache.Publish(parent, "b", all->back()).has_value());
}

TEST(PrefixCacheOff, PublishesAndFindsNothing) {
  BlockPool pool({.block_count = 2, .block_tokens = 1});
  PrefixCache cache(pool, false);
  const auto block = cache.Take(1);
  ASSERT_TRUE(block);
  EXPECT_FALSE(cache.Publish({}, "a", block->front()).has_value());
  EXPECT_TRUE(cache.Lookup(1, [](int32_t) { return "a"; }).blocks.empty());
  cache.Release(*block);
  EXPECT_EQ(pool.free_count(), 2);
}

}  // namespace
}  // namespace qwen::engine
