// controller/kube/store.h — the local copy of one resource: typed objects by key, with indices. What an informer fills and a
// reconciler reads instead of asking the API server.
//
// T is a small struct of the caller's with a member `ObjectMeta meta`: a Pod is 8 kB of JSON and 60 kB as a tree of it, but a
// reconciler looks at a few hundred bytes. Objects are immutable and shared, because a reader may still hold one that the
// next event has replaced.
// Thread safety: all members from any thread; AddIndex before the first object.
#pragma once
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "controller/kube/object.h"
#include "stage/base/check.h"

namespace qwen::kube {

template <typename T>
class Store {
 public:
  using Ptr = std::shared_ptr<const T>;
  using IndexOf = std::function<std::vector<std::string>(const T&)>;

  // Objects become findable under every value that `index_of` gives.
  void AddIndex(std::string name, IndexOf index_of) {
    std::unique_lock lock(mutex_);
    QP_CHECK(objects_.empty());
    indices_.emplace(std::move(name), Index{std::move(index_of), {}});
  }

  Ptr Get(const ObjectKey& key) const {  // null: not there
    std::shared_lock lock(mutex_);
    const auto found = objects_.find(key);
    return found == objects_.end() ? nullptr : found->second;
  }
  std::vector<Ptr> List() const {
    std::shared_lock lock(mutex_);
    std::vector<Ptr> all;
    all.reserve(objects_.size());
    for (const auto& [key, object] : objects_) all.push_back(object);
    return all;
  }
  // In order of their keys. REQUIRES: the index was added.
  std::vector<Ptr> ByIndex(const std::string& name, const std::string& value) const {
    std::shared_lock lock(mutex_);
    const auto index = indices_.find(name);
    QP_CHECK(index != indices_.end()) << name;
    std::vector<Ptr> found;
    if (const auto keys = index->second.keys.find(value); keys != index->second.keys.end()) {
      for (const ObjectKey& key : keys->second) found.push_back(objects_.at(key));
    }
    return found;
  }
  size_t size() const {
    std::shared_lock lock(mutex_);
    return objects_.size();
  }
  // The newest resourceVersion that is reflected here; a reconciler compares it with those of its own writes (expectations.h).
  uint64_t seen_revision() const {
    std::shared_lock lock(mutex_);
    return seen_revision_;
  }

  // Return what was there before (null: nothing).
  Ptr Put(Ptr object) {
    std::unique_lock lock(mutex_);
    Ptr& slot = objects_[object->meta.key];
    Ptr old = std::move(slot);
    slot = std::move(object);
    for (auto& [name, index] : indices_) {
      if (old) index.Remove(*old);
      index.Add(*slot);
    }
    return old;
  }
  Ptr Remove(const ObjectKey& key) {
    std::unique_lock lock(mutex_);
    const auto found = objects_.find(key);
    if (found == objects_.end()) return nullptr;
    Ptr old = std::move(found->second);
    for (auto& [name, index] : indices_) index.Remove(*old);
    objects_.erase(found);
    return old;
  }
  void SeenRevision(uint64_t revision) {
    std::unique_lock lock(mutex_);
    if (revision > seen_revision_) seen_revision_ = revision;
  }

 private:
  struct Index {
    IndexOf index_of;
    std::unordered_map<std::string, std::set<ObjectKey>> keys;  // value -> objects

    void Add(const T& object) {
      for (const std::string& value : index_of(object)) keys[value].insert(object.meta.key);
    }
    void Remove(const T& object) {
      for (const std::string& value : index_of(object)) {
        const auto found = keys.find(value);
        if (found == keys.end()) continue;
        found->second.erase(object.meta.key);
        if (found->second.empty()) keys.erase(found);
      }
    }
  };

  mutable std::shared_mutex mutex_;
  std::unordered_map<ObjectKey, Ptr> objects_;  // guarded by mutex_
  std::map<std::string, Index> indices_;        // guarded by mutex_
  uint64_t seen_revision_ = 0;                  // guarded by mutex_
};

}  // namespace qwen::kube
