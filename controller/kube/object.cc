#include "controller/kube/object.h"

#include <charconv>
#include <nlohmann/json.hpp>

namespace qwen::kube {

const Json* FindAt(const Json& value, std::string_view pointer) {
  const Json* at = &value;
  while (!pointer.empty()) {
    pointer.remove_prefix(1);  // the '/'
    const size_t end = pointer.find('/');
    const std::string_view name = pointer.substr(0, end);
    if (at->is_object()) {
      std::string key(name);  // "~1" stands for '/', as in RFC 6901
      for (size_t at_escape; (at_escape = key.find("~1")) != std::string::npos;) key.replace(at_escape, 2, "/");
      const auto found = at->find(key);
      if (found == at->end()) return nullptr;
      at = &*found;
    } else if (at->is_array()) {
      size_t index = 0;
      const auto parsed = std::from_chars(name.data(), name.data() + name.size(), index);
      if (parsed.ec != std::errc() || parsed.ptr != name.data() + name.size() || index >= at->size()) return nullptr;
      at = &(*at)[index];
    } else {
      return nullptr;
    }
    pointer = end == std::string_view::npos ? std::string_view() : pointer.substr(end);
  }
  return at;
}

std::string StringAt(const Json& value, std::string_view pointer, std::string_view fallback) {
  const Json* found = FindAt(value, pointer);
  return found && found->is_string() ? found->get_ref<const std::string&>() : std::string(fallback);
}

int64_t IntAt(const Json& value, std::string_view pointer, int64_t fallback) {
  const Json* found = FindAt(value, pointer);
  return found && found->is_number_integer() ? found->get<int64_t>() : fallback;
}

bool BoolAt(const Json& value, std::string_view pointer, bool fallback) {
  const Json* found = FindAt(value, pointer);
  return found && found->is_boolean() ? found->get<bool>() : fallback;
}

ObjectKey KeyOf(const Json& object) { return {StringAt(object, "/metadata/namespace"), StringAt(object, "/metadata/name")}; }

ObjectMeta ParseMeta(const Json& object) {
  ObjectMeta meta;
  meta.key = KeyOf(object);
  meta.uid = StringAt(object, "/metadata/uid");
  meta.resource_version = StringAt(object, "/metadata/resourceVersion");
  meta.generation = IntAt(object, "/metadata/generation");
  meta.deleting = FindAt(object, "/metadata/deletionTimestamp") != nullptr;
  meta.creation_timestamp = StringAt(object, "/metadata/creationTimestamp");
  if (const Json* labels = FindAt(object, "/metadata/labels"); labels && labels->is_object()) {
    for (const auto& [name, value] : labels->items()) {
      if (value.is_string()) meta.labels.emplace(name, value.get_ref<const std::string&>());
    }
  }
  if (const Json* owners = FindAt(object, "/metadata/ownerReferences"); owners && owners->is_array()) {
    for (const Json& owner : *owners) {
      if (!BoolAt(owner, "/controller")) continue;
      meta.owner_uid = StringAt(owner, "/uid");
      meta.owner_kind = StringAt(owner, "/kind");
      meta.owner_name = StringAt(owner, "/name");
    }
  }
  return meta;
}

uint64_t RevisionOf(std::string_view resource_version) {
  uint64_t revision = 0;
  const auto parsed = std::from_chars(resource_version.data(), resource_version.data() + resource_version.size(), revision);
  return parsed.ec == std::errc() && parsed.ptr == resource_version.data() + resource_version.size() ? revision : 0;
}

}  // namespace qwen::kube
