// Goal: a step that was begun before it was asked for gives what the asked one gives, bit for bit, whatever the head does in
// between; and a guess is made only when everything that it needs is known.
#include "stage/model/run_ahead.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <random>

#include "tests/unit/stage/model/tiny_model.h"

namespace qwen::model {
namespace {

constexpr int32_t kBlockTokens = 4, kBlocks = 64;

step::SequenceSpan Decode(step::SequenceId id, int32_t begin, int32_t token, std::vector<step::BlockId> blocks) {
  return {.sequence = id, .slot = static_cast<int32_t>(id), .begin = begin, .tokens = {token}, .positions = {{begin, begin + 2, begin + 3}}, .blocks = std::move(blocks), .sample = true};
}

TEST(NextDecode, IsEverySequenceOneTokenFurther) {
  const step::StepPlan done{.epoch = 3, .step = 7, .spans = {Decode(1, 5, 11, {0, 1}), Decode(2, 8, 12, {4, 5, 6})}};
  const std::vector<step::SampledToken> samples = {{.sequence = 1, .token = 21}, {.sequence = 2, .token = 22}};
  const auto next = NextDecode(done, samples, kBlockTokens, 100);
  ASSERT_TRUE(next.has_value());
  EXPECT_EQ(next->epoch, 3u);
  ASSERT_EQ(next->spans.size(), 2u);
  EXPECT_EQ(next->spans[0].begin, 6);
  EXPECT_EQ(next->spans[0].tokens, (std::vector<int32_t>{21}));
  EXPECT_EQ(next->spans[0].positions[0], (step::Position{6, 8, 9}));
  EXPECT_EQ(next->spans[1].blocks, (std::vector<step::BlockId>{4, 5, 6}));
  EXPECT_TRUE(next->spans[1].sample);
}

TEST(NextDecode, IsNothingWhenSomethingIsUnknown) {
  const std::vector<step::SampledToken> samples = {{.sequence = 1, .token = 21}};
  const step::StepPlan good{.spans = {Decode(1, 5, 11, {0, 1})}};
  EXPECT_TRUE(NextDecode(good, samples, kBlockTokens, 100));
  EXPECT_FALSE(NextDecode(good, {}, kBlockTokens, 100)) << "no sample";
  EXPECT_FALSE(NextDecode(good, samples, kBlockTokens, 6)) << "no place for position 6";
  EXPECT_FALSE(NextDecode({.spans = {Decode(1, 7, 11, {0, 1})}}, samples, kBlockTokens, 100)) << "no block for token 8";
  EXPECT_TRUE(NextDecode({.spans = {Decode(1, 7, 11, {0, 1, 2})}}, samples, kBlockTokens, 100)) << "a block given ahead";
  step::StepPlan prompt = good;
  prompt.spans[0].tokens.push_back(12);
  EXPECT_FALSE(NextDecode(prompt, samples, kBlockTokens, 100)) << "a prompt";
  EXPECT_FALSE(NextDecode(good, std::vector<step::SampledToken>{{.sequence = 9, .token = 21}}, kBlockTokens, 100)) << "another's sample";
}

TEST(RowsOf, AreThoseOfTheSequencesThatGoOn) {
  const step::StepPlan ahead{.epoch = 1, .spans = {Decode(1, 6, 21, {0, 1}), Decode(2, 9, 22, {4, 5, 6}), Decode(3, 2, 23, {7})}};
  EXPECT_EQ(RowsOf(ahead, ahead), (std::vector<int64_t>{0, 1, 2}));
  step::StepPlan fewer = ahead;
  fewer.spans.erase(fewer.spans.begin() + 1);
  EXPECT_EQ(RowsOf(ahead, fewer), (std::vector<int64_t>{0, 2}));
  const auto wrong = [&](auto change) {
    step::StepPlan plan = ahead;
    change(plan);
    return !RowsOf(ahead, plan).has_value();
  };
  EXPECT_TRUE(wrong([](step::StepPlan& p) { p.epoch = 2; }));
  EXPECT_TRUE(wrong([](step::StepPlan& p) { p.spans[1].tokens[0] = 5; }));
  EXPECT_TRUE(wrong([](step::StepPlan& p) { p.spans[1].begin = 8; }));
  EXPECT_TRUE(wrong([](step::StepPlan& p) { p.spans[1].blocks[0] = 9; })) << "moved to another place meanwhile";
  EXPECT_TRUE(wrong([](step::StepPlan& p) { p.spans[1].positions[0].h = 0; }));
  EXPECT_TRUE(wrong([](step::StepPlan& p) { p.spans.push_back(Decode(4, 3, 5, {9})); })) << "a newcomer";
  EXPECT_TRUE(wrong([](step::StepPlan& p) { std::swap(p.spans[0], p.spans[1]); })) << "another order";
  EXPECT_TRUE(wrong([](step::StepPlan& p) { p.spans[2].sample = false; }));
}

TEST(RunAheadPolicy, PausesLongerAfterEachWrongGuess) {
  RunAheadPolicy policy;
  EXPECT_TRUE(policy.Tries());
  policy.Wrong();
  EXPECT_FALSE(policy.Tries());
  EXPECT_TRUE(policy.Tries());
  policy.Wrong();
  EXPECT_FALSE(policy.Tries());
  EXPECT_FALSE(policy.Tries());
  EXPECT_TRUE(policy.Tries());
  for (int i = 0; i < 20; ++i) policy.Wrong();
  int pause = 0;
  while (!policy.Tries()) ++pause;
  EXPECT_EQ(pause, RunAheadPolicy::kPauseMax);
  policy.Right();
  policy.Wrong();
  EXPECT_FALSE(policy.Tries());
  EXPECT_TRUE(policy.Tries());
}

// A backend that is a reference model of its own, and counts.
struct Counts {
  int decodes = 0, prefills = 0;
};
class ReferenceBackend final : public StageBackend {
 public:
  ReferenceBackend(std::unique_ptr<StageModel> model, Counts& counts) : model_(std::move(model)), counts_(counts) {}
  void* stream() const override { return nullptr; }
  bool TakesDecode(const step::StepPlan& plan) const override {
    return std::all_of(plan.spans.begin(), plan.spans.end(), [](const step::SequenceSpan& span) { return span.tokens.size() == 1 && span.sample; });
  }
  Result<StageOutput> Decode(const step::StepPlan& plan, const StageActivations&) override {
    ++counts_.decodes;
    return model_->Forward(plan, {});
  }
  Result<StageOutput> Prefill(const step::StepPlan& plan, StageActivations, const at::Tensor&) override {
    ++counts_.prefills;
    return model_->Forward(plan, {});
  }

 private:
  std::unique_ptr<StageModel> model_;
  Counts& counts_;
};

// Sequences that come, go and take over each other's blocks at random, in plans as the engine makes them.
TEST(RunAhead, ChangesNoBitHoweverSequencesComeAndGo) {
  const contract::ModelShape shape = TinyShape();
  const weights::TensorMap weights = TinyWeights(shape);
  StageModelOptions options{.layers = {0, 4}, .dtype = at::kFloat, .block_tokens = kBlockTokens, .block_count = kBlocks};
  const auto plain = StageModel::Create(shape, options, weights).value();
  Counts counts;
  StageModelOptions ahead_options = options;
  ahead_options.backend = [&](const auto&, const auto&, weights::TensorMap&, const auto&, const auto&) -> Result<std::unique_ptr<StageBackend>> {
    return std::unique_ptr<StageBackend>(new ReferenceBackend(StageModel::Create(shape, options, weights).value(), counts));
  };
  const auto ahead = StageModel::Create(shape, ahead_options, weights).value();

  std::mt19937 random(5);
  const auto chance = [&](int one_in) { return random() % static_cast<unsigned>(one_in) == 0; };
  std::vector<step::BlockId> free;
  for (step::BlockId b = 0; b < kBlocks; ++b) free.push_back(b);
  std::vector<TinySequence> live;
  std::vector<int32_t> done;  // tokens of each in the cache
  uint64_t next_id = 1;
  const auto give_blocks = [&](TinySequence& sequence, size_t tokens) {
    while (sequence.blocks.size() * kBlockTokens < tokens) {
      sequence.blocks.push_back(free.back());
      free.pop_back();
    }
  };
  int decode_plans = 0, begun_plans = 0;
  StageModel::Ahead begun;  // what the model said that it had begun
  for (int step = 0; step < 400; ++step) {
    for (size_t i = live.size(); i-- > 0;) {
      if (!chance(25) && live[i].tokens.size() < 40) continue;
      free.insert(free.end(), live[i].blocks.begin(), live[i].blocks.end());
      live.erase(live.begin() + static_cast<std::ptrdiff_t>(i));
      done.erase(done.begin() + static_cast<std::ptrdiff_t>(i));
    }
    if (live.empty() || (live.size() < 4 && chance(8))) {
      live.push_back(TextSequence(next_id++, 2 + static_cast<int32_t>(random() % 9)));
      done.push_back(0);
    }
    step::StepPlan plan{.epoch = 1, .step = static_cast<uint64_t>(step)};
    bool decode = true;
    for (size_t i = 0; i < live.size(); ++i) {
      const auto length = static_cast<int32_t>(live[i].tokens.size());
      give_blocks(live[i], static_cast<size_t>(length) + (chance(4) ? 0 : 1));
      step::SequenceSpan span = live[i].Span(done[i], length - done[i], kBlockTokens, true);
      span.blocks = live[i].blocks;
      decode &= span.tokens.size() == 1;
      plan.spans.push_back(std::move(span));
      done[i] = length;
    }
    decode_plans += decode;
    const auto want = plain->Forward(plan, {}), got = ahead->Forward(plan, {});
    ASSERT_TRUE(want.ok() && got.ok());
    ASSERT_TRUE(at::equal(want->logits, got->logits)) << "step " << step;
    begun_plans += got->begun;
    for (size_t i = 0, row = 0; got->begun && i < live.size(); ++i) {  // then every row is one of that step's, of the same sequence and token
      while (row < begun.plan.spans.size() && begun.plan.spans[row].sequence != live[i].id) ++row;
      ASSERT_LT(row, begun.plan.spans.size());
      ASSERT_EQ(begun.plan.spans[row].tokens, plan.spans[i].tokens);
      ASSERT_TRUE(at::equal(begun.logits[static_cast<int64_t>(row)], got->logits[static_cast<int64_t>(i)]));
    }
    std::vector<step::SampledToken> samples;
    for (size_t i = 0; i < live.size(); ++i) {
      const auto token = static_cast<int32_t>(want->logits[static_cast<int64_t>(i)].argmax().item<int64_t>());
      samples.push_back({.sequence = live[i].id, .token = token});
      live[i].tokens.push_back(token);
    }
    const StageModel::Ahead* next = ahead->RunAhead(plan, samples);
    begun = next != nullptr ? *next : StageModel::Ahead();
  }
  EXPECT_GT(begun_plans, decode_plans / 2);
  EXPECT_GT(decode_plans, 300);
  EXPECT_GT(counts.decodes, decode_plans) << "no guess was wrong: the test shows nothing";
  EXPECT_LT(counts.decodes, decode_plans * 3 / 2);
}

}  // namespace
}  // namespace qwen::model
