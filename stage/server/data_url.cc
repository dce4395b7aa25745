#include "stage/server/data_url.h"

#include <array>
#include <cctype>
#include <cstdint>

namespace qwen::server {
namespace {

constexpr std::array<int8_t, 256> MakeAlphabet() {
  std::array<int8_t, 256> table{};
  for (auto& entry : table) entry = -1;
  int8_t value = 0;
  for (char c = 'A'; c <= 'Z'; ++c) table[static_cast<unsigned char>(c)] = value++;
  for (char c = 'a'; c <= 'z'; ++c) table[static_cast<unsigned char>(c)] = value++;
  for (char c = '0'; c <= '9'; ++c) table[static_cast<unsigned char>(c)] = value++;
  table['+'] = table['-'] = 62;
  table['/'] = table['_'] = 63;
  return table;
}
constexpr auto kAlphabet = MakeAlphabet();

bool EqualsIgnoreCase(std::string_view a, std::string_view b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::tolower(static_cast<unsigned char>(a[i])) != std::tolower(static_cast<unsigned char>(b[i]))) return false;
  }
  return true;
}

}  // namespace

std::optional<std::string> DecodeBase64(std::string_view text) {
  std::string out;
  out.reserve(text.size() / 4 * 3 + 3);
  uint32_t bits = 0;
  int count = 0;    // sextets in `bits`
  int padding = 0;
  for (const char c : text) {
    if (c == ' ' || c == '\n' || c == '\r' || c == '\t') continue;
    if (c == '=') {
      if (++padding > 2) return std::nullopt;
      continue;
    }
    const int8_t value = kAlphabet[static_cast<unsigned char>(c)];
    if (value < 0 || padding > 0) return std::nullopt;
    bits = bits << 6 | static_cast<uint32_t>(value);
    if (++count == 4) {
      out.push_back(static_cast<char>(bits >> 16));
      out.push_back(static_cast<char>(bits >> 8));
      out.push_back(static_cast<char>(bits));
      bits = 0;
      count = 0;
    }
  }
  if (count == 1 || (padding > 0 && count + padding != 4)) return std::nullopt;
  if (count >= 2) {
    bits <<= 6 * (4 - count);
    out.push_back(static_cast<char>(bits >> 16));
    if (count == 3) out.push_back(static_cast<char>(bits >> 8));
  }
  return out;
}

bool IsDataUrl(std::string_view url) { return url.size() >= 5 && EqualsIgnoreCase(url.substr(0, 5), "data:"); }

Result<DataUrl> DecodeDataUrl(std::string_view url) {
  if (!IsDataUrl(url)) return InvalidArgumentError("not a data: URL");
  url.remove_prefix(5);
  const size_t comma = url.find(',');
  if (comma == std::string_view::npos || comma > 1024) return InvalidArgumentError("a data: URL without a comma");
  const std::string_view head = url.substr(0, comma);
  const size_t last = head.rfind(';');
  if (last == std::string_view::npos || !EqualsIgnoreCase(head.substr(last + 1), "base64")) {
    return InvalidArgumentError("a data: URL must be base64");
  }
  DataUrl result;
  result.media_type = std::string(head.substr(0, head.find(';')));
  auto bytes = DecodeBase64(url.substr(comma + 1));
  if (!bytes) return InvalidArgumentError("broken base64 in a data: URL");
  result.bytes = std::move(*bytes);
  return result;
}

}  // namespace qwen::server
