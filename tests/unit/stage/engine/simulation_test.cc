// Goal: whatever the schedule, each request gets exactly the tokens that it gets alone. Method: thousands of small
// random worlds (limits, prompts with shared beginnings and pictures, arrivals, cancels, lost and new groups) drive
// Engine against FakeStages, which checks every plan and every KV read; the seed of a failing world is printed.
// QP_SIM_SEEDS=n runs n worlds, QP_SIM_FIRST=s starts at seed s.
#include <gtest/gtest.h>

#include <cstdlib>
#include <random>

#include "stage/base/log.h"
#include "stage/engine/engine.h"
#include "tests/unit/stage/engine/fake_stages.h"

namespace qwen::engine {
namespace {

using testing::Alone;
using testing::AloneTokens;
using testing::FakeStages;
using testing::Prompt;

constexpr int32_t kVocab = 40;
constexpr int32_t kPlaceholder = 39;

int32_t EnvironmentOr(const char* name, int32_t otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr ? std::atoi(value) : otherwise;
}

struct Heard {
  Prompt prompt;
  std::vector<int32_t> tokens;
  std::vector<FinishEvent> finishes;
  bool cancelled = false;
};

struct Totals {
  int64_t plans = 0, spans = 0, samples = 0, cut_images = 0, preemptions = 0, cached_tokens = 0, epochs = 0,
          cancelled = 0, errors = 0, full_pipelines = 0;
};

class World {
 public:
  World(uint64_t seed, Totals& totals)
      : random_(seed), totals_(totals), stages_(kVocab, false), engine_(MakeOptions(), stages_) {}

  // The first thing that went wrong; empty when nothing did.
  std::string Run() {
    wanted_ = Pick(1, 24);
    max_cancels_ = Chance(2) ? Pick(0, wanted_) : 0;
    faults_ = Chance(3) ? Pick(1, 4) : 0;
    const bool late_group = Chance(8);
    if (!late_group) NewGroup();
    const int32_t patience = 4000 + wanted_ * 400;
    for (int32_t i = 0; i < patience; ++i) {
      if (next_ < wanted_ && Chance(3)) SubmitOne();
      if (max_cancels_ > 0 && !heard_.empty() && Chance(12)) CancelOne();
      if (late_group && epoch_ == 0 && Chance(10)) NewGroup();
      if (faults_ > 0 && epoch_ > 0 && Chance(25)) Fault();
      for (int32_t n = Pick(0, 3); n > 0; --n) stages_.ExecuteNext();
      engine_.Step(i * 1000, std::chrono::microseconds(0));
      if (const std::string wrong = CheckStep(); !wrong.empty()) return "step " + std::to_string(i) + ": " + wrong;
      if (next_ == wanted_ && engine_.idle() && epoch_ > 0 && faults_ == 0 && !down_) return Finished();
      if (next_ == wanted_ && engine_.idle()) faults_ = 0;
      if (down_ && Chance(6)) NewGroup();
    }
    return "not finished after " + std::to_string(patience) + " steps: starvation or deadlock";
  }

 private:
  int32_t Pick(int32_t low, int32_t high) {
    return low + static_cast<int32_t>(random_() % static_cast<uint64_t>(high - low + 1));
  }
  bool Chance(int32_t one_in) { return Pick(1, one_in) == 1; }

  Engine::Options MakeOptions() {
    return {.queue_capacity = Pick(1, 12), .max_batch_tokens = Chance(4) ? Pick(1, 20) : 0, .prefix_cache = !Chance(4), .block_ahead = Chance(2)};
  }

  void NewGroup() {
    if (epoch_ == 0 || Chance(3)) {  // the first, or one of another size
      limits_.block_tokens = Pick(1, 6);
      limits_.max_sequence_tokens = Pick(20, 60);
      limits_.block_count = Pick(5, 20) * 4 / limits_.block_tokens + 1;
      limits_.max_slots = Pick(1, 8);
      limits_.max_batch_tokens = Pick(1, 24);
      limits_.vocab_size = kVocab;
      stage_count_ = Pick(1, 4);
    }
    ++totals_.epochs;
    down_ = false;
    stages_.Assemble(++epoch_, limits_, stage_count_);
  }
  void Fault() {
    --faults_;
    stages_.Lose(Chance(3));
    down_ = true;
    if (Chance(3)) NewGroup();  // so fast that the engine may hear of both at once
  }

  // Prompts begin like one of three texts, and show some of four pictures: the prefix cache gets hits, also inside
  // pictures.
  Prompt MakePrompt() {
    Prompt prompt{.id = static_cast<step::SequenceId>(next_ + 1),
                  .seed = static_cast<uint64_t>(Chance(2) ? 7 : Pick(0, 1000))};
    std::mt19937_64 text(static_cast<uint64_t>(Pick(1, 3)));
    const int32_t alike = Pick(0, 30), length = Pick(1, 34);
    int32_t images = Chance(3) ? Pick(1, 3) : 0;
    while (static_cast<int32_t>(prompt.tokens.size()) < length) {
      const auto at = static_cast<int32_t>(prompt.tokens.size());
      const uint64_t shared = text();
      if (images == 0 || (shared >> 8) % 4 != 0) {
        prompt.tokens.push_back(at < alike ? static_cast<int32_t>(shared % 30) : Pick(0, 30));
        continue;
      }
      --images;
      const auto count = static_cast<int32_t>(1 + (shared >> 16) % 6);
      Prompt::Image image{.id = ++vision_, .picture = static_cast<uint8_t>(Pick(0, 3)), .runs = {{at, count}}};
      prompt.tokens.insert(prompt.tokens.end(), static_cast<size_t>(count), kPlaceholder);
      if (shared >> 32 & 1) {  // a video: a text token between its frame pairs
        image.runs.push_back({at + count + 1, 2});
        prompt.tokens.insert(prompt.tokens.end(), {1, kPlaceholder, kPlaceholder});
      }
      prompt.images.push_back(image);
      prompt.position_delta -= count / 2;
    }
    if (!prompt.images
             .empty()) {  // as in M-RoPE: a picture's positions differ per axis and advance less than its tokens
      for (int32_t i = 0; i < static_cast<int32_t>(prompt.tokens.size()); ++i) {
        const bool visual = prompt.FeatureAt(i) != 0;
        prompt.positions.push_back(visual ? step::Position{i / 2, i, i / 3} : step::Position{i, i, i});
      }
    }
    prompt.max_tokens = Pick(1, 14);
    if (Chance(3)) prompt.stop_tokens = {Pick(0, 30), Pick(0, 30)};
    prompt.ignore_stop_tokens = Chance(5);
    prompt.min_tokens = Chance(4) ? Pick(0, 5) : 0;
    if (Chance(5)) prompt.grammar_length = Pick(1, 16);
    return prompt;
  }

  void SubmitOne() {
    if (!pending_) pending_ = MakePrompt();
    stages_.Register(*pending_);
    Request request = pending_->MakeRequest(kVocab);
    const step::SequenceId id = request.id;
    request.on_event = [this, id](RequestEvent event) {
      Heard& heard = heard_.at(id);
      if (auto* token = std::get_if<TokenEvent>(&event)) {
        if (!heard.finishes.empty()) wrong_ = "a token after the finish";
        heard.tokens.push_back(token->token);
      } else {
        heard.finishes.push_back(std::get<FinishEvent>(event));
      }
    };
    const auto asked = static_cast<int32_t>(request.tokens.size()) + request.max_tokens;
    const Status status = engine_.Submit(std::move(request));
    if (status.code() == StatusCode::kResourceExhausted) return;  // again later
    if (status.ok()) {
      heard_[id] = {.prompt = *pending_};
    } else if (status.code() != StatusCode::kInvalidArgument || asked <= 1) {
      wrong_ = status.ToString();
    }
    pending_.reset();
    ++next_;
  }
  void CancelOne() {
    --max_cancels_;
    auto victim = std::next(heard_.begin(), Pick(0, static_cast<int32_t>(heard_.size()) - 1));
    if (victim->second.finishes.empty()) victim->second.cancelled = true;
    engine_.Cancel(victim->first);
    if (Chance(4)) engine_.Cancel(victim->first);
  }

  std::string CheckStep() {
    if (!stages_.failure().empty()) return stages_.failure();
    if (!wrong_.empty()) return wrong_;
    const EngineStats stats = engine_.stats();
    if (stats.kv_blocks_used + stats.kv_blocks_cached > stats.kv_blocks_total) return "more blocks than there are";
    if (stats.plans_in_flight == stats.stages && stats.stages > 1) ++totals_.full_pipelines;
    return "";
  }

  std::string Finished() {
    for (const auto& [id, heard] : heard_) {
      const std::string who = "sequence " + std::to_string(id) + ": ";
      if (heard.finishes.size() != 1) return who + std::to_string(heard.finishes.size()) + " finishes";
      const FinishEvent& finish = heard.finishes[0];
      const Alone alone = AloneTokens(heard.prompt, kVocab);
      totals_.cached_tokens += finish.cached_prompt_tokens;
      if (heard.tokens.size() > alone.tokens.size() ||
          !std::equal(heard.tokens.begin(), heard.tokens.end(), alone.tokens.begin())) {
        return who + "other tokens than alone";
      }
      if (finish.reason == FinishReason::kCancelled) {
        ++totals_.cancelled;
        if (!heard.cancelled) return who + "cancelled by nobody";
      } else if (finish.reason == FinishReason::kError) {
        ++totals_.errors;
        if (epoch_ < 1 || finish.error.find("tokens asked") == std::string::npos) return who + finish.error;
      } else if (finish.reason != alone.reason || heard.tokens != alone.tokens) {
        return who + "finished early or for another reason";
      }
    }
    // Results of cancelled sequences come in, and one more request carries the last releases of pixels.
    Settle();
    Prompt last{.id = 1000000, .tokens = {1}, .max_tokens = 1};
    stages_.Register(last);
    Request request = last.MakeRequest(kVocab);
    request.on_event = [](RequestEvent) {};
    if (const Status status = engine_.Submit(std::move(request)); !status.ok()) return status.ToString();
    Settle();
    const EngineStats stats = engine_.stats();
    if (!stages_.failure().empty()) return stages_.failure();
    if (!engine_.idle() || stats.running != 0 || stats.waiting != 0 || stats.plans_in_flight != 0) return "not at rest";
    if (stats.kv_blocks_used != 0) return std::to_string(stats.kv_blocks_used) + " blocks leaked";
    if (stages_.resident() != 0) return "pixels left on stage 0";
    totals_.plans += stages_.plans;
    totals_.spans += stages_.spans;
    totals_.samples += stages_.samples;
    totals_.cut_images += stages_.cut_images;
    totals_.preemptions += static_cast<int64_t>(stats.preemptions_total);
    return "";
  }
  void Settle() {
    for (int32_t i = 0; i < 50; ++i) {
      stages_.ExecuteNext();
      engine_.Step(0, std::chrono::microseconds(0));
    }
  }

  std::mt19937_64 random_;
  Totals& totals_;
  FakeStages stages_;
  Engine engine_;
  step::PlanLimits limits_;
  int32_t stage_count_ = 1;
  uint64_t epoch_ = 0;
  bool down_ = false;
  int32_t wanted_ = 0, next_ = 0, max_cancels_ = 0, faults_ = 0;
  step::VisionId vision_ = 0;
  std::optional<Prompt> pending_;
  std::map<step::SequenceId, Heard> heard_;
  std::string wrong_;
};

TEST(EngineSimulation, EveryRequestGetsTheTokensItGetsAlone) {
  const int32_t first = EnvironmentOr("QP_SIM_FIRST", 1), count = EnvironmentOr("QP_SIM_SEEDS", 3000);
  log::Init({.process = "simulation", .level = "error"});
  Totals totals;
  for (int32_t seed = first; seed < first + count; ++seed) {
    World world(static_cast<uint64_t>(seed), totals);
    const std::string wrong = world.Run();
    ASSERT_EQ(wrong, "") << "seed " << seed;
  }
  std::printf(
      "worlds %d plans %ld spans %ld samples %ld cut images %ld preemptions %ld cached tokens %ld epochs %ld cancelled "
      "%ld errors %ld full pipelines %ld\n",
      count, totals.plans, totals.spans, totals.samples, totals.cut_images, totals.preemptions, totals.cached_tokens,
      totals.epochs, totals.cancelled, totals.errors, totals.full_pipelines);
  if (count < 500) return;
  // The worlds did contain what they are meant to contain.
  EXPECT_GT(totals.preemptions, count / 20);
  EXPECT_GT(totals.cached_tokens, count);
  EXPECT_GT(totals.cut_images, count / 20);
  EXPECT_GT(totals.epochs, count);
  EXPECT_GT(totals.cancelled, count / 20);
  EXPECT_GT(totals.full_pipelines, count);
  EXPECT_GT(totals.errors, 0);
}

}  // namespace
}  // namespace qwen::engine
