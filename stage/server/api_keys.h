// stage/server/api_keys.h — the API keys that may use the model. Thread safety: immutable after Load.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "stage/base/status.h"

namespace qwen::server {

class ApiKeys {
 public:
  ApiKeys() = default;  // no keys: everybody may
  // One key a line; white space around it, empty lines and lines that begin with # do not count. A file without a key is
  // kInvalidArgument: it would lock out everybody, or let in everybody, and neither can be meant.
  static Result<ApiKeys> Load(const std::string& path);
  static Result<ApiKeys> Parse(std::string_view text);

  bool required() const { return !digests_.empty(); }
  // `authorization` is the header's value, "Bearer <key>". Takes the same time for every wrong key of equal length: keys
  // are compared as SHA-256 digests, all of them, without an early end.
  bool Allows(std::string_view authorization) const;

 private:
  using Digest = std::array<uint8_t, 32>;
  static Digest DigestOf(std::string_view key);
  std::vector<Digest> digests_;
};

}  // namespace qwen::server
