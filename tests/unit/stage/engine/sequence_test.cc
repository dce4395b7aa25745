// Goal: a request that the stages could not run is refused by name before it is queued; two blocks have equal content
// iff nothing that their KV depends on differs.
#include "stage/engine/sequence.h"

#include <gtest/gtest.h>

#include <functional>

namespace qwen::engine {
namespace {

// 8 tokens; tokens 2..5 are a picture of 4 visual tokens.
Request Valid() {
  Request request{.id = 1, .tokens = {1, 2, 9, 9, 9, 9, 3, 4}, .position_delta = -2, .max_tokens = 4};
  request.positions = {{0, 0, 0}, {1, 1, 1}, {2, 2, 2}, {2, 2, 3}, {2, 3, 2}, {2, 3, 3}, {4, 4, 4}, {5, 5, 5}};
  auto input = std::make_shared<step::VisionInput>();
  input->id = 7;
  input->grid = {1, 4, 4};
  request.vision = {{.input = input, .runs = {{2, 4}}, .content_hash = "cat"}};
  request.on_event = [](RequestEvent) {};
  return request;
}

TEST(ValidateRequest, AcceptsAValidRequest) {
  EXPECT_TRUE(ValidateRequest(Valid()).ok()) << ValidateRequest(Valid()).ToString();
}

TEST(ValidateRequest, NamesTheFieldThatIsWrong) {
  const struct {
    const char* field;
    std::function<void(Request&)> spoil;
  } cases[] = {
      {"tokens: ", [](Request& r) { r.tokens.clear(); }},
      {"max_tokens: 0", [](Request& r) { r.max_tokens = 0; }},
      {"max_tokens: prompt and", [](Request& r) { r.max_tokens = INT32_MAX; }},
      {"positions: not as many", [](Request& r) { r.positions.pop_back(); }},
      {"positions: negative", [](Request& r) { r.positions[3].w = -1; }},
      {"position_delta", [](Request& r) { r.position_delta = -9; }},
      {"on_event", [](Request& r) { r.on_event = nullptr; }},
      {"vision[0].input: null", [](Request& r) { r.vision[0].input = nullptr; }},
      {"vision[1].input.id", [](Request& r) { r.vision.push_back(r.vision[0]); }},
      {"vision[0].runs: outside",
       [](Request& r) {
         r.vision[0].runs = {{5, 4}};
       }},
      {"vision[0].runs: outside",
       [](Request& r) {
         r.vision[0].runs = {{2, -4}};
       }},
      {"vision[0].runs: 3 placeholder",
       [](Request& r) {
         r.vision[0].runs = {{2, 3}};
       }},
      {"vision[0].runs: 0 placeholder", [](Request& r) { r.vision[0].runs = {}; }},
      {"vision[0].runs: not in order",
       [](Request& r) {
         r.vision[0].runs = {{4, 2}, {2, 2}};
       }},
      {"vision: runs overlap",
       [](Request& r) {
         r.vision[0].runs = {{2, 2}, {3, 2}};
       }},
  };
  for (const auto& c : cases) {
    Request request = Valid();
    c.spoil(request);
    const Status status = ValidateRequest(request);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << c.field;
    EXPECT_NE(status.message().find(c.field), std::string::npos) << status.message() << " does not say " << c.field;
  }
}

TEST(ValidateRequestLimits, StatesTheLimitAndWhatWasAsked) {
  const step::PlanLimits limits{.block_tokens = 4, .block_count = 3, .max_sequence_tokens = 12, .vocab_size = 10};
  Request request = Valid();
  EXPECT_TRUE(ValidateRequestLimits(request, 8, limits).ok());
  request.max_tokens = 5;
  EXPECT_EQ(ValidateRequestLimits(request, 8, limits).message(),
            "max_tokens: 8 prompt + 5 max_tokens = 13 tokens asked, the model's limit is 12");
  step::PlanLimits small = limits;
  small.max_sequence_tokens = 100;
  EXPECT_EQ(ValidateRequestLimits(request, 8, small).message(),
            "max_tokens: 8 prompt + 5 max_tokens = 13 tokens asked, the KV cache holds 12");
  request = Valid();
  request.tokens[0] = 10;
  EXPECT_EQ(ValidateRequestLimits(request, 8, limits).message(), "tokens: id 10 is not in the vocabulary of 10");
  request = Valid();
  request.params.stop_tokens = {-1};
  EXPECT_EQ(ValidateRequestLimits(request, 8, limits).code(), StatusCode::kInvalidArgument);
  request = Valid();
  request.params.logit_bias = {{11, 1.0f}};
  EXPECT_EQ(ValidateRequestLimits(request, 8, limits).code(), StatusCode::kInvalidArgument);
}

TEST(Sequence, ContinuesThePositionsOfThePromptWithTheDelta) {
  Sequence sequence(Valid(), 0, 0);
  sequence.request.tokens.push_back(5);
  EXPECT_EQ(sequence.PositionOf(4), (step::Position{2, 3, 2}));
  EXPECT_EQ(sequence.PositionOf(8), (step::Position{6, 6, 6}));
}

TEST(Sequence, CutsRunsAtBothEnds) {
  Request request = Valid();
  request.vision[0].runs = {{1, 1}, {3, 3}};  // a video: rows 0 | 1..3
  const Sequence sequence(std::move(request), 0, 0);
  const auto cut = sequence.RunsIn(4, 8);
  ASSERT_EQ(cut.size(), 1u);
  EXPECT_EQ(cut[0].first, 4);
  EXPECT_EQ(cut[0].count, 2);
  EXPECT_EQ(cut[0].feature_begin, 2);
  EXPECT_EQ(sequence.RunsIn(0, 4).size(), 2u);
  EXPECT_TRUE(sequence.RunsIn(6, 8).empty());
  EXPECT_EQ(sequence.VisionEnd(0), 6);
}

TEST(BlockContent, IsEqualIffNothingThatItsKvDependsOnDiffers) {
  const std::string content = Sequence(Valid(), 0, 0).BlockContent(1, 4);
  const auto changed = [](const std::function<void(Request&)>& change) {
    Request request = Valid();
    change(request);
    return Sequence(std::move(request), 0, 0).BlockContent(1, 4);
  };
  EXPECT_EQ(changed([](Request& r) {
              auto other = std::make_shared<step::VisionInput>(*r.vision[0].input);
              other->id = 8;  // the same picture in another request
              r.vision[0].input = other;
              r.id = 2;
              r.tokens[0] = 5;  // before the block
              r.position_delta = 3;
            }),
            content);
  EXPECT_NE(changed([](Request& r) { r.tokens[6] = 5; }), content);
  EXPECT_NE(changed([](Request& r) { r.positions[7].h = 6; }), content);
  EXPECT_NE(changed([](Request& r) { r.vision[0].content_hash = "dog"; }), content);
  EXPECT_NE(changed([](Request& r) { r.vision.clear(); }), content);
  EXPECT_NE(changed([](Request& r) {
              r.vision[0].runs = {{0, 1}, {2, 3}};
            }),
            content)
      << "other rows at the same tokens";
}

TEST(BlockContent, TellsTheRowsOfOnePictureFromThoseOfAnEqualOne) {
  // Block 1 shows rows 4..7 of the first picture, or rows 0..3 of the second, which is the same picture.
  const auto content = [](std::vector<std::pair<int32_t, int32_t>> first,
                          std::vector<std::pair<int32_t, int32_t>> second) {
    Request request{
        .id = 1, .tokens = std::vector<int32_t>(16, 9), .positions = std::vector<step::Position>(16), .max_tokens = 1};
    auto input = std::make_shared<step::VisionInput>();
    input->grid = {1, 4, 8};
    request.vision = {{.input = input, .runs = std::move(first), .content_hash = "cat"},
                      {.input = input, .runs = std::move(second), .content_hash = "cat"}};
    return Sequence(std::move(request), 0, 0).BlockContent(1, 4);
  };
  EXPECT_NE(content({{0, 8}}, {{8, 8}}), content({{0, 4}, {8, 4}}, {{4, 4}, {12, 4}}));
}

TEST(BlockContent, OfAPictureWithoutAContentHashIsLikeNoOther) {
  const auto content = [](step::VisionId id) {
    Request request = Valid();
    auto input = std::make_shared<step::VisionInput>(*request.vision[0].input);
    input->id = id;
    request.vision[0] = {.input = input, .runs = {{2, 4}}, .content_hash = ""};
    return Sequence(std::move(request), 0, 0).BlockContent(0, 4);
  };
  EXPECT_EQ(content(7), content(7));
  EXPECT_NE(content(7), content(8));
}

}  // namespace
}  // namespace qwen::engine
