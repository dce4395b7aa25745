#include "stage/server/model_assets.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <fstream>
#include <sstream>

namespace qwen::server {
namespace {

Result<std::string> ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return ErrnoError("cannot read " + path, errno);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

Result<GenerationDefaults> LoadDefaults(const std::string& dir, const text::Tokenizer& tokenizer) {
  GenerationDefaults defaults;
  auto text = ReadFile(dir + "/generation_config.json");
  if (text.ok()) {
    auto parsed = ParseGenerationDefaults(*text);
    if (!parsed.ok()) return parsed.status().WithContext(dir);
    defaults = std::move(*parsed);
  } else if (text.status().code() != StatusCode::kNotFound) {
    return text.status();
  }
  if (defaults.eos_tokens.empty()) {  // the file is optional in a checkpoint; what ends a turn is not
    for (const char* name : {"<|im_end|>", "<|endoftext|>"}) {
      if (auto id = tokenizer.TokenToId(name)) defaults.eos_tokens.push_back(*id);
    }
  }
  if (defaults.eos_tokens.empty()) return InvalidArgumentError(dir + ": neither generation_config.json nor the tokenizer names an end-of-sequence token");
  return defaults;
}

}  // namespace

Result<std::unique_ptr<ModelAssets>> ModelAssets::Load(const std::string& dir, const std::string& model_id, int32_t max_model_len) {
  auto assets = std::make_unique<ModelAssets>();
  assets->model_id = model_id;
  ASSIGN_OR_RETURN(assets->shape, contract::LoadModelShape(dir));
  ASSIGN_OR_RETURN(assets->tokenizer, text::Tokenizer::Load(dir));
  if (assets->tokenizer->size() > assets->shape.vocab) {
    return InvalidArgumentError(dir + ": the tokenizer has " + std::to_string(assets->tokenizer->size()) + " tokens, config.json's vocab_size is " +
                                std::to_string(assets->shape.vocab));
  }
  auto chat_template = text::ChatTemplate::Load(dir);
  if (chat_template.ok()) {
    assets->chat_template = std::move(*chat_template);
  } else if (chat_template.status().code() != StatusCode::kNotFound) {
    return chat_template.status();
  }
  ASSIGN_OR_RETURN(assets->defaults, LoadDefaults(dir, *assets->tokenizer));
  std::erase_if(assets->defaults.eos_tokens, [&](int32_t id) { return id >= assets->shape.vocab; });
  if (assets->defaults.eos_tokens.empty()) return InvalidArgumentError(dir + ": no eos_token_id is below vocab_size");
  ASSIGN_OR_RETURN(assets->constraints,
                   text::ConstraintCompiler::Load(*assets->tokenizer, dir, assets->shape.vocab, assets->defaults.eos_tokens));
  if (assets->shape.vision) {
    ASSIGN_OR_RETURN(assets->processor, preprocess::LoadProcessorConfig(dir));
  }
  assets->max_model_len = max_model_len > 0 ? max_model_len : assets->shape.max_positions;
  if (assets->max_model_len < 2 || (assets->shape.max_positions > 0 && assets->max_model_len > assets->shape.max_positions)) {
    return InvalidArgumentError("max-model-len " + std::to_string(assets->max_model_len) + " is outside of 2.." +
                                std::to_string(assets->shape.max_positions) + " (max_position_embeddings)");
  }
  assets->created_unix =
      std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
  return assets;
}

}  // namespace qwen::server
