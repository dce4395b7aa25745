#include "stage/server/api_keys.h"

#include <openssl/crypto.h>
#include <openssl/sha.h>

#include <cctype>
#include <cerrno>
#include <fstream>
#include <sstream>

namespace qwen::server {

ApiKeys::Digest ApiKeys::DigestOf(std::string_view key) {
  Digest digest;
  SHA256(reinterpret_cast<const unsigned char*>(key.data()), key.size(), digest.data());
  return digest;
}

Result<ApiKeys> ApiKeys::Parse(std::string_view text) {
  ApiKeys keys;
  while (!text.empty()) {
    const size_t end = std::min(text.find('\n'), text.size());
    std::string_view line = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    while (!line.empty() && std::isspace(static_cast<unsigned char>(line.front()))) line.remove_prefix(1);
    while (!line.empty() && std::isspace(static_cast<unsigned char>(line.back()))) line.remove_suffix(1);
    if (!line.empty() && line.front() != '#') keys.digests_.push_back(DigestOf(line));
  }
  if (keys.digests_.empty()) return InvalidArgumentError("the API key file holds no key");
  return keys;
}

Result<ApiKeys> ApiKeys::Load(const std::string& path) {
  std::ifstream file(path);
  if (!file) return ErrnoError("cannot read the API keys in " + path, errno);
  std::ostringstream text;
  text << file.rdbuf();
  return Parse(text.str());
}

bool ApiKeys::Allows(std::string_view authorization) const {
  if (!required()) return true;
  constexpr std::string_view kScheme = "bearer ";
  if (authorization.size() <= kScheme.size()) return false;
  for (size_t i = 0; i < kScheme.size(); ++i) {
    if (std::tolower(static_cast<unsigned char>(authorization[i])) != kScheme[i]) return false;
  }
  const Digest digest = DigestOf(authorization.substr(kScheme.size()));
  int matches = 0;
  for (const auto& known : digests_) matches |= CRYPTO_memcmp(digest.data(), known.data(), digest.size()) == 0 ? 1 : 0;
  return matches != 0;
}

}  // namespace qwen::server
