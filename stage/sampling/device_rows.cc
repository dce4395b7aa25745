#include "stage/sampling/device_rows.h"

#include <algorithm>

#include "stage/kernels/common/sampling_weight.h"
#include "stage/sampling/philox.h"

namespace qwen::sampling {

bool HasPenalties(const step::SamplingParams& params) {
  return params.repetition_penalty != 1.0f || params.presence_penalty != 0.0f || params.frequency_penalty != 0.0f;
}

std::optional<ops::RowToSample> DeviceRow(const SlotHistory& history, std::span<const uint32_t> allowed) {
  const step::SamplingParams& params = history.params();
  const bool banned = history.generated() < params.min_tokens;
  if (params.no_repeat_ngram_size > 0 || params.logprobs > kernels::kSamplerLogprobsMax) return std::nullopt;
  if (params.logit_bias.size() > kernels::kSamplerBiasMax || (banned && params.stop_tokens.size() > kernels::kSamplerBanMax)) return std::nullopt;
  if (HasPenalties(params) && history.generated() >= kernels::kSamplerCountMax) return std::nullopt;
  ops::RowToSample row{.row = {.draw = UniformBits(params.seed, static_cast<uint64_t>(history.generated())),
                               .top_p = kernels::TopPFraction(params.top_p),
                               .min_p = kernels::MinPWeight(params.min_p),
                               .temperature = params.temperature,
                               .top_k = params.top_k,
                               .repetition = params.repetition_penalty,
                               .presence = params.presence_penalty,
                               .frequency = params.frequency_penalty,
                               .token_limit = params.token_limit,
                               .mask_words = allowed.empty() ? -1 : static_cast<int32_t>(allowed.size()),
                               .logprobs = params.logprobs},
                       .bias = params.logit_bias,
                       .bans = {},
                       .mask = allowed};
  if (banned) row.bans = params.stop_tokens;
  return row;
}

Result<step::SampledToken> TokenOf(const kernels::SamplerResult& result, const SlotHistory& history, int64_t vocab) {
  if (result.status == kernels::kSamplerNan) return InvalidArgumentError("sampling: a logit is NaN");
  if (result.status != kernels::kSamplerDone) return InvalidArgumentError("sampling: no token is allowed");
  step::SampledToken token{.sequence = history.sequence(), .token = result.token};
  const int32_t logprobs = history.params().logprobs;
  if (logprobs >= 0) token.logprob = result.logprob;
  for (int64_t i = 0; i < std::min<int64_t>(logprobs, vocab); ++i) token.top.push_back({result.top_token[i], result.top_logprob[i]});
  return token;
}

}  // namespace qwen::sampling
