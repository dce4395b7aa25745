// stage/server/model_assets.h — everything of a checkpoint that the head needs: tokenizer, chat template, grammars, image
// preprocessing, defaults. No weights.
//
// Thread safety: immutable after Load; all members may be used from any thread.
#pragma once
#include <memory>
#include <optional>
#include <string>

#include "stage/base/status.h"
#include "stage/contract/model_shape.h"
#include "stage/server/generation_options.h"
#include "stage/text/chat_template.h"
#include "stage/text/constraint.h"
#include "stage/text/tokenizer.h"
#include "stage/vision/preprocess/processor_config.h"

namespace qwen::server {

struct ModelAssets {
  std::string model_id;  // the name that clients use
  contract::ModelShape shape;
  std::unique_ptr<text::Tokenizer> tokenizer;
  std::unique_ptr<text::ChatTemplate> chat_template;  // null for base models: then only /v1/completions
  std::unique_ptr<text::ConstraintCompiler> constraints;
  std::optional<preprocess::ProcessorConfig> processor;  // with a vision tower
  GenerationDefaults defaults;
  int32_t max_model_len = 0;  // prompt + output tokens
  int64_t created_unix = 0;   // when it was loaded, for /v1/models

  // `max_model_len` 0: what config.json says. Fails with the file's name in the message.
  static Result<std::unique_ptr<ModelAssets>> Load(const std::string& dir, const std::string& model_id, int32_t max_model_len);

  OptionLimits option_limits() const { return {.vocab_size = shape.vocab, .tokenizer_size = tokenizer->size()}; }
};

}  // namespace qwen::server
