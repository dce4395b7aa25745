// tests/traces/engine_traces.cc — plays tests/traces/engine/*.txt: an Engine between a scripted server and scripted
// stages.
//
//   engine blocks= block_tokens= batch_tokens= stages= slots= length= queue= [cache=off] [group=none]   (first)
//   submit id=a tokens=0..48,100..116 max_tokens= [stop=7] [picture=4+8:cat]  tokens [4,12) show "cat"; m..n is m to
//   n-1 step [now_ms=]                  Engine::Step: prints pixels and plans that go out, then what requests are told
//   result a=5 b=6 | result         the oldest unanswered plan is done; a's next token is 5 (default 900). Then a step
//   cancel id=a | drain | stats
//   lost [silently] | ready epoch=2 [blocks=] [stages=]
#include <algorithm>
#include <deque>

#include "stage/base/check.h"
#include "stage/base/log.h"
#include "stage/engine/engine.h"
#include "tests/traces/trace_file.h"

namespace qwen::engine {
namespace {

using traces::Command;

constexpr int32_t kVocab = 1000;

std::string Joined(const BlockList& blocks) {
  std::string out;
  for (const BlockId block : blocks) out += (out.empty() ? "" : ",") + std::to_string(block);
  return out;
}
std::string Range(int64_t begin, int64_t end) { return "[" + std::to_string(begin) + "," + std::to_string(end) + ")"; }

class Stage final : public step::Executor {
 public:
  explicit Stage(std::string& out) : out_(out) {}
  Status SubmitVision(std::shared_ptr<const step::VisionInput> input) override {
    if (!up) return UnavailableError("stage 1 is gone");
    out_ += "pixels " + std::to_string(input->id) + "\n";
    return OkStatus();
  }
  Status Submit(const step::StepPlan& plan) override {
    if (!up) return UnavailableError("stage 1 is gone");
    const Status valid = step::ValidatePlan(plan, limits);
    QP_CHECK(valid.ok()) << valid.ToString();
    out_ +=
        "plan " + std::to_string(plan.step) + (plan.epoch > 1 ? " of epoch " + std::to_string(plan.epoch) : "") + "\n";
    for (const step::SequenceSpan& span : plan.spans) Print(span, plan);
    for (const step::VisionId id : plan.vision_released) out_ += "  release " + std::to_string(id) + "\n";
    plans.push_back(plan);
    return OkStatus();
  }
  step::ExecutorEvent Poll(std::chrono::microseconds) override {
    if (events.empty()) return std::monostate();
    step::ExecutorEvent event = std::move(events.front());
    events.pop_front();
    return event;
  }
  void Wake() override {}

  bool up = false;
  step::PlanLimits limits;
  std::deque<step::StepPlan> plans;  // unanswered
  std::deque<step::ExecutorEvent> events;
  std::map<step::SequenceId, std::string> names;

 private:
  void Print(const step::SequenceSpan& span, const step::StepPlan& plan) {
    const auto count = static_cast<int64_t>(span.tokens.size());
    out_ += "  " + names[span.sequence] + Range(span.begin, span.begin + count) + " slot=" + std::to_string(span.slot) +
            " blocks=" + Joined(span.blocks);
    for (const step::VisionSlice& slice : span.vision) {
      out_ += " picture " + std::to_string(slice.id) + Range(slice.feature_begin, slice.feature_begin + slice.count) +
              "@" + std::to_string(slice.span_offset);
    }
    for (const step::SequenceStart& start : plan.starts) {
      if (start.sequence == span.sequence) out_ += " start(" + std::to_string(start.tokens.size()) + ")";
    }
    out_ += span.sample ? " sample\n" : "\n";
  }
  std::string& out_;
};

class Story {
 public:
  std::string Run(const Command& command) {
    out_.clear();
    if (command.verb == "engine") {
      Start(command);
    } else if (command.verb == "submit") {
      Submit(command);
    } else if (command.verb == "step") {
      StepAt(command.Number("now_ms", 0));
    } else if (command.verb == "result") {
      Answer(command);
    } else if (command.verb == "cancel") {
      engine_->Cancel(Id(command.Text("id")));
    } else if (command.verb == "drain") {
      engine_->Drain();
    } else if (command.verb == "lost") {
      stage_.up = false;
      if (!command.Has("silently"))
        stage_.events.push_back(step::GroupLost{.epoch = epoch_, .reason = "stage 1 is gone"});
    } else if (command.verb == "ready") {
      Ready(command);
    } else if (command.verb == "stats") {
      Stats();
    } else {
      out_ = "unknown command " + command.verb + "\n";
    }
    return out_;
  }

 private:
  step::SequenceId Id(const std::string& name) {
    for (const auto& [id, known] : stage_.names) {
      if (known == name) return id;
    }
    const step::SequenceId id = stage_.names.size() + 1;
    stage_.names[id] = name;
    return id;
  }
  void Start(const Command& c) {
    stage_.limits = {.block_tokens = c.Number("block_tokens", 4),
                     .block_count = c.Number("blocks", 16),
                     .max_slots = c.Number("slots", 8),
                     .max_batch_tokens = c.Number("batch_tokens", 16),
                     .max_sequence_tokens = c.Number("length", 64),
                     .vocab_size = kVocab};
    stages_ = c.Number("stages", 1);
    engine_ = std::make_unique<Engine>(
        Engine::Options{.queue_capacity = c.Number("queue", 16), .prefix_cache = c.Text("cache") != "off"}, stage_);
    if (c.Text("group") == "none") return;
    Ready(c);
    StepAt(0);
  }
  void Ready(const Command& c) {
    stage_.plans.clear();
    stage_.up = true;
    stage_.limits.block_count = c.Number("blocks", stage_.limits.block_count);
    stages_ = c.Number("stages", stages_);
    epoch_ = static_cast<uint64_t>(c.Number("epoch", 1));
    stage_.events.push_back(step::GroupReady{.epoch = epoch_, .limits = stage_.limits, .stages = stages_});
  }
  void Submit(const Command& c) {
    const std::string name = c.Text("id");
    Request request{.id = Id(name), .max_tokens = c.Number("max_tokens", 4)};
    std::istringstream ranges(c.Text("tokens"));
    for (std::string range; std::getline(ranges, range, ',');) {
      const size_t dots = range.find("..");
      const int32_t first = std::stoi(range),
                    end = dots == std::string::npos ? first + 1 : std::stoi(range.substr(dots + 2));
      for (int32_t token = first; token < end; ++token) request.tokens.push_back(token);
    }
    for (int32_t i = 0; i < static_cast<int32_t>(request.tokens.size()); ++i) request.positions.push_back({i, i, i});
    if (c.Has("stop")) request.params.stop_tokens = {c.Number("stop", 0)};
    if (const std::string picture = c.Text("picture"); !picture.empty()) {  // first+count:content
      const int32_t first = std::stoi(picture), count = std::stoi(picture.substr(picture.find('+') + 1));
      auto input = std::make_shared<step::VisionInput>();
      input->id = ++pictures_;
      input->grid = {1, 2, 2 * count};
      request.vision.push_back(
          {.input = input, .runs = {{first, count}}, .content_hash = picture.substr(picture.find(':') + 1)});
    }
    request.on_event = [this, name](const RequestEvent& event) { Tell(name, event); };
    if (const Status status = engine_->Submit(std::move(request)); !status.ok())
      out_ += name + ": " + status.ToString() + "\n";
  }
  void Tell(const std::string& name, const RequestEvent& event) {
    if (const auto* token = std::get_if<TokenEvent>(&event)) {
      out_ += name + ": token " + std::to_string(token->token) + "\n";
      return;
    }
    static constexpr const char* kReasons[] = {"stop", "length", "cancelled", "error"};
    const auto& finish = std::get<FinishEvent>(event);
    out_ += name + ": finish " + kReasons[static_cast<int>(finish.reason)];
    if (finish.cached_prompt_tokens > 0) out_ += " cached=" + std::to_string(finish.cached_prompt_tokens);
    out_ += (finish.error.empty() ? "" : ": " + finish.error) + "\n";
  }
  void Answer(const Command& c) {
    if (stage_.plans.empty()) {
      out_ += "no plan is unanswered\n";
      return;
    }
    const step::StepPlan plan = std::move(stage_.plans.front());
    stage_.plans.pop_front();
    step::StepResult result{.epoch = plan.epoch, .step = plan.step};
    for (const step::SequenceSpan& span : plan.spans) {
      if (span.sample)
        result.samples.push_back({.sequence = span.sequence, .token = c.Number(stage_.names[span.sequence], 900)});
    }
    stage_.events.push_back(std::move(result));
    StepAt(now_ms_);
  }
  void StepAt(int32_t now_ms) {
    now_ms_ = now_ms;
    engine_->Step(now_ms * int64_t{1000}, std::chrono::microseconds(0));
  }
  void Stats() {
    const EngineStats s = engine_->stats();
    out_ += "running=" + std::to_string(s.running) + " waiting=" + std::to_string(s.waiting) +
            " in_flight=" + std::to_string(s.plans_in_flight) + " blocks used=" + std::to_string(s.kv_blocks_used) +
            " cached=" + std::to_string(s.kv_blocks_cached) + " of " + std::to_string(s.kv_blocks_total) +
            " preemptions=" + std::to_string(s.preemptions_total) + (engine_->idle() ? " idle" : "") +
            (s.group_ready ? "" : " no group: " + s.group_lost_reason) + "\n";
  }

  std::string out_;
  Stage stage_{out_};
  std::unique_ptr<Engine> engine_;
  int32_t stages_ = 1, now_ms_ = 0;
  uint64_t epoch_ = 0;
  step::VisionId pictures_ = 0;
};

}  // namespace
}  // namespace qwen::engine

int main(int argc, char** argv) {
  qwen::log::Init({.process = "engine_traces", .level = "error"});
  return qwen::traces::Main(argc, argv, [] {
    auto story = std::make_shared<qwen::engine::Story>();
    return [story](const qwen::traces::Command& command) { return story->Run(command); };
  });
}
