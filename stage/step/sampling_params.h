// stage/step/sampling_params.h — how the last stage turns one row of logits into one token (docs/numerics.md gives the order:
// logit bias and penalties, no-repeat n-grams, grammar mask, temperature, top-k, top-p, min-p, draw). Values; defaults change nothing.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

namespace qwen::step {

struct SamplingParams {
  float temperature = 0.0f;         // 0 = greedy (the lowest id among equal maxima)
  int32_t top_k = 0;                // 0 = off
  float top_p = 1.0f;               // (0, 1]
  float min_p = 0.0f;               // [0, 1)
  float repetition_penalty = 1.0f;  // > 0; over prompt and output, as in transformers
  float presence_penalty = 0.0f;    // [-2, 2]; over output, as in the OpenAI API
  float frequency_penalty = 0.0f;   // [-2, 2]; over output
  int32_t no_repeat_ngram_size = 0; // 0 = off; over prompt and output, as in transformers
  uint64_t seed = 0;                // the draw of output token i depends on (seed, i) alone: replays after a fault are equal
  int32_t logprobs = -1;            // -1 = none; 0 = of the sampled token; n > 0 = and of the n most likely
  int32_t min_tokens = 0;           // until so many were generated, `stop_tokens` are not sampled
  int32_t token_limit = 0;          // ids >= this are never sampled (the vocabulary's padding); 0 = off
  std::vector<int32_t> stop_tokens;
  std::vector<std::pair<int32_t, float>> logit_bias;  // (token, added to its logit), ids in range, each once
};

}  // namespace qwen::step
