// stage/server/data_url.h — "data:image/png;base64,…" -> bytes. Thread safety: pure functions.
#pragma once
#include <optional>
#include <string>
#include <string_view>

#include "stage/base/status.h"

namespace qwen::server {

struct DataUrl {
  std::string media_type;  // "image/png"; empty when not given
  std::string bytes;
};
bool IsDataUrl(std::string_view url);
// kInvalidArgument: not base64 (the only encoding taken), or broken.
Result<DataUrl> DecodeDataUrl(std::string_view url);
// RFC 4648, standard or URL-safe alphabet, padding optional, ASCII white space ignored.
std::optional<std::string> DecodeBase64(std::string_view text);

}  // namespace qwen::server
