#include "stage/server/http_server.h"

#include <netinet/tcp.h>

#include <boost/asio.hpp>
#include <mutex>
#include <thread>
#include <vector>

#include "stage/base/log.h"
#include "stage/server/connection.h"

namespace qwen::server {
namespace {
namespace asio = boost::asio;
using tcp = asio::ip::tcp;

// A peer that vanishes without FIN (a pulled cable, a dead node) is seen after 30 + 3 * 10 s.
void EnableKeepAlive(Connection::Socket& socket) {
  const int fd = socket.native_handle();
  const int on = 1, idle_seconds = 30, interval_seconds = 10, probes = 3;
  setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
  setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle_seconds, sizeof(idle_seconds));
  setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval_seconds, sizeof(interval_seconds));
  setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof(probes));
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));  // a token a packet; never wait for more
}

}  // namespace

struct HttpServer::Impl {
  void Accept() {
    acceptor.async_accept(asio::make_strand(context), [this](boost::system::error_code error, Connection::Socket socket) {
      if (error == asio::error::operation_aborted || !acceptor.is_open()) return;
      if (error) {  // out of file descriptors, most likely: do not spin
        log::Warning("accept failed", {{"error", error.message()}});
        retry.expires_after(std::chrono::milliseconds(50));
        retry.async_wait([this](boost::system::error_code stopped) {
          if (!stopped) Accept();
        });
        return;
      }
      if (shared->connections < shared->options.connections_max) {
        EnableKeepAlive(socket);
        if (shared->options.socket_send_bytes > 0) {
          boost::system::error_code ignored;
          socket.set_option(asio::socket_base::send_buffer_size(shared->options.socket_send_bytes), ignored);
        }
        auto connection = std::make_shared<Connection>(std::move(socket), shared);
        {
          std::lock_guard<std::mutex> lock(mutex);
          std::erase_if(open, [](const std::weak_ptr<Connection>& c) { return c.expired(); });
          open.push_back(connection);
        }
        connection->Start();
      } else {
        // A fixed answer, written without waiting: 503 helps a balancer more than a reset.
        static constexpr char kFull[] =
            "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
        boost::system::error_code ignored;
        socket.non_blocking(true, ignored);
        socket.write_some(asio::buffer(kFull, sizeof(kFull) - 1), ignored);
        socket.shutdown(tcp::socket::shutdown_both, ignored);
      }
      Accept();
    });
  }

  std::vector<std::shared_ptr<Connection>> Connections() {
    std::lock_guard<std::mutex> lock(mutex);
    std::vector<std::shared_ptr<Connection>> alive;
    for (const auto& weak : open) {
      if (auto connection = weak.lock()) alive.push_back(std::move(connection));
    }
    return alive;
  }

  std::shared_ptr<ServerShared> shared = std::make_shared<ServerShared>();
  asio::io_context& context = shared->context;
  asio::strand<asio::io_context::executor_type> accept_strand{context.get_executor()};
  asio::basic_socket_acceptor<tcp, asio::strand<asio::io_context::executor_type>> acceptor{accept_strand};
  asio::basic_waitable_timer<std::chrono::steady_clock, asio::wait_traits<std::chrono::steady_clock>,
                             asio::strand<asio::io_context::executor_type>>
      retry{accept_strand};
  uint16_t port = 0;
  std::optional<asio::executor_work_guard<asio::io_context::executor_type>> work;
  std::vector<std::thread> threads;
  std::mutex mutex;
  std::vector<std::weak_ptr<Connection>> open;  // guarded by mutex
};

HttpServer::HttpServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Result<std::unique_ptr<HttpServer>> HttpServer::Start(const Options& options, Precheck precheck, Handler handler,
                                                      OnResponse on_response) {
  auto impl = std::make_unique<Impl>();
  impl->shared->options = options;
  impl->shared->precheck = std::move(precheck);
  impl->shared->handler = std::move(handler);
  impl->shared->on_response = std::move(on_response);
  try {
    const tcp::endpoint endpoint(asio::ip::make_address(options.address), options.port);
    impl->acceptor.open(endpoint.protocol());
    impl->acceptor.set_option(asio::socket_base::reuse_address(true));
    impl->acceptor.bind(endpoint);
    impl->acceptor.listen(1024);
    impl->port = impl->acceptor.local_endpoint().port();
  } catch (const boost::system::system_error& e) {
    return UnavailableError("cannot listen on " + options.address + ":" + std::to_string(options.port) + ": " + e.code().message());
  }
  impl->work.emplace(impl->context.get_executor());
  asio::post(impl->accept_strand, [raw = impl.get()] { raw->Accept(); });
  for (int i = 0; i < std::max(1, options.io_threads); ++i) {
    impl->threads.emplace_back([raw = impl.get()] { raw->context.run(); });
  }
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(impl)));
}

HttpServer::~HttpServer() {
  StopAccepting();
  for (const auto& connection : impl_->Connections()) connection->Close();
  impl_->work.reset();
  // Close() ends every operation, so run() returns by itself. What other threads posted meanwhile is run here.
  for (auto& thread : impl_->threads) thread.join();
  impl_->shared->stopped = true;
  while (impl_->shared->posting > 0) std::this_thread::yield();
  impl_->context.restart();
  impl_->context.poll();
}

uint16_t HttpServer::port() const { return impl_->port; }
int HttpServer::connections() const { return impl_->shared->connections; }

void HttpServer::StopAccepting() {
  if (impl_->shared->stopping.exchange(true)) return;
  asio::post(impl_->accept_strand, [raw = impl_.get()] {
    boost::system::error_code ignored;
    raw->acceptor.close(ignored);
    raw->retry.cancel();
  });
  for (const auto& connection : impl_->Connections()) connection->CloseWhenIdle();
}

}  // namespace qwen::server
