// Rendezvous as a table of stories: who joins, what the head says, what the engine hears. No sockets, no clock.
#include "stage/transport/rendezvous.h"

#include <gtest/gtest.h>

namespace qwen::transport {
namespace {

Hello StageHello(int32_t stage, int32_t begin, int32_t end) {
  Hello hello;
  hello.stage = stage;
  hello.stages = 3;
  hello.layer_begin = begin;
  hello.layer_end = end;
  hello.data_address = "host" + std::to_string(stage) + ":1";
  hello.capacity = {.block_tokens = 16, .block_count = 100 - stage, .max_slots = 8 + stage, .max_batch_tokens = 512, .max_sequence_tokens = 4096, .weight_bytes = 5};
  hello.instance = "i" + std::to_string(stage);
  return hello;
}
const Hello kHello[] = {StageHello(0, 0, 4), StageHello(1, 4, 8), StageHello(2, 8, 12)};

Rendezvous::Options Three() {
  Rendezvous::Options options;
  options.stages = 3;
  options.layers = 12;
  options.limits.vocab_size = 1000;
  return options;
}

// Joins all three and reports their edges; returns what the last one brought about.
Rendezvous::Actions Gather(Rendezvous& rendezvous, int64_t now = 0) {
  for (const Hello& hello : kHello) {
    if (!rendezvous.connected(hello.stage)) (void)rendezvous.Join(hello, now);
  }
  (void)rendezvous.Assembled(0, rendezvous.epoch(), now);
  (void)rendezvous.Assembled(2, rendezvous.epoch(), now);
  return rendezvous.Assembled(1, rendezvous.epoch(), now);
}

TEST(Rendezvous, AssemblesWhenTheLastOneJoinsAndIsReadyWhenAllEdgesAreUp) {
  Rendezvous rendezvous(Three());
  EXPECT_TRUE(rendezvous.Join(kHello[2], 0).assemble.empty());
  EXPECT_TRUE(rendezvous.Join(kHello[0], 0).assemble.empty());
  const auto actions = rendezvous.Join(kHello[1], 0);
  ASSERT_EQ(actions.assemble.size(), 3u);
  EXPECT_EQ(actions.assemble[0].second.next_address, "host1:1");
  EXPECT_EQ(actions.assemble[1].second.next_address, "host2:1");
  EXPECT_EQ(actions.assemble[2].second.next_address, "");
  for (const auto& [stage, assemble] : actions.assemble) {
    EXPECT_EQ(assemble.epoch, 1u);
    EXPECT_EQ(assemble.block_count, 98);  // the smallest stage's
  }
  EXPECT_FALSE(rendezvous.Assembled(0, 1, 0).ready);
  EXPECT_FALSE(rendezvous.Assembled(0, 1, 0).ready);  // twice does not count twice
  EXPECT_FALSE(rendezvous.Assembled(1, 1, 0).ready);
  const auto ready = rendezvous.Assembled(2, 1, 0).ready;
  ASSERT_TRUE(ready.has_value());
  EXPECT_EQ(ready->epoch, 1u);
  EXPECT_EQ(ready->stages, 3);
  EXPECT_EQ(ready->limits.block_count, 98);
  EXPECT_EQ(ready->limits.max_slots, 8);
  EXPECT_EQ(ready->limits.block_tokens, 16);
  EXPECT_EQ(ready->limits.vocab_size, 1000);
}

TEST(Rendezvous, TheHeadsOwnBoundsNarrowTheGroups) {
  auto options = Three();
  options.limits.max_slots = 4;
  options.limits.max_batch_tokens = 100'000;
  Rendezvous rendezvous(options);
  const auto ready = Gather(rendezvous).ready;
  ASSERT_TRUE(ready.has_value());
  EXPECT_EQ(ready->limits.max_slots, 4);
  EXPECT_EQ(ready->limits.max_batch_tokens, 512);
}

TEST(Rendezvous, AStageThatStillLoadsIsWaitedFor) {
  Rendezvous rendezvous(Three());
  Hello loading = kHello[1];
  loading.loading = true;
  loading.capacity = {};
  (void)rendezvous.Join(kHello[0], 0);
  (void)rendezvous.Join(loading, 0);
  EXPECT_TRUE(rendezvous.Join(kHello[2], 0).assemble.empty());
  EXPECT_EQ(rendezvous.Loaded(1, kHello[1].capacity, 0).assemble.size(), 3u);
}

TEST(Rendezvous, ALostStageEndsTheEpochAndItsReturnBeginsTheNext) {
  Rendezvous rendezvous(Three());
  ASSERT_TRUE(Gather(rendezvous).ready.has_value());
  const auto lost = rendezvous.Leave(1, "reset by peer", 10);
  ASSERT_TRUE(lost.lost.has_value());
  EXPECT_EQ(lost.lost->epoch, 1u);
  EXPECT_EQ(lost.lost->reason, "stage 1 lost: reset by peer");
  ASSERT_EQ(lost.notify.size(), 2u);  // those that stay drop their edges at once
  EXPECT_EQ(lost.notify[0].first, 0);
  EXPECT_EQ(lost.notify[1].first, 2);
  EXPECT_EQ(lost.notify[0].second.epoch, 1u);
  EXPECT_TRUE(rendezvous.Tick(20).assemble.empty());
  const auto again = rendezvous.Join(kHello[1], 30);
  ASSERT_EQ(again.assemble.size(), 3u);
  EXPECT_EQ(again.assemble[0].second.epoch, 2u);
  EXPECT_FALSE(rendezvous.Assembled(0, 1, 30).ready);  // of the old epoch
  EXPECT_EQ(Gather(rendezvous, 30).ready->epoch, 2u);
}

TEST(Rendezvous, ALossWhileAssemblingIsNoLossForTheEngine) {
  Rendezvous rendezvous(Three());
  for (const Hello& hello : kHello) (void)rendezvous.Join(hello, 0);
  const auto actions = rendezvous.Leave(2, "gone", 1);
  EXPECT_FALSE(actions.lost.has_value());
  EXPECT_EQ(actions.notify.size(), 2u);
}

TEST(Rendezvous, TheEpochIsAboveEveryEpochThatAnybodyServed) {
  auto options = Three();
  options.initial_epoch = 5;
  Rendezvous rendezvous(options);
  Hello survivor = kHello[1];
  survivor.epoch = 41;  // a stage that kept its weights through the loss of the former head
  (void)rendezvous.Join(kHello[0], 0);
  (void)rendezvous.Join(survivor, 0);
  EXPECT_EQ(rendezvous.Join(kHello[2], 0).assemble[0].second.epoch, 42u);
}

TEST(Rendezvous, AFaultOfAnEdgeTriesAgainWithGrowingPauses) {
  Rendezvous rendezvous(Three());
  ASSERT_TRUE(Gather(rendezvous).ready.has_value());
  EXPECT_TRUE(rendezvous.Failed(2, 1, "edge receive: checksum mismatch", 0).lost.has_value());
  EXPECT_FALSE(rendezvous.Failed(1, 1, "edge send: closed", 0).lost.has_value());  // the other end of the same edge
  EXPECT_TRUE(rendezvous.Tick(99'999).assemble.empty());
  EXPECT_EQ(rendezvous.Tick(100'000).assemble.size(), 3u);
  EXPECT_FALSE(rendezvous.Failed(2, 2, "again", 100'000).lost.has_value());  // was not ready
  EXPECT_TRUE(rendezvous.Tick(299'999).assemble.empty());
  EXPECT_EQ(rendezvous.Tick(300'000).assemble.size(), 3u);
  EXPECT_EQ(rendezvous.epoch(), 3u);
}

TEST(Rendezvous, AnAssemblyThatTakesTooLongStartsOver) {
  Rendezvous rendezvous(Three());
  for (const Hello& hello : kHello) (void)rendezvous.Join(hello, 0);
  (void)rendezvous.Assembled(0, 1, 5);
  EXPECT_TRUE(rendezvous.Tick(29'999'999).notify.empty());
  const auto late = rendezvous.Tick(30'000'000);
  ASSERT_EQ(late.notify.size(), 3u);
  EXPECT_EQ(late.notify[0].second.reason, "edges not up in time; waiting for stage 1, 2");
  EXPECT_EQ(rendezvous.Tick(30'100'000).assemble.size(), 3u);
}

TEST(Rendezvous, RangesMustFollowEachOtherAndCoverTheModel) {
  Rendezvous rendezvous(Three());
  EXPECT_EQ(rendezvous.CheckJoin(StageHello(0, 1, 4)).reason, "stage 0 must begin at layer 0");
  EXPECT_EQ(rendezvous.CheckJoin(StageHello(2, 8, 11)).reason, "the last stage must end at layer 12");
  EXPECT_EQ(rendezvous.CheckJoin(StageHello(1, 4, 13)).reason, "layers 4:13 out of 0:12");
  EXPECT_EQ(rendezvous.CheckJoin(StageHello(1, 5, 5)).code, FailureCode::kConfig);
  (void)rendezvous.Join(kHello[0], 0);
  EXPECT_EQ(rendezvous.CheckJoin(StageHello(1, 5, 8)).reason, "layers 5:8 do not follow stage 0's 0:4");
  (void)rendezvous.Join(kHello[2], 0);
  EXPECT_EQ(rendezvous.CheckJoin(StageHello(1, 4, 7)).reason, "layers 4:7 do not precede stage 2's 8:12");
  EXPECT_EQ(rendezvous.CheckJoin(kHello[1]).code, FailureCode::kUnspecified);
}

TEST(Rendezvous, OneProcessPerIndexAndTheYoungerPodWins) {
  Rendezvous rendezvous(Three());
  Hello first = kHello[1];
  first.pod_epoch = 4;
  (void)rendezvous.Join(first, 0);
  Hello second = first;
  EXPECT_EQ(rendezvous.CheckJoin(second).code, FailureCode::kUnspecified);  // the same process dials again
  second.instance = "other";
  EXPECT_EQ(rendezvous.CheckJoin(second).code, FailureCode::kBusy);
  second.pod_epoch = 5;
  EXPECT_EQ(rendezvous.CheckJoin(second).code, FailureCode::kUnspecified);
  (void)rendezvous.Leave(1, "replaced", 0);
  (void)rendezvous.Join(second, 0);
  (void)rendezvous.Leave(1, "gone", 0);
  EXPECT_EQ(rendezvous.CheckJoin(first).code, FailureCode::kStale);  // the old pod comes back from a cut-off node
}

TEST(Rendezvous, DifferentBlockSizesDropTheStageThatDiffers) {
  Rendezvous rendezvous(Three());
  (void)rendezvous.Join(kHello[0], 0);
  (void)rendezvous.Join(kHello[1], 0);
  Hello odd = kHello[2];
  odd.capacity.block_tokens = 32;
  const auto actions = rendezvous.Join(odd, 0);
  ASSERT_EQ(actions.drop.size(), 1u);
  EXPECT_EQ(actions.drop[0].first, 2);
  EXPECT_TRUE(actions.drop[0].second.fatal);
  EXPECT_EQ(actions.drop[0].second.reason, "block_tokens 32, the group has 16");
  EXPECT_FALSE(rendezvous.connected(2));
}

TEST(Rendezvous, OneStageAloneIsAGroup) {
  auto options = Three();
  options.stages = 1;
  Rendezvous rendezvous(options);
  const auto actions = rendezvous.Join(StageHello(0, 0, 12), 0);
  ASSERT_EQ(actions.assemble.size(), 1u);
  EXPECT_EQ(actions.assemble[0].second.next_address, "");
  EXPECT_TRUE(rendezvous.Assembled(0, 1, 0).ready.has_value());
}

}  // namespace
}  // namespace qwen::transport
