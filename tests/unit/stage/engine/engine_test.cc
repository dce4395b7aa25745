// Goal: the edges of the engine that traces do not show: refusals, calls out of callbacks, results that make no sense,
// the bound on one plan's histories, and Submit and Cancel from many threads (run under ThreadSanitizer by
// -DSANITIZE=thread).
#include "stage/engine/engine.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "tests/unit/stage/engine/fake_stages.h"

namespace qwen::engine {
namespace {

using testing::AloneTokens;
using testing::FakeStages;
using testing::Prompt;

constexpr int32_t kVocab = 40;
const step::PlanLimits kLimits{.block_tokens = 4,
                               .block_count = 16,
                               .max_slots = 4,
                               .max_batch_tokens = 16,
                               .max_sequence_tokens = 64,
                               .vocab_size = kVocab};

struct EngineTest : ::testing::Test {
  FakeStages stages{kVocab, true};
  std::vector<RequestEvent> events;

  Request Make(step::SequenceId id, int32_t prompt, int32_t max_tokens) {
    Prompt p{.id = id, .tokens = std::vector<int32_t>(static_cast<size_t>(prompt), 5), .max_tokens = max_tokens};
    stages.Register(p);
    Request request = p.MakeRequest(kVocab);
    request.on_event = [this](RequestEvent event) { events.push_back(std::move(event)); };
    return request;
  }
  static void StepUntilIdle(Engine& engine) {
    for (int i = 0; i < 200 && !engine.idle(); ++i) engine.Step(i, std::chrono::microseconds(0));
    ASSERT_TRUE(engine.idle());
  }
  int Finishes(FinishReason reason) const {
    return static_cast<int>(std::count_if(events.begin(), events.end(), [&](const RequestEvent& e) {
      const auto* finish = std::get_if<FinishEvent>(&e);
      return finish != nullptr && finish->reason == reason;
    }));
  }
};

TEST_F(EngineTest, RefusesWhatIsFullDrainingTwiceOrTooLong) {
  Engine engine({.queue_capacity = 2}, stages);
  EXPECT_EQ(engine.stats().group_lost_reason, "waiting for the first group");
  EXPECT_TRUE(engine.Submit(Make(1, 3, 2)).ok());
  EXPECT_EQ(engine.Submit(Make(1, 3, 2)).code(), StatusCode::kInvalidArgument);
  EXPECT_TRUE(engine.Submit(Make(2, 3, 2)).ok());
  EXPECT_EQ(engine.Submit(Make(3, 3, 2)).code(), StatusCode::kResourceExhausted);
  engine.Step(0, std::chrono::microseconds(0));
  EXPECT_EQ(engine.Submit(Make(3, 3, 2)).code(), StatusCode::kResourceExhausted)
      << "taken from the inbox, but still waiting";
  EXPECT_EQ(engine.stats().waiting, 2);
  stages.Assemble(1, kLimits, 1);
  engine.Step(1, std::chrono::microseconds(0));  // hears of the group
  engine.Step(2, std::chrono::microseconds(0));  // admits both
  EXPECT_TRUE(engine.stats().group_ready);
  EXPECT_EQ(engine.Submit(Make(3, 60, 5)).code(), StatusCode::kInvalidArgument);
  EXPECT_TRUE(engine.Submit(Make(4, 3, 2)).ok());
  engine.Drain();
  EXPECT_EQ(engine.Submit(Make(5, 3, 2)).code(), StatusCode::kFailedPrecondition);
  StepUntilIdle(engine);
  EXPECT_EQ(Finishes(FinishReason::kLength), 3) << "what was accepted is finished";
  EXPECT_EQ(stages.failure(), "");
}

TEST_F(EngineTest, FinishesWithAnErrorWhatDoesNotFitTheGroupThatComes) {
  Engine engine({}, stages);
  EXPECT_TRUE(engine.Submit(Make(1, 60, 5)).ok()) << "no group, no limits yet";
  stages.Assemble(1, kLimits, 1);
  StepUntilIdle(engine);
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(std::get<FinishEvent>(events[0]).reason, FinishReason::kError);
  EXPECT_NE(std::get<FinishEvent>(events[0]).error.find("limit is 64"), std::string::npos);
}

TEST_F(EngineTest, TakesCancelAndSubmitOutOfACallback) {
  Engine engine({}, stages);
  stages.Assemble(1, kLimits, 2);
  Request first = Make(1, 5, 20);
  first.on_event = [&](RequestEvent event) {
    const bool token = std::holds_alternative<TokenEvent>(event);
    events.push_back(std::move(event));
    if (!token) return;
    engine.Cancel(1);
    EXPECT_TRUE(engine.Submit(Make(2, 5, 1)).ok());
  };
  ASSERT_TRUE(engine.Submit(std::move(first)).ok());
  StepUntilIdle(engine);
  ASSERT_EQ(events.size(), 4u) << "token, finish of 1; token, finish of 2";
  EXPECT_EQ(Finishes(FinishReason::kCancelled), 1);
  EXPECT_EQ(Finishes(FinishReason::kLength), 1);
}

TEST_F(EngineTest, IgnoresACancelOfWhatIsUnknownOrFinished) {
  Engine engine({}, stages);
  stages.Assemble(1, kLimits, 1);
  engine.Cancel(1);
  ASSERT_TRUE(engine.Submit(Make(1, 3, 1)).ok());
  StepUntilIdle(engine);
  engine.Cancel(1);
  engine.Step(0, std::chrono::microseconds(0));
  EXPECT_EQ(events.size(), 2u);
  EXPECT_EQ(Finishes(FinishReason::kLength), 1);
}

TEST_F(EngineTest, CountsTokensAndWhatThePrefixCacheSaved) {
  Engine engine({}, stages);
  stages.Assemble(1, kLimits, 1);
  for (const step::SequenceId id : {1, 2}) {
    ASSERT_TRUE(engine.Submit(Make(id, 10, 3)).ok());
    StepUntilIdle(engine);
  }
  const EngineStats stats = engine.stats();
  EXPECT_EQ(stats.prompt_tokens_total, 20u);
  EXPECT_EQ(stats.cached_prompt_tokens_total, 8u);
  EXPECT_EQ(stats.generated_tokens_total, 6u);
  EXPECT_EQ(stats.plans_total, 6u);
  EXPECT_EQ(stats.kv_blocks_total, 16);
  EXPECT_EQ(stats.epoch, 1u);
  EXPECT_EQ(std::get<FinishEvent>(events.back()).cached_prompt_tokens, 8);
}

TEST_F(EngineTest, KeepsTheGroupWhenNewsOfAnOlderOneComesLate) {
  struct Late : FakeStages {
    using FakeStages::FakeStages;
    std::deque<step::ExecutorEvent> late;
    step::ExecutorEvent Poll(std::chrono::microseconds timeout) override {
      if (late.empty()) return FakeStages::Poll(timeout);
      step::ExecutorEvent event = std::move(late.front());
      late.pop_front();
      return event;
    }
  } old_news(kVocab, true);
  Engine engine({}, old_news);
  old_news.Assemble(5, kLimits, 1);
  engine.Step(0, std::chrono::microseconds(0));
  old_news.late = {step::GroupReady{.epoch = 4, .limits = kLimits, .stages = 3},
                   step::GroupLost{.epoch = 4, .reason = "old"}};
  engine.Step(1, std::chrono::microseconds(0));
  engine.Step(2, std::chrono::microseconds(0));
  EXPECT_EQ(engine.stats().epoch, 5u);
  EXPECT_EQ(engine.stats().stages, 1);
  EXPECT_TRUE(engine.stats().group_ready);
}

TEST_F(EngineTest, AnswersRequestsFromManyThreadsAsIfEachWereAlone) {
  constexpr int kThreads = 3, kEach = 40;
  Engine engine({.queue_capacity = 16}, stages);
  stages.Assemble(1, kLimits, 3);
  std::atomic<bool> stop = false;
  std::thread stepper([&] {
    for (int64_t now = 0; !stop; ++now) engine.Step(now, std::chrono::milliseconds(1));
  });
  std::atomic<int> wrong = 0, cancelled = 0, finished = 0;
  std::vector<std::thread> clients;
  for (int t = 0; t < kThreads; ++t) {
    clients.emplace_back([&, t] {
      for (int i = 0; i < kEach; ++i) {
        Prompt prompt{.id = static_cast<step::SequenceId>(t * kEach + i + 1),
                      .tokens = {1, 2, 3, 4, i % 5},
                      .seed = static_cast<uint64_t>(i),
                      .max_tokens = 1 + i % 9};
        stages.Register(prompt);
        auto heard = std::make_shared<std::vector<int32_t>>();
        const auto alone = AloneTokens(prompt, kVocab).tokens;
        while (true) {
          Request request = prompt.MakeRequest(kVocab);
          request.on_event = [&, heard, alone](RequestEvent event) {
            if (auto* token = std::get_if<TokenEvent>(&event)) return heard->push_back(token->token);
            const bool early = std::get<FinishEvent>(event).reason == FinishReason::kCancelled;
            cancelled += early;
            const bool prefix =
                heard->size() <= alone.size() && std::equal(heard->begin(), heard->end(), alone.begin());
            wrong += !prefix || (!early && *heard != alone);
            ++finished;
          };
          const Status status = engine.Submit(std::move(request));
          if (status.ok()) break;
          if (status.code() != StatusCode::kResourceExhausted) ++wrong;
          (void)engine.stats();
          std::this_thread::yield();
        }
        if (i % 4 == 0) engine.Cancel(prompt.id);
      }
    });
  }
  for (std::thread& client : clients) client.join();
  for (int i = 0; i < 5000 && !engine.idle(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  stop = true;
  stepper.join();
  EXPECT_EQ(finished, kThreads * kEach);
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(stages.failure(), "");
  EXPECT_EQ(engine.stats().kv_blocks_used, 0);
}

// ---- The scheduler by itself ----

Request Text(step::SequenceId id, int32_t prompt, int32_t max_tokens) {
  Request request{.id = id,
                  .tokens = std::vector<int32_t>(static_cast<size_t>(prompt), static_cast<int32_t>(id)),
                  .max_tokens = max_tokens};
  for (int32_t i = 0; i < prompt; ++i) request.positions.push_back({i, i, i});
  return request;
}

TEST(Scheduler, FinishesASequenceWhoseTokenIsMissingOrNonsense) {
  Scheduler scheduler({});
  scheduler.StartOver(1, kLimits, 1);
  for (step::SequenceId id = 1; id <= 4; ++id) scheduler.Add(Text(id, 3, 5), 0);
  ASSERT_TRUE(scheduler.Schedule(0));
  EXPECT_FALSE(scheduler.Commit({.epoch = 2, .step = 0})) << "another epoch";
  EXPECT_FALSE(scheduler.Commit({.epoch = 1, .step = 1})) << "no such plan";
  EXPECT_TRUE(scheduler.TakeEvents().empty());
  ASSERT_TRUE(scheduler.Commit(
      {.epoch = 1,
       .step = 0,
       .samples = {{.sequence = 1, .token = 7}, {.sequence = 9, .token = 7}, {.sequence = 3, .token = kVocab}}}));
  const auto events = scheduler.TakeEvents();
  ASSERT_EQ(events.size(), 4u);
  EXPECT_EQ(std::get<TokenEvent>(events[0].event).token, 7);
  for (size_t i = 1; i < 4; ++i) {
    EXPECT_EQ(events[i].sequence, i + 1);
    EXPECT_EQ(std::get<FinishEvent>(events[i].event).reason, FinishReason::kError);
  }
  EXPECT_EQ(scheduler.running_count(), 1);
  EXPECT_EQ(scheduler.blocks_used(), 1);
}

TEST(Scheduler, SplitsLongHistoriesOverPlans) {
  // Four sequences of 400,000 tokens whose prefixes are cached could all sample in one plan; their histories, 1.6
  // million tokens, must not travel in one.
  constexpr int32_t kLong = 400'000, kBlock = 1000;
  Scheduler scheduler({});
  scheduler.StartOver(1,
                      {.block_tokens = kBlock,
                       .block_count = 2000,
                       .max_slots = 4,
                       .max_batch_tokens = kLong + 10,
                       .max_sequence_tokens = 1'000'000,
                       .vocab_size = kVocab},
                      1);
  for (step::SequenceId id = 1; id <= 4; ++id) {
    Request request = Text(id, kLong, 5);
    request.tokens.assign(kLong, 1);
    scheduler.Add(std::move(request), 0);
  }
  std::vector<size_t> starts;
  for (int i = 0; i < 3; ++i) {
    const auto step = scheduler.Schedule(0);
    ASSERT_TRUE(step.has_value());
    starts.push_back(step->plan.starts.size());
    step::StepResult result{.epoch = 1, .step = step->plan.step, .samples = {}};
    for (const step::SequenceSpan& span : step->plan.spans) {
      if (span.sample) result.samples.push_back({.sequence = span.sequence, .token = 7});
    }
    ASSERT_TRUE(scheduler.Commit(result));
  }
  EXPECT_EQ(starts, (std::vector<size_t>{1, 2, 1})) << "one computes the prefix, then the others follow, two at a time";
}

TEST(Scheduler, GivesADecodingSequenceItsNextBlockAheadIfThatTakesItFromNobody) {
  const auto blocks = [](int32_t block_count) {
    Scheduler scheduler({.block_ahead = true});
    step::PlanLimits limits = kLimits;
    limits.block_count = block_count;
    scheduler.StartOver(1, limits, 1);
    scheduler.Add(Text(1, 6, 8), 0);
    std::vector<size_t> sizes;  // of the block table in each plan: 6, 7, 8, 9 tokens, blocks of 4
    for (uint64_t step = 0; step < 4; ++step) {
      const auto next = scheduler.Schedule(0);
      if (!next) break;
      sizes.push_back(next->plan.spans.at(0).blocks.size());
      EXPECT_TRUE(scheduler.Commit({.epoch = 1, .step = step, .samples = {{.sequence = 1, .token = 7}}}));
    }
    return sizes;
  };
  EXPECT_EQ(blocks(16), (std::vector<size_t>{2, 2, 3, 3})) << "the plan of token 8 already names the block of token 9";
  EXPECT_EQ(blocks(4), (std::vector<size_t>{2, 2, 3, 3}));
}

TEST(Scheduler, CutsPromptsSoThatAllStagesHaveWork) {
  // The prompt tokens of the plans of one prompt, as far as they go before a result must come.
  const auto chunks = [](int32_t tokens, int32_t stages, int32_t max_batch_tokens) {
    Scheduler scheduler({});
    scheduler.StartOver(1,
                        {.block_tokens = 16,
                         .block_count = 8192,
                         .max_slots = 4,
                         .max_batch_tokens = max_batch_tokens,
                         .max_sequence_tokens = 131'072,
                         .vocab_size = kVocab},
                        stages);
    scheduler.Add(Text(1, tokens, 5), 0);
    std::vector<size_t> sizes;
    while (const auto step = scheduler.Schedule(0)) sizes.push_back(step->plan.spans.at(0).tokens.size());
    return sizes;
  };
  EXPECT_EQ(chunks(8192, 1, 8192), (std::vector<size_t>{8192}));
  EXPECT_EQ(chunks(8192, 4, 8192), (std::vector<size_t>{2048, 2048, 2048, 2048}));
  EXPECT_EQ(chunks(1500, 4, 8192), (std::vector<size_t>{1500})) << "a short prompt is not cut";
  EXPECT_EQ(chunks(8192, 2, 1024), (std::vector<size_t>{1024, 1024})) << "the stages' limit holds";
  EXPECT_EQ(chunks(40'000, 2, 8192), (std::vector<size_t>{8192, 7952})) << "what is left is cut anew each time";
}

TEST(Scheduler, TimesTheQueueAndAStepFromItsScheduleToTheNextAfterItsCommit) {
  Scheduler scheduler({});
  scheduler.StartOver(1, kLimits, 1);
  scheduler.Add(Text(1, 3, 5), 100);
  EXPECT_EQ(scheduler.waiting_since(), 100);
  ASSERT_TRUE(scheduler.Schedule(150));
  EXPECT_FALSE(scheduler.waiting_since().has_value());
  ASSERT_TRUE(scheduler.Commit({.epoch = 1, .step = 0, .samples = {{.sequence = 1, .token = 7}}}));
  ASSERT_TRUE(scheduler.Schedule(190));
  EXPECT_EQ(scheduler.counters().last_step_micros, 40);
  scheduler.Cancel(1);
  EXPECT_EQ(std::get<FinishEvent>(scheduler.TakeEvents().back().event).queued_micros, 50);
}

}  // namespace
}  // namespace qwen::engine
