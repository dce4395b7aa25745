// stage/text/tokenizer.h — a checkpoint's tokenizer, as transformers 5.17 runs it: the crate `tokenizers` over its
// tokenizer.json. Byte-level BPE only (every Qwen): a token decodes to bytes, and a character may span tokens.
//
// Ownership: everything returned is a value. Thread safety: immutable after Load; any thread.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "stage/base/status.h"

struct qt_tokenizer;

namespace qwen::text {

class Tokenizer {
 public:
  // Reads tokenizer.json of `checkpoint_dir`. kNotFound without one, kInvalidArgument when it is not what we support.
  static Result<std::unique_ptr<Tokenizer>> Load(const std::string& checkpoint_dir);
  // The same from the text of a tokenizer.json.
  static Result<std::unique_ptr<Tokenizer>> FromJson(std::string_view json);
  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // Added tokens ("<|im_end|>", "<think>") in `text` become their id, as in transformers: a caller who must not let a
  // user write control tokens has to look for them. kInvalidArgument when `text` is not UTF-8.
  Result<std::vector<int32_t>> Encode(std::string_view text, bool add_special_tokens) const;
  // decode(clean_up_tokenization_spaces=False): bytes that are no UTF-8 become U+FFFD; ids without a token add nothing.
  Result<std::string> Decode(std::span<const int32_t> ids, bool skip_special_tokens) const;

  int32_t size() const { return size_; }  // len(tokenizer): ids >= size() are padding columns of the logits
  std::optional<int32_t> TokenToId(std::string_view token) const;
  std::string IdToToken(int32_t id) const;   // the vocabulary string ("Ġworld"); "" if none
  std::string TokenBytes(int32_t id) const;  // the bytes it decodes to (" world"); "" if none
  bool IsSpecial(int32_t id) const;          // dropped by skip_special_tokens; <tool_call> and <think> are not special

  const qt_tokenizer* handle() const { return handle_; }  // for constraint.cc

 private:
  explicit Tokenizer(qt_tokenizer* handle);
  qt_tokenizer* const handle_;
  const int32_t size_;
};

}  // namespace qwen::text
