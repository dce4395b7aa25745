// KV sizing by hand-made sums.
#include "stage/worker/kv_sizing.h"

#include <gtest/gtest.h>

namespace qwen::worker {
namespace {

KvSizingInput Input() {
  return {.free_bytes = 1'000'000, .weight_bytes = 600'000, .kv_bytes_per_token = 100, .max_positions = 4000, .block_tokens = 10, .max_sequences = 4, .memory_share = 0.5};
}

TEST(KvSizing, TakesItsShareOfWhatIsFreeBesideTheWeights) {
  const auto sizing = SizeKv(Input());  // 400,000 free * 0.5 / 1,000 a block
  ASSERT_TRUE(sizing.ok());
  EXPECT_EQ(sizing->blocks, 200);
  EXPECT_EQ(sizing->max_sequence_tokens, 2000);  // the model's 4,000 do not fit: nobody asked for them
}

TEST(KvSizing, TakesNoMoreThanAllSequencesCanUse) {
  auto input = Input();
  input.max_model_len = 95;
  const auto sizing = SizeKv(input);
  ASSERT_TRUE(sizing.ok());
  EXPECT_EQ(sizing->blocks, 40);  // 4 sequences of 10 blocks
  EXPECT_EQ(sizing->max_sequence_tokens, 95);
}

TEST(KvSizing, AnExplicitCountIsTakenAsItIs) {
  auto input = Input();
  input.kv_blocks = 7;
  const auto sizing = SizeKv(input);
  ASSERT_TRUE(sizing.ok());
  EXPECT_EQ(sizing->blocks, 7);
  EXPECT_EQ(sizing->max_sequence_tokens, 70);
}

TEST(KvSizing, WhatDoesNotFitSaysWhatIsMissing) {
  auto input = Input();
  input.max_model_len = 2001;
  EXPECT_EQ(SizeKv(input).status().code(), StatusCode::kResourceExhausted);
  EXPECT_NE(SizeKv(input).status().message().find("room for 2000 tokens"), std::string::npos);
  input = Input();
  input.weight_bytes = 1'000'001;
  EXPECT_EQ(SizeKv(input).status().code(), StatusCode::kResourceExhausted);
  EXPECT_NE(SizeKv(input).status().message().find("weights need"), std::string::npos);
  input.free_bytes = -1;  // not known: let it try
  EXPECT_TRUE(SizeKv(input).ok());
}

}  // namespace
}  // namespace qwen::worker
