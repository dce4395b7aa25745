#include "stage/server/generation_options.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <random>

namespace qwen::server {
namespace {

constexpr double kInt32Max = std::numeric_limits<int32_t>::max();

void ReadSampling(FieldReader& fields, const GenerationDefaults& defaults, step::SamplingParams& params) {
  params.temperature = static_cast<float>(fields.Number("temperature", 0, 2).value_or(defaults.temperature));
  params.top_p = static_cast<float>(fields.Number("top_p", 0, 1).value_or(defaults.top_p));
  if (params.top_p <= 0) fields.Fail("top_p", "must be greater than 0");
  // -1 is vLLM's spelling of "off".
  params.top_k = static_cast<int32_t>(std::max<int64_t>(0, fields.Integer("top_k", -1, kInt32Max).value_or(defaults.top_k)));
  params.min_p = static_cast<float>(fields.Number("min_p", 0, 1).value_or(defaults.min_p));
  if (params.min_p >= 1) fields.Fail("min_p", "must be less than 1");
  params.repetition_penalty =
      static_cast<float>(fields.Number("repetition_penalty", 0, 100).value_or(defaults.repetition_penalty));
  if (params.repetition_penalty <= 0) fields.Fail("repetition_penalty", "must be greater than 0");
  params.presence_penalty = static_cast<float>(fields.Number("presence_penalty", -2, 2).value_or(0));
  params.frequency_penalty = static_cast<float>(fields.Number("frequency_penalty", -2, 2).value_or(0));
  params.no_repeat_ngram_size = static_cast<int32_t>(fields.Integer("no_repeat_ngram_size", 0, 1 << 20).value_or(0));
  params.min_tokens = static_cast<int32_t>(fields.Integer("min_tokens", 0, kInt32Max).value_or(0));
  if (auto seed = fields.Integer("seed", std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max())) {
    params.seed = static_cast<uint64_t>(*seed);
  } else {
    std::random_device random;
    params.seed = (uint64_t{random()} << 32) ^ random();
  }
}

void ReadLogitBias(FieldReader& fields, const OptionLimits& limits, step::SamplingParams& params) {
  const Json* bias = fields.Find("logit_bias");
  if (!bias) return;
  if (!bias->is_object()) return fields.Fail("logit_bias", "must be an object of token id to number");
  if (bias->size() > kLogitBiasMax) return fields.Fail("logit_bias", "has more than " + std::to_string(kLogitBiasMax) + " entries");
  for (const auto& [key, value] : bias->items()) {
    int32_t token = 0;
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), token);
    if (error != std::errc() || end != key.data() + key.size() || token < 0 || token >= limits.vocab_size) {
      return fields.Fail("logit_bias", "has a key that is no token id: \"" + key.substr(0, 40) + "\"");
    }
    if (!value.is_number() || !(std::abs(value.get<double>()) <= 100)) {
      return fields.Fail("logit_bias", "has a value outside of -100..100 for token " + key);
    }
    if (std::ranges::any_of(params.logit_bias, [token = token](const auto& entry) { return entry.first == token; })) {
      return fields.Fail("logit_bias", "names token " + std::to_string(token) + " twice");  // "7" and "07"
    }
    params.logit_bias.emplace_back(token, value.get<float>());
  }
}

void ReadStops(FieldReader& fields, const OptionLimits& limits, GenerationOptions& options) {
  if (const Json* stop = fields.Find("stop")) {
    std::vector<const Json*> items;
    if (stop->is_array()) {
      for (const auto& item : *stop) items.push_back(&item);
    } else {
      items.push_back(stop);
    }
    if (items.size() > kStopsMax) return fields.Fail("stop", "has more than " + std::to_string(kStopsMax) + " strings");
    for (const Json* item : items) {
      if (!item->is_string()) return fields.Fail("stop", "must be a string or a list of strings");
      const auto& text = item->get_ref<const std::string&>();
      if (text.empty()) return fields.Fail("stop", "has an empty string");
      if (text.size() > kStopBytesMax) return fields.Fail("stop", "has a string of more than " + std::to_string(kStopBytesMax) + " bytes");
      options.stops.push_back(text);
    }
  }
  if (const Json* ids = fields.Find("stop_token_ids")) {
    if (!ids->is_array() || ids->size() > 128) return fields.Fail("stop_token_ids", "must be a list of at most 128 token ids");
    for (const auto& id : *ids) {
      if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() >= limits.vocab_size) {
        return fields.Fail("stop_token_ids", "has an entry that is no token id");
      }
      options.stop_token_ids.push_back(id.get<int32_t>());
    }
  }
}

void Guide(FieldReader& fields, GenerationOptions& options, GuidedDecoding::Kind kind, std::string text, const char* param) {
  if (options.guided.kind != GuidedDecoding::Kind::kNone) {
    return fields.Fail(param, "cannot be combined with " + options.guided.param);
  }
  options.guided = {.kind = kind, .text = std::move(text), .param = param};
}

void ReadResponseFormat(FieldReader& fields, GenerationOptions& options) {
  using Kind = GuidedDecoding::Kind;
  const Json* format = fields.Find("response_format");
  if (!format) return;
  if (!format->is_object()) return fields.Fail("response_format", "must be an object");
  FieldReader inner(*format, "response_format.");
  const std::string type = inner.String("type").value_or("");
  if (type == "text") return;
  if (type == "json_object") return Guide(fields, options, Kind::kAnyJson, "", "response_format");
  if (type != "json_schema") return fields.Fail("response_format.type", "must be text, json_object or json_schema");
  const Json* wrapper = inner.Find("json_schema");
  if (!wrapper || !wrapper->is_object()) return fields.Fail("response_format.json_schema", "must be an object");
  const auto schema = wrapper->find("schema");
  if (schema == wrapper->end() || !(schema->is_object() || schema->is_boolean())) {
    return fields.Fail("response_format.json_schema.schema", "must be a JSON schema");
  }
  Guide(fields, options, Kind::kJsonSchema, DumpJson(*schema), "response_format.json_schema.schema");
}

// vLLM's extra fields; OpenAI's Python client passes them through extra_body.
void ReadGuided(FieldReader& fields, GenerationOptions& options) {
  using Kind = GuidedDecoding::Kind;
  if (const Json* schema = fields.Find("guided_json")) {
    if (schema->is_string()) {
      auto parsed = ParseJson(schema->get_ref<const std::string&>(), {});
      if (!parsed.ok()) return fields.Fail("guided_json", "is not a JSON schema: " + parsed.status().message());
      Guide(fields, options, Kind::kJsonSchema, schema->get<std::string>(), "guided_json");
    } else if (schema->is_object()) {
      Guide(fields, options, Kind::kJsonSchema, DumpJson(*schema), "guided_json");
    } else {
      fields.Fail("guided_json", "must be a JSON schema");
    }
  }
  if (auto regex = fields.String("guided_regex")) Guide(fields, options, Kind::kRegex, *regex, "guided_regex");
  if (auto grammar = fields.String("guided_grammar")) Guide(fields, options, Kind::kGrammar, *grammar, "guided_grammar");
}

void ReadStreaming(FieldReader& fields, GenerationOptions& options) {
  options.stream = fields.Boolean("stream").value_or(false);
  const Json* stream_options = fields.Find("stream_options");
  if (!stream_options) return;
  if (!stream_options->is_object()) return fields.Fail("stream_options", "must be an object");
  if (!options.stream) return fields.Fail("stream_options", "needs stream: true");
  FieldReader inner(*stream_options, "stream_options.");
  options.include_usage = inner.Boolean("include_usage").value_or(false);
  options.continuous_usage = inner.Boolean("continuous_usage_stats").value_or(false);
  if (inner.error()) fields.Fail("stream_options", "must hold booleans");
}

}  // namespace

OrError<GenerationOptions> ParseGenerationOptions(const Json& body, const GenerationDefaults& defaults,
                                                  const OptionLimits& limits) {
  GenerationOptions options;
  FieldReader fields(body, "");
  ReadSampling(fields, defaults, options.params);
  ReadLogitBias(fields, limits, options.params);
  ReadStops(fields, limits, options);
  ReadResponseFormat(fields, options);
  ReadGuided(fields, options);
  ReadStreaming(fields, options);
  options.n = static_cast<int32_t>(fields.Integer("n", 1, limits.choices_max).value_or(1));
  if (auto best_of = fields.Integer("best_of", 1, limits.choices_max); best_of && *best_of != options.n) {
    fields.Fail("best_of", "must equal n: choosing among samples is not offered");
  }
  // The chat name wins, as it is the newer one.
  for (const char* name : {"max_tokens", "max_completion_tokens"}) {
    if (auto count = fields.Integer(name, 1, kInt32Max)) options.max_tokens = static_cast<int32_t>(*count);
  }
  if (options.max_tokens && options.params.min_tokens > *options.max_tokens) {
    fields.Fail("min_tokens", "must not be greater than max_tokens");
  }
  options.include_stop = fields.Boolean("include_stop_str_in_output").value_or(false);
  options.ignore_eos = fields.Boolean("ignore_eos").value_or(false);
  options.skip_special_tokens = fields.Boolean("skip_special_tokens").value_or(true);
  options.return_token_ids = fields.Boolean("return_token_ids").value_or(false);
  fields.String("user");  // type checked, otherwise of no use here
  if (fields.error()) return *fields.error();

  // A token that ends the sequence is part of params even with ignore_eos off only; stop_token_ids always count.
  auto& stop_tokens = options.params.stop_tokens;
  if (!options.ignore_eos) stop_tokens = defaults.eos_tokens;
  stop_tokens.insert(stop_tokens.end(), options.stop_token_ids.begin(), options.stop_token_ids.end());
  std::ranges::sort(stop_tokens);
  stop_tokens.erase(std::unique(stop_tokens.begin(), stop_tokens.end()), stop_tokens.end());
  if (limits.tokenizer_size < limits.vocab_size) options.params.token_limit = limits.tokenizer_size;
  return options;
}

uint64_t ChoiceSeed(uint64_t seed, int32_t index) {
  if (index == 0) return seed;
  uint64_t z = seed + 0x9e3779b97f4a7c15ull * static_cast<uint64_t>(index);  // splitmix64
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

Result<GenerationDefaults> ParseGenerationDefaults(std::string_view text) {
  ASSIGN_OR_RETURN(const Json json, ParseJson(text, {}));
  if (!json.is_object()) return InvalidArgumentError("generation_config.json is not an object");
  GenerationDefaults defaults;
  FieldReader fields(json, "generation_config.json ");
  if (auto v = fields.Number("temperature", 0, 2)) defaults.temperature = static_cast<float>(*v);
  if (auto v = fields.Number("top_p", 1e-6, 1)) defaults.top_p = static_cast<float>(*v);
  if (auto v = fields.Integer("top_k", 0, kInt32Max)) defaults.top_k = static_cast<int32_t>(*v);
  if (auto v = fields.Number("min_p", 0, 0.999999)) defaults.min_p = static_cast<float>(*v);
  if (auto v = fields.Number("repetition_penalty", 1e-6, 100)) defaults.repetition_penalty = static_cast<float>(*v);
  if (auto v = fields.Boolean("do_sample"); v && !*v) defaults.temperature = 0;
  if (const Json* eos = fields.Find("eos_token_id")) {
    const Json list = eos->is_array() ? *eos : Json::array({*eos});
    for (const auto& id : list) {
      if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() > kInt32Max) {
        return InvalidArgumentError("generation_config.json eos_token_id must hold token ids");
      }
      defaults.eos_tokens.push_back(id.get<int32_t>());
    }
  }
  if (fields.error()) return InvalidArgumentError(fields.error()->message);
  return defaults;
}

}  // namespace qwen::server
