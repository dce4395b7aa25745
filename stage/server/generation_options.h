// stage/server/generation_options.h — the request fields that chat and text completions share: sampling, length, stopping,
// grammar, streaming. Parsed and checked here; what is out of range is a 400 that names the field.
//
// Thread safety: values and pure functions.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "stage/server/errors.h"
#include "stage/server/json_text.h"
#include "stage/step/sampling_params.h"

namespace qwen::server {

// What generation_config.json says; used where a request is silent.
struct GenerationDefaults {
  float temperature = 1.0f;  // OpenAI's default
  float top_p = 1.0f;
  int32_t top_k = 0;
  float min_p = 0.0f;
  float repetition_penalty = 1.0f;
  std::vector<int32_t> eos_tokens;
};
// Text of generation_config.json; `do_sample: false` means temperature 0, as transformers generates greedily then.
Result<GenerationDefaults> ParseGenerationDefaults(std::string_view json);

struct GuidedDecoding {
  enum class Kind { kNone, kAnyJson, kJsonSchema, kRegex, kGrammar };
  Kind kind = Kind::kNone;
  std::string text;   // schema (JSON text), regex or Lark grammar
  std::string param;  // the request field it came from, for errors
};

struct GenerationOptions {
  step::SamplingParams params;     // stop_tokens: eos, unless ignored, and stop_token_ids; seed: of choice 0
  std::vector<int32_t> stop_token_ids;  // those that the request named: they end a sequence even with ignore_eos
  std::optional<int32_t> max_tokens;
  int32_t n = 1;
  std::vector<std::string> stops;
  bool include_stop = false;
  bool ignore_eos = false;
  bool skip_special_tokens = true;
  bool stream = false;
  bool include_usage = false;
  bool continuous_usage = false;
  bool return_token_ids = false;
  GuidedDecoding guided;
};

struct OptionLimits {
  int32_t vocab_size = 0;      // of the model: ids in the request are below it
  int32_t tokenizer_size = 0;  // ids from here on are padding and never sampled
  int32_t choices_max = 128;   // n, and prompts * n
};
inline constexpr int kStopsMax = 16;
inline constexpr int kStopBytesMax = 1024;
inline constexpr int kLogprobsMax = 20;  // OpenAI's limit
inline constexpr int kLogitBiasMax = 1024;

// Reads everything except logprobs, whose form differs between the two endpoints.
OrError<GenerationOptions> ParseGenerationOptions(const Json& body, const GenerationDefaults& defaults,
                                                  const OptionLimits& limits);
// The seed of choice `index` of a request with seed `seed`: different for each, the same again for the same request.
uint64_t ChoiceSeed(uint64_t seed, int32_t index);

}  // namespace qwen::server
