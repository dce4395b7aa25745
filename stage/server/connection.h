// stage/server/connection.h — one client's TCP connection: reads requests one after the other, writes their answers.
//
// Thread safety: everything runs on the connection's strand; the ResponseWriter that it hands out may be used from any
// thread and posts to the strand. Lifetime: kept alive by its pending operations and by writers still held.
#pragma once
#include <atomic>
#include <utility>  // before Asio 1.74, whose awaitable.hpp forgets it
#include <boost/asio.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <memory>
#include <optional>
#include <string>

#include "stage/server/http_server.h"

namespace qwen::server {

// What the connections of one server share. Counters are self-synchronised, the rest is constant.
struct ServerShared {
  boost::asio::io_context context;  // here, because sockets of writers still held must not outlive it
  HttpServer::Options options;
  HttpServer::Precheck precheck;
  HttpServer::Handler handler;
  HttpServer::OnResponse on_response;
  std::atomic<int> connections{0};
  std::atomic<uint64_t> body_bytes_in_flight{0};
  std::atomic<bool> stopping{false};  // answer what was asked, take nothing new
  std::atomic<bool> stopped{false};   // no thread runs `context` any more: writers do nothing
  std::atomic<int> posting{0};        // writers between their look at `stopped` and the end of their post

  // Held by a writer while it hands work to `context`. Work that nobody runs any more would hold its connection, and the
  // connection this struct, and this struct the work: so the server waits for posts under way before it runs the last.
  struct Posting {
    explicit Posting(ServerShared& s) : shared(s) {
      ++shared.posting;
      allowed = !shared.stopped;
    }
    ~Posting() { --shared.posting; }
    Posting(const Posting&) = delete;
    Posting& operator=(const Posting&) = delete;
    ServerShared& shared;
    bool allowed;
  };
};

class Connection : public std::enable_shared_from_this<Connection> {
 public:
  using Socket = boost::asio::basic_stream_socket<boost::asio::ip::tcp, boost::asio::strand<boost::asio::io_context::executor_type>>;
  Connection(Socket socket, std::shared_ptr<ServerShared> shared);
  ~Connection();
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  void Start();
  void Close();         // any thread: drops everything at once
  void CloseWhenIdle();  // any thread: at once between requests, else after the answer

 private:
  friend class ConnectionWriter;
  enum class State { kIdle, kHeader, kBody, kAnswering, kLingering, kClosed };
  using ErrorCode = boost::beast::error_code;

  void WaitForRequest();
  void ReadHeader();
  void OnHeader(ErrorCode error);
  void ReadBody(uint64_t bytes_expected);
  void OnBody(ErrorCode error);
  void Dispatch();
  void Watch();  // reads on while a request is being answered, to see the client go
  void OnWatched(ErrorCode error, size_t bytes);

  // The writer's half; `exchange` tells a late call for an earlier request apart.
  void Reply(uint64_t exchange, HttpResponse response);
  void StartStream(uint64_t exchange, const std::string& content_type);
  void Send(uint64_t exchange, const std::string& bytes);
  void Finish(uint64_t exchange);
  void AbortStream(uint64_t exchange);
  void OnClosed(uint64_t exchange, std::function<void()> closed);

  void Refuse(HttpResponse response);  // answers a request that was not read to its end, then closes
  void FailRead(ErrorCode error);
  void AppendHeader(const HttpResponse& response, bool chunked);
  void Flush();
  void OnFlushed(ErrorCode error);
  void EndExchange();
  void Linger();
  void DrainLingering();
  void Drop(const char* reason);  // closes the socket and tells whoever answers
  void Arm(std::chrono::milliseconds timeout);
  void OnTimeout();
  void ReleaseBody();

  const std::shared_ptr<ServerShared> shared_;  // shared: a connection lives on while somebody holds its writer
  Socket socket_;
  boost::asio::steady_timer timer_;
  uint64_t timer_generation_ = 0;
  boost::beast::flat_buffer buffer_;  // received, not yet parsed: may hold the next pipelined request
  std::optional<boost::beast::http::request_parser<boost::beast::http::string_body>> parser_;
  HttpRequest request_;
  State state_ = State::kIdle;
  uint64_t exchange_ = 0;      // number of the current request
  bool watching_ = false;      // a Watch() read is pending
  bool timed_out_ = false;     // the pending read ends because of our timer
  bool keep_alive_ = false;    // of the current request
  bool close_when_idle_ = false;
  bool head_ = false;          // HEAD: header only
  bool http10_ = false;        // no chunks for an HTTP/1.0 client
  bool header_sent_ = false;
  bool streaming_ = false;
  bool finished_ = false;      // everything to write is in out_
  bool writing_ = false;
  std::string out_;            // waits for the write in flight
  std::string in_flight_;
  uint64_t body_reserved_ = 0;
  std::function<void()> on_closed_;
};

}  // namespace qwen::server
