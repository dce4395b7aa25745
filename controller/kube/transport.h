// controller/kube/transport.h — HTTP to one API server, and nothing of Kubernetes: requests in, answers or a Status out.
// transport.cc is the only file that sees cpprestsdk; tests put a fake in its place.
//
// Thread safety: all members from any thread. A POST may reach the server twice: the library re-sends when a kept-alive
// connection drops before the answer, so names of created objects must be deterministic (never generateName).
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <stop_token>
#include <string>
#include <string_view>

#include "controller/kube/credentials.h"
#include "stage/base/status.h"

namespace qwen::kube {

enum class Method { kGet, kPost, kPut, kPatch, kDelete };
std::string_view MethodName(Method method);  // "GET"

struct HttpRequest {
  Method method = Method::kGet;
  std::string path;          // with its query, percent-encoded: "/api/v1/pods?limit=500"
  std::string content_type;  // of the body; empty: no body
  std::string body;
  bool metadata_only = false;  // of the answer's object: the server leaves out spec and status, which it would encode and we would read
};
struct HttpResponse {
  int32_t status = 0;
  std::string body;
  int32_t retry_after_seconds = -1;  // the Retry-After header; -1: none
};

class Transport {
 public:
  virtual ~Transport() = default;

  // Starts the request and returns. `done` runs exactly once, on a thread of the transport (or, when the request cannot even
  // start, on the caller's); it must not block. Errors: kUnavailable (connection), kDeadlineExceeded (silence), kCancelled
  // (the transport is being destroyed), kUnauthenticated (no credential to be had).
  using Done = std::function<void(Result<HttpResponse>)>;
  virtual void Send(HttpRequest request, Done done) = 0;

  // Blocks until the answer ends. With status 200 every piece of the body goes to `on_chunk` (on the calling thread; false
  // ends the stream), and the returned body is empty; any other status returns its body, cut at 64 KiB. A server that is
  // silent for longer than Options::silence_max_seconds counts as gone: kDeadlineExceeded. `stop` ends it with kCancelled.
  using OnChunk = std::function<bool(std::string_view)>;
  virtual Result<HttpResponse> Stream(const HttpRequest& request, const OnChunk& on_chunk, std::stop_token stop) = 0;
};

// Send, waited for. Not from a thread of the transport.
Result<HttpResponse> SendAndWait(Transport& transport, HttpRequest request);

// Where the API server is and whom it should see.
struct ClusterAccess {
  std::string server;   // "https://host:port"; no IPv6 literal (the library cannot dial one)
  std::string ca_file;  // read again for every connection, so a rotated CA needs no restart; empty: ca_pem, else the system's CAs
  std::string ca_pem;
  bool skip_tls_verify = false;
  std::string namespace_name = "default";
  std::shared_ptr<Credentials> credentials;  // shared by every client of this cluster: one refresh serves them all
};

struct TransportOptions {
  int32_t timeout_seconds = 30;      // of inactivity, for Send
  int32_t silence_max_seconds = 80;  // for Stream; bookmarks come every 60 s, so more silence is a half-open connection
  int32_t threads = 4;               // of the library's pool; process-wide, the first transport decides
};
// kInvalidArgument for a server URL that cannot be used. Connects lazily.
Result<std::unique_ptr<Transport>> MakeTransport(ClusterAccess access, const TransportOptions& options);

}  // namespace qwen::kube
