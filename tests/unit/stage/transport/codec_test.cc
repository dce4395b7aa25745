// Codec: every field of every message survives the wire; what is out of range is refused and named; pixels arrive whole.
#include "stage/transport/codec.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "stage/contract/wire.pb.h"
#include "stage/transport/frame.h"

namespace qwen::transport {
namespace {

template <typename T>
T RoundTrip(const T& message) {
  auto decoded = DecodeMessage(EncodeMessage(Message(message)));
  EXPECT_TRUE(decoded.ok()) << decoded.status().ToString();
  return std::get<T>(*decoded);
}

step::StepPlan SamplePlan() {
  step::StepPlan plan{.epoch = 7, .step = 41, .starts = {}, .vision_released = {3, 9}, .spans = {}};
  step::SequenceStart start{.sequence = 1ull << 60, .slot = 5, .params = {}, .tokens = {1, 2, 151'935}, .prompt_tokens = 2};
  start.params = {.temperature = 0.7f, .top_k = 20, .top_p = 0.8f, .min_p = 0.05f, .repetition_penalty = 1.1f, .presence_penalty = -0.5f,
                  .frequency_penalty = 0.25f, .no_repeat_ngram_size = 3, .seed = ~0ull, .logprobs = 5, .min_tokens = 4, .token_limit = 151'669,
                  .stop_tokens = {151'643, 151'645}, .logit_bias = {{17, -100.0f}, {18, 2.5f}}};
  plan.starts.push_back(start);
  plan.spans.push_back({.sequence = 1ull << 60, .slot = 5, .begin = 32, .tokens = {10, 11, 12}, .positions = {{1, 2, 3}, {4, 5, 6}, {7, 7, 7}},
                        .blocks = {8, 0, 9}, .vision = {{.id = 3, .feature_begin = 4, .span_offset = 1, .count = 2}}, .sample = true,
                        .allowed = {0xffffffffu, 0u, 1u}});
  plan.spans.push_back({.sequence = 2, .slot = 0, .begin = 0, .tokens = {1}, .positions = {{0, 0, 0}}, .blocks = {4}});
  return plan;
}

TEST(Codec, APlanSurvivesWithEveryField) {
  const step::StepPlan in = SamplePlan();
  const step::StepPlan out = RoundTrip(in);
  EXPECT_EQ(out.epoch, 7u);
  EXPECT_EQ(out.step, 41u);
  EXPECT_EQ(out.vision_released, (std::vector<step::VisionId>{3, 9}));
  ASSERT_EQ(out.starts.size(), 1u);
  EXPECT_EQ(out.starts[0].sequence, 1ull << 60);
  EXPECT_EQ(out.starts[0].slot, 5);
  EXPECT_EQ(out.starts[0].tokens, (std::vector<int32_t>{1, 2, 151'935}));
  EXPECT_EQ(out.starts[0].prompt_tokens, 2);
  const step::SamplingParams& p = out.starts[0].params;
  EXPECT_EQ(p.temperature, 0.7f);
  EXPECT_EQ(p.top_k, 20);
  EXPECT_EQ(p.top_p, 0.8f);
  EXPECT_EQ(p.min_p, 0.05f);
  EXPECT_EQ(p.repetition_penalty, 1.1f);
  EXPECT_EQ(p.presence_penalty, -0.5f);
  EXPECT_EQ(p.frequency_penalty, 0.25f);
  EXPECT_EQ(p.no_repeat_ngram_size, 3);
  EXPECT_EQ(p.seed, ~0ull);
  EXPECT_EQ(p.logprobs, 5);
  EXPECT_EQ(p.min_tokens, 4);
  EXPECT_EQ(p.token_limit, 151'669);
  EXPECT_EQ(p.stop_tokens, (std::vector<int32_t>{151'643, 151'645}));
  EXPECT_EQ(p.logit_bias, (std::vector<std::pair<int32_t, float>>{{17, -100.0f}, {18, 2.5f}}));
  ASSERT_EQ(out.spans.size(), 2u);
  EXPECT_EQ(out.spans[0].sequence, 1ull << 60);
  EXPECT_EQ(out.spans[0].slot, 5);
  EXPECT_EQ(out.spans[0].begin, 32);
  EXPECT_EQ(out.spans[0].tokens, (std::vector<int32_t>{10, 11, 12}));
  EXPECT_EQ(out.spans[0].positions, (std::vector<step::Position>{{1, 2, 3}, {4, 5, 6}, {7, 7, 7}}));
  EXPECT_EQ(out.spans[0].blocks, (std::vector<step::BlockId>{8, 0, 9}));
  EXPECT_EQ(out.spans[0].vision, (std::vector<step::VisionSlice>{{3, 4, 1, 2}}));
  EXPECT_TRUE(out.spans[0].sample);
  EXPECT_EQ(out.spans[0].allowed, (std::vector<uint32_t>{0xffffffffu, 0u, 1u}));
  EXPECT_FALSE(out.spans[1].sample);
  EXPECT_TRUE(out.spans[1].allowed.empty());
}

TEST(Codec, AResultSurvives) {
  const step::StepResult out = RoundTrip(step::StepResult{
      .epoch = 3, .step = 9, .samples = {{.sequence = 8, .token = 77, .logprob = -0.125f, .top = {{77, -0.125f}, {5, -3.5f}}}, {.sequence = 9, .token = 0}}});
  EXPECT_EQ(out.epoch, 3u);
  EXPECT_EQ(out.step, 9u);
  ASSERT_EQ(out.samples.size(), 2u);
  EXPECT_EQ(out.samples[0].sequence, 8u);
  EXPECT_EQ(out.samples[0].token, 77);
  EXPECT_EQ(out.samples[0].logprob, -0.125f);
  ASSERT_EQ(out.samples[0].top.size(), 2u);
  EXPECT_EQ(out.samples[0].top[1].token, 5);
  EXPECT_EQ(out.samples[0].top[1].logprob, -3.5f);
  EXPECT_EQ(out.samples[1].token, 0);
}

TEST(Codec, TheHandshakeSurvives) {
  const Hello in{.pipeline_uid = "uid", .stage = 3, .stages = 4, .layer_begin = 71, .layer_end = 94, .config_hash = "abc",
                 .data_address = "[::1]:7001",
                 .capacity = {.block_tokens = 16, .block_count = 100, .max_slots = 8, .max_batch_tokens = 2048, .max_sequence_tokens = 4096, .weight_bytes = 1ll << 40},
                 .loading = false, .nonce = std::string(32, '\1'), .hmac = std::string(32, '\xff'), .epoch = 12, .pod_epoch = 11, .instance = "i"};
  const Hello out = RoundTrip(in);
  EXPECT_EQ(out.pipeline_uid, in.pipeline_uid);
  EXPECT_EQ(out.stage, 3);
  EXPECT_EQ(out.stages, 4);
  EXPECT_EQ(out.layer_begin, 71);
  EXPECT_EQ(out.layer_end, 94);
  EXPECT_EQ(out.config_hash, "abc");
  EXPECT_EQ(out.data_address, "[::1]:7001");
  EXPECT_EQ(out.capacity, in.capacity);
  EXPECT_EQ(out.nonce, in.nonce);
  EXPECT_EQ(out.hmac, in.hmac);
  EXPECT_EQ(out.epoch, 12u);
  EXPECT_EQ(out.pod_epoch, 11u);
  EXPECT_EQ(out.instance, "i");
  EXPECT_EQ(RoundTrip(Welcome{.epoch = 5, .hmac = "h"}).epoch, 5u);
  EXPECT_EQ(RoundTrip(Assemble{.epoch = 5, .next_address = "a:1", .block_count = 9}).next_address, "a:1");
  EXPECT_EQ(RoundTrip(Failure{.epoch = 5, .code = FailureCode::kStale, .reason = "r", .fatal = true, .hmac = "m"}).code, FailureCode::kStale);
  EXPECT_EQ(RoundTrip(Loading{.bytes_done = 5, .bytes_total = 6}).bytes_total, 6);
  EXPECT_EQ(RoundTrip(Loaded{in.capacity}).capacity, in.capacity);
  EXPECT_EQ(RoundTrip(Heartbeat{.sent_micros = 5, .steps_done = 6}).steps_done, 6u);
}

// What a hostile or broken peer could send: one wrong field at a time, made with Protobuf directly.
std::string RefusalOf(const std::function<void(wire::StepPlan&)>& spoil) {
  wire::ControlMessage message;
  EXPECT_TRUE(message.ParseFromString(EncodeMessage(Message(SamplePlan()))));
  spoil(*message.mutable_plan());
  auto decoded = DecodeMessage(message.SerializeAsString());
  return decoded.ok() ? "accepted" : decoded.status().message();
}

TEST(Codec, WhatIsOutOfRangeIsRefusedByName) {
  EXPECT_EQ(RefusalOf([](wire::StepPlan&) {}), "accepted");
  EXPECT_EQ(RefusalOf([](wire::StepPlan& p) { p.mutable_spans(0)->add_positions(1); }), "plan.spans.positions: not three per token");
  EXPECT_EQ(RefusalOf([](wire::StepPlan& p) { p.mutable_starts(0)->mutable_params()->set_temperature(std::nanf("")); }), "params.temperature: out of range");
  EXPECT_EQ(RefusalOf([](wire::StepPlan& p) { p.mutable_starts(0)->mutable_params()->set_top_p(1.5f); }), "params.top_p: out of range");
  EXPECT_EQ(RefusalOf([](wire::StepPlan& p) { p.mutable_starts(0)->mutable_params()->set_top_k(-1); }), "params.top_k: negative");
  EXPECT_EQ(RefusalOf([](wire::StepPlan& p) { p.mutable_starts(0)->mutable_params()->set_logprobs(-2); }), "params.logprobs: out of range");
  EXPECT_EQ(RefusalOf([](wire::StepPlan& p) { p.mutable_starts(0)->mutable_params()->mutable_logit_bias(0)->set_bias(std::numeric_limits<float>::infinity()); }),
            "params.logit_bias: not finite");
}

TEST(Codec, GarbageAndUnknownMessagesAreRefused) {
  EXPECT_EQ(DecodeMessage("\xff\xff\xff").status().code(), StatusCode::kDataLoss);
  EXPECT_EQ(DecodeMessage("").status().code(), StatusCode::kDataLoss);  // no body
}

step::VisionInput Image(int32_t t, int32_t h, int32_t w) {
  step::VisionInput input{.id = 77, .grid = {t, h, w}, .patches = {}};
  input.patches.resize(static_cast<size_t>(input.patch_count()) * 1536);
  for (size_t i = 0; i < input.patches.size(); ++i) input.patches[i] = static_cast<uint8_t>(i * 31 + i / 1536);
  return input;
}

VisionChunk Piece(const step::VisionInput& input, size_t index) {
  FrameParser parser;
  const std::string frame = EncodeVisionChunk(input, index).value();
  parser.Feed(std::as_bytes(std::span(frame.data(), frame.size())));
  return std::get<VisionChunk>(*DecodeMessage(**parser.Next()));
}

TEST(Codec, PixelsTravelInPiecesAndArriveWhole) {
  const step::VisionInput image = Image(2, 60, 62);  // 11.4 MB: three pieces
  VisionAssembler assembler(1ull << 30);
  for (size_t index = 0; index < 3; ++index) {
    ASSERT_TRUE(EncodeVisionChunk(image, index).has_value());
    auto done = assembler.Add(Piece(image, index));
    ASSERT_TRUE(done.ok()) << done.status().ToString();
    ASSERT_EQ(done->has_value(), index == 2);
    if (*done) {
      EXPECT_EQ((*done)->id, image.id);
      EXPECT_EQ((*done)->grid, image.grid);
      EXPECT_EQ((*done)->patches, image.patches);
    }
  }
  EXPECT_FALSE(EncodeVisionChunk(image, 3).has_value());
  EXPECT_FALSE(assembler.in_progress());
}

TEST(Codec, PiecesThatDoNotFitAreRefused) {
  const step::VisionInput image = Image(2, 60, 62);
  const auto refusal = [&](size_t first_piece, const std::function<void(VisionChunk&)>& spoil, uint64_t bytes_max = 1ull << 30) {
    VisionAssembler assembler(bytes_max);
    if (first_piece > 0) {
      EXPECT_TRUE(assembler.Add(Piece(image, 0)).ok());
    }
    VisionChunk chunk = Piece(image, first_piece);
    spoil(chunk);
    auto done = assembler.Add(std::move(chunk));
    return done.ok() ? std::string("accepted") : done.status().message();
  };
  EXPECT_EQ(refusal(0, [](VisionChunk&) {}), "accepted");
  EXPECT_EQ(refusal(1, [](VisionChunk&) {}), "accepted");
  EXPECT_EQ(refusal(0, [](VisionChunk& c) { c.offset = 1; }), "vision.offset: the first piece must be at 0");
  EXPECT_EQ(refusal(0, [](VisionChunk& c) { c.grid[1] = 61; }), "vision.grid: h and w must be even");
  EXPECT_EQ(refusal(0, [](VisionChunk& c) { c.grid = {1 << 20, 1 << 20, 1 << 20}; }), "vision.grid: larger than an input may be");
  EXPECT_EQ(refusal(0, [](VisionChunk& c) { c.grid[0] = -2; }), "vision.grid: out of range");
  EXPECT_EQ(refusal(0, [](VisionChunk& c) { c.total_bytes += 1; }), "vision.total_bytes: does not fit the grid");
  EXPECT_EQ(refusal(0, [](VisionChunk&) {}, 1'000'000), "vision.grid: larger than an input may be");
  EXPECT_EQ(refusal(1, [](VisionChunk& c) { c.id = 5; }), "vision: a piece of another input in between");
  EXPECT_EQ(refusal(1, [](VisionChunk& c) { c.offset = 0; }), "vision.offset: out of order");
}

}  // namespace
}  // namespace qwen::transport
