// stage/text/detokenizer.h — ids to text, one at a time. The concatenation of every Push and of Finish equals
// Tokenizer::Decode of all ids; a character that spans tokens appears with the token that completes it.
//
// Bytes that can never become UTF-8 turn into U+FFFD as String::from_utf8_lossy (and so transformers) does: one for
// each maximal ill-formed part (Unicode 15, section 3.9, "substitution of maximal subparts"). Thread safety: none; one
// per stream. `tokenizer` must outlive it.
#pragma once
#include <string>
#include <string_view>

#include "stage/text/tokenizer.h"

namespace qwen::text {

// UTF-8 from arbitrary bytes that come in pieces. Holds back at most 3 bytes.
class Utf8Stream {
 public:
  std::string Push(std::string_view bytes);
  std::string Finish();  // what is held back becomes one U+FFFD; the stream is then as new

 private:
  std::string held_;  // a proper prefix of a well-formed character
};

class Detokenizer {
 public:
  Detokenizer(const Tokenizer& tokenizer, bool skip_special_tokens);
  std::string Push(int32_t id);  // often "": a special token that is skipped, or part of a character
  std::string Finish();

 private:
  const Tokenizer& tokenizer_;
  const bool skip_special_tokens_;
  Utf8Stream stream_;
};

}  // namespace qwen::text
