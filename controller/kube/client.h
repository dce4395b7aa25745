// controller/kube/client.h — requests to the API server with the retries that client-go makes, and many of them at once.
//
// An Answer carries what a controller decides on (NotFound, AlreadyExists, Conflict), not only success. No client-side rate
// limit: the server's own fairness (429 with Retry-After, which is obeyed here) does that work since Kubernetes 1.20.
// Thread safety: all members from any thread. Blocking; never call it from a thread of the transport.
#pragma once
#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "controller/kube/metrics.h"
#include "controller/kube/object.h"
#include "controller/kube/requests.h"
#include "controller/kube/transport.h"
#include "stage/base/clock.h"

namespace qwen::kube {

struct Answer {
  int32_t code = 0;     // HTTP status; 0: no answer was had, transport_status says why
  std::string reason;   // metav1.Status.reason: "NotFound", "AlreadyExists", "Conflict", "Invalid", ...; empty when ok
  std::string message;  // the server's words
  Status transport_status;
  Json body;  // the object, when ok; null otherwise

  bool ok() const { return code >= 200 && code < 300; }
  bool NotFound() const { return code == 404; }
  bool AlreadyExists() const { return code == 409 && reason == "AlreadyExists"; }
  bool Conflict() const { return code == 409 && reason != "AlreadyExists"; }
  bool Gone() const { return code == 410; }
  // OK, or the same failure for callers that only pass it on: "Invalid (422): ...".
  Status status() const;
};
Answer ParseAnswer(Result<HttpResponse> response);

// Says whether this process may still write. Asked before each attempt of a request that is no GET, so that nothing is sent
// after leadership is lost (leader_election.h). REQUIRES: thread-safe, fast.
class WriteFence {
 public:
  virtual ~WriteFence() = default;
  virtual bool MayWrite() const = 0;
};

// How long to wait before the same request is sent again; nullopt: the answer stands. `attempt` counts from 1.
//   429, and 5xx with Retry-After: what the server asks (at most 30 s), up to 10 attempts, for every method
//   401: once, at once: the credential is read again
//   no answer at all: GETs only, 3 attempts; a write may have been carried out, and the caller's next look will tell
std::optional<int64_t> RetryDelayMicros(Method method, const Result<HttpResponse>& response, int32_t attempt);

class Client {
 public:
  struct Options {
    std::string field_manager;          // for Apply and PatchStatus
    int32_t in_flight_max = 32;         // of one DoAll; each is one keep-alive connection
    const WriteFence* fence = nullptr;  // null: always may write (the Lease itself is written so)
  };
  // Everything borrowed outlives the client.
  Client(Transport& transport, const Clock& clock, Metrics& metrics, Options options);

  Answer Get(const Resource& resource, const ObjectKey& key) { return Do(GetRequest(resource, key)); }
  Answer Create(const Resource& resource, const Json& object) { return Do(CreateRequest(resource, object)); }
  Answer Update(const Resource& resource, const Json& object) { return Do(UpdateRequest(resource, object)); }
  Answer Apply(const Resource& resource, const Json& object) { return Do(MakeApply(resource, object)); }
  // `status` replaces what it names of /status (merge patch); an unchanged one costs a request but no write in etcd. A Conflict when the
  // object is no longer at `resource_version`, from which the status was made.
  Answer PatchStatus(const Resource& resource, const ObjectKey& key, const std::string& resource_version, const Json& status);
  Answer Delete(const Resource& resource, const ObjectKey& key, const DeleteOptions& options = {}) {
    return Do(DeleteRequest(resource, key, options));
  }
  // Calls `each` for every object, page by page (500 a page), holding one page's text and one object at a time.
  // `resource_version` (may be null) receives that of the list. Not a snapshot when a page expired: the answer is then 410.
  Answer List(const Resource& resource, const Selection& selection, const std::function<void(Json)>& each,
              std::string* resource_version = nullptr);

  HttpRequest MakeApply(const Resource& resource, const Json& object) const;

  Answer Do(HttpRequest request);
  // All of them, up to in_flight_max at once. `on_answer(index, answer)` runs on the calling thread in order of arrival, so a
  // thousand answers are never held together. Returns the number that were not ok.
  size_t DoAll(std::vector<HttpRequest> requests, const std::function<void(size_t, Answer)>& on_answer);

 private:
  Transport& transport_;
  const Clock& clock_;
  Metrics& metrics_;
  const Options options_;
};

// Splits a list's text into its items without building a tree of the whole: `each` gets one object at a time. Returns the
// list's metadata; kDataLoss for what is no list.
struct ListMeta {
  std::string resource_version;
  std::string continue_token;
};
Result<ListMeta> ForEachItem(const std::string& list, const std::function<void(Json)>& each);

}  // namespace qwen::kube
