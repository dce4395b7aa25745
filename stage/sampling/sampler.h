// stage/sampling/sampler.h — the last stage's sampler: logits of a step in, StepResult out, history per slot.
//
// With a device (ops::RowSampler) rows are sampled where the logits are, in one call for the batch, and only tokens come back; what the
// device does not do (device_rows.h) goes the host's way, row by row. Without one, greedy rows without constraints are one argmax over the
// batch on the logits' own device, and every other row is copied to the host as float32 and goes through logits_pipeline.h. Both ways give
// the same tokens. Thread safety: none; one thread.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "stage/base/status.h"
#include "stage/ops/row_sampler.h"
#include "stage/sampling/logits_pipeline.h"
#include "stage/step/step_plan.h"
#include "stage/step/step_result.h"

namespace qwen::sampling {

class Sampler {
 public:
  struct Options {
    int32_t max_slots = 256;
    ops::RowSampler* device = nullptr;  // outlives the sampler, for as many slots; null: the host
  };
  explicit Sampler(const Options& options);

  // Applies plan.starts, then samples one token per span with `sample`, in span order. `logits` (samples, vocab), any float
  // dtype and device; undefined when the plan samples nothing. `begun`: they are those (or some rows of those) that BeginAhead was given
  // last, so that rows whose sampling began there need only be waited for.
  // kFailedPrecondition when a slot was not started for the span's sequence; kInvalidArgument when a mask leaves no token
  // or logits are NaN. Call it for every plan, in order: starts may come in a plan without samples.
  Result<step::StepResult> Step(const step::StepPlan& plan, const at::Tensor& logits, bool begun = false);

  // Begins sampling the step that will probably come next, after Step has returned its sequences' last tokens: on a device, for rows that
  // it takes and that had no grammar mask so far (the mask comes with the plan). Nothing else changes, so a step that does not come costs nothing.
  void BeginAhead(const step::StepPlan& next, const at::Tensor& logits);

 private:
  struct Slot {
    SlotHistory history;
    int64_t on_device = -1;  // tokens that the device's state of this slot holds; -1: no state
    bool masked = false;     // its last span had a grammar mask
  };
  struct Begun {  // a row of the device's last call
    int32_t slot;
    step::SequenceId sequence;
    int64_t generated;
  };

  Result<step::SampledToken> SampleRow(const step::SequenceSpan& span, const at::Tensor& row);
  // What the device is asked for the span; nothing when the host has to do it.
  std::optional<ops::RowToSample> RowFor(const step::SequenceSpan& span, int64_t logits_row);
  // Brings the device's state up to the slot's history. False when there is no memory for it.
  bool UpdateState(int32_t slot, kernels::SamplerRow& row);
  Status Enqueue(const at::Tensor& logits, const std::vector<ops::RowToSample>& rows, const std::vector<Begun>& begun);

  ops::RowSampler* const device_;
  std::vector<Slot> slots_;
  std::vector<Begun> ahead_;    // what BeginAhead asked for
  bool states_fit_ = true;      // the device had memory for penalties' states
  std::vector<float> scratch_;  // one row, kept between calls
};

}  // namespace qwen::sampling
