// stage/sampling/device_rows.h — what a slot asks of a row of logits as an ops::RowSampler takes it, and what comes back as a token. Pure.
#pragma once
#include <cstdint>
#include <optional>
#include <span>

#include "stage/base/status.h"
#include "stage/kernels/common/sampler_row.h"
#include "stage/ops/row_sampler.h"
#include "stage/sampling/logits_pipeline.h"
#include "stage/step/step_result.h"

namespace qwen::sampling {

// Whether penalties look at the tokens of prompt or output.
bool HasPenalties(const step::SamplingParams& params);

// The next output token of `history` under the grammar mask `allowed` (empty: all). Nothing when it takes what only the host does:
// no_repeat_ngram_size, longer lists or more logprobs than sampler_row.h allows, an output that a count might not hold. Refers to `history` and
// `allowed`. logits_row and, with penalties, state and append are the caller's.
std::optional<ops::RowToSample> DeviceRow(const SlotHistory& history, std::span<const uint32_t> allowed);

// The same errors as Choose gives. `vocab`: ids of a row, which bounds the most likely ones.
Result<step::SampledToken> TokenOf(const kernels::SamplerResult& result, const SlotHistory& history, int64_t vocab);

}  // namespace qwen::sampling
