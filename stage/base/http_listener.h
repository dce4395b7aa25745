// stage/base/http_listener.h — a small HTTP/1.1 listener for /healthz, /readyz and /metrics, mounted by every binary.
// GET and HEAD only, one request a connection, bounded (16 connections, 8 KiB of header, 5 s each). The OpenAI API is
// not served by this: server/ has its own.
//
// Thread safety: Start, port and the destructor by the owner; handlers run on the listener's own thread, one at a time.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "stage/base/status.h"

namespace qwen {

struct HttpReply {
  int status = 200;
  std::string body;
  std::string content_type = "text/plain; charset=utf-8";
};

class HttpListener {
 public:
  struct Options {
    std::string address = "0.0.0.0";
    uint16_t port = 0;  // 0: any free one; port() says which
  };
  using Routes = std::map<std::string, std::function<HttpReply()>>;  // exact path ("/metrics") -> handler
  static Result<std::unique_ptr<HttpListener>> Start(const Options& options, Routes routes);
  ~HttpListener();  // stops listening and joins
  uint16_t port() const;

 private:
  struct Impl;
  explicit HttpListener(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace qwen
