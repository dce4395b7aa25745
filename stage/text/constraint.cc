#include "stage/text/constraint.h"

#include <algorithm>

#include "stage/text/ffi.h"
#include "stage/text/qwen_text.h"

namespace qwen::text {

TokenConstraint::TokenConstraint(qt_constraint* handle, std::vector<int32_t> eos)
    : handle_(handle), eos_(std::move(eos)) {}
TokenConstraint::~TokenConstraint() { qt_constraint_free(handle_); }

void TokenConstraint::FillMask(std::vector<uint32_t>& mask) {
  if (broken_.ok()) {
    std::string message;
    const qt_code code = qt_constraint_mask(handle_, mask.data(), mask.size(), AppendToString, &message);
    if (code == QT_OK) return;
    broken_ = StatusOf(code, std::move(message));
  }
  // A mask of nothing would leave the sampler without a token: end the sequence instead.
  std::fill(mask.begin(), mask.end(), 0u);
  for (const int32_t id : eos_) mask[id / 32] |= 1u << (id % 32);
}

Status TokenConstraint::Accept(int32_t token) {
  if (!broken_.ok()) return broken_;
  std::string message;
  const qt_code code = qt_constraint_accept(handle_, token, AppendToString, &message);
  if (code == QT_OK) return OkStatus();
  const Status status = StatusOf(code, std::move(message));
  if (code != QT_INVALID_ARGUMENT) broken_ = status;
  return status;
}

bool TokenConstraint::finished() const { return broken_.ok() && qt_constraint_finished(handle_) != 0; }

ConstraintCompiler::ConstraintCompiler(qt_compiler* handle, std::vector<int32_t> eos)
    : handle_(handle), eos_(std::move(eos)) {}
ConstraintCompiler::~ConstraintCompiler() { qt_compiler_free(handle_); }

Result<std::unique_ptr<ConstraintCompiler>> ConstraintCompiler::Load(const Tokenizer& tokenizer,
                                                                     const std::string& checkpoint_dir,
                                                                     int32_t vocab_size, std::vector<int32_t> eos) {
  qt_compiler* handle = nullptr;
  std::string message;
  const qt_code code =
      qt_compiler_new(tokenizer.handle(), vocab_size, eos.data(), eos.size(), &handle, AppendToString, &message);
  if (code != QT_OK) return StatusOf(code, std::move(message)).WithContext(checkpoint_dir);
  return std::unique_ptr<ConstraintCompiler>(new ConstraintCompiler(handle, std::move(eos)));
}

Result<std::unique_ptr<TokenConstraint>> ConstraintCompiler::Compile(int grammar, std::string_view text) const {
  qt_constraint* handle = nullptr;
  std::string message;
  const qt_code code = qt_constraint_new(handle_, static_cast<qt_grammar>(grammar), text.data(), text.size(), &handle,
                                         AppendToString, &message);
  if (code != QT_OK) return StatusOf(code, std::move(message));
  return std::unique_ptr<TokenConstraint>(new TokenConstraint(handle, eos_));
}

Result<std::unique_ptr<TokenConstraint>> ConstraintCompiler::JsonSchema(std::string_view schema_json) const {
  return Compile(QT_JSON_SCHEMA, schema_json);
}
Result<std::unique_ptr<TokenConstraint>> ConstraintCompiler::AnyJsonObject() const {
  return Compile(QT_JSON_SCHEMA, R"({"type":"object"})");
}
Result<std::unique_ptr<TokenConstraint>> ConstraintCompiler::Regex(std::string_view regex) const {
  return Compile(QT_REGEX, regex);
}
Result<std::unique_ptr<TokenConstraint>> ConstraintCompiler::Lark(std::string_view grammar) const {
  return Compile(QT_LARK, grammar);
}

}  // namespace qwen::text
