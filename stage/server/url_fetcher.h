// stage/server/url_fetcher.h — the bytes behind the URL of an image or video: data: always; http: and https: only from
// hosts that the operator allowed, so that a client cannot make the head read what only the head can reach.
//
// Bounded: bytes, time, redirects (each to an allowed host again). Thread safety: immutable; Fetch blocks, so it belongs
// on the worker pool.
#pragma once
#include <chrono>
#include <set>
#include <string>

#include "stage/base/status.h"

namespace qwen::server {

class UrlFetcher {
 public:
  struct Options {
    std::set<std::string> allowed_hosts;  // lower case, without a port; exact names
    uint64_t bytes_max = 64ull << 20;
    std::chrono::milliseconds timeout{10'000};  // of a whole Fetch
    int redirects_max = 3;
    std::string ca_file;  // PEM; empty: the system's
  };
  explicit UrlFetcher(Options options) : options_(std::move(options)) {}

  // kInvalidArgument: not such a URL, a host that is not allowed, a bad answer, too large. kDeadlineExceeded and
  // kUnavailable: the host does not answer.
  Result<std::string> Fetch(const std::string& url) const;

 private:
  const Options options_;
};

struct ParsedUrl {
  bool https = false;
  std::string host;    // lower case
  std::string port;
  std::string target;  // path and query, at least "/"
};
// http: or https: only, no user info; kInvalidArgument otherwise.
Result<ParsedUrl> ParseUrl(std::string_view url);

}  // namespace qwen::server
