// stage/step/step_result.h — what comes back of a StepPlan. Values.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

#include "stage/step/step_plan.h"

namespace qwen::step {

struct TokenLogprob {
  int32_t token = 0;
  float logprob = 0.0f;  // natural log, of the distribution before temperature and truncation (after penalties and masks: no)
};

struct SampledToken {
  SequenceId sequence = 0;
  int32_t token = 0;
  float logprob = 0.0f;           // valid when logprobs >= 0 was asked
  std::vector<TokenLogprob> top;  // most likely first; as many as asked
};

struct StepResult {
  uint64_t epoch = 0;
  uint64_t step = 0;
  std::vector<SampledToken> samples;  // one per span with `sample`, in span order
};

}  // namespace qwen::step
