#include "stage/server/connection.h"

#include <sstream>

#include "stage/base/log.h"
#include "stage/server/errors.h"
#include "stage/server/request_id.h"

namespace qwen::server {
namespace {

namespace beast = boost::beast;
namespace http = beast::http;
namespace asio = boost::asio;

constexpr size_t kReadBufferMax = 256 << 10;  // Beast reads bodies in pieces of 64 KiB through it
constexpr size_t kWatchBytesMax = 64 << 10;   // pipelined bytes taken while answering; then the socket is left unread

}  // namespace

// The ResponseWriter of one exchange.
class ConnectionWriter final : public ResponseWriter {
 public:
  ConnectionWriter(std::shared_ptr<Connection> connection, uint64_t exchange)
      : connection_(std::move(connection)), exchange_(exchange) {}
  ~ConnectionWriter() override {
    // A handler that lost its writer would leave the client waiting for ever.
    Post([c = connection_, e = exchange_] { c->AbortStream(e); });
  }
  void Reply(HttpResponse response) override {
    Run([e = exchange_, r = std::move(response)](Connection& c) mutable { c.Reply(e, std::move(r)); });
  }
  void StartStream(std::string type) override {
    Run([e = exchange_, t = std::move(type)](Connection& c) { c.StartStream(e, t); });
  }
  void Send(std::string bytes) override {
    Run([e = exchange_, b = std::move(bytes)](Connection& c) { c.Send(e, b); });
  }
  void Finish() override {
    Run([e = exchange_](Connection& c) { c.Finish(e); });
  }
  void Abort() override {
    Run([e = exchange_](Connection& c) { c.AbortStream(e); });
  }
  void Post(std::function<void()> task) override {
    const ServerShared::Posting posting(*connection_->shared_);
    if (!posting.allowed) return;
    asio::post(connection_->socket_.get_executor(), [c = connection_, t = std::move(task)] { t(); });
  }
  void OnClosed(std::function<void()> closed) override {
    Run([e = exchange_, f = std::move(closed)](Connection& c) mutable { c.OnClosed(e, std::move(f)); });
  }

 private:
  // dispatch: at once when already on the strand, so that what a strand task sends is in out_ when it returns.
  template <typename F>
  void Run(F&& f) {
    const ServerShared::Posting posting(*connection_->shared_);
    if (!posting.allowed) return;
    asio::dispatch(connection_->socket_.get_executor(), [c = connection_, f = std::forward<F>(f)]() mutable { f(*c); });
  }
  const std::shared_ptr<Connection> connection_;
  const uint64_t exchange_;
};

Connection::Connection(Socket socket, std::shared_ptr<ServerShared> shared)
    : shared_(std::move(shared)), socket_(std::move(socket)), timer_(socket_.get_executor()), buffer_(kReadBufferMax) {
  ++shared_->connections;
}

Connection::~Connection() {
  ReleaseBody();
  --shared_->connections;
}

void Connection::Start() {
  asio::dispatch(socket_.get_executor(), [self = shared_from_this()] { self->WaitForRequest(); });
}

void Connection::Close() {
  asio::post(socket_.get_executor(), [self = shared_from_this()] { self->Drop("server stops"); });
}

void Connection::CloseWhenIdle() {
  asio::post(socket_.get_executor(), [self = shared_from_this()] {
    self->close_when_idle_ = true;
    if (self->state_ == State::kIdle) self->Drop("idle");
  });
}

// ---- Reading ----------------------------------------------------------------------------------------------------------

void Connection::WaitForRequest() {
  state_ = State::kIdle;
  if (close_when_idle_ || shared_->stopping) return Drop("idle");
  Arm(shared_->options.idle_timeout);
  if (watching_) {  // that read now waits for the next request
    if (buffer_.size() > 0) {
      ErrorCode ignored;
      socket_.cancel(ignored);
    }
    return;
  }
  if (buffer_.size() > 0) return ReadHeader();
  socket_.async_wait(asio::socket_base::wait_read, [self = shared_from_this()](ErrorCode error) {
    if (self->state_ != State::kIdle) return;
    if (error) return self->Drop("idle");
    self->ReadHeader();
  });
}

void Connection::ReadHeader() {
  state_ = State::kHeader;
  timed_out_ = false;
  parser_.emplace();
  parser_->header_limit(shared_->options.header_bytes_max);
  parser_->body_limit(shared_->options.body_bytes_max);
  Arm(shared_->options.header_timeout);
  http::async_read_header(socket_, buffer_, *parser_,
                          [self = shared_from_this()](ErrorCode error, size_t) { self->OnHeader(error); });
}

void Connection::OnHeader(ErrorCode error) {
  if (state_ != State::kHeader) return;
  if (error == http::error::end_of_stream) return Drop("closed");
  const auto& message = parser_->get();
  ++exchange_;
  request_ = HttpRequest{};
  request_.request_id = SaneRequestId(std::string_view(message["x-request-id"].data(), message["x-request-id"].size()));
  if (request_.request_id.empty()) request_.request_id = NewRequestId();
  head_ = message.method() == http::verb::head;
  http10_ = message.version() < 11;
  keep_alive_ = false;
  header_sent_ = streaming_ = finished_ = false;
  if (error) return FailRead(error);

  request_.method = std::string(message.method_string());
  const std::string target(message.target());
  request_.path = target.substr(0, target.find('?'));
  request_.authorization = std::string(message[http::field::authorization]);
  request_.content_type = std::string(message[http::field::content_type]);
  keep_alive_ = message.keep_alive();
  if (shared_->precheck) {
    if (auto refusal = shared_->precheck(request_)) {
      if (!parser_->is_done()) return Refuse(std::move(*refusal));
      state_ = State::kAnswering;
      Watch();
      return Reply(exchange_, std::move(*refusal));
    }
  }
  if (parser_->is_done()) return Dispatch();
  const uint64_t expected = parser_->content_length().value_or(shared_->options.body_bytes_max);
  if (shared_->body_bytes_in_flight.fetch_add(expected) + expected > shared_->options.body_bytes_in_flight_max) {
    shared_->body_bytes_in_flight -= expected;
    return Refuse(ErrorResponse(qwen::server::Unavailable("too many request bodies are being received", 1)));
  }
  body_reserved_ = expected;
  if (beast::iequals(message[http::field::expect], "100-continue")) {
    static constexpr char kContinue[] = "HTTP/1.1 100 Continue\r\n\r\n";
    state_ = State::kBody;
    asio::async_write(socket_, asio::buffer(kContinue, sizeof(kContinue) - 1),
                      [self = shared_from_this(), expected](ErrorCode failed, size_t) {
                        if (self->state_ != State::kBody) return;
                        if (failed) return self->Drop("closed");
                        self->ReadBody(expected);
                      });
    return;
  }
  ReadBody(expected);
}

void Connection::ReadBody(uint64_t bytes_expected) {
  state_ = State::kBody;
  const auto seconds = static_cast<int64_t>(bytes_expected / std::max<uint64_t>(1, shared_->options.body_bytes_per_second));
  Arm(shared_->options.body_timeout + std::chrono::seconds(seconds));
  http::async_read(socket_, buffer_, *parser_, [self = shared_from_this()](ErrorCode error, size_t) { self->OnBody(error); });
}

void Connection::OnBody(ErrorCode error) {
  if (state_ != State::kBody) return;
  if (error) return FailRead(error);
  Dispatch();
}

// Answers what can be answered when a request could not be read.
void Connection::FailRead(ErrorCode error) {
  if (timed_out_) {
    return Refuse(ErrorResponse({.status = 408, .message = "the request was not sent in time", .code = "request_timeout"}));
  }
  if (error == http::error::body_limit) {
    return Refuse(ErrorResponse({.status = 413,
                                 .message = "the request body is larger than " + std::to_string(shared_->options.body_bytes_max) + " bytes",
                                 .code = "request_too_large"}));
  }
  if (error == http::error::header_limit || error == http::error::buffer_overflow) {
    return Refuse(ErrorResponse({.status = 431, .message = "the request header is too large", .code = "header_too_large"}));
  }
  if (error.category() == http::make_error_code(http::error::bad_method).category() && error != http::error::partial_message) {
    return Refuse(ErrorResponse(BadRequest("malformed HTTP request: " + error.message())));
  }
  Drop("closed");
}

void Connection::Dispatch() {
  state_ = State::kAnswering;
  ++timer_generation_;  // no deadline of the connection's own while the engine works
  HttpRequest request = request_;  // a copy: request_ keeps the id for the answer's header and the log
  request.body = std::move(parser_->get().body());
  Watch();
  shared_->handler(std::move(request), std::make_shared<ConnectionWriter>(shared_from_this(), exchange_));
}

void Connection::Watch() {
  if (watching_ || state_ != State::kAnswering || buffer_.size() >= kWatchBytesMax) return;
  watching_ = true;
  socket_.async_read_some(buffer_.prepare(4096),
                          [self = shared_from_this()](ErrorCode error, size_t bytes) { self->OnWatched(error, bytes); });
}

void Connection::OnWatched(ErrorCode error, size_t bytes) {
  watching_ = false;
  buffer_.commit(bytes);
  switch (state_) {
    case State::kAnswering:
      if (error) return Drop("client went away");
      return Watch();
    case State::kIdle:  // the answer was finished meanwhile
      if (error && buffer_.size() == 0) return Drop("closed");
      return ReadHeader();
    case State::kLingering:
      if (error) return Drop("closed");
      return DrainLingering();
    default:
      return;
  }
}

// ---- Writing ----------------------------------------------------------------------------------------------------------

void Connection::AppendHeader(const HttpResponse& response, bool chunked) {
  http::response<http::empty_body> header;
  header.version(11);
  header.result(static_cast<unsigned>(response.status));
  header.set(http::field::content_type, response.content_type);
  header.set("x-request-id", request_.request_id);
  for (const auto& [name, value] : response.headers) header.set(name, value);
  if (shared_->stopping || close_when_idle_) keep_alive_ = false;
  if (chunked) {
    header.set(http::field::cache_control, "no-cache");
    if (http10_) {
      keep_alive_ = false;  // the end of the connection is the end of the body
    } else {
      header.set(http::field::transfer_encoding, "chunked");
    }
  } else {
    header.content_length(response.body.size());
  }
  header.set(http::field::connection, keep_alive_ ? "keep-alive" : "close");
  std::ostringstream text;
  text << header.base();
  out_ += text.str();
  header_sent_ = true;
  if (shared_->on_response) shared_->on_response(response.status);
}

void Connection::Reply(uint64_t exchange, HttpResponse response) {
  if (exchange != exchange_ || state_ != State::kAnswering || header_sent_) return;
  AppendHeader(response, /*chunked=*/false);
  if (!head_) out_ += response.body;
  finished_ = true;
  ReleaseBody();  // before the client can know, so that its next request finds the room
  Flush();
}

void Connection::StartStream(uint64_t exchange, const std::string& content_type) {
  if (exchange != exchange_ || state_ != State::kAnswering || header_sent_) return;
  AppendHeader({.content_type = content_type}, /*chunked=*/true);
  streaming_ = true;
  Flush();
}

void Connection::Send(uint64_t exchange, const std::string& bytes) {
  if (exchange != exchange_ || state_ != State::kAnswering || !streaming_ || finished_ || bytes.empty()) return;
  if (out_.size() + bytes.size() > shared_->options.send_buffer_bytes_max) return Drop("client reads too slowly");
  if (http10_) {
    out_ += bytes;
  } else {
    char size[20];
    std::snprintf(size, sizeof(size), "%zx\r\n", bytes.size());
    out_ += size;
    out_ += bytes;
    out_ += "\r\n";
  }
  Flush();
}

void Connection::Finish(uint64_t exchange) {
  if (exchange != exchange_ || state_ != State::kAnswering || !streaming_ || finished_) return;
  if (!http10_) out_ += "0\r\n\r\n";
  finished_ = true;
  ReleaseBody();
  Flush();
}

void Connection::AbortStream(uint64_t exchange) {
  if (exchange != exchange_ || state_ != State::kAnswering || finished_) return;
  Drop("aborted by the server");
}

void Connection::OnClosed(uint64_t exchange, std::function<void()> closed) {
  if (exchange == exchange_ && state_ == State::kAnswering) {
    on_closed_ = std::move(closed);
  } else if (state_ == State::kClosed) {
    closed();
  }
}

void Connection::Flush() {
  if (writing_) return;
  if (out_.empty()) {
    if (finished_) EndExchange();
    return;
  }
  writing_ = true;
  in_flight_.swap(out_);
  out_.clear();
  Arm(shared_->options.write_timeout);
  asio::async_write(socket_, asio::buffer(in_flight_), [self = shared_from_this()](ErrorCode error, size_t) { self->OnFlushed(error); });
}

void Connection::OnFlushed(ErrorCode error) {
  writing_ = false;
  if (state_ == State::kClosed) return;
  if (error) return Drop("client went away");
  ++timer_generation_;  // the write made its end
  if (in_flight_.capacity() > (64 << 10)) in_flight_ = std::string();
  Flush();
}

void Connection::EndExchange() {
  on_closed_ = nullptr;
  if (keep_alive_) return WaitForRequest();
  Linger();
}

void Connection::Refuse(HttpResponse response) {
  state_ = State::kAnswering;
  keep_alive_ = false;
  Reply(exchange_, std::move(response));
}

// A close with unread bytes makes TCP send RST, which can throw away the answer before the client has read it: so shut
// down our half and read the rest for a while.
void Connection::Linger() {
  state_ = State::kLingering;
  ErrorCode ignored;
  socket_.shutdown(asio::ip::tcp::socket::shutdown_send, ignored);
  Arm(shared_->options.linger_timeout);
  if (!watching_) DrainLingering();
}

void Connection::DrainLingering() {
  buffer_.clear();
  watching_ = true;
  socket_.async_read_some(buffer_.prepare(64 << 10),
                          [self = shared_from_this()](ErrorCode error, size_t bytes) { self->OnWatched(error, bytes); });
}

void Connection::Drop(const char* reason) {
  if (state_ == State::kClosed) return;
  const bool answering = state_ == State::kAnswering;
  state_ = State::kClosed;
  ++timer_generation_;
  timer_.cancel();
  ErrorCode ignored;
  socket_.close(ignored);
  ReleaseBody();
  if (answering) {
    log::Debug("connection dropped", {{"request_id", request_.request_id}, {"reason", reason}});
    if (auto closed = std::move(on_closed_)) closed();
  }
  on_closed_ = nullptr;
}

void Connection::Arm(std::chrono::milliseconds timeout) {
  const uint64_t generation = ++timer_generation_;
  timer_.expires_after(timeout);
  timer_.async_wait([self = shared_from_this(), generation](ErrorCode error) {
    if (!error && generation == self->timer_generation_) self->OnTimeout();
  });
}

void Connection::OnTimeout() {
  if ((state_ == State::kHeader || state_ == State::kBody) && !timed_out_) {
    timed_out_ = true;  // the read ends with operation_aborted, and FailRead answers 408
    ErrorCode ignored;
    socket_.cancel(ignored);
    return;
  }
  Drop("timed out");
}

void Connection::ReleaseBody() {
  shared_->body_bytes_in_flight -= body_reserved_;
  body_reserved_ = 0;
}

}  // namespace qwen::server
