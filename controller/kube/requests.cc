#include "controller/kube/requests.h"

#include <nlohmann/json.hpp>

namespace qwen::kube {
namespace {
constexpr char kJson[] = "application/json";

// Appends "?name=value" or "&name=value"; empty values are left out.
class Query {
 public:
  explicit Query(std::string path) : path_(std::move(path)) {}
  Query& Add(std::string_view name, std::string_view value) {
    if (value.empty()) return *this;
    path_ += path_.find('?') == std::string::npos ? '?' : '&';
    path_ += name;
    path_ += '=';
    path_ += PercentEncode(value);
    return *this;
  }
  std::string Take() { return std::move(path_); }

 private:
  std::string path_;
};

Query Selecting(const Resource& resource, const Selection& selection) {
  Query query(ResourcePath(resource, selection.namespace_name));
  query.Add("labelSelector", selection.label_selector).Add("fieldSelector", selection.field_selector);
  return query;
}

std::string ObjectPath(const Resource& resource, const ObjectKey& key, const std::string& subresource) {
  return ResourcePath(resource, key.namespace_name, key.name) + (subresource.empty() ? "" : "/" + subresource);
}
}  // namespace

std::string PercentEncode(std::string_view text) {
  constexpr char kHex[] = "0123456789ABCDEF";
  std::string out;
  for (const unsigned char c : text) {
    if (std::isalnum(c) || c == '-' || c == '.' || c == '_' || c == '~') {
      out += static_cast<char>(c);
    } else {
      out += '%';
      out += kHex[c >> 4];
      out += kHex[c & 15];
    }
  }
  return out;
}

std::string ResourcePath(const Resource& resource, const std::string& namespace_name, const std::string& name) {
  std::string path = resource.group.empty() ? "/api/" + resource.version : "/apis/" + resource.group + "/" + resource.version;
  if (resource.namespaced && !namespace_name.empty()) path += "/namespaces/" + PercentEncode(namespace_name);
  path += "/" + resource.plural;
  if (!name.empty()) path += "/" + PercentEncode(name);
  return path;
}

HttpRequest GetRequest(const Resource& resource, const ObjectKey& key) { return {Method::kGet, ObjectPath(resource, key, {}), {}, {}}; }

HttpRequest ListRequest(const Resource& resource, const Selection& selection, int32_t items_max, const std::string& continue_token) {
  Query query = Selecting(resource, selection);
  query.Add("limit", std::to_string(items_max)).Add("continue", continue_token);
  return {Method::kGet, query.Take(), {}, {}};
}

HttpRequest WatchRequest(const Resource& resource, const Selection& selection, const WatchOptions& options) {
  Query query = Selecting(resource, selection);
  query.Add("watch", "true").Add("allowWatchBookmarks", "true").Add("timeoutSeconds", std::to_string(options.timeout_seconds));
  query.Add("resourceVersion", options.resource_version);
  if (options.initial_events) query.Add("sendInitialEvents", "true").Add("resourceVersionMatch", "NotOlderThan");
  return {Method::kGet, query.Take(), {}, {}};
}

HttpRequest CreateRequest(const Resource& resource, const Json& object) {
  return {Method::kPost, ResourcePath(resource, KeyOf(object).namespace_name), kJson, object.dump()};
}

HttpRequest UpdateRequest(const Resource& resource, const Json& object, const std::string& subresource) {
  return {Method::kPut, ObjectPath(resource, KeyOf(object), subresource), kJson, object.dump()};
}

HttpRequest ApplyRequest(const Resource& resource, const Json& object, const ApplyOptions& options) {
  Query query(ObjectPath(resource, KeyOf(object), options.subresource));
  query.Add("fieldManager", options.field_manager).Add("force", options.force ? "true" : "false");
  // The API takes YAML here, of which JSON is a part; apply-patch+json does not exist.
  return {Method::kPatch, query.Take(), "application/apply-patch+yaml", object.dump()};
}

HttpRequest MergePatchRequest(const Resource& resource, const ObjectKey& key, const Json& patch, const std::string& subresource,
                              const std::string& field_manager) {
  Query query(ObjectPath(resource, key, subresource));
  query.Add("fieldManager", field_manager);
  return {Method::kPatch, query.Take(), "application/merge-patch+json", patch.dump()};
}

HttpRequest DeleteRequest(const Resource& resource, const ObjectKey& key, const DeleteOptions& options) {
  Json body = {{"apiVersion", "v1"}, {"kind", "DeleteOptions"}, {"propagationPolicy", options.propagation}};
  if (!options.uid.empty()) body["preconditions"] = {{"uid", options.uid}};
  if (options.grace_period_seconds) body["gracePeriodSeconds"] = *options.grace_period_seconds;
  return {Method::kDelete, ObjectPath(resource, key, {}), kJson, body.dump()};
}

}  // namespace qwen::kube
