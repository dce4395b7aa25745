// controller/ctl/http_client.h — HTTP/1.1 to a server of ours: a small GET, and a POST whose answer streams. One connection a
// call, every wait bounded. Boost.Beast stays in http_client.cc. Thread safety: calls are independent; any thread.
#pragma once
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <string_view>

#include "stage/base/status.h"

namespace qwen::ctl {

struct Url {
  std::string host;
  uint16_t port = 80;
  std::string prefix;  // path before the API's own, without a trailing '/'
};
// "http://HOST[:PORT][/PREFIX]". kInvalidArgument otherwise; TLS is not spoken here (put a proxy in front, or use port-forward).
Result<Url> ParseUrl(std::string_view text);

struct HttpResult {
  int status = 0;
  std::string body;  // of GET, and of a POST that was not answered 200; at most kBodyBytesMax
};
inline constexpr size_t kBodyBytesMax = 16 << 20;

// kUnavailable: cannot connect or the connection broke; kDeadlineExceeded; kDataLoss: not HTTP, or too large.
Result<HttpResult> HttpGet(const Url& url, std::string_view path, std::chrono::milliseconds timeout,
                           const std::map<std::string, std::string>& headers = {});

struct PostOptions {
  std::string path;
  std::string body;
  std::string content_type = "application/json";
  std::map<std::string, std::string> headers;
  std::chrono::milliseconds connect_timeout{5000};
  std::chrono::milliseconds silence_timeout{300000};  // between two pieces of the answer: a long prefill is silent
};
// Gives the answer's body piece by piece while it is 200. `on_data` returning false ends the call early (OK, status 200).
Result<HttpResult> HttpPostStream(const Url& url, const PostOptions& options, const std::function<bool(std::string_view)>& on_data);

}  // namespace qwen::ctl
