// stage/model/run_ahead.h — which step will probably come after a decode step, and whether it did. Pure.
//
// A stage that has sampled a token waits for the head to send it back in the next plan: a millisecond in which its GPU has
// nothing to do. With one stage the next plan is nearly always the same sequences, one token further, so the stage begins it
// unasked, and takes the result if that is what the head then asks for. What a wrong guess writes into the KV cache is one row
// past each sequence's end, in a block of its own: whoever gets that block next writes the row before reading it.
#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "stage/step/step_plan.h"
#include "stage/step/step_result.h"

namespace qwen::model {

// `done` with every sequence one token further. Nothing when `done` is not a decode step of sampled text tokens alone, when
// `samples` are not its samples, or when a sequence's next token has no block yet or no place below max_sequence_tokens.
std::optional<step::StepPlan> NextDecode(const step::StepPlan& done, std::span<const step::SampledToken> samples, int32_t block_tokens,
                                         int32_t max_sequence_tokens);

// The rows (one a span) of the results of `ahead` that `plan` asks for, in its order: all, or fewer when sequences have ended.
// Nothing when it asks for anything else.
std::optional<std::vector<int64_t>> RowsOf(const step::StepPlan& ahead, const step::StepPlan& plan);

// Decides whether guessing pays: after a wrong guess it waits for a number of steps that doubles up to kPauseMax.
class RunAheadPolicy {
 public:
  static constexpr int32_t kPauseMax = 64;
  bool Tries() {
    if (pause_ == 0) return true;
    --pause_;
    return false;
  }
  void Right() { next_pause_ = 1; }
  void Wrong() {
    pause_ = next_pause_;
    next_pause_ = next_pause_ * 2 < kPauseMax ? next_pause_ * 2 : kPauseMax;
  }

 private:
  int32_t pause_ = 0, next_pause_ = 1;
};

}  // namespace qwen::model
