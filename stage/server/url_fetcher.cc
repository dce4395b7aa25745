#include "stage/server/url_fetcher.h"

#include <utility>  // before Asio 1.74, whose awaitable.hpp forgets it

#include <boost/asio.hpp>
#include <boost/asio/ssl.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <boost/beast/ssl.hpp>
#include <functional>

#include "stage/server/data_url.h"

namespace qwen::server {
namespace {

namespace beast = boost::beast;
namespace http = beast::http;
namespace asio = boost::asio;
using tcp = asio::ip::tcp;
using Response = http::response_parser<http::string_body>;

// Runs one asynchronous operation to its end, or until the deadline, when the caller's stream must not be used again.
class Blocking {
 public:
  explicit Blocking(std::chrono::steady_clock::time_point deadline) : deadline_(deadline) {}
  asio::io_context& context() { return context_; }
  // `start(handler)` begins the operation.
  template <typename Start>
  Status Run(const char* what, Start&& start) {
    beast::error_code result = asio::error::would_block;
    start([&result](beast::error_code error, auto&&...) { result = error; });
    context_.restart();
    context_.run_until(deadline_);
    if (result == asio::error::would_block) return DeadlineExceededError(std::string(what) + " took too long");
    if (result == http::error::body_limit) return InvalidArgumentError("the file is too large");
    if (result) return UnavailableError(std::string(what) + " failed: " + result.message());
    return OkStatus();
  }

 private:
  const std::chrono::steady_clock::time_point deadline_;
  asio::io_context context_;
};

template <typename Stream>
Status Exchange(Blocking& blocking, Stream& stream, const ParsedUrl& url, Response& response) {
  http::request<http::empty_body> request(http::verb::get, url.target, 11);
  const bool standard = url.port == (url.https ? "443" : "80");
  request.set(http::field::host, standard ? url.host : url.host + ":" + url.port);
  request.set(http::field::user_agent, "qwen-head");
  request.set(http::field::accept, "image/*, video/*, */*;q=0.5");
  request.set(http::field::connection, "close");
  RETURN_IF_ERROR(blocking.Run("sending the request", [&](auto handler) { http::async_write(stream, request, handler); }));
  beast::flat_buffer buffer(1 << 20);
  return blocking.Run("reading the answer", [&](auto handler) { http::async_read(stream, buffer, response, handler); });
}

Status GetOnce(const ParsedUrl& url, const UrlFetcher::Options& options, std::chrono::steady_clock::time_point deadline,
               Response& response) {
  Blocking blocking(deadline);
  tcp::resolver resolver(blocking.context());
  tcp::resolver::results_type endpoints;
  RETURN_IF_ERROR(blocking.Run("resolving the host", [&](auto handler) {
    resolver.async_resolve(url.host, url.port, [&endpoints, handler](beast::error_code error, tcp::resolver::results_type found) {
      endpoints = std::move(found);
      handler(error);
    });
  }));
  if (!url.https) {
    tcp::socket socket(blocking.context());
    RETURN_IF_ERROR(blocking.Run("connecting", [&](auto handler) { asio::async_connect(socket, endpoints, handler); }));
    return Exchange(blocking, socket, url, response);
  }
  asio::ssl::context tls(asio::ssl::context::tls_client);
  beast::error_code error;
  tls.set_verify_mode(asio::ssl::verify_peer);
  if (options.ca_file.empty()) {
    tls.set_default_verify_paths(error);
  } else {
    tls.load_verify_file(options.ca_file, error);
  }
  if (error) return InternalError("no certificate authorities: " + error.message());
  asio::ssl::stream<tcp::socket> stream(blocking.context(), tls);
  stream.set_verify_callback(asio::ssl::host_name_verification(url.host), error);
  if (error || SSL_set_tlsext_host_name(stream.native_handle(), url.host.c_str()) != 1) return InternalError("TLS set-up failed");
  RETURN_IF_ERROR(blocking.Run("connecting", [&](auto handler) { asio::async_connect(stream.lowest_layer(), endpoints, handler); }));
  RETURN_IF_ERROR(blocking.Run("the TLS handshake", [&](auto handler) { stream.async_handshake(asio::ssl::stream_base::client, handler); }));
  return Exchange(blocking, stream, url, response);
}

}  // namespace

Result<ParsedUrl> ParseUrl(std::string_view text) {
  ParsedUrl url;
  const size_t colon = text.find("://");
  std::string scheme(text.substr(0, colon == std::string_view::npos ? 0 : colon));
  for (char& c : scheme) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  if (scheme != "http" && scheme != "https") return InvalidArgumentError("the URL must begin with data:, http: or https:");
  url.https = scheme == "https";
  text.remove_prefix(colon + 3);
  const size_t end = std::min(text.find_first_of("/?#"), text.size());
  std::string_view authority = text.substr(0, end);
  std::string_view target = text.substr(end);
  target = target.substr(0, target.find('#'));
  url.target = target.starts_with("/") ? std::string(target) : "/" + std::string(target);
  for (const char c : url.target) {
    if (static_cast<unsigned char>(c) <= ' ' || c == 0x7f) return InvalidArgumentError("the URL has characters that must be escaped");
  }
  url.port = url.https ? "443" : "80";
  if (const size_t port = authority.rfind(':'); port != std::string_view::npos && authority.find(']') == std::string_view::npos) {
    url.port = std::string(authority.substr(port + 1));
    authority = authority.substr(0, port);
    if (url.port.empty() || url.port.size() > 5 || url.port.find_first_not_of("0123456789") != std::string::npos) {
      return InvalidArgumentError("the URL has no valid port");
    }
  }
  for (const char c : authority) {
    if (!std::isalnum(static_cast<unsigned char>(c)) && c != '.' && c != '-') return InvalidArgumentError("the URL has no valid host name");
    url.host.push_back(static_cast<char>(std::tolower(static_cast<unsigned char>(c))));
  }
  if (url.host.empty()) return InvalidArgumentError("the URL has no host");
  return url;
}

Result<std::string> UrlFetcher::Fetch(const std::string& text) const {
  if (IsDataUrl(text)) {
    ASSIGN_OR_RETURN(DataUrl data, DecodeDataUrl(text));
    return std::move(data.bytes);
  }
  const auto deadline = std::chrono::steady_clock::now() + options_.timeout;
  std::string next = text;
  for (int hop = 0; hop <= options_.redirects_max; ++hop) {
    ASSIGN_OR_RETURN(const ParsedUrl url, ParseUrl(next));
    if (!options_.allowed_hosts.contains(url.host)) {
      return InvalidArgumentError("this server does not fetch from the host " + url.host + "; send the file as a data: URL");
    }
    Response response;
    response.body_limit(options_.bytes_max);
    try {
      if (Status status = GetOnce(url, options_, deadline, response); !status.ok()) return status.WithContext(url.host);
    } catch (const std::exception& e) {
      return InternalError(std::string("fetching a URL: ") + e.what());
    }
    const unsigned code = response.get().result_int();
    if (code == 301 || code == 302 || code == 303 || code == 307 || code == 308) {
      const std::string location(response.get()[http::field::location]);
      next = location.starts_with("/") && !location.starts_with("//")
                 ? std::string(url.https ? "https://" : "http://") + url.host + ":" + url.port + location
                 : location;
      continue;
    }
    if (code != 200) return InvalidArgumentError(url.host + " answers " + std::to_string(code));
    return std::move(response.get().body());
  }
  return InvalidArgumentError("the URL redirects too often");
}

}  // namespace qwen::server
