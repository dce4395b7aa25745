// controller/kube/requests.h — the API's paths and bodies as HttpRequests. Pure; thread-safe.
#pragma once
#include <cstdint>
#include <optional>
#include <string>

#include "controller/kube/object.h"
#include "controller/kube/transport.h"

namespace qwen::kube {

// "/api/v1/namespaces/ns/pods/name"; an empty name gives the collection, an empty namespace all of them.
std::string ResourcePath(const Resource& resource, const std::string& namespace_name, const std::string& name = {});
std::string PercentEncode(std::string_view text);  // for one query value

HttpRequest GetRequest(const Resource& resource, const ObjectKey& key);

struct Selection {
  std::string namespace_name;  // empty: all namespaces
  std::string label_selector;
  std::string field_selector;
};
// One page, consistent with the store at the time of its first page. `continue_token` is empty for the first.
HttpRequest ListRequest(const Resource& resource, const Selection& selection, int32_t items_max, const std::string& continue_token);
struct WatchOptions {
  std::string resource_version;  // empty with initial_events: from the present
  bool initial_events = false;   // WatchList: the present state first, then a bookmark that ends it
  int32_t timeout_seconds = 0;   // after which the server ends the stream cleanly
};
HttpRequest WatchRequest(const Resource& resource, const Selection& selection, const WatchOptions& options);

// Below: `object` carries apiVersion, kind, metadata.name and, where it has one, metadata.namespace.
HttpRequest CreateRequest(const Resource& resource, const Json& object);
// PUT; fails with Conflict when metadata.resourceVersion is not the stored one.
HttpRequest UpdateRequest(const Resource& resource, const Json& object, const std::string& subresource = {});
// Server-side apply. `force` takes fields from other managers, as a controller should for what it owns.
struct ApplyOptions {
  std::string field_manager;
  bool force = true;
  std::string subresource;  // "status", or empty
};
HttpRequest ApplyRequest(const Resource& resource, const Json& object, const ApplyOptions& options);
// A JSON merge patch; null removes a field. With metadata.resourceVersion in it, a stale one is a Conflict.
HttpRequest MergePatchRequest(const Resource& resource, const ObjectKey& key, const Json& patch, const std::string& subresource = {},
                              const std::string& field_manager = {});
struct DeleteOptions {
  std::string uid;                              // non-empty: only this very object, else Conflict
  std::optional<int32_t> grace_period_seconds;  // absent: the object's own; 0 at once
  std::string propagation = "Background";       // of what it owns: Foreground, Background, Orphan
};
HttpRequest DeleteRequest(const Resource& resource, const ObjectKey& key, const DeleteOptions& options = {});

}  // namespace qwen::kube
