// Slots and batches: starts, histories, and that the fast greedy road gives what the long one gives.
#include "stage/sampling/sampler.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

namespace qwen::sampling {
namespace {

step::SequenceStart Start(uint64_t sequence, int32_t slot, step::SamplingParams params, std::vector<int32_t> prompt = {1}) {
  const int32_t count = static_cast<int32_t>(prompt.size());
  return {.sequence = sequence, .slot = slot, .params = std::move(params), .tokens = std::move(prompt), .prompt_tokens = count};
}

step::SequenceSpan Span(uint64_t sequence, int32_t slot, bool sample = true) {
  step::SequenceSpan span{.sequence = sequence, .slot = slot, .sample = sample};
  span.tokens = {1};
  return span;
}

at::Tensor RandomLogits(int64_t rows, int64_t vocab, uint64_t seed) {
  at::manual_seed(seed);
  return at::randn({rows, vocab});
}

TEST(Sampler, GivesOneTokenPerSamplingSpanInSpanOrder) {
  Sampler sampler({.max_slots = 4});
  step::StepPlan plan{.epoch = 3, .step = 9};
  plan.starts = {Start(10, 0, {}), Start(11, 1, {}), Start(12, 2, {})};
  plan.spans = {Span(12, 2), Span(10, 0, /*sample=*/false), Span(11, 1)};
  at::Tensor logits = at::zeros({2, 5});
  logits[0][4] = 1.0f;
  logits[1][2] = 1.0f;
  const step::StepResult result = sampler.Step(plan, logits).value();
  EXPECT_EQ(result.epoch, 3u);
  EXPECT_EQ(result.step, 9u);
  ASSERT_EQ(result.samples.size(), 2u);
  EXPECT_EQ(result.samples[0].sequence, 12u);
  EXPECT_EQ(result.samples[0].token, 4);
  EXPECT_EQ(result.samples[1].sequence, 11u);
  EXPECT_EQ(result.samples[1].token, 2);
}

TEST(Sampler, StartsCountEvenWhenNothingIsSampled) {
  Sampler sampler({.max_slots = 1});
  step::StepPlan first;
  first.starts = {Start(10, 0, {})};
  first.spans = {Span(10, 0, false)};
  EXPECT_TRUE(sampler.Step(first, at::Tensor()).value().samples.empty());
  step::StepPlan second;
  second.spans = {Span(10, 0)};
  EXPECT_EQ(sampler.Step(second, at::zeros({1, 4})).value().samples[0].token, 0);
}

TEST(Sampler, ASlotOfAnotherSequenceIsRefused) {
  Sampler sampler({.max_slots = 1});
  step::StepPlan plan;
  plan.starts = {Start(10, 0, {})};
  plan.spans = {Span(11, 0)};
  EXPECT_EQ(sampler.Step(plan, at::zeros({1, 4})).status().code(), StatusCode::kFailedPrecondition);
}

TEST(Sampler, ABatchedGreedyRowEqualsTheRowTakenTheLongWay) {
  const at::Tensor logits = RandomLogits(6, 100, 5).to(at::kBFloat16);  // bf16: with ties
  Sampler fast({.max_slots = 6}), slow({.max_slots = 6});
  step::StepPlan plan, with_logprobs;
  for (int i = 0; i < 6; ++i) {
    const int32_t limit = i % 2 == 0 ? 0 : 50;
    plan.starts.push_back(Start(i + 1, i, {.token_limit = limit}));
    with_logprobs.starts.push_back(Start(i + 1, i, {.logprobs = 0, .token_limit = limit}));
    plan.spans.push_back(Span(i + 1, i));
  }
  with_logprobs.spans = plan.spans;
  const auto a = fast.Step(plan, logits).value(), b = slow.Step(with_logprobs, logits).value();
  for (int i = 0; i < 6; ++i) {
    EXPECT_EQ(a.samples[i].token, b.samples[i].token) << i;
    if (i % 2 == 1) {
      EXPECT_LT(a.samples[i].token, 50);
    }
  }
}

TEST(Sampler, ADrawDependsOnlyOnSeedAndOutputIndexNotOnSlotOrCompany) {
  const at::Tensor row = RandomLogits(1, 64, 6)[0];
  const step::SamplingParams params{.temperature = 1.0f, .seed = 42};
  Sampler alone({.max_slots = 8});
  std::vector<int32_t> expected;
  for (int i = 0; i < 8; ++i) {
    step::StepPlan plan;
    if (i == 0) plan.starts = {Start(1, 0, params)};
    plan.spans = {Span(1, 0)};
    expected.push_back(alone.Step(plan, row.unsqueeze(0)).value().samples[0].token);
  }
  // Elsewhere: slot 5, other company, and the first three tokens already in the history (a replay after a fault).
  Sampler other({.max_slots = 8});
  step::SequenceStart replay = Start(1, 5, params);
  replay.tokens.insert(replay.tokens.end(), expected.begin(), expected.begin() + 3);
  for (int i = 3; i < 8; ++i) {
    step::StepPlan plan;
    if (i == 3) plan.starts = {replay, Start(2, 0, {.temperature = 2.0f, .seed = 1})};
    plan.spans = {Span(2, 0), Span(1, 5)};
    const auto result = other.Step(plan, at::stack({row * 2, row})).value();
    EXPECT_EQ(result.samples[1].token, expected[i]) << i;
  }
}

TEST(Sampler, SampledTokensEnterTheHistory) {
  Sampler sampler({.max_slots = 1});
  const at::Tensor logits = at::tensor({3.0f, 2.0f, 1.0f}).unsqueeze(0);
  std::vector<int32_t> tokens;
  for (int i = 0; i < 3; ++i) {
    step::StepPlan plan;
    if (i == 0) plan.starts = {Start(1, 0, {.frequency_penalty = 1.5f}, {0, 0})};
    plan.spans = {Span(1, 0)};
    tokens.push_back(sampler.Step(plan, logits).value().samples[0].token);
  }
  EXPECT_EQ(tokens, (std::vector<int32_t>{0, 1, 0}));  // 3 | 1.5, 2 | 1.5, 0.5, 1
}

TEST(Sampler, LogprobsAreThoseOfTheRawLogitsUnderPenaltiesAndMasks) {
  Sampler sampler({.max_slots = 1});
  step::SamplingParams params{.logprobs = 2};
  params.logit_bias = {{1, -100.0f}};
  step::StepPlan plan;
  plan.starts = {Start(1, 0, params)};
  plan.spans = {Span(1, 0)};
  plan.spans[0].allowed = {0b110};
  const auto sampled = sampler.Step(plan, at::tensor({0.0f, 3.0f, 1.0f}).unsqueeze(0)).value().samples[0];
  EXPECT_EQ(sampled.token, 2);
  const double normaliser = std::log(1.0 + std::exp(3.0) + std::exp(1.0));
  EXPECT_NEAR(sampled.logprob, 1.0 - normaliser, 1e-6);
  ASSERT_EQ(sampled.top.size(), 2u);
  EXPECT_EQ(sampled.top[0].token, 1);
  EXPECT_NEAR(sampled.top[0].logprob, 3.0 - normaliser, 1e-6);
}

TEST(Sampler, AMaskWithoutAnyTokenIsAnErrorAndLeavesTheHistory) {
  Sampler sampler({.max_slots = 1});
  step::StepPlan plan;
  plan.starts = {Start(1, 0, {})};
  plan.spans = {Span(1, 0)};
  plan.spans[0].allowed = {0};
  EXPECT_EQ(sampler.Step(plan, at::zeros({1, 4})).status().code(), StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace qwen::sampling
