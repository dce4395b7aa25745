// The whole model at a tiny size: right against plain loops, and the same however it is split, chunked or accompanied.
#include "stage/model/stage_model.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "tests/unit/stage/model/slow_decoder.h"
#include "tests/unit/stage/model/tiny_model.h"

namespace qwen::model {
namespace {

constexpr int32_t kBlockTokens = 4, kBlocks = 64;

// A pipeline of stages in one process, fed plan by plan.
class Pipeline {
 public:
  struct Options {
    std::vector<contract::LayerRange> ranges = {{0, 4}};
    at::ScalarType dtype = at::kFloat;
    RowGrouping grouping = RowGrouping::kPerSpan;
  };
  Pipeline(const contract::ModelShape& shape, const weights::TensorMap& weights, const Options& options) {
    weights::TensorMap cast;
    for (const auto& [slot, tensor] : weights) cast[slot] = tensor.to(options.dtype);
    for (size_t s = 0; s < options.ranges.size(); ++s) {
      StageModelOptions stage;
      stage.layers = options.ranges[s];
      stage.stage = static_cast<int32_t>(s);
      stage.stages = static_cast<int32_t>(options.ranges.size());
      stage.dtype = options.dtype;
      stage.block_tokens = kBlockTokens;
      stage.block_count = kBlocks;
      stage.grouping = options.grouping;
      if (shape.vision) stage.vision = FakeVision(shape, options.dtype);
      stages_.push_back(StageModel::Create(shape, stage, cast).value());
    }
  }

  void AddVision(const TinySequence& sequence) {
    for (const step::VisionInput& input : sequence.vision) ASSERT_TRUE(stages_[0]->AddVision(input).ok());
  }

  // Logits of the plan. On the way, what crosses each boundary must be what step/activation_shape.h says.
  at::Tensor Forward(const step::StepPlan& plan) {
    StageOutput output;
    for (size_t s = 0; s < stages_.size(); ++s) {
      Result<StageOutput> result = stages_[s]->Forward(plan, output.activations);
      QP_CHECK(result.ok()) << result.status().ToString();
      output = std::move(result).value();
      if (s + 1 == stages_.size()) break;
      const auto expected = step::ActivationsBefore(stages_[s]->options().layers.end, plan, stages_[s]->activation_sizes());
      EXPECT_EQ(output.activations.hidden.nbytes(), static_cast<size_t>(expected.hidden_bytes));
      const at::Tensor& taps = output.activations.deepstack;
      EXPECT_EQ(taps.defined() ? taps.nbytes() : 0, static_cast<size_t>(expected.deepstack_bytes));
    }
    return output.logits;
  }
  StageModel& first() { return *stages_.front(); }

 private:
  std::vector<std::unique_ptr<StageModel>> stages_;
};

step::StepPlan Plan(std::vector<step::SequenceSpan> spans) {
  step::StepPlan plan;
  plan.spans = std::move(spans);
  return plan;
}

void GiveBlocks(TinySequence& sequence, int32_t tokens, std::vector<step::BlockId>& free) {
  for (int32_t i = 0; i < (tokens + kBlockTokens - 1) / kBlockTokens; ++i) {
    sequence.blocks.push_back(free.back());
    free.pop_back();
  }
}
std::vector<step::BlockId> AllBlocks() {  // in an order in which neighbours are never adjacent
  std::vector<step::BlockId> blocks;
  for (int32_t i = 0; i < kBlocks; ++i) blocks.push_back(i * 37 % kBlocks);
  return blocks;
}

// Prefill in chunks (0: all at once), then greedy steps; returns the logits of every sampled position, (steps, vocab).
at::Tensor Generate(Pipeline& pipeline, TinySequence& sequence, int32_t steps, int32_t chunk) {
  pipeline.AddVision(sequence);
  std::vector<at::Tensor> rows;
  int32_t done = 0;
  while (static_cast<int32_t>(rows.size()) < steps) {
    const int32_t known = static_cast<int32_t>(sequence.tokens.size());
    const int32_t count = chunk > 0 ? std::min(chunk, known - done) : known - done;
    const at::Tensor logits = pipeline.Forward(Plan({sequence.Span(done, count, kBlockTokens, done + count == known)}));
    done += count;
    if (done < known) continue;
    rows.push_back(logits[0]);
    sequence.tokens.push_back(static_cast<int32_t>(logits[0].argmax().item<int64_t>()));
  }
  sequence.tokens.pop_back();  // the last one was sampled, not computed
  return at::stack(rows);
}

class StageModelTest : public ::testing::Test {
 protected:
  TinySequence Image(uint64_t id) {
    TinySequence sequence = ImageSequence(id);
    GiveBlocks(sequence, 40, free_);
    return sequence;
  }
  TinySequence Text(uint64_t id, int32_t count) {
    TinySequence sequence = TextSequence(id, count);
    GiveBlocks(sequence, count + 12, free_);
    return sequence;
  }
  std::vector<SlowDecoder::Token> SlowTokens(const TinySequence& sequence) const {
    std::vector<SlowDecoder::Token> tokens;
    for (int32_t i = 0; i < static_cast<int32_t>(sequence.tokens.size()); ++i) {
      const step::SequenceSpan span = sequence.Span(i, 1, kBlockTokens, false);
      const step::Position p = span.positions[0];
      SlowDecoder::Token token{.embedding = ToRow(weights_.at("embed_tokens.weight")[span.tokens[0]]), .position = {p.t, p.h, p.w}};
      if (!span.vision.empty()) {
        const at::Tensor features = FakeFeatures(shape_, sequence.vision[0]).select(1, span.vision[0].feature_begin);
        token.embedding = ToRow(features[0]);
        for (int64_t tap = 1; tap < features.size(0); ++tap) token.taps.push_back(ToRow(features[tap]));
      }
      tokens.push_back(std::move(token));
    }
    return tokens;
  }

  contract::ModelShape shape_ = TinyShape();
  weights::TensorMap weights_ = TinyWeights(shape_);
  std::vector<step::BlockId> free_ = AllBlocks();
};

TEST_F(StageModelTest, AnImagePromptAndItsDecodeStepsEqualThePlainLoops) {
  Pipeline pipeline(shape_, weights_, {});
  TinySequence sequence = Image(1);
  const int32_t prompt = static_cast<int32_t>(sequence.tokens.size());
  const at::Tensor logits = Generate(pipeline, sequence, 6, 0);
  const Rows expected = SlowDecoder(shape_, weights_).Logits(SlowTokens(sequence));
  ASSERT_EQ(expected.size(), static_cast<size_t>(prompt + 5));
  for (int s = 0; s < 6; ++s) {
    for (int i = 0; i < shape_.vocab; ++i) EXPECT_NEAR(logits[s][i].item<double>(), expected[prompt - 1 + s][i], 1e-4) << s << " " << i;
  }
}

TEST_F(StageModelTest, ATextModelThatDoesNotNormaliseItsRouterEqualsThePlainLoops) {
  shape_.vision.reset();
  shape_.mrope_section = {0, 0, 0};
  shape_.moe->norm_topk_prob = false;
  Pipeline pipeline(shape_, weights_, {});
  TinySequence sequence = Text(2, 9);
  const at::Tensor logits = Generate(pipeline, sequence, 3, 0);
  const Rows expected = SlowDecoder(shape_, weights_).Logits(SlowTokens(sequence));
  for (int s = 0; s < 3; ++s) {
    for (int i = 0; i < shape_.vocab; ++i) EXPECT_NEAR(logits[s][i].item<double>(), expected[8 + s][i], 1e-4);
  }
}

TEST_F(StageModelTest, EveryContiguousSplitGivesTheBitsOfOneStage) {
  for (at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const TinySequence prompt = Image(3);
    Pipeline whole(shape_, weights_, {.dtype = dtype});
    TinySequence sequence = prompt;
    const at::Tensor expected = Generate(whole, sequence, 5, 0);
    for (int cuts = 1; cuts < 8; ++cuts) {  // bit i: a boundary before layer i + 1
      std::vector<contract::LayerRange> ranges = {{0, 4}};
      for (int32_t layer = 1; layer < 4; ++layer) {
        if ((cuts >> (layer - 1) & 1) == 0) continue;
        ranges.back().end = layer;
        ranges.push_back({layer, 4});
      }
      Pipeline split(shape_, weights_, {.ranges = ranges, .dtype = dtype});
      TinySequence again = prompt;
      EXPECT_TRUE(Generate(split, again, 5, 0).equal(expected)) << "cuts " << cuts;
    }
  }
}

TEST_F(StageModelTest, ChunkedPrefillGivesTheSameTokensWithinTheTolerance) {
  const TinySequence prompt = Image(4);
  Pipeline pipeline(shape_, weights_, {.ranges = {{0, 1}, {1, 4}}});
  TinySequence sequence = prompt;
  const at::Tensor expected = Generate(pipeline, sequence, 8, 0);
  for (int32_t chunk : {1, 3, 4, 5, 14, 22}) {  // some cut the image, some a block, 1 is all decode
    TinySequence again = prompt;
    const at::Tensor logits = Generate(pipeline, again, 8, chunk);
    EXPECT_EQ(again.tokens, sequence.tokens) << chunk;
    EXPECT_LE((logits - expected).abs().max().item<double>(), 2e-5) << chunk;
  }
}

// Three sequences in different phases side by side, and each alone.
TEST_F(StageModelTest, BatchCompanyDoesNotChangeASingleBitWithRowsGroupedBySpan) {
  for (at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    free_ = AllBlocks();
    TinySequence image = Image(5), text = Text(6, 11), chunked = Text(7, 10);
    Pipeline together(shape_, weights_, {.dtype = dtype}), alone(shape_, weights_, {.dtype = dtype});
    together.AddVision(image);
    alone.AddVision(image);
    const auto check = [&](const std::vector<step::SequenceSpan>& spans) {
      const at::Tensor logits = together.Forward(Plan(spans));
      int64_t row = 0;
      for (const step::SequenceSpan& span : spans) {
        const at::Tensor expected = alone.Forward(Plan({span}));
        if (!span.sample) continue;
        EXPECT_TRUE(logits[row++].equal(expected[0])) << "sequence " << span.sequence;
      }
    };
    const int32_t n = static_cast<int32_t>(image.tokens.size());
    check({image.Span(0, n, kBlockTokens, true), text.Span(0, 11, kBlockTokens, true), chunked.Span(0, 4, kBlockTokens, false)});
    image.tokens.push_back(3);
    text.tokens.push_back(17);
    check({text.Span(11, 1, kBlockTokens, true), chunked.Span(4, 6, kBlockTokens, true), image.Span(n, 1, kBlockTokens, true)});
    chunked.tokens.push_back(8);
    text.tokens.push_back(9);
    check({chunked.Span(10, 1, kBlockTokens, true), text.Span(12, 1, kBlockTokens, true)});
  }
}

TEST_F(StageModelTest, OneProductForTheWholeBatchStaysWithinTheTolerance) {
  TinySequence a = Text(8, 9), b = Text(9, 6);
  Pipeline grouped(shape_, weights_, {}), joint(shape_, weights_, {.grouping = RowGrouping::kWholeBatch});
  const step::StepPlan plan = Plan({a.Span(0, 9, kBlockTokens, true), b.Span(0, 6, kBlockTokens, true)});
  EXPECT_LE((grouped.Forward(plan) - joint.Forward(plan)).abs().max().item<double>(), 1e-5);
}

TEST_F(StageModelTest, ASequenceMovedToOtherBlocksGivesTheSameBits) {
  Pipeline pipeline(shape_, weights_, {});
  TinySequence here = Text(10, 13), there = here;
  std::vector<step::BlockId> other = free_;
  there.blocks.clear();
  GiveBlocks(there, 25, other);
  EXPECT_TRUE(Generate(pipeline, here, 4, 0).equal(Generate(pipeline, there, 4, 0)));
}

TEST_F(StageModelTest, APlanWithoutSamplesGivesNoLogitsAndFillsTheCache) {
  Pipeline pipeline(shape_, weights_, {});
  TinySequence sequence = Text(11, 8), same = sequence;
  EXPECT_FALSE(pipeline.Forward(Plan({sequence.Span(0, 8, kBlockTokens, false)})).defined());
  sequence.tokens.push_back(5);
  const at::Tensor logits = pipeline.Forward(Plan({sequence.Span(8, 1, kBlockTokens, true)}));
  same.tokens.push_back(5);
  const Rows expected = SlowDecoder(shape_, weights_).Logits(SlowTokens(same));
  for (int i = 0; i < shape_.vocab; ++i) EXPECT_NEAR(logits[0][i].item<double>(), expected[8][i], 1e-4);
}

TEST_F(StageModelTest, VisionFeaturesLiveUntilAPlanReleasesThem) {
  Pipeline pipeline(shape_, weights_, {});
  TinySequence sequence = Image(12);
  pipeline.AddVision(sequence);
  EXPECT_EQ(pipeline.first().vision_tokens(), 6);
  step::StepPlan plan = Plan({sequence.Span(0, 23, kBlockTokens, true)});
  plan.vision_released = {sequence.vision[0].id, 999};  // an id that is gone already is no error
  pipeline.Forward(plan);
  EXPECT_EQ(pipeline.first().vision_tokens(), 0);
  EXPECT_EQ(pipeline.first().Forward(plan, {}).status().code(), StatusCode::kInvalidArgument);
  pipeline.AddVision(sequence);
  pipeline.AddVision(sequence);  // sent again: replaced, not counted twice
  EXPECT_EQ(pipeline.first().vision_tokens(), 6);
  pipeline.first().Reset();
  EXPECT_EQ(pipeline.first().vision_tokens(), 0);
}

TEST_F(StageModelTest, VisionInputsBeyondTheBoundAreRefused) {
  StageModelOptions options{.layers = {0, 4}, .dtype = at::kFloat, .block_count = 4, .vision_tokens_max = 11};
  options.vision = FakeVision(shape_, at::kFloat);
  const auto model = StageModel::Create(shape_, options, weights_).value();
  EXPECT_TRUE(model->AddVision({.id = 1, .grid = {1, 4, 6}}).ok());
  EXPECT_EQ(model->AddVision({.id = 2, .grid = {1, 4, 6}}).code(), StatusCode::kResourceExhausted);
  EXPECT_TRUE(model->AddVision({.id = 1, .grid = {1, 4, 10}}).ok());  // replaces its own 6 by 10
  const std::vector<step::VisionInput> several = {{.id = 1, .grid = {1, 4, 4}}, {.id = 2, .grid = {1, 4, 4}}, {.id = 3, .grid = {1, 4, 4}}};
  EXPECT_EQ(model->AddVision(several).code(), StatusCode::kResourceExhausted);  // 12 in all: none of them
  EXPECT_EQ(model->vision_tokens(), 10);
  EXPECT_TRUE(model->AddVision(std::span(several).first(2)).ok());
  EXPECT_EQ(model->vision_tokens(), 8);
}

TEST_F(StageModelTest, AStageWithoutATowerRefusesVision) {
  StageModelOptions options{.layers = {0, 4}, .dtype = at::kFloat, .block_count = 4};
  const auto model = StageModel::Create(shape_, options, weights_).value();
  EXPECT_EQ(model->AddVision({.id = 1, .grid = {1, 4, 6}}).code(), StatusCode::kFailedPrecondition);
}

TEST_F(StageModelTest, FeaturesPastTheEndOfAnInputAreRefused) {
  Pipeline pipeline(shape_, weights_, {});
  TinySequence sequence = Image(13);
  pipeline.AddVision(sequence);
  step::StepPlan plan = Plan({sequence.Span(0, 23, kBlockTokens, true)});
  plan.spans[0].vision[0].feature_begin = 1;
  EXPECT_EQ(pipeline.first().Forward(plan, {}).status().code(), StatusCode::kInvalidArgument);
}

TEST_F(StageModelTest, ActivationsOfTheWrongShapeOrDtypeAreRefused) {
  StageModelOptions options{.layers = {1, 4}, .stage = 1, .stages = 2, .dtype = at::kFloat, .block_tokens = kBlockTokens, .block_count = kBlocks};
  const auto model = StageModel::Create(shape_, options, weights_).value();
  TinySequence text = Text(14, 5), image = Image(15);
  const step::StepPlan plain = Plan({text.Span(0, 5, kBlockTokens, true)}), visual = Plan({image.Span(0, 23, kBlockTokens, true)});
  const auto code = [&](const step::StepPlan& plan, at::Tensor hidden, at::Tensor taps) {
    return model->Forward(plan, {std::move(hidden), std::move(taps)}).status().code();
  };
  EXPECT_EQ(code(plain, at::zeros({5, 24}), {}), StatusCode::kOk);
  EXPECT_EQ(code(plain, {}, {}), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(plain, at::zeros({4, 24}), {}), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(plain, at::zeros({5, 24}, at::kBFloat16), {}), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(plain, at::zeros({5, 24}), at::zeros({2, 6, 24})), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(visual, at::zeros({23, 24}), at::zeros({2, 6, 24})), StatusCode::kOk);
  EXPECT_EQ(code(visual, at::zeros({23, 24}), at::zeros({3, 6, 24})), StatusCode::kInvalidArgument);
  EXPECT_EQ(code(visual, at::zeros({23, 24}), {}), StatusCode::kInvalidArgument);
}

TEST_F(StageModelTest, OptionsThatDoNotFitTheModelAreRefused) {
  const auto code = [&](StageModelOptions options) {
    options.block_count = 4;
    return StageModel::Create(shape_, options, weights_).status().code();
  };
  EXPECT_EQ(code({.layers = {0, 5}, .dtype = at::kFloat}), StatusCode::kInvalidArgument);
  EXPECT_EQ(code({.layers = {1, 4}, .dtype = at::kFloat}), StatusCode::kInvalidArgument);
  EXPECT_EQ(code({.layers = {0, 3}, .dtype = at::kFloat}), StatusCode::kInvalidArgument);
  EXPECT_EQ(code({.layers = {0, 4}, .stage = 0, .stages = 2, .dtype = at::kFloat}), StatusCode::kInvalidArgument);
  EXPECT_EQ(code({.layers = {0, 4}, .dtype = at::kHalf}), StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace qwen::model
