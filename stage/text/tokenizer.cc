#include "stage/text/tokenizer.h"

#include "stage/text/ffi.h"
#include "stage/text/qwen_text.h"

namespace qwen::text {

Tokenizer::Tokenizer(qt_tokenizer* handle) : handle_(handle), size_(qt_tokenizer_size(handle)) {}
Tokenizer::~Tokenizer() { qt_tokenizer_free(handle_); }

Result<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::string& checkpoint_dir) {
  const std::string path = checkpoint_dir + "/tokenizer.json";
  ASSIGN_OR_RETURN(const std::string json, ReadFile(path));
  Result<std::unique_ptr<Tokenizer>> tokenizer = FromJson(json);
  if (!tokenizer.ok()) return tokenizer.status().WithContext(path);
  return tokenizer;
}

Result<std::unique_ptr<Tokenizer>> Tokenizer::FromJson(std::string_view json) {
  qt_tokenizer* handle = nullptr;
  std::string message;
  const qt_code code = qt_tokenizer_new(json.data(), json.size(), &handle, AppendToString, &message);
  if (code != QT_OK) return StatusOf(code, std::move(message));
  return std::unique_ptr<Tokenizer>(new Tokenizer(handle));
}

Result<std::vector<int32_t>> Tokenizer::Encode(std::string_view text, bool add_special_tokens) const {
  std::string bytes;  // the ids, or the message
  const qt_code code =
      qt_tokenizer_encode(handle_, text.data(), text.size(), add_special_tokens, AppendToString, &bytes);
  if (code != QT_OK) return StatusOf(code, std::move(bytes));
  std::vector<int32_t> ids(bytes.size() / sizeof(int32_t));
  bytes.copy(reinterpret_cast<char*>(ids.data()), bytes.size());
  return ids;
}

Result<std::string> Tokenizer::Decode(std::span<const int32_t> ids, bool skip_special_tokens) const {
  std::string text;
  const qt_code code = qt_tokenizer_decode(handle_, ids.data(), ids.size(), skip_special_tokens, AppendToString, &text);
  if (code != QT_OK) return StatusOf(code, std::move(text));
  return text;
}

std::optional<int32_t> Tokenizer::TokenToId(std::string_view token) const {
  const int32_t id = qt_tokenizer_token_to_id(handle_, token.data(), token.size());
  if (id < 0) return std::nullopt;
  return id;
}

std::string Tokenizer::IdToToken(int32_t id) const {
  qt_token token;
  return qt_tokenizer_token(handle_, id, &token) ? std::string(token.name, token.name_size) : std::string();
}

std::string Tokenizer::TokenBytes(int32_t id) const {
  qt_token token;
  if (!qt_tokenizer_token(handle_, id, &token)) return {};
  return std::string(reinterpret_cast<const char*>(token.bytes), token.bytes_size);
}

bool Tokenizer::IsSpecial(int32_t id) const {
  qt_token token;
  return qt_tokenizer_token(handle_, id, &token) && token.special != 0;
}

}  // namespace qwen::text
