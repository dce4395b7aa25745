#include "stage/text/detokenizer.h"

#include <cstdint>

namespace qwen::text {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

struct Unit {
  size_t size;  // bytes taken; 0: the bytes end inside a character that may still complete
  bool valid;
};

// The first character of `bytes`, or its first maximal ill-formed part. Table 3-7 of the Unicode Standard: only the
// second byte's range depends on the first byte. REQUIRES: bytes is not empty.
Unit FirstUnit(std::string_view bytes) {
  const auto at = [&](size_t i) { return static_cast<uint8_t>(bytes[i]); };
  const uint8_t lead = at(0);
  if (lead < 0x80) return {1, true};
  if (lead < 0xC2 || lead > 0xF4) return {1, false};
  const size_t size = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  uint8_t low = 0x80;
  uint8_t high = 0xBF;
  if (lead == 0xE0) low = 0xA0;   // shorter forms exist
  if (lead == 0xED) high = 0x9F;  // surrogates
  if (lead == 0xF0) low = 0x90;   // shorter forms exist
  if (lead == 0xF4) high = 0x8F;  // above U+10FFFF
  for (size_t i = 1; i < size; ++i) {
    if (i == bytes.size()) return {0, false};
    if (at(i) < low || at(i) > high) return {i, false};
    low = 0x80;
    high = 0xBF;
  }
  return {size, true};
}

}  // namespace

std::string Utf8Stream::Push(std::string_view bytes) {
  held_.append(bytes);
  std::string text;
  std::string_view rest = held_;
  while (!rest.empty()) {
    const Unit unit = FirstUnit(rest);
    if (unit.size == 0) break;
    text.append(unit.valid ? rest.substr(0, unit.size) : kReplacement);
    rest.remove_prefix(unit.size);
  }
  held_ = std::string(rest);
  return text;
}

std::string Utf8Stream::Finish() {
  if (held_.empty()) return {};
  held_.clear();
  return std::string(kReplacement);
}

Detokenizer::Detokenizer(const Tokenizer& tokenizer, bool skip_special_tokens)
    : tokenizer_(tokenizer), skip_special_tokens_(skip_special_tokens) {}

std::string Detokenizer::Push(int32_t id) {
  if (skip_special_tokens_ && tokenizer_.IsSpecial(id)) return {};
  return stream_.Push(tokenizer_.TokenBytes(id));
}

std::string Detokenizer::Finish() { return stream_.Finish(); }

}  // namespace qwen::text
