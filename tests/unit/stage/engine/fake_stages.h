// tests/unit/stage/engine/fake_stages.h — stages in memory that check what the engine asks of them.
//
// The "model": the record of token i is Mix(record of token i-1, id, position, visual feature), the KV cache stores
// records by block, and the next token is drawn from the last record. A wrong block, a block reused too early, a wrong
// position, a missing image row or a stale sampler slot each change a record or are seen at once. AloneTokens() is the
// oracle: it walks a request by itself, without blocks, plans or slots.
//
// Thread safety: Register, AloneTokens and Wake from any thread, the rest by the engine thread.
#pragma once
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "stage/engine/request.h"
#include "stage/step/executor.h"

namespace qwen::engine::testing {

inline uint64_t Mix(uint64_t a, uint64_t b) {  // splitmix64 of the pair
  uint64_t x = a * 0x9E3779B97F4A7C15ull + b + 0x7F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// Allows token t after accepted tokens of sum s iff (t + s) % 3 != 0; nothing after `length` tokens.
class ThirdsConstraint final : public Constraint {
 public:
  explicit ThirdsConstraint(int32_t vocab, int32_t length) : vocab_(vocab), length_(length) {}
  bool Allows(int32_t token) const { return accepted_ < length_ && (token + sum_) % 3 != 0; }
  void FillMask(std::vector<uint32_t>& mask) override {
    for (int32_t t = 0; t < vocab_; ++t) {
      if (Allows(t)) mask[static_cast<size_t>(t) / 32] |= 1u << (t % 32);
    }
  }
  Status Accept(int32_t token) override {
    if (!Allows(token)) return InternalError("token " + std::to_string(token) + " is not allowed");
    sum_ += token;
    ++accepted_;
    return OkStatus();
  }

 private:
  const int32_t vocab_, length_;
  int32_t accepted_ = 0, sum_ = 0;
};

// A request by content, to make Requests from and to walk alone.
struct Prompt {
  struct Image {
    step::VisionId id = 0;
    uint8_t picture = 0;  // content: the first byte of its patches
    std::vector<std::pair<int32_t, int32_t>> runs;
  };
  step::SequenceId id = 0;
  std::vector<int32_t> tokens;
  std::vector<step::Position> positions;  // empty: the index on all axes
  int32_t position_delta = 0;
  std::vector<Image> images;
  uint64_t seed = 0;
  int32_t max_tokens = 1;
  int32_t min_tokens = 0;
  std::vector<int32_t> stop_tokens;
  bool ignore_stop_tokens = false;
  int32_t grammar_length = 0;  // > 0: a ThirdsConstraint

  step::Position PositionAt(int32_t i) const {
    if (i >= static_cast<int32_t>(tokens.size())) return {i + position_delta, i + position_delta, i + position_delta};
    if (positions.empty()) return {i, i, i};
    return positions[static_cast<size_t>(i)];
  }
  uint64_t FeatureAt(int32_t i) const {  // 0: no visual token
    for (const Image& image : images) {
      int32_t row = 0;
      for (const auto& [first, count] : image.runs) {
        if (i >= first && i < first + count) return Mix(image.picture + 1u, static_cast<uint64_t>(row + i - first));
        row += count;
      }
    }
    return 0;
  }
  Request MakeRequest(int32_t vocab) const {
    Request request{.id = id,
                    .tokens = tokens,
                    .position_delta = position_delta,
                    .max_tokens = max_tokens,
                    .ignore_stop_tokens = ignore_stop_tokens};
    for (int32_t i = 0; i < static_cast<int32_t>(tokens.size()); ++i) request.positions.push_back(PositionAt(i));
    request.params.seed = seed;
    request.params.min_tokens = min_tokens;
    request.params.stop_tokens = stop_tokens;
    for (const Image& image : images) {
      auto input = std::make_shared<step::VisionInput>();
      int32_t count = 0;
      for (const auto& run : image.runs) count += run.second;
      input->id = image.id;
      input->grid = {1, 2, 2 * count};  // 4 patches a merged token
      input->patches = {image.picture};
      request.vision.push_back(
          {.input = input, .runs = image.runs, .content_hash = "picture " + std::to_string(image.picture)});
    }
    if (grammar_length > 0) request.constraint = std::make_unique<ThirdsConstraint>(vocab, grammar_length);
    return request;
  }
};

// The sampler of the fake last stage: the `draw`-th of the allowed tokens, stop tokens only once min_tokens is reached.
inline int32_t Draw(uint64_t record, uint64_t seed, int32_t generated, int32_t min_tokens,
                    const std::vector<int32_t>& stops, int32_t vocab, const std::function<bool(int32_t)>& allowed) {
  std::vector<int32_t> choice;
  for (int32_t t = 0; t < vocab; ++t) {
    const bool stop = std::find(stops.begin(), stops.end(), t) != stops.end();
    if (allowed(t) && !(stop && generated < min_tokens)) choice.push_back(t);
  }
  if (choice.empty()) return 0;
  return choice[Mix(record, Mix(seed, static_cast<uint64_t>(generated))) % choice.size()];
}

struct Alone {
  std::vector<int32_t> tokens;  // generated
  FinishReason reason = FinishReason::kLength;
};
inline Alone AloneTokens(const Prompt& prompt, int32_t vocab) {
  Alone alone;
  uint64_t record = 0;
  std::vector<int32_t> all = prompt.tokens;
  ThirdsConstraint grammar(vocab, prompt.grammar_length);
  for (int32_t i = 0;; ++i) {
    const step::Position p = prompt.PositionAt(i);
    for (const uint64_t part : {static_cast<uint64_t>(all[static_cast<size_t>(i)]), static_cast<uint64_t>(p.t),
                                static_cast<uint64_t>(p.h), static_cast<uint64_t>(p.w), prompt.FeatureAt(i)}) {
      record = Mix(record, part);
    }
    if (i + 1 < static_cast<int32_t>(all.size())) continue;
    if (prompt.grammar_length > 0 && static_cast<int32_t>(alone.tokens.size()) == prompt.grammar_length)
      return alone.reason = FinishReason::kStop, alone;
    const int32_t token =
        Draw(record, prompt.seed, static_cast<int32_t>(alone.tokens.size()), prompt.min_tokens, prompt.stop_tokens,
             vocab, [&](int32_t t) { return prompt.grammar_length == 0 || grammar.Allows(t); });
    alone.tokens.push_back(token);
    all.push_back(token);
    const Status accepted = grammar.Accept(token);
    (void)accepted;  // without a grammar it refuses everything; that is nothing to this walk
    const bool stop =
        std::find(prompt.stop_tokens.begin(), prompt.stop_tokens.end(), token) != prompt.stop_tokens.end();
    if (stop && !prompt.ignore_stop_tokens) return alone.reason = FinishReason::kStop, alone;
    if (static_cast<int32_t>(alone.tokens.size()) == prompt.max_tokens) return alone;
  }
}

class FakeStages : public step::Executor {
 public:
  // With `automatic`, Poll executes the next queued plan by itself; else ExecuteNext() does.
  FakeStages(int32_t vocab, bool automatic) : vocab_(vocab), automatic_(automatic) {}

  void Register(const Prompt& prompt) {
    Alone alone = AloneTokens(prompt, vocab_);
    std::lock_guard<std::mutex> lock(mutex_);
    known_[prompt.id] = {prompt, alone.tokens};
  }

  // A group of `stages` stages whose memory holds garbage; announced by the next Poll.
  void Assemble(uint64_t epoch, const step::PlanLimits& limits, int32_t stages) {
    Forget();
    up_ = false;  // until Poll has announced it: pixels of the old epoch must not reach the new one
    epoch_ = epoch;
    limits_ = limits;
    stages_ = stages;
    next_step_ = 0;
    kv_.assign(static_cast<size_t>(limits.block_count) * static_cast<size_t>(limits.block_tokens), 0xDEADull + epoch);
    slots_.assign(static_cast<size_t>(limits.max_slots), {});
    events_.push_back(step::GroupReady{.epoch = epoch, .limits = limits, .stages = stages});
  }
  // `silently`: the engine first hears of it by a refused Submit. Results that are on their way stay on their way.
  void Lose(bool silently) {
    Forget();
    up_ = false;
    if (!silently) events_.push_back(step::GroupLost{.epoch = epoch_, .reason = "stage 1 is gone"});
  }

  Status SubmitVision(std::shared_ptr<const step::VisionInput> input) override {
    if (!up_) return UnavailableError("group is lost");
    Expect(pixels_.insert(input->id).second,
           "vision " + std::to_string(input->id) + " is sent although stage 0 holds it");
    queue_.push_back({.vision = std::move(input)});
    return OkStatus();
  }

  Status Submit(const step::StepPlan& plan) override {
    if (!up_) return UnavailableError("group is lost");
    const Status valid = step::ValidatePlan(plan, limits_);
    Expect(valid.ok(), valid.ToString());
    Expect(plan.epoch == epoch_ && plan.step == next_step_++, "wrong epoch or step");
    Expect(static_cast<int32_t>(unanswered_.size()) < stages_, "more plans in flight than stages");
    CheckOwnership(plan);
    for (const step::VisionId id : plan.vision_released)
      Expect(pixels_.erase(id) == 1, "vision " + std::to_string(id) + " is released but was not sent");
    unanswered_.push_back(plan);
    queue_.push_back({.plan = plan});
    ++plans;
    return OkStatus();
  }

  step::ExecutorEvent Poll(std::chrono::microseconds timeout) override {
    if (automatic_) ExecuteNext();
    if (events_.empty() && timeout.count() > 0) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait_for(lock, timeout, [&] { return woken_; });
      woken_ = false;
    }
    if (events_.empty()) return std::monostate();
    step::ExecutorEvent event = std::move(events_.front());
    events_.pop_front();
    if (const auto* ready = std::get_if<step::GroupReady>(&event)) up_ = ready->epoch == epoch_;
    if (const auto* result = std::get_if<step::StepResult>(&event);
        result && result->epoch == epoch_ && !unanswered_.empty())
      unanswered_.pop_front();
    return event;
  }
  void Wake() override {
    std::lock_guard<std::mutex> lock(mutex_);
    woken_ = true;
    wake_.notify_one();
  }

  // Executes the next plan of the queue, with the pixels before it. False when there is none.
  bool ExecuteNext() {
    while (!queue_.empty()) {
      Item item = std::move(queue_.front());
      queue_.pop_front();
      if (item.vision != nullptr) {
        resident_[item.vision->id] = item.vision->patches.at(0);
        continue;
      }
      Execute(item.plan);
      return true;
    }
    return false;
  }

  const std::string& failure() const { return failure_; }  // the first; empty: none
  size_t resident() const { return resident_.size(); }
  size_t undelivered() const { return events_.size(); }

  int64_t plans = 0, spans = 0, samples = 0, cut_images = 0, largest_in_flight = 0;

 private:
  struct Item {
    std::shared_ptr<const step::VisionInput> vision;
    step::StepPlan plan;
  };
  struct Slot {
    step::SequenceId sequence = 0;
    step::SamplingParams params;
    std::vector<int32_t> tokens;
    int32_t prompt_tokens = 0;
  };
  struct Known {
    Prompt prompt;
    std::vector<int32_t> generated;
  };

  void Expect(bool condition, const std::string& what) {
    if (!condition && failure_.empty()) failure_ = what;
  }
  void Forget() {
    queue_.clear();
    unanswered_.clear();
    resident_.clear();
    pixels_.clear();
  }

  // No block that a plan in flight names is written for another sequence; after a span that samples, none of its
  // sequence.
  void CheckOwnership(const step::StepPlan& plan) {
    largest_in_flight = std::max(largest_in_flight, static_cast<int64_t>(unanswered_.size()) + 1);
    std::vector<const step::StepPlan*> flying{&plan};
    for (const step::StepPlan& other : unanswered_) flying.push_back(&other);
    for (const step::SequenceSpan& span : plan.spans) {
      const std::set<step::BlockId> written(span.blocks.begin() + span.begin / limits_.block_tokens, span.blocks.end());
      Expect(std::set<step::BlockId>(span.blocks.begin(), span.blocks.end()).size() == span.blocks.size(),
             "a block twice in one span");
      for (const step::StepPlan* other : flying) {
        for (const step::SequenceSpan& theirs : other->spans) {
          if (theirs.sequence == span.sequence) {
            Expect(&theirs == &span || (other != &plan && !theirs.sample),
                   "a sequence goes on before its token is known");
            continue;
          }
          for (const step::BlockId block : theirs.blocks)
            Expect(!written.contains(block),
                   "block " + std::to_string(block) + " is written while another sequence's plan in flight names it");
        }
      }
    }
  }

  void Execute(const step::StepPlan& plan) {
    for (const step::SequenceStart& start : plan.starts) {
      slots_[static_cast<size_t>(start.slot)] = {.sequence = start.sequence,
                                                 .params = start.params,
                                                 .tokens = start.tokens,
                                                 .prompt_tokens = start.prompt_tokens};
    }
    step::StepResult result{.epoch = plan.epoch, .step = plan.step};
    for (const step::SequenceSpan& span : plan.spans) {
      ++spans;
      const uint64_t record = ExecuteSpan(span);
      if (span.sample) result.samples.push_back({.sequence = span.sequence, .token = Sample(span, record)});
    }
    for (const step::VisionId id : plan.vision_released)
      Expect(resident_.erase(id) == 1, "released input is not on stage 0");
    events_.push_back(std::move(result));
  }

  uint64_t ExecuteSpan(const step::SequenceSpan& span) {
    Known known;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto found = known_.find(span.sequence);
      if (found == known_.end()) return Expect(false, "unknown sequence"), 0;
      known = found->second;
    }
    std::vector<int32_t> all = known.prompt.tokens;
    all.insert(all.end(), known.generated.begin(), known.generated.end());
    const std::string who = "sequence " + std::to_string(span.sequence) + " ";
    const auto at = [&](int32_t i) -> uint64_t& {
      const auto bt = limits_.block_tokens;
      return kv_[static_cast<size_t>(span.blocks[static_cast<size_t>(i / bt)] * bt + i % bt)];
    };
    const int32_t end = span.begin + static_cast<int32_t>(span.tokens.size());
    if (end > static_cast<int32_t>(all.size())) return Expect(false, who + "runs past its own end"), 0;
    uint64_t truth = 0;
    for (int32_t i = 0; i < end; ++i) {
      const step::Position p = known.prompt.PositionAt(i);
      for (const uint64_t part : {static_cast<uint64_t>(all[static_cast<size_t>(i)]), static_cast<uint64_t>(p.t),
                                  static_cast<uint64_t>(p.h), static_cast<uint64_t>(p.w), known.prompt.FeatureAt(i)}) {
        truth = Mix(truth, part);
      }
      if (i < span.begin) {
        Expect(at(i) == truth,
               who + "reads a wrong KV record at token " + std::to_string(i) + " of " + std::to_string(end));
        continue;
      }
      const auto k = static_cast<size_t>(i - span.begin);
      uint64_t record = i == 0 ? 0 : at(i - 1);
      for (const uint64_t part : {static_cast<uint64_t>(span.tokens[k]), static_cast<uint64_t>(span.positions[k].t),
                                  static_cast<uint64_t>(span.positions[k].h),
                                  static_cast<uint64_t>(span.positions[k].w), Feature(span, static_cast<int32_t>(k))}) {
        record = Mix(record, part);
      }
      at(i) = record;
      Expect(record == truth, who + "computes a wrong record at token " + std::to_string(i));
    }
    for (const step::VisionSlice& slice : span.vision) cut_images += slice.feature_begin > 0;
    return at(end - 1);
  }

  uint64_t Feature(const step::SequenceSpan& span, int32_t offset) {
    for (const step::VisionSlice& slice : span.vision) {
      if (offset < slice.span_offset || offset >= slice.span_offset + slice.count) continue;
      const auto input = resident_.find(slice.id);
      if (input == resident_.end()) return Expect(false, "a plan uses pixels that stage 0 does not hold"), 0;
      return Mix(input->second + 1u, static_cast<uint64_t>(slice.feature_begin + offset - slice.span_offset));
    }
    return 0;
  }

  int32_t Sample(const step::SequenceSpan& span, uint64_t record) {
    ++samples;
    Slot& slot = slots_[static_cast<size_t>(span.slot)];
    const int32_t end = span.begin + static_cast<int32_t>(span.tokens.size());
    Expect(slot.sequence == span.sequence, "the sampler slot belongs to another sequence");
    Expect(static_cast<int32_t>(slot.tokens.size()) == end &&
               std::equal(span.tokens.begin(), span.tokens.end(), slot.tokens.begin() + span.begin),
           "the sampler's history is not the sequence");
    const int32_t token =
        Draw(record, slot.params.seed, end - slot.prompt_tokens, slot.params.min_tokens, slot.params.stop_tokens,
             vocab_, [&](int32_t t) {
               return span.allowed.empty() || (span.allowed[static_cast<size_t>(t) / 32] >> (t % 32) & 1u);
             });
    slot.tokens.push_back(token);
    return token;
  }

  const int32_t vocab_;
  const bool automatic_;
  bool up_ = false;
  uint64_t epoch_ = 0, next_step_ = 0;
  step::PlanLimits limits_;
  int32_t stages_ = 0;
  std::vector<uint64_t> kv_;  // (block_count * block_tokens) records
  std::vector<Slot> slots_;
  std::deque<Item> queue_;                      // sent, not executed
  std::deque<step::StepPlan> unanswered_;       // sent, result not yet polled
  std::set<step::VisionId> pixels_;             // as the engine must see it: sent and not released
  std::map<step::VisionId, uint8_t> resident_;  // on stage 0, after what is executed
  std::deque<step::ExecutorEvent> events_;
  std::string failure_;

  std::mutex mutex_;
  std::condition_variable wake_;
  bool woken_ = false;                       // guarded by mutex_
  std::map<step::SequenceId, Known> known_;  // guarded by mutex_
};

}  // namespace qwen::engine::testing
