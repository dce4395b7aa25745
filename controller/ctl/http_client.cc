#include "controller/ctl/http_client.h"

#include <boost/asio.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <charconv>

namespace qwen::ctl {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using tcp = asio::ip::tcp;

constexpr auto kDefaultTimeout = std::chrono::seconds(30);

Status ToStatus(const beast::error_code& error, const Url& url, const char* doing) {
  const std::string what = url.host + ":" + std::to_string(url.port) + ": " + doing + ": " + error.message();
  if (error == beast::error::timeout) return DeadlineExceededError(what);
  if (error.category() == http::make_error_code(http::error::bad_version).category() && error != http::error::end_of_stream && error != http::error::partial_message)
    return DataLossError(what);
  return UnavailableError(what);
}

// A blocking connection on which every operation has a deadline. Beast's timeouts work for asynchronous operations only, so each
// one is started and the context run until it is through.
class Connection {
 public:
  explicit Connection(const Url& url) : url_(url), stream_(io_) {}

  Status Connect(std::chrono::milliseconds timeout) {
    tcp::resolver resolver(io_);
    beast::error_code error;
    const auto endpoints = resolver.resolve(url_.host, std::to_string(url_.port), error);
    if (error) return ToStatus(error, url_, "resolve");
    return Await("connect", timeout, [&](auto handler) {
      stream_.async_connect(endpoints, [handler](beast::error_code e, const tcp::endpoint&) { handler(e, 0); });
    });
  }
  template <typename Request>
  Status Write(const Request& request, std::chrono::milliseconds timeout) {
    return Await("write", timeout, [&](auto handler) { http::async_write(stream_, request, handler); });
  }
  template <typename Parser>
  Status ReadHeader(Parser& parser, std::chrono::milliseconds timeout) {
    return Await("read", timeout, [&](auto handler) { http::async_read_header(stream_, buffer_, parser, handler); });
  }
  template <typename Parser>
  Status ReadAll(Parser& parser, std::chrono::milliseconds timeout) {
    return Await("read", timeout, [&](auto handler) { http::async_read(stream_, buffer_, parser, handler); });
  }
  // One piece into a buffer_body parser; a full buffer is not an error.
  template <typename Parser>
  Status ReadSome(Parser& parser, std::chrono::milliseconds timeout) {
    return Await("read", timeout, [&](auto handler) {
      http::async_read_some(stream_, buffer_, parser, [handler](beast::error_code e, size_t n) { handler(e == http::error::need_buffer ? beast::error_code() : e, n); });
    });
  }

 private:
  template <typename Start>
  Status Await(const char* doing, std::chrono::milliseconds timeout, const Start& start) {
    beast::error_code result;
    stream_.expires_after(timeout);
    start([&result](beast::error_code error, size_t) { result = error; });
    io_.restart();
    io_.run();
    return result ? ToStatus(result, url_, doing) : OkStatus();
  }

  const Url& url_;
  asio::io_context io_;
  beast::tcp_stream stream_;
  beast::flat_buffer buffer_;
};

http::request<http::string_body> MakeRequest(http::verb verb, const Url& url, std::string_view path) {
  http::request<http::string_body> request{verb, url.prefix + std::string(path), 11};
  request.set(http::field::host, url.host + ":" + std::to_string(url.port));
  request.set(http::field::user_agent, "qwenctl");
  request.set(http::field::connection, "close");
  return request;
}

}  // namespace

Result<Url> ParseUrl(std::string_view text) {
  const auto fail = [&](const char* what) { return InvalidArgumentError("url \"" + std::string(text.substr(0, 200)) + "\": " + what); };
  if (!text.starts_with("http://")) return fail("must begin with http://");
  std::string_view rest = text.substr(7);
  Url url;
  const size_t slash = rest.find('/');
  if (slash != std::string_view::npos) {
    url.prefix = std::string(rest.substr(slash));
    while (url.prefix.ends_with('/')) url.prefix.pop_back();
    rest = rest.substr(0, slash);
  }
  std::string_view port;
  if (rest.starts_with('[')) {  // IPv6 literal
    const size_t close = rest.find(']');
    if (close == std::string_view::npos) return fail("'[' without ']'");
    url.host = std::string(rest.substr(1, close - 1));
    port = rest.substr(close + 1);
  } else {
    const size_t colon = rest.find(':');
    url.host = std::string(rest.substr(0, colon));
    if (colon != std::string_view::npos) port = rest.substr(colon);
  }
  if (url.host.empty()) return fail("has no host");
  if (!port.empty()) {
    uint32_t number = 0;
    const auto parsed = std::from_chars(port.data() + 1, port.data() + port.size(), number);
    if (port[0] != ':' || parsed.ec != std::errc() || parsed.ptr != port.data() + port.size() || number == 0 || number > 65535) return fail("bad port");
    url.port = static_cast<uint16_t>(number);
  }
  for (const std::string& part : {url.host, url.prefix})
    for (const char c : part)
      if (static_cast<unsigned char>(c) <= 0x20 || c == 0x7f) return fail("holds a blank or control character");
  return url;
}

Result<HttpResult> HttpGet(const Url& url, std::string_view path, std::chrono::milliseconds timeout,
                           const std::map<std::string, std::string>& headers) {
  Connection connection(url);
  RETURN_IF_ERROR(connection.Connect(timeout));
  auto request = MakeRequest(http::verb::get, url, path);
  for (const auto& [name, value] : headers) request.set(name, value);
  RETURN_IF_ERROR(connection.Write(request, timeout));
  http::response_parser<http::string_body> parser;
  parser.body_limit(kBodyBytesMax);
  RETURN_IF_ERROR(connection.ReadAll(parser, timeout));
  return HttpResult{.status = static_cast<int>(parser.get().result_int()), .body = std::move(parser.get().body())};
}

Result<HttpResult> HttpPostStream(const Url& url, const PostOptions& options, const std::function<bool(std::string_view)>& on_data) {
  Connection connection(url);
  RETURN_IF_ERROR(connection.Connect(options.connect_timeout));
  auto request = MakeRequest(http::verb::post, url, options.path);
  request.set(http::field::content_type, options.content_type);
  for (const auto& [name, value] : options.headers) request.set(name, value);
  request.body() = options.body;
  request.prepare_payload();
  RETURN_IF_ERROR(connection.Write(request, kDefaultTimeout));

  http::response_parser<http::buffer_body> parser;
  parser.body_limit(boost::none);  // a stream has no length; what is kept of it is bounded below
  RETURN_IF_ERROR(connection.ReadHeader(parser, options.silence_timeout));
  HttpResult result{.status = static_cast<int>(parser.get().result_int())};
  char piece[16384];
  while (!parser.is_done()) {
    parser.get().body().data = piece;
    parser.get().body().size = sizeof(piece);
    RETURN_IF_ERROR(connection.ReadSome(parser, options.silence_timeout));
    const std::string_view data(piece, sizeof(piece) - parser.get().body().size);
    if (data.empty()) continue;
    if (result.status == 200) {
      if (!on_data(data)) return result;
    } else {
      if (result.body.size() + data.size() > kBodyBytesMax) return DataLossError(url.host + ": error body larger than 16 MiB");
      result.body += data;
    }
  }
  return result;
}

}  // namespace qwen::ctl
