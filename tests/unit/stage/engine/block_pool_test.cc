// Goal: blocks are handed out once, come back once, and the count is right after every call.
#include "stage/engine/block_pool.h"

#include <gtest/gtest.h>

#include <set>

namespace qwen::engine {
namespace {

TEST(BlockPool, HandsOutEveryBlockOnceAndThenNone) {
  BlockPool pool({.block_count = 5, .block_tokens = 16});
  const auto first = pool.Take(2), rest = pool.Take(3);
  ASSERT_TRUE(first && rest);
  std::set<BlockId> all(first->begin(), first->end());
  all.insert(rest->begin(), rest->end());
  EXPECT_EQ(all, (std::set<BlockId>{0, 1, 2, 3, 4}));
  EXPECT_EQ(pool.free_count(), 0);
  EXPECT_FALSE(pool.Take(1).has_value());
  EXPECT_TRUE(pool.Take(0).has_value());
}

TEST(BlockPool, GivesAllOrNothing) {
  BlockPool pool({.block_count = 3, .block_tokens = 16});
  EXPECT_FALSE(pool.Take(4).has_value());
  EXPECT_EQ(pool.free_count(), 3);
}

TEST(BlockPool, FreesABlockWithItsLastReferenceOnly) {
  BlockPool pool({.block_count = 1, .block_tokens = 16});
  ASSERT_EQ(pool.Take(1), BlockList{0});
  pool.Share(0);
  pool.Release(0);
  EXPECT_EQ(pool.references(0), 1);
  EXPECT_FALSE(pool.Take(1).has_value());
  pool.Release(0);
  EXPECT_EQ(pool.Take(1), BlockList{0});
}

TEST(BlockPoolDeathTest, AbortsWhenABlockIsReleasedTwice) {
  BlockPool pool({.block_count = 1, .block_tokens = 16});
  ASSERT_TRUE(pool.Take(1));
  pool.Release(0);
  EXPECT_DEATH(pool.Release(0), "block 0");
  EXPECT_DEATH(pool.Share(0), "block 0");
}

}  // namespace
}  // namespace qwen::engine
