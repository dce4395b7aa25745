// controller/kube/expectations.h — what this process wrote and its store may not show yet. A reconciler that looks before its
// own writes have come back would create a pod twice, or count a deleted one.
//
//   after a create or apply:   Wrote(owner, answer's resourceVersion)
//   after a delete:            Deleted(owner, uid)
//   at the start of Reconcile: if (!Satisfied(owner, ...)) return requeue; the event that satisfies it enqueues the key anyway
// Versions of etcd-backed resources are ordered, so a store that has seen a later one has seen the write, whatever happened to
// the object since. An expectation that is not met within 5 minutes is dropped: the truth is then looked up anew.
// Thread safety: all members from any thread. One Expectations per store.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>

#include "controller/kube/object.h"

namespace qwen::kube {

class Expectations {
 public:
  static constexpr int64_t kGiveUpMicros = 300'000'000;

  void Wrote(const ObjectKey& owner, const std::string& resource_version, int64_t now_micros);
  void Deleted(const ObjectKey& owner, const std::string& uid, int64_t now_micros);
  void Forget(const ObjectKey& owner);  // the owner is gone

  // `alive(uid)`: the store still has that object, and not marked as being deleted.
  bool Satisfied(const ObjectKey& owner, uint64_t seen_revision, const std::function<bool(const std::string&)>& alive,
                 int64_t now_micros);

 private:
  struct Outstanding {
    uint64_t revision = 0;
    std::set<std::string> deleted_uids;
    int64_t since_micros = 0;  // of the latest write
  };
  std::mutex mutex_;
  std::unordered_map<ObjectKey, Outstanding> owners_;  // guarded by mutex_
};

}  // namespace qwen::kube
