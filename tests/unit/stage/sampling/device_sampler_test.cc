// The road over a device: which rows take it, how its states follow the histories, and what becomes of steps begun ahead. The device is a
// plain loop over what ops::RowToSample asks for, with states of its own; the oracle is the host's sampler on the same logits.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <random>

#include "stage/kernels/common/sampling_weight.h"
#include "stage/sampling/device_rows.h"
#include "stage/sampling/sampler.h"

namespace qwen::sampling {
namespace {

class PlainDevice final : public ops::RowSampler {
 public:
  bool Takes(const at::Tensor& logits) const override { return logits.dim() == 2; }
  Status SetState(int32_t slot, std::span<const int32_t> tokens, int64_t prompt_tokens) override {
    ++sets;
    if (no_memory) return ResourceExhaustedError("no memory");
    State& state = states_[slot];
    state = {};
    for (size_t i = 0; i < tokens.size(); ++i) {
      state.seen[tokens[i]] = true;
      if (static_cast<int64_t>(i) >= prompt_tokens) ++state.counts[tokens[i]];
    }
    return OkStatus();
  }
  Status Enqueue(const at::Tensor& logits, std::span<const ops::RowToSample> rows) override {
    ++calls;
    results_.clear();
    for (const ops::RowToSample& row : rows) results_.push_back(SampleOne(logits[row.row.logits_row].to(at::kFloat).contiguous(), row));
    return OkStatus();
  }
  Result<std::span<const kernels::SamplerResult>> Wait() override { return std::span<const kernels::SamplerResult>(results_); }

  int sets = 0, calls = 0, rows = 0;
  bool no_memory = false;

 private:
  struct State {
    std::map<int32_t, bool> seen;
    std::map<int32_t, int> counts;
  };
  kernels::SamplerResult SampleOne(const at::Tensor& raw, const ops::RowToSample& asked) {
    ++rows;
    const kernels::SamplerRow& p = asked.row;
    std::vector<float> l(raw.const_data_ptr<float>(), raw.const_data_ptr<float>() + raw.numel());
    for (const auto& [id, bias] : asked.bias) l[id] += bias;
    if (p.state >= 0) {
      State& state = states_.at(p.state);
      if (p.append >= 0) {
        state.seen[p.append] = true;
        ++state.counts[p.append];
      }
      if (p.repetition != 1) {
        for (const auto& [id, seen] : state.seen) l[id] = l[id] < 0 ? l[id] * p.repetition : l[id] / p.repetition;
      }
      for (const auto& [id, count] : state.counts) l[id] -= p.presence + p.frequency * static_cast<float>(count);
    }
    for (size_t i = 0; i < l.size(); ++i) {
      const bool allowed = p.mask_words < 0 || (asked.mask[i / 32] >> (i % 32) & 1) != 0;
      if (!allowed || (p.token_limit > 0 && static_cast<int>(i) >= p.token_limit)) l[i] = -INFINITY;
    }
    for (int32_t id : asked.bans) l[id] = -INFINITY;
    const float best = *std::max_element(l.begin(), l.end());
    kernels::SamplerResult result{};
    if (best == -INFINITY) {
      result.status = kernels::kSamplerNothingAllowed;
      return result;
    }
    std::vector<std::pair<float, int>> order;  // descending logit, ascending id
    for (size_t i = 0; i < l.size(); ++i) order.emplace_back(-l[i], static_cast<int>(i));
    std::sort(order.begin(), order.end());
    result.token = order[0].second;
    if (p.temperature > 0) {
      const float maximum = best / p.temperature;
      std::map<int, uint64_t> kept;
      uint64_t total = 0, before = 0;
      size_t count = order.size();
      if (p.top_k > 0 && p.top_k < static_cast<int>(order.size())) {
        count = static_cast<size_t>(p.top_k);
        while (count < order.size() && order[count].first == order[static_cast<size_t>(p.top_k) - 1].first) ++count;
      }
      const auto weight = [&](size_t i) { return kernels::SamplingWeight(-order[i].first / p.temperature, maximum); };
      for (size_t i = 0; i < count; ++i) total += weight(i);
      const uint64_t wanted = p.top_p == kernels::kNoTopP ? total : kernels::WantedMass(p.top_p, total);
      total = 0;
      for (size_t i = 0; i < count && before < wanted; ++i) {
        before += weight(i);
        if (weight(i) < p.min_p) continue;
        kept[order[i].second] = weight(i);
        total += weight(i);
      }
      uint64_t sum = 0;
      for (const auto& [id, w] : kept) {
        sum += w;
        result.token = id;
        if (sum > kernels::DrawnUnit(p.draw, total)) break;
      }
    }
    if (p.logprobs >= 0) {
      const at::Tensor log = raw.to(at::kDouble).log_softmax(0);
      result.logprob = static_cast<float>(log[result.token].item<double>());
      const auto [values, ids] = log.sort(/*stable=*/true, 0, /*descending=*/true);
      for (int i = 0; i < std::min<int>(p.logprobs, static_cast<int>(log.numel())); ++i) {
        result.top_token[i] = static_cast<int32_t>(ids[i].item<int64_t>());
        result.top_logprob[i] = static_cast<float>(values[i].item<double>());
      }
    }
    return result;
  }

  std::map<int32_t, State> states_;
  std::vector<kernels::SamplerResult> results_;
};

constexpr int kVocab = 96;

step::SamplingParams RandomParams(std::mt19937& random) {
  step::SamplingParams params{.temperature = random() % 4 == 0 ? 0.0f : 0.8f, .seed = random()};
  if (random() % 3 == 0) params.top_k = 5;
  if (random() % 3 == 0) params.top_p = 0.7f;
  if (random() % 4 == 0) params.min_p = 0.1f;
  if (random() % 3 == 0) params.repetition_penalty = 1.5f;
  if (random() % 3 == 0) params.presence_penalty = 0.5f;
  if (random() % 3 == 0) params.frequency_penalty = 0.4f;
  if (random() % 6 == 0) params.no_repeat_ngram_size = 2;  // the host's
  if (random() % 4 == 0) params.token_limit = 80;
  if (random() % 4 == 0) params.logprobs = static_cast<int32_t>(random() % 4);
  if (random() % 4 == 0) params.logit_bias = {{3, 2.5f}, {90, -4.0f}};
  if (random() % 3 == 0) {
    params.min_tokens = 6;
    params.stop_tokens = {1, 2, 3};
  }
  return params;
}

step::SequenceStart Start(step::SequenceId sequence, int32_t slot, const step::SamplingParams& params, std::vector<int32_t> tokens, int32_t prompt) {
  return {.sequence = sequence, .slot = slot, .params = params, .tokens = std::move(tokens), .prompt_tokens = prompt};
}

step::SequenceSpan Span(step::SequenceId sequence, int32_t slot) {
  step::SequenceSpan span{.sequence = sequence, .slot = slot, .sample = true};
  span.tokens = {1};
  return span;
}

void ExpectSame(const step::StepResult& a, const step::StepResult& b) {
  ASSERT_EQ(a.samples.size(), b.samples.size());
  for (size_t i = 0; i < a.samples.size(); ++i) {
    EXPECT_EQ(a.samples[i].sequence, b.samples[i].sequence);
    EXPECT_EQ(a.samples[i].token, b.samples[i].token) << i;
    EXPECT_NEAR(a.samples[i].logprob, b.samples[i].logprob, 1e-5);
    ASSERT_EQ(a.samples[i].top.size(), b.samples[i].top.size());
    for (size_t n = 0; n < a.samples[i].top.size(); ++n) EXPECT_EQ(a.samples[i].top[n].token, b.samples[i].top[n].token);
  }
}

// Sequences that come, leave, are preempted and started again, with masks now and then, and steps begun ahead that are taken whole, in part
// or not at all.
TEST(DeviceSampler, GivesTheHostsTokensHoweverSequencesComeAndGo) {
  std::mt19937 random(11);
  for (int round = 0; round < 8; ++round) {
    PlainDevice device;
    constexpr int kSlots = 6;
    Sampler host({.max_slots = kSlots}), fast({.max_slots = kSlots, .device = &device});
    struct Live {
      step::SequenceId id = 0;
      step::SamplingParams params;
      std::vector<int32_t> tokens;
      int32_t prompt = 0;
    };
    std::vector<Live> live(kSlots);
    step::SequenceId next_id = 1;
    int taken_ahead = 0;
    at::manual_seed(static_cast<uint64_t>(round));
    std::vector<int32_t> ahead_slots;  // rows of ahead_logits
    at::Tensor ahead_logits;
    for (int step = 0; step < 60; ++step) {
      step::StepPlan plan{.step = static_cast<uint64_t>(step)};
      const bool take = ahead_logits.defined() && random() % 3 != 0;  // the plan is the one that was guessed, or some of its rows
      std::vector<int64_t> rows;
      for (int32_t slot = 0; slot < kSlots; ++slot) {
        Live& l = live[static_cast<size_t>(slot)];
        const auto guessed = std::find(ahead_slots.begin(), ahead_slots.end(), slot);
        if (take && (guessed == ahead_slots.end() || random() % 8 == 0)) continue;
        if (!take && random() % 4 == 0) continue;
        const bool fresh = l.id == 0 || (!take && random() % 12 == 0);
        if (fresh) {
          l = {.id = next_id++, .params = RandomParams(random), .tokens = {4, 5, 5, static_cast<int32_t>(random() % kVocab)}, .prompt = 3};
          if (random() % 2 == 0) l.prompt = 4;
        }
        if (fresh || (!take && random() % 10 == 0)) plan.starts.push_back(Start(l.id, slot, l.params, l.tokens, l.prompt));  // or preempted
        plan.spans.push_back(Span(l.id, slot));
        if (random() % 9 == 0) plan.spans.back().allowed = {0xfffffff0u, 0x0f0f0f0fu, 0xffffffffu};
        if (take) rows.push_back(guessed - ahead_slots.begin());
      }
      if (plan.spans.empty()) continue;
      const at::Tensor logits = take ? ahead_logits.index_select(0, at::tensor(rows)) : at::randn({static_cast<int64_t>(plan.spans.size()), kVocab}) * 2;
      const int before = device.rows;
      const auto want = host.Step(plan, logits), got = fast.Step(plan, logits, take);
      ASSERT_TRUE(want.ok() && got.ok()) << step;
      ExpectSame(*got, *want);
      ASSERT_FALSE(HasFailure()) << "round " << round << " step " << step;
      if (take) taken_ahead += static_cast<int>(plan.spans.size()) - (device.rows - before);
      for (size_t i = 0; i < plan.spans.size(); ++i) live[static_cast<size_t>(plan.spans[i].slot)].tokens.push_back(want->samples[i].token);
      ahead_logits = at::Tensor();
      ahead_slots.clear();
      if (random() % 3 == 0) continue;
      step::StepPlan guess{.step = static_cast<uint64_t>(step + 1)};
      for (const step::SequenceSpan& span : plan.spans) {
        guess.spans.push_back(Span(span.sequence, span.slot));
        ahead_slots.push_back(span.slot);
      }
      ahead_logits = at::randn({static_cast<int64_t>(guess.spans.size()), kVocab}) * 2;
      fast.BeginAhead(guess, ahead_logits);
    }
    EXPECT_GT(taken_ahead, 5);
    EXPECT_GT(device.rows, 50);
  }
}

TEST(DeviceSampler, AStateIsSetOnceAndThenFollowsTokenByToken) {
  PlainDevice device;
  Sampler sampler({.max_slots = 1, .device = &device});
  for (int step = 0; step < 10; ++step) {
    step::StepPlan plan;
    if (step == 0) plan.starts = {Start(1, 0, {.frequency_penalty = 1.0f}, {1, 2}, 2)};
    plan.spans = {Span(1, 0)};
    ASSERT_TRUE(sampler.Step(plan, at::zeros({1, kVocab})).ok());
  }
  EXPECT_EQ(device.sets, 1);
  EXPECT_EQ(device.calls, 10);
}

TEST(DeviceSampler, ARowBegunAheadIsNotSampledAgainUnlessAMaskCame) {
  PlainDevice device;
  Sampler sampler({.max_slots = 2, .device = &device});
  step::StepPlan plan;
  plan.starts = {Start(1, 0, {.temperature = 1.0f}, {1}, 1), Start(2, 1, {.temperature = 1.0f}, {1}, 1)};
  plan.spans = {Span(1, 0), Span(2, 1)};
  ASSERT_TRUE(sampler.Step(plan, at::randn({2, kVocab})).ok());
  EXPECT_EQ(device.rows, 2);
  plan.starts.clear();
  const at::Tensor ahead = at::randn({2, kVocab});
  sampler.BeginAhead(plan, ahead);
  EXPECT_EQ(device.rows, 4);
  plan.spans[1].allowed = {1u << 7, 0, 0};
  const auto result = sampler.Step(plan, ahead, /*begun=*/true).value();
  EXPECT_EQ(device.rows, 5);
  EXPECT_EQ(result.samples[1].token, 7);
  sampler.BeginAhead(plan, ahead);  // the one with a mask will have one again
  EXPECT_EQ(device.rows, 6);
}

TEST(DeviceSampler, WithoutMemoryForStatesRowsWithPenaltiesGoToTheHost) {
  PlainDevice device;
  device.no_memory = true;
  Sampler sampler({.max_slots = 2, .device = &device});
  const at::Tensor logits = at::tensor({3.0f, 2.0f, 1.0f, 0.0f}).unsqueeze(0);
  std::vector<int32_t> tokens;
  for (int i = 0; i < 3; ++i) {
    step::StepPlan plan;
    if (i == 0) plan.starts = {Start(1, 0, {.frequency_penalty = 1.5f}, {0, 0}, 2)};
    plan.spans = {Span(1, 0)};
    tokens.push_back(sampler.Step(plan, logits).value().samples[0].token);
  }
  EXPECT_EQ(tokens, (std::vector<int32_t>{0, 1, 0}));
  EXPECT_EQ(device.rows, 0);
  EXPECT_EQ(device.sets, 1);  // asked once
}

TEST(DeviceSampler, AMaskOrANanIsTheHostsError) {
  PlainDevice device;
  Sampler sampler({.max_slots = 1, .device = &device});
  step::StepPlan plan;
  plan.starts = {Start(1, 0, {}, {1}, 1)};
  plan.spans = {Span(1, 0)};
  plan.spans[0].allowed = {0, 0, 0};
  EXPECT_EQ(sampler.Step(plan, at::zeros({1, kVocab})).status().code(), StatusCode::kInvalidArgument);
  const SlotHistory history(plan.starts[0]);
  kernels::SamplerResult nan{};
  nan.status = kernels::kSamplerNan;
  EXPECT_EQ(TokenOf(nan, history, kVocab).status().code(), StatusCode::kInvalidArgument);
}

TEST(DeviceRow, WhatTheDeviceDoesNotDoIsTheHosts) {
  const auto takes = [](step::SamplingParams params, int32_t output = 0) {
    std::vector<int32_t> tokens(static_cast<size_t>(output) + 1, 5);
    return DeviceRow(SlotHistory(Start(1, 0, params, tokens, 1)), {}).has_value();
  };
  EXPECT_TRUE(takes({}));
  EXPECT_TRUE(takes({.temperature = 1, .top_k = 5, .top_p = 0.5f, .logprobs = 20}));
  EXPECT_FALSE(takes({.no_repeat_ngram_size = 3}));
  EXPECT_FALSE(takes({.logprobs = 21}));
  step::SamplingParams params;
  for (int32_t i = 0; i < 256; ++i) params.logit_bias.emplace_back(i, 1.0f);
  EXPECT_TRUE(takes(params));
  params.logit_bias.emplace_back(256, 1.0f);
  EXPECT_FALSE(takes(params));
  step::SamplingParams stops{.min_tokens = 1};
  stops.stop_tokens.assign(65, 1);
  EXPECT_FALSE(takes(stops));
  EXPECT_TRUE(takes(stops, 1));  // the bans are over
  EXPECT_TRUE(takes({.frequency_penalty = 1}, kernels::kSamplerCountMax - 1));
  EXPECT_FALSE(takes({.frequency_penalty = 1}, kernels::kSamplerCountMax));  // a count would not fit
  EXPECT_TRUE(takes({}, kernels::kSamplerCountMax));
}

}  // namespace
}  // namespace qwen::sampling
