// One row of logits to one token: each step of the order alone, then the distribution that is drawn from.
#include "stage/sampling/logits_pipeline.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>

namespace qwen::sampling {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

SlotHistory History(step::SamplingParams params, std::vector<int32_t> tokens = {}, int32_t prompt_tokens = 0) {
  return SlotHistory({.sequence = 1, .slot = 0, .params = std::move(params), .tokens = std::move(tokens), .prompt_tokens = prompt_tokens});
}

std::vector<float> Constrained(std::vector<float> logits, const SlotHistory& history, std::vector<uint32_t> allowed = {}) {
  ApplyConstraints(logits, history, allowed);
  return logits;
}

// How often each id is drawn over `draws` output indices.
std::map<int32_t, int> Draw(const std::vector<float>& logits, const step::SamplingParams& params, int draws) {
  std::map<int32_t, int> counts;
  for (int i = 0; i < draws; ++i) {
    std::vector<float> row = logits;
    ++counts[Choose(row, params, i).value()];
  }
  return counts;
}

TEST(Constraints, DefaultsChangeNothing) {
  EXPECT_EQ(Constrained({1, -2, 3}, History({}, {0, 1, 2}, 1)), (std::vector<float>{1, -2, 3}));
}

TEST(Constraints, LogitBiasIsAddedBeforeTheRepetitionPenalty) {
  step::SamplingParams params{.repetition_penalty = 2.0f};
  params.logit_bias = {{0, 3.0f}, {1, -5.0f}};
  // 0: (1 + 3) / 2; 1: (1 - 5) * 2; 2: not seen
  EXPECT_EQ(Constrained({1, 1, 1}, History(params, {0, 1}, 2)), (std::vector<float>{2, -8, 1}));
}

TEST(Constraints, RepetitionPenaltyCountsATokenOnceOverPromptAndOutput) {
  const step::SamplingParams params{.repetition_penalty = 2.0f};
  EXPECT_EQ(Constrained({4, -4, 0, 4}, History(params, {0, 0, 1, 2}, 2)), (std::vector<float>{2, -8, 0, 4}));
}

TEST(Constraints, PresenceAndFrequencyLookAtTheOutputOnly) {
  const step::SamplingParams params{.presence_penalty = 1.0f, .frequency_penalty = 0.5f};
  SlotHistory history = History(params, {0, 0, 1}, 2);  // 0 is prompt, 1 is output once
  EXPECT_EQ(Constrained({0, 0, 0}, history), (std::vector<float>{0, -1.5f, 0}));
  history.Append(1);
  history.Append(0);
  EXPECT_EQ(Constrained({0, 0, 0}, history), (std::vector<float>{-1.5f, -2.0f, 0}));
}

TEST(Constraints, StopTokensAreBannedUntilMinTokens) {
  step::SamplingParams params{.min_tokens = 2};
  params.stop_tokens = {1};
  SlotHistory history = History(params, {0, 0}, 1);  // one generated
  EXPECT_EQ(Constrained({0, 5, 0}, history)[1], -kInf);
  history.Append(2);
  EXPECT_EQ(Constrained({0, 5, 0}, history)[1], 5);
}

TEST(Constraints, TokenLimitBansThePaddingOfTheVocabulary) {
  EXPECT_EQ(Constrained({1, 2, 3, 4}, History({.token_limit = 2})), (std::vector<float>{1, 2, -kInf, -kInf}));
}

TEST(Constraints, ABigramThatOccurredIsNotRepeated) {
  // ... 5 6 ... 5 7 ... 5: after 5 neither 6 nor 7 may come.
  const SlotHistory history = History({.no_repeat_ngram_size = 2}, {5, 6, 1, 5, 7, 2, 5}, 3);
  const std::vector<float> logits = Constrained(std::vector<float>(8, 0.0f), history);
  for (int i = 0; i < 8; ++i) EXPECT_EQ(logits[i], i == 6 || i == 7 ? -kInf : 0.0f) << i;
}

TEST(Constraints, ATrigramNeedsBothTokensBefore) {
  const SlotHistory history = History({.no_repeat_ngram_size = 3}, {1, 2, 3, 4, 2, 5, 1, 2}, 8);
  const std::vector<float> logits = Constrained(std::vector<float>(6, 0.0f), history);
  for (int i = 0; i < 6; ++i) EXPECT_EQ(logits[i], i == 3 ? -kInf : 0.0f) << i;
}

TEST(Constraints, UnigramsBanEverythingSeenAndShortHistoriesBanNothing) {
  EXPECT_EQ(Constrained({0, 0, 0}, History({.no_repeat_ngram_size = 1}, {2, 0}, 2)), (std::vector<float>{-kInf, 0, -kInf}));
  EXPECT_EQ(Constrained({0, 0, 0}, History({.no_repeat_ngram_size = 4}, {2, 2, 2}, 3)), (std::vector<float>{0, 0, 0}));
}

TEST(Constraints, TheGrammarMaskIsOneBitAToken) {
  std::vector<float> logits(40, 1.0f);
  logits = Constrained(logits, History({}), {0x80000001u, 0x00000002u});
  for (int i = 0; i < 40; ++i) EXPECT_EQ(logits[i], i == 0 || i == 31 || i == 33 ? 1.0f : -kInf) << i;
}

TEST(Choose, GreedyTakesTheLowestIdAmongTheMaxima) {
  std::vector<float> logits = {1, 7, 3, 7};
  EXPECT_EQ(Choose(logits, {}, 0).value(), 1);
}

TEST(Choose, AMaskThatAllowsNothingIsAnError) {
  std::vector<float> logits = {-kInf, -kInf};
  EXPECT_EQ(Choose(logits, {}, 0).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(Choose(logits, {.temperature = 1.0f}, 0).status().code(), StatusCode::kInvalidArgument);
}

TEST(Choose, ANanIsAnErrorAndNotAToken) {
  std::vector<float> logits = {1, NAN, 2};
  EXPECT_EQ(Choose(logits, {}, 0).status().code(), StatusCode::kInvalidArgument);
}

TEST(Choose, ATinyTemperatureIsGreedy) {
  std::vector<float> logits = {1, 3, 2};
  EXPECT_EQ(Choose(logits, {.temperature = 1e-38f}, 5).value(), 1);
}

TEST(Choose, DrawsFollowTheSoftmaxAtTheTemperature) {
  const std::vector<float> logits = {0.0f, 1.0f, 2.0f, -1.0f, -kInf};
  for (float temperature : {0.5f, 1.0f, 2.0f}) {
    constexpr int kDraws = 20000;
    auto counts = Draw(logits, {.temperature = temperature, .seed = 99}, kDraws);
    double total = 0;
    for (float l : logits) total += std::exp(l / temperature);
    double chi2 = 0;
    for (int i = 0; i < 4; ++i) {
      const double expected = kDraws * std::exp(logits[i] / temperature) / total;
      chi2 += std::pow(counts[i] - expected, 2) / expected;
    }
    EXPECT_LT(chi2, 16.3) << temperature;  // 3 degrees of freedom, p = 0.001
    EXPECT_EQ(counts.count(4), 0u);
  }
}

TEST(Choose, TheSameSeedAndIndexDrawTheSameToken) {
  const std::vector<float> logits(50, 0.0f);
  for (int i = 0; i < 20; ++i) {
    std::vector<float> a = logits, b = logits;
    EXPECT_EQ(Choose(a, {.temperature = 1, .seed = 7}, i).value(), Choose(b, {.temperature = 1, .seed = 7}, i).value());
  }
  EXPECT_NE(Draw(logits, {.temperature = 1, .seed = 7}, 50), Draw(logits, {.temperature = 1, .seed = 8}, 50));
}

TEST(Choose, TopKKeepsTiesAtTheBorder) {
  const auto counts = Draw({3, 1, 2, 2, 0}, {.temperature = 1.0f, .top_k = 2, .seed = 1}, 2000);
  EXPECT_EQ(counts.size(), 3u);  // 0, and both 2s
  EXPECT_EQ(counts.count(1), 0u);
  EXPECT_EQ(counts.count(4), 0u);
}

TEST(Choose, TopPKeepsTheSmallestSetThatReachesTheMass) {
  // Probabilities 0.5, 0.3, 0.15, 0.05 in shuffled order.
  const std::vector<float> logits = {std::log(0.15f), std::log(0.5f), std::log(0.05f), std::log(0.3f)};
  EXPECT_EQ(Draw(logits, {.temperature = 1, .top_p = 0.45f, .seed = 3}, 500).size(), 1u);
  const auto two = Draw(logits, {.temperature = 1, .top_p = 0.7f, .seed = 3}, 1000);
  EXPECT_EQ(two.size(), 2u);
  EXPECT_TRUE(two.count(1) && two.count(3));
  EXPECT_EQ(Draw(logits, {.temperature = 1, .top_p = 0.9f, .seed = 3}, 1000).size(), 3u);
  EXPECT_EQ(Draw(logits, {.temperature = 1, .top_p = 1e-6f, .seed = 3}, 200).size(), 1u);
}

TEST(Choose, TopPWorksOnWhatTopKLeft) {
  // 0.4, 0.3, 0.3: top_k 2 keeps all three (tie); of 0.5/0.3/0.2 with top_k 2 the rest is 0.625/0.375, so 0.6 needs one.
  const std::vector<float> logits = {std::log(0.5f), std::log(0.3f), std::log(0.2f)};
  EXPECT_EQ(Draw(logits, {.temperature = 1, .top_k = 2, .top_p = 0.6f, .seed = 4}, 500).size(), 1u);
  EXPECT_EQ(Draw(logits, {.temperature = 1, .top_p = 0.6f, .seed = 4}, 500).size(), 2u);
}

TEST(Choose, MinPIsRelativeToTheMostLikely) {
  const std::vector<float> logits = {std::log(0.6f), std::log(0.3f), std::log(0.1f)};
  EXPECT_EQ(Draw(logits, {.temperature = 1, .min_p = 0.4f, .seed = 5}, 500).size(), 2u);
  EXPECT_EQ(Draw(logits, {.temperature = 1, .min_p = 0.6f, .seed = 5}, 500).size(), 1u);
}

TEST(Logprobs, AreTheLogSoftmaxOfTheRawRow) {
  const std::vector<float> raw = {1.0f, 2.0f, 0.5f, 2.0f};
  double total = 0;
  for (float l : raw) total += std::exp(static_cast<double>(l));
  step::SampledToken sampled{.token = 2};
  FillLogprobs(raw, 3, sampled);
  EXPECT_NEAR(sampled.logprob, 0.5 - std::log(total), 1e-6);
  ASSERT_EQ(sampled.top.size(), 3u);
  EXPECT_EQ(sampled.top[0].token, 1);  // the tie: lower id first
  EXPECT_EQ(sampled.top[1].token, 3);
  EXPECT_EQ(sampled.top[2].token, 0);
  EXPECT_NEAR(sampled.top[2].logprob, 1.0 - std::log(total), 1e-6);
}

TEST(Logprobs, LargeLogitsDoNotOverflow) {
  const std::vector<float> raw = {1e4f, 1e4f};
  step::SampledToken sampled{.token = 0};
  FillLogprobs(raw, 0, sampled);
  EXPECT_NEAR(sampled.logprob, -std::log(2.0), 1e-3);
  EXPECT_TRUE(sampled.top.empty());
}

}  // namespace
}  // namespace qwen::sampling
