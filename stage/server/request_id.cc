#include "stage/server/request_id.h"

#include <cctype>
#include <cstdint>
#include <random>

namespace qwen::server {

std::string SaneRequestId(std::string_view text) {
  if (text.empty() || text.size() > 128) return "";
  for (const char c : text) {
    if (!std::isalnum(static_cast<unsigned char>(c)) && c != '.' && c != '_' && c != '-') return "";
  }
  return std::string(text);
}

std::string NewRequestId() {
  thread_local std::mt19937_64 random{std::random_device{}() ^ (uint64_t{std::random_device{}()} << 32)};
  constexpr char kHex[] = "0123456789abcdef";
  std::string id;
  for (int word = 0; word < 2; ++word) {
    uint64_t bits = random();
    for (int i = 0; i < 16; ++i, bits >>= 4) id.push_back(kHex[bits & 15]);
  }
  return id;
}

}  // namespace qwen::server
