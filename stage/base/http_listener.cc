#include "stage/base/http_listener.h"

#include <boost/asio.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <thread>

namespace qwen {
namespace {

namespace beast = boost::beast;
namespace http = beast::http;
namespace asio = boost::asio;
using tcp = asio::ip::tcp;

constexpr int kMaxConnections = 16;     // probes and one or two scrapers; more is somebody's mistake
constexpr uint32_t kHeaderBytesMax = 8192;
constexpr auto kConnectionTimeout = std::chrono::seconds(5);

class Connection : public std::enable_shared_from_this<Connection> {
 public:
  Connection(tcp::socket socket, const HttpListener::Routes& routes, int& open) : stream_(std::move(socket)), routes_(routes), open_(open) { ++open_; }
  ~Connection() { --open_; }

  void Run() {
    stream_.expires_after(kConnectionTimeout);
    parser_.header_limit(kHeaderBytesMax);
    parser_.body_limit(1024);
    http::async_read(stream_, buffer_, parser_, [self = shared_from_this()](beast::error_code error, size_t) {
      if (!error) self->Answer();
    });
  }

 private:
  void Answer() {
    const auto& request = parser_.get();
    HttpReply reply;
    std::string path(request.target());
    path = path.substr(0, path.find('?'));
    if (auto route = routes_.find(path); route == routes_.end()) {
      reply = {.status = 404, .body = "not found\n"};
    } else if (request.method() != http::verb::get && request.method() != http::verb::head) {
      reply = {.status = 405, .body = "method not allowed\n"};
    } else {
      reply = route->second();
    }
    response_.version(11);
    response_.result(static_cast<unsigned>(reply.status));
    response_.set(http::field::content_type, reply.content_type);
    response_.keep_alive(false);
    response_.body() = std::move(reply.body);
    response_.prepare_payload();
    if (request.method() == http::verb::head) response_.body().clear();
    http::async_write(stream_, response_, [self = shared_from_this()](beast::error_code, size_t) {
      beast::error_code ignored;
      self->stream_.socket().shutdown(tcp::socket::shutdown_send, ignored);
    });
  }

  beast::tcp_stream stream_;
  const HttpListener::Routes& routes_;
  int& open_;
  beast::flat_buffer buffer_;
  http::request_parser<http::string_body> parser_;
  http::response<http::string_body> response_;
};

}  // namespace

struct HttpListener::Impl {
  explicit Impl(Routes r) : routes(std::move(r)) {}
  void Accept() {
    acceptor.async_accept([this](beast::error_code error, tcp::socket socket) {
      if (error == asio::error::operation_aborted) return;
      if (!error && open < kMaxConnections) std::make_shared<Connection>(std::move(socket), routes, open)->Run();
      Accept();
    });
  }

  const Routes routes;
  int open = 0;  // touched by the listener's thread only; outlives the connections (declared before context)
  asio::io_context context{1};
  tcp::acceptor acceptor{context};
  std::thread thread;
};

HttpListener::HttpListener(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Result<std::unique_ptr<HttpListener>> HttpListener::Start(const Options& options, Routes routes) {
  auto impl = std::make_unique<Impl>(std::move(routes));
  const std::string where = options.address + ":" + std::to_string(options.port);
  try {
    const tcp::endpoint endpoint(asio::ip::make_address(options.address), options.port);
    impl->acceptor.open(endpoint.protocol());
    impl->acceptor.set_option(asio::socket_base::reuse_address(true));
    impl->acceptor.bind(endpoint);
    impl->acceptor.listen();
  } catch (const boost::system::system_error& e) {
    return UnavailableError("cannot listen on " + where + ": " + e.code().message());
  }
  impl->Accept();
  impl->thread = std::thread([raw = impl.get()] { raw->context.run(); });
  return std::unique_ptr<HttpListener>(new HttpListener(std::move(impl)));
}

HttpListener::~HttpListener() {
  impl_->context.stop();
  impl_->thread.join();
}

uint16_t HttpListener::port() const { return impl_->acceptor.local_endpoint().port(); }

}  // namespace qwen
