// stage/server/http_server.h — HTTP/1.1 over Boost.Beast: accepts, reads whole requests, hands them to a handler.
//
// Everything is bounded: connections, header and body bytes, body bytes of all connections together, the time that each
// phase may take, and the bytes that wait for a slow reader. Keep-alive; pipelined requests are answered in order, one at
// a time. While a request is being answered the socket is read on, so that a client that goes away (FIN or RST; a
// half-closed client counts as gone) is noticed although nothing is being written.
//
// Thread safety: all members from any thread. The handler runs on an I/O thread: it must not block.
#pragma once
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "stage/base/status.h"
#include "stage/server/http_types.h"

namespace qwen::server {

class HttpServer {
 public:
  struct Options {
    std::string address = "0.0.0.0";
    uint16_t port = 0;  // 0: any free one; port() says which
    int io_threads = 2;
    int connections_max = 1024;
    uint32_t header_bytes_max = 32 << 10;
    uint64_t body_bytes_max = 64ull << 20;          // a 16-megapixel PNG in base64 fits
    uint64_t body_bytes_in_flight_max = 1ull << 30;  // of all connections together; then 503
    size_t send_buffer_bytes_max = 1 << 20;  // a stream's bytes that wait for the client; beyond it the client is dropped
    int socket_send_bytes = 0;               // SO_SNDBUF; 0: the system's default
    std::chrono::milliseconds header_timeout{10'000};
    std::chrono::milliseconds body_timeout{20'000};  // plus a second for every `body_bytes_per_second`
    uint64_t body_bytes_per_second = 128 << 10;
    std::chrono::milliseconds idle_timeout{75'000};   // between requests of a kept-alive connection
    std::chrono::milliseconds write_timeout{30'000};  // one write makes no end
    std::chrono::milliseconds linger_timeout{2'000};  // reads that drain after a refusal, so that the client sees it
  };
  using Handler = std::function<void(HttpRequest, std::shared_ptr<ResponseWriter>)>;
  // Looks at a request whose body was not read yet; a response refuses it. `body` is empty.
  using Precheck = std::function<std::optional<HttpResponse>(const HttpRequest&)>;
  using OnResponse = std::function<void(int status)>;

  static Result<std::unique_ptr<HttpServer>> Start(const Options& options, Precheck precheck, Handler handler,
                                                   OnResponse on_response);
  ~HttpServer();  // closes every connection and joins the threads

  uint16_t port() const;
  int connections() const;
  // Closes the listening socket and idle connections, both a moment later on the server's threads; those that are being
  // answered end with "Connection: close".
  void StopAccepting();

 private:
  struct Impl;
  explicit HttpServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace qwen::server
