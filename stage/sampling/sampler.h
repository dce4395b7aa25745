// stage/sampling/sampler.h — the last stage's sampler: logits of a step in, StepResult out, history per slot.
//
// Greedy rows without constraints are one argmax over the batch on the logits' own device; every other row is copied to the
// host as float32 and goes through logits_pipeline.h. Thread safety: none; one thread.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "stage/base/status.h"
#include "stage/sampling/logits_pipeline.h"
#include "stage/step/step_plan.h"
#include "stage/step/step_result.h"

namespace qwen::sampling {

class Sampler {
 public:
  struct Options {
    int32_t max_slots = 256;
  };
  explicit Sampler(const Options& options);

  // Applies plan.starts, then samples one token per span with `sample`, in span order. `logits` (samples, vocab), any float
  // dtype and device; undefined when the plan samples nothing.
  // kFailedPrecondition when a slot was not started for the span's sequence; kInvalidArgument when a mask leaves no token
  // or logits are NaN. Call it for every plan, in order: starts may come in a plan without samples.
  Result<step::StepResult> Step(const step::StepPlan& plan, const at::Tensor& logits);

 private:
  Result<step::SampledToken> SampleRow(const step::SequenceSpan& span, const at::Tensor& row);

  std::vector<SlotHistory> slots_;
  std::vector<float> scratch_;  // one row, kept between calls
};

}  // namespace qwen::sampling
