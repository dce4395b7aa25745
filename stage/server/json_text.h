// stage/server/json_text.h — JSON of strangers: bounded before it is parsed, and typed field access that names the field.
//
// nlohmann-json is quadratic in the keys of one ordered object and recursive when it writes, so both are bounded by a scan
// of the raw text that costs one pass.
// Thread safety: pure functions; FieldReader is a local.
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "stage/base/status.h"
#include "stage/server/errors.h"

namespace qwen::server {

using Json = nlohmann::ordered_json;  // ordered: a template prints tools with their keys as the client sent them

struct JsonLimits {
  int depth = 64;
  int64_t values = 2'000'000;  // commas and brackets; a million token ids fit
  int64_t keys = 1024;         // of one object
};
Result<Json> ParseJson(std::string_view text, const JsonLimits& limits);
// UTF-8, no escapes beyond the necessary; bytes that are no UTF-8 become U+FFFD.
std::string DumpJson(const Json& json);

// Reads optional fields of one object and remembers the first mistake. null counts as absent, as OpenAI clients mean it.
class FieldReader {
 public:
  // REQUIRES: object.is_object(); both outlive the reader. `prefix` precedes names in errors ("messages[0].").
  FieldReader(const Json& object, std::string prefix) : object_(object), prefix_(std::move(prefix)) {}

  const Json* Find(const char* name) const;  // nullptr: absent or null
  std::optional<double> Number(const char* name, double low, double high);
  std::optional<int64_t> Integer(const char* name, int64_t low, int64_t high);
  std::optional<bool> Boolean(const char* name);
  std::optional<std::string> String(const char* name);

  void Fail(const char* name, const std::string& message);
  const std::optional<ApiError>& error() const { return error_; }

 private:
  const Json& object_;
  const std::string prefix_;
  std::optional<ApiError> error_;
};

}  // namespace qwen::server
