// stage/sampling/logits_pipeline.h — one row of logits to one token: bias, penalties, bans, mask, truncation, draw.
// Plain C++ on float32 values; docs/numerics.md gives the same order with its sources.
//
//   1 logit_bias            added
//   2 repetition_penalty    once per distinct token of prompt + output: l > 0 ? l / p : l * p        (transformers)
//   3 presence, frequency   l -= presence + frequency * count, for tokens of the output             (OpenAI API)
//   4 bans -> -inf          token_limit; stop_tokens while fewer than min_tokens were generated; a token that would repeat
//                           an n-gram of prompt + output (transformers' NoRepeatNGram); tokens outside the grammar mask
//   5 temperature 0         the lowest id among the maxima
//   6 temperature           l / T
//   7 top_k                 keeps every l >= the k-th largest (ties stay, as in transformers)
//   8 top_p                 by descending l (equal: lower id first), keeps a token while the probability mass before it
//                           is < top_p; the first always stays
//   9 min_p                 keeps p >= min_p * max p
//  10 draw                  u = UniformBits(seed, output index); the first id in ascending order whose running sum of
//                           weights exceeds floor(u * total / 2^53)
// Probabilities are integer weights round(2^40 exp(l - max)) over what the step before left (kernels/common/sampling_weight.h): the
// sampler on the GPU sums them in another order and draws the same tokens.
//
// Thread safety: none; owned by the thread that samples.
#pragma once
#include <cstdint>
#include <span>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "stage/base/status.h"
#include "stage/step/sampling_params.h"
#include "stage/step/step_plan.h"
#include "stage/step/step_result.h"

namespace qwen::sampling {

// What a slot remembers of its sequence.
class SlotHistory {
 public:
  SlotHistory() = default;
  explicit SlotHistory(const step::SequenceStart& start);

  void Append(int32_t token);  // a token that was sampled

  step::SequenceId sequence() const { return sequence_; }
  const step::SamplingParams& params() const { return params_; }
  int64_t generated() const { return static_cast<int64_t>(tokens_.size()) - prompt_tokens_; }
  const std::vector<int32_t>& tokens() const { return tokens_; }  // prompt, then output
  const std::unordered_set<int32_t>& seen() const { return seen_; }                  // only with a repetition penalty
  const std::unordered_map<int32_t, int32_t>& output_counts() const { return output_counts_; }  // only with presence/frequency
  // Nothing but an argmax is asked for (apart from token_limit): no copy of the row is needed.
  bool PlainGreedy() const;

 private:
  void Count(int32_t token, bool output);

  step::SequenceId sequence_ = 0;
  step::SamplingParams params_;
  std::vector<int32_t> tokens_;
  int64_t prompt_tokens_ = 0;
  std::unordered_set<int32_t> seen_;
  std::unordered_map<int32_t, int32_t> output_counts_;
};

// Steps 1 to 4, in place. `allowed`: grammar mask of step::SequenceSpan, empty = all.
void ApplyConstraints(std::span<float> logits, const SlotHistory& history, std::span<const uint32_t> allowed);

// Steps 5 to 10 on constrained logits (changed in place). kInvalidArgument when nothing is left to sample or a logit is NaN.
Result<int32_t> Choose(std::span<float> logits, const step::SamplingParams& params, int64_t output_index);

// log_softmax of the raw logits (before step 1, as vLLM's default): of `token`, and of the `top` most likely (equal: lower
// id first).
void FillLogprobs(std::span<const float> raw, int32_t top, step::SampledToken& result);

}  // namespace qwen::sampling
