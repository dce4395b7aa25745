// stage/model/batch.h — a StepPlan as index tensors, made once per step and shared by all layers of the stage.
// Thread safety: values.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "stage/ops/attention.h"
#include "stage/ops/linear.h"
#include "stage/step/step_plan.h"

namespace qwen::model {

// Which rows of a batch share a matrix product (ops/linear.h).
enum class RowGrouping {
  kPerSpan,    // every sequence gets the bits that it would have alone: results do not depend on batch company
  kWholeBatch  // weights are read once per batch; results may differ in the last bit with batch company
};

struct BatchOptions {
  int64_t block_tokens = 16;
  RowGrouping grouping = RowGrouping::kPerSpan;
  at::Device device = at::kCPU;
  bool attention = true;  // false: `spans` stays empty (a backend looks at the plan itself)
};

struct Batch {
  int64_t tokens = 0;
  at::Tensor token_ids;    // (tokens) int64
  at::Tensor positions;    // (3, tokens) float32: t, h, w
  at::Tensor cache_rows;   // (tokens) int64: block * block_tokens + offset, where k and v go
  at::Tensor visual_rows;  // (visual tokens) int64, plan order; undefined when there are none
  at::Tensor sample_rows;  // (samples) int64, last row of each sampling span; undefined when there are none
  std::vector<ops::AttentionSpan> spans;
  ops::RowGroups groups;         // of the tokens
  ops::RowGroups sample_groups;  // of the sample rows
};
// REQUIRES: step::ValidatePlan found nothing wrong with `plan`.
Batch MakeBatch(const step::StepPlan& plan, const BatchOptions& options);

}  // namespace qwen::model
