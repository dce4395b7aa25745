#include "stage/sampling/logits_pipeline.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "stage/base/check.h"
#include "stage/kernels/common/sampling_weight.h"
#include "stage/sampling/philox.h"
#include "stage/sampling/weights.h"

namespace qwen::sampling {
namespace {

constexpr float kBanned = -std::numeric_limits<float>::infinity();

bool InRange(std::span<const float> logits, int32_t token) {
  return token >= 0 && static_cast<size_t>(token) < logits.size();
}

void Penalise(std::span<float> logits, const SlotHistory& history) {
  const step::SamplingParams& params = history.params();
  for (const auto& [token, bias] : params.logit_bias) {
    if (InRange(logits, token)) logits[token] += bias;
  }
  if (params.repetition_penalty != 1.0f) {
    for (int32_t token : history.seen()) {
      if (!InRange(logits, token)) continue;
      float& logit = logits[token];
      logit = logit < 0 ? logit * params.repetition_penalty : logit / params.repetition_penalty;
    }
  }
  for (const auto& [token, count] : history.output_counts()) {
    if (!InRange(logits, token)) continue;
    logits[token] -= params.presence_penalty + params.frequency_penalty * static_cast<float>(count);
  }
}

// Bans what followed every earlier occurrence of the last n-1 tokens.
void BanRepeatedNgrams(std::span<float> logits, const std::vector<int32_t>& tokens, int64_t n) {
  const int64_t length = static_cast<int64_t>(tokens.size()), prefix = n - 1;
  if (length < n) return;
  const auto last = tokens.end() - prefix;
  for (int64_t i = 0; i + prefix < length; ++i) {
    if (std::equal(last, tokens.end(), tokens.begin() + i) && InRange(logits, tokens[i + prefix])) {
      logits[tokens[i + prefix]] = kBanned;
    }
  }
}

// A token that may still be drawn. Those that weigh nothing never are, and are left out from the start: whatever a truncation
// would say of them, the sums stay the same.
struct Candidate {
  int32_t token;
  float logit;
  uint64_t weight;
};

bool MoreLikely(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
}

uint64_t Total(const std::vector<Candidate>& candidates) {
  uint64_t total = 0;
  for (const Candidate& candidate : candidates) total += candidate.weight;
  return total;
}

// Keeps every candidate at least as likely as the k-th.
void KeepTopK(std::vector<Candidate>& candidates, int32_t k) {
  if (k <= 0 || static_cast<size_t>(k) >= candidates.size()) return;
  std::nth_element(candidates.begin(), candidates.begin() + (k - 1), candidates.end(), MoreLikely);
  const float threshold = candidates[k - 1].logit;
  std::erase_if(candidates, [&](const Candidate& c) { return c.logit < threshold; });
}

// Keeps the most likely ones until their mass reaches top_p.
void KeepTopP(std::vector<Candidate>& candidates, float top_p) {
  const uint64_t fraction = kernels::TopPFraction(top_p);
  if (fraction == kernels::kNoTopP) return;
  const uint64_t wanted = kernels::WantedMass(fraction, Total(candidates));
  uint64_t before = 0;
  // Sorted as far as the mass needs: a row of 150,000 takes 15 ms to sort whole, and most of them keep a few hundred.
  size_t keep = 0, sorted = 0;
  const auto at = [&](size_t i) { return candidates.begin() + static_cast<std::ptrdiff_t>(i); };
  while (keep < candidates.size() && before < wanted) {
    if (keep == sorted) {
      sorted = std::min(candidates.size(), std::max<size_t>(256, 8 * sorted));
      if (sorted < candidates.size()) std::nth_element(at(keep), at(sorted), candidates.end(), MoreLikely);
      std::sort(at(keep), at(sorted), MoreLikely);
    }
    before += candidates[keep++].weight;
  }
  candidates.resize(keep);
}

void KeepMinP(std::vector<Candidate>& candidates, float min_p) {
  const uint64_t least = kernels::MinPWeight(min_p);  // weights are relative to the maximum's own
  std::erase_if(candidates, [&](const Candidate& c) { return c.weight < least; });
}

}  // namespace

SlotHistory::SlotHistory(const step::SequenceStart& start)
    : sequence_(start.sequence), params_(start.params), tokens_(start.tokens), prompt_tokens_(start.prompt_tokens) {
  for (size_t i = 0; i < tokens_.size(); ++i) Count(tokens_[i], static_cast<int64_t>(i) >= prompt_tokens_);
}

void SlotHistory::Append(int32_t token) {
  tokens_.push_back(token);
  Count(token, true);
}

void SlotHistory::Count(int32_t token, bool output) {
  if (params_.repetition_penalty != 1.0f) seen_.insert(token);
  if (output && (params_.presence_penalty != 0.0f || params_.frequency_penalty != 0.0f)) ++output_counts_[token];
}

bool SlotHistory::PlainGreedy() const {
  return params_.temperature == 0.0f && params_.repetition_penalty == 1.0f && params_.presence_penalty == 0.0f &&
         params_.frequency_penalty == 0.0f && params_.no_repeat_ngram_size == 0 && params_.logprobs < 0 &&
         params_.logit_bias.empty() && (params_.stop_tokens.empty() || generated() >= params_.min_tokens);
}

void ApplyConstraints(std::span<float> logits, const SlotHistory& history, std::span<const uint32_t> allowed) {
  const step::SamplingParams& params = history.params();
  Penalise(logits, history);
  if (params.token_limit > 0 && static_cast<size_t>(params.token_limit) < logits.size()) {
    std::fill(logits.begin() + params.token_limit, logits.end(), kBanned);
  }
  if (history.generated() < params.min_tokens) {
    for (int32_t token : params.stop_tokens) {
      if (InRange(logits, token)) logits[token] = kBanned;
    }
  }
  if (params.no_repeat_ngram_size > 0) BanRepeatedNgrams(logits, history.tokens(), params.no_repeat_ngram_size);
  if (!allowed.empty()) {
    for (size_t i = 0; i < logits.size(); ++i) {
      if (i / 32 >= allowed.size() || (allowed[i / 32] >> (i % 32) & 1) == 0) logits[i] = kBanned;
    }
  }
}

Result<int32_t> Choose(std::span<float> logits, const step::SamplingParams& params, int64_t output_index) {
  const float* best = nullptr;
  for (const float& logit : logits) {
    if (std::isnan(logit)) return InvalidArgumentError("sampling: a logit is NaN");
    if (best == nullptr || logit > *best) best = &logit;  // strictly: the lowest id wins
  }
  if (best == nullptr || *best == kBanned) return InvalidArgumentError("sampling: no token is allowed");
  const auto token = static_cast<int32_t>(best - logits.data());
  if (params.temperature == 0.0f || std::isinf(*best)) return token;

  const float maximum = *best / params.temperature;
  // A temperature near 0 overflows the division; what is left is the greedy choice.
  if (std::isinf(maximum)) return token;
  for (float& logit : logits) logit /= params.temperature;
  std::vector<uint64_t> weights(logits.size());
  WeighRow(logits, maximum, weights);
  std::vector<Candidate> candidates;
  candidates.reserve(logits.size() - static_cast<size_t>(std::count(weights.begin(), weights.end(), uint64_t{0})));
  for (size_t i = 0; i < logits.size(); ++i) {
    if (weights[i] > 0) candidates.push_back({static_cast<int32_t>(i), logits[i], weights[i]});
  }
  KeepTopK(candidates, params.top_k);
  KeepTopP(candidates, params.top_p);
  KeepMinP(candidates, params.min_p);
  const auto by_id = [](const Candidate& a, const Candidate& b) { return a.token < b.token; };
  if (!std::is_sorted(candidates.begin(), candidates.end(), by_id)) std::sort(candidates.begin(), candidates.end(), by_id);

  const uint64_t target = kernels::DrawnUnit(UniformBits(params.seed, static_cast<uint64_t>(output_index)), Total(candidates));
  uint64_t sum = 0;
  for (const Candidate& candidate : candidates) {
    sum += candidate.weight;
    if (sum > target) return candidate.token;
  }
  QP_CHECK(false) << "a draw beyond the total of " << sum;
  return token;
}

void FillLogprobs(std::span<const float> raw, int32_t top, step::SampledToken& result) {
  const float maximum = *std::max_element(raw.begin(), raw.end());
  double total = 0;
  for (float logit : raw) total += std::exp(static_cast<double>(logit) - maximum);
  const double normaliser = static_cast<double>(maximum) + std::log(total);
  const auto logprob = [&](int32_t token) { return static_cast<float>(static_cast<double>(raw[token]) - normaliser); };
  result.logprob = logprob(result.token);
  std::vector<int32_t> order(raw.size());
  std::iota(order.begin(), order.end(), 0);
  const auto count = std::min<int64_t>(top, static_cast<int64_t>(raw.size()));
  std::partial_sort(order.begin(), order.begin() + count, order.end(),
                    [&](int32_t a, int32_t b) { return raw[a] != raw[b] ? raw[a] > raw[b] : a < b; });
  for (int64_t i = 0; i < count; ++i) result.top.push_back({order[i], logprob(order[i])});
}

}  // namespace qwen::sampling
