// The only file with cpprestsdk. What is worked around here, each seen against a real or fake server:
//   - timeouts are of inactivity, 30 s unless set; 0 cancels at once. Watches get their own client with a longer one.
//   - with set_response_stream a lost connection never wakes the reader; response.body() throws, so that is what is read.
//   - getn(n) waits for n bytes; one byte is waited for and then what is there is taken.
//   - an exception in a task that nobody looks at ends the process: every chain ends in a handler.
//   - every connection gets all of the system's CAs (1 MB); with a CA of the cluster's they are thrown out again.
//   - 40 threads by default; one per core is enough for what is only parsing HTTP.
#include "controller/kube/transport.h"

#include <cpprest/http_client.h>
#include <openssl/ssl.h>
#include <pplx/threadpool.h>

#include <atomic>
#include <condition_variable>
#include <future>
#include <mutex>
#include <vector>

#include "stage/base/check.h"
#include "stage/base/log.h"

namespace qwen::kube {
namespace {
namespace http = web::http;
constexpr size_t kErrorBodyMax = 64 << 10;
constexpr size_t kChunkBytes = 64 << 10;

Status StatusOf(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const pplx::task_canceled&) {
    return CancelledError("request cancelled");
  } catch (const http::http_exception& e) {
    if (e.error_code() == std::errc::timed_out) return DeadlineExceededError(e.what());
    if (e.error_code() == std::errc::operation_canceled) return CancelledError(e.what());
    return UnavailableError(e.what());
  } catch (const std::exception& e) {
    return UnavailableError(e.what());
  }
}

int32_t RetryAfter(const http::http_response& response) {
  int32_t seconds = -1;
  const auto found = response.headers().find("Retry-After");
  if (found == response.headers().end()) return -1;
  try {
    seconds = std::stoi(found->second);  // the date form is not used by API servers
  } catch (const std::exception&) {
    return -1;
  }
  return seconds;
}

class CpprestTransport final : public Transport {
 public:
  CpprestTransport(ClusterAccess access, const TransportOptions& options)
      : access_(std::move(access)),
        calls_(access_.server, Config(std::chrono::seconds(options.timeout_seconds))),
        watches_(access_.server, Config(std::chrono::seconds(options.silence_max_seconds))) {}

  ~CpprestTransport() override {
    closing_.cancel();
    std::unique_lock<std::mutex> lock(mutex_);
    idle_.wait(lock, [this] { return in_flight_ == 0; });
  }

  void Send(HttpRequest request, Done done) override {
    Result<http::http_request> made = Make(request);
    if (!made.ok()) return done(made.status());
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ++in_flight_;
    }
    auto shared_done = std::make_shared<Done>(std::move(done));  // copied into a copyable lambda
    pplx::task<http::http_response> sent;
    try {
      sent = calls_.request(*made, closing_.get_token());
    } catch (...) {
      Finish(*shared_done, StatusOf(std::current_exception()));
      return;
    }
    sent.then([this](http::http_response response) {
          HttpResponse head{response.status_code(), {}, RetryAfter(response)};
          if (head.status == http::status_codes::Unauthorized) access_.credentials->Invalidate();
          return response.extract_utf8string(true).then([head](std::string body) mutable {
            head.body = std::move(body);
            return head;
          });
        })
        .then([this, shared_done](pplx::task<HttpResponse> task) {
          try {
            Finish(*shared_done, task.get());
          } catch (...) {
            Finish(*shared_done, StatusOf(std::current_exception()));
          }
        });
  }

  Result<HttpResponse> Stream(const HttpRequest& request, const OnChunk& on_chunk, std::stop_token stop) override {
    Result<http::http_request> made = Make(request);
    if (!made.ok()) return made.status();
    pplx::cancellation_token_source cancel;
    // cancel() may run what waits for it; it must not do so on the stack of whoever asked to stop, but that is only our owner.
    std::stop_callback on_stop(stop, [&cancel] { cancel.cancel(); });
    HttpResponse head;
    try {
      http::http_response response = watches_.request(*made, cancel.get_token()).get();
      head = {response.status_code(), {}, RetryAfter(response)};
      if (head.status == http::status_codes::Unauthorized) access_.credentials->Invalidate();
      auto body = response.body().streambuf();
      std::vector<char> chunk(kChunkBytes);
      for (;;) {
        const auto first = body.bumpc().get();
        if (first == concurrency::streams::char_traits<uint8_t>::eof()) break;
        chunk[0] = static_cast<char>(first);
        const size_t there = std::min(body.in_avail(), kChunkBytes - 1);
        const size_t got = there == 0 ? 0 : body.getn(reinterpret_cast<uint8_t*>(chunk.data()) + 1, there).get();
        const std::string_view piece(chunk.data(), 1 + got);
        if (head.status != 200) {
          if (head.body.size() < kErrorBodyMax) head.body += piece;
        } else if (!on_chunk(piece)) {
          cancel.cancel();
          return head;
        }
      }
    } catch (...) {
      cancel.cancel();
      if (stop.stop_requested()) return CancelledError("stream stopped");
      return StatusOf(std::current_exception());
    }
    if (stop.stop_requested()) return CancelledError("stream stopped");
    return head;
  }

 private:
  http::client::http_client_config Config(std::chrono::seconds timeout) {
    http::client::http_client_config config;
    config.set_timeout(timeout);
    config.set_validate_certificates(!access_.skip_tls_verify);
    // Runs for every connection, so certificates that were renewed on disk or by a plugin are used without a restart.
    config.set_ssl_context_callback([this](boost::asio::ssl::context& context) { SetUpTls(context); });
    return config;
  }

  void SetUpTls(boost::asio::ssl::context& context) {
    boost::system::error_code error;
    SSL_CTX_set_mode(context.native_handle(), SSL_MODE_RELEASE_BUFFERS);  // 34 kB less for every idle connection
    if (!access_.ca_file.empty() || !access_.ca_pem.empty()) {
      // The library has put all of the system's CAs in: 1 MB for every connection, and any of them could vouch for the server.
      SSL_CTX_set_cert_store(context.native_handle(), X509_STORE_new());
    }
    if (!access_.ca_file.empty()) {
      context.load_verify_file(access_.ca_file, error);
    } else if (!access_.ca_pem.empty()) {
      context.add_certificate_authority(boost::asio::buffer(access_.ca_pem), error);
    }
    if (error) log::Error("CA of the API server cannot be used", {{"error", error.message()}});
    const Result<Identity> identity = access_.credentials->Get();
    if (!identity.ok() || identity->certificate_pem.empty()) return;
    context.use_certificate_chain(boost::asio::buffer(identity->certificate_pem), error);
    if (!error) context.use_private_key(boost::asio::buffer(identity->key_pem), boost::asio::ssl::context::pem, error);
    if (error) log::Error("client certificate cannot be used", {{"error", error.message()}});
  }

  Result<http::http_request> Make(const HttpRequest& request) {
    ASSIGN_OR_RETURN(const Identity identity, access_.credentials->Get());
    try {
      http::http_request out{http::method(std::string(MethodName(request.method)))};
      out.set_request_uri(request.path);
      out.headers().add("Accept", request.metadata_only ? "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json" : "application/json");
      out.headers().add("User-Agent", "qwen-controller");
      if (!identity.bearer_token.empty()) out.headers().add("Authorization", "Bearer " + identity.bearer_token);
      if (!request.content_type.empty()) out.set_body(request.body, request.content_type);
      return out;
    } catch (const std::exception& e) {
      return InvalidArgumentError(std::string("request cannot be made: ") + e.what());
    }
  }

  void Finish(const Done& done, Result<HttpResponse> result) {
    done(std::move(result));
    std::lock_guard<std::mutex> lock(mutex_);
    --in_flight_;
    if (in_flight_ == 0) idle_.notify_all();
  }

  const ClusterAccess access_;
  pplx::cancellation_token_source closing_;
  std::mutex mutex_;
  std::condition_variable idle_;
  size_t in_flight_ = 0;  // guarded by mutex_
  http::client::http_client calls_;
  http::client::http_client watches_;
};
}  // namespace

std::string_view MethodName(Method method) {
  switch (method) {
    case Method::kGet: return "GET";
    case Method::kPost: return "POST";
    case Method::kPut: return "PUT";
    case Method::kPatch: return "PATCH";
    case Method::kDelete: return "DELETE";
  }
  return "";
}

Result<HttpResponse> SendAndWait(Transport& transport, HttpRequest request) {
  // Shared: the transport may still hold the promise for a moment after the waiter has its answer.
  auto promise = std::make_shared<std::promise<Result<HttpResponse>>>();
  std::future<Result<HttpResponse>> answer = promise->get_future();
  transport.Send(std::move(request), [promise](Result<HttpResponse> response) { promise->set_value(std::move(response)); });
  return answer.get();
}

Result<std::unique_ptr<Transport>> MakeTransport(ClusterAccess access, const TransportOptions& options) {
  QP_CHECK(access.credentials != nullptr);
  static std::once_flag threads_once;
  try {
    std::call_once(threads_once, [&] { crossplat::threadpool::initialize_with_threads(static_cast<size_t>(options.threads)); });
    const web::uri uri(access.server);
    if (uri.scheme() != "https" && uri.scheme() != "http") return InvalidArgumentError("server " + access.server + " is no http(s) URL");
    if (uri.host().find(':') != std::string::npos) return InvalidArgumentError("server " + access.server + ": use a name instead of an IPv6 address");
    return std::unique_ptr<Transport>(std::make_unique<CpprestTransport>(std::move(access), options));
  } catch (const std::exception& e) {
    return InvalidArgumentError("server " + access.server + ": " + e.what());
  }
}

}  // namespace qwen::kube
