#include "controller/kube/expectations.h"

#include <algorithm>

#include "stage/base/log.h"

namespace qwen::kube {

void Expectations::Wrote(const ObjectKey& owner, const std::string& resource_version, int64_t now_micros) {
  std::lock_guard<std::mutex> lock(mutex_);
  Outstanding& outstanding = owners_[owner];
  outstanding.revision = std::max(outstanding.revision, RevisionOf(resource_version));
  outstanding.since_micros = now_micros;
}

void Expectations::Deleted(const ObjectKey& owner, const std::string& uid, int64_t now_micros) {
  std::lock_guard<std::mutex> lock(mutex_);
  Outstanding& outstanding = owners_[owner];
  outstanding.deleted_uids.insert(uid);
  outstanding.since_micros = now_micros;
}

void Expectations::Forget(const ObjectKey& owner) {
  std::lock_guard<std::mutex> lock(mutex_);
  owners_.erase(owner);
}

bool Expectations::Satisfied(const ObjectKey& owner, uint64_t seen_revision, const std::function<bool(const std::string&)>& alive,
                             int64_t now_micros) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = owners_.find(owner);
  if (found == owners_.end()) return true;
  Outstanding& outstanding = found->second;
  std::erase_if(outstanding.deleted_uids, [&](const std::string& uid) { return !alive(uid); });
  const bool met = seen_revision >= outstanding.revision && outstanding.deleted_uids.empty();
  const bool given_up = !met && now_micros - outstanding.since_micros >= kGiveUpMicros;
  if (given_up) log::Warning("own writes did not come back in time; looking anew", {{"object", owner.ToString()}});
  if (met || given_up) owners_.erase(found);
  return met || given_up;
}

}  // namespace qwen::kube
