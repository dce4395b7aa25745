// stage/server/http_types.h — what the HTTP layer hands to the API and takes back. No Beast type crosses this line.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace qwen::server {

struct HttpRequest {
  std::string method;         // "GET", "POST", ...
  std::string path;           // without the query
  std::string authorization;  // header values as sent; empty when absent
  std::string content_type;
  std::string request_id;  // the client's x-request-id when it is sane, else one of ours; echoed in every response
  std::string body;
};

struct HttpResponse {
  int status = 200;
  std::string body;
  std::string content_type = "application/json";
  std::vector<std::pair<std::string, std::string>> headers;
};

// One exchange's way back to the client: either one Reply, or StartStream, Send..., Finish. After the client has gone,
// or after the exchange has ended, calls do nothing.
// Thread safety: every member from any thread; effects are ordered as the calls of one thread are.
class ResponseWriter {
 public:
  virtual ~ResponseWriter() = default;
  virtual void Reply(HttpResponse response) = 0;
  virtual void StartStream(std::string content_type) = 0;
  virtual void Send(std::string bytes) = 0;
  virtual void Finish() = 0;
  // Ends a stream without the end that the protocol asks for: the client sees a broken transfer, not a short answer.
  virtual void Abort() = 0;
  // Runs `task` on the connection's own strand: tasks of one exchange never run at the same time.
  virtual void Post(std::function<void()> task) = 0;
  // `closed` runs once on the strand when the client goes before the end (or is too slow to be kept); at once when it
  // has gone already. It is dropped, unrun, when the exchange ends normally.
  virtual void OnClosed(std::function<void()> closed) = 0;
};

}  // namespace qwen::server
