// controller/kube/informer.h — a reflector on its own thread, a store, and handlers that hear of every change.
//
//   Informer<Pod> pods({.resource = resources::kPods, .selection = {.label_selector = "..."}}, DecodePod);
//   pods.store().AddIndex("owner", ...);
//   pods.AddHandler({.on_change = [&](auto old, auto now, bool initial) { queue.Add(...); }});
//   pods.Start(transport, clock, metrics);
//   if (!pods.WaitForSync(30s)) ...
//
// Handlers run on the informer's thread, one at a time, after the store has changed; they must not block (put a key in a work
// queue). A handler added after Start is a broken invariant.
// Thread safety: Start, Stop and AddHandler by the owner; store() and synced() from any thread.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>
#include <utility>
#include <vector>

#include "controller/kube/metrics.h"
#include "controller/kube/reflector.h"
#include "controller/kube/store.h"
#include "controller/kube/transport.h"
#include "stage/base/clock.h"
#include "stage/base/log.h"

namespace qwen::kube {

// Drives a reflector: the only place of its I/O. Owns the thread.
class ReflectorThread {
 public:
  // `synced` becomes true with the first complete list. Whoever asks for it may do so before this begins and after it has ended.
  ReflectorThread(Reflector& reflector, Transport& transport, const Clock& clock, Metrics& metrics, std::atomic<bool>& synced);
  ~ReflectorThread();  // ends the stream in progress and joins

  bool WaitForSync(std::chrono::milliseconds timeout);  // false: not in time

 private:
  void Run(std::stop_token stop);
  void NoteSync();

  Reflector& reflector_;
  Transport& transport_;
  const Clock& clock_;
  Metrics& metrics_;
  std::atomic<bool>& synced_;
  std::mutex mutex_;
  std::condition_variable_any changed_;
  std::jthread thread_;  // last: it uses all of the above
};

template <typename T>
class Informer final : private Reflector::Sink {
 public:
  using Ptr = typename Store<T>::Ptr;
  using Decode = std::function<T(const Json&)>;  // may throw nlohmann's type errors: the object is then left out and logged
  struct Handler {
    // old null: added; now null: deleted; both: changed. `initial`: part of a full list, so of low priority.
    std::function<void(const Ptr& old, const Ptr& now, bool initial)> on_change;
  };

  Informer(Reflector::Options options, Decode decode) : decode_(std::move(decode)), reflector_(std::move(options), *this) {}
  ~Informer() override { Stop(); }

  Store<T>& store() { return store_; }
  const Store<T>& store() const { return store_; }
  void AddHandler(Handler handler) {
    QP_CHECK(thread_ == nullptr);
    handlers_.push_back(std::move(handler));
  }
  // Everything borrowed outlives the informer.
  void Start(Transport& transport, const Clock& clock, Metrics& metrics) {
    QP_CHECK(thread_ == nullptr);
    thread_ = std::make_unique<ReflectorThread>(reflector_, transport, clock, metrics, synced_);
  }
  void Stop() {
    thread_.reset();
    synced_ = false;
  }
  bool WaitForSync(std::chrono::milliseconds timeout) { return thread_ != nullptr && thread_->WaitForSync(timeout); }
  bool synced() const { return synced_; }

 private:
  Ptr Make(const Json& object) const {
    try {
      return std::make_shared<const T>(decode_(object));
    } catch (const nlohmann::json::exception& e) {
      log::Error("object left out: it cannot be decoded", {{"object", KeyOf(object).ToString()}, {"error", e.what()}});
      return nullptr;
    }
  }
  void Tell(const Ptr& old, const Ptr& now, bool initial) const {
    for (const Handler& handler : handlers_) handler.on_change(old, now, initial);
  }
  void PutAndTell(Ptr object, bool initial) {
    if (object == nullptr) return;
    const Ptr now = object;
    const Ptr old = store_.Put(std::move(object));
    if (old && old->meta.resource_version == now->meta.resource_version) return;  // a relist of what is known
    Tell(old, now, initial);
  }

  void BeginReplace() override { listed_.clear(); }
  void ReplaceItem(Json object) override {
    if (Ptr made = Make(object)) listed_[made->meta.key] = std::move(made);
  }
  void EndReplace() override {
    for (const Ptr& old : store_.List()) {
      if (listed_.contains(old->meta.key)) continue;
      store_.Remove(old->meta.key);
      Tell(old, nullptr, false);
    }
    for (auto& [key, object] : listed_) PutAndTell(std::move(object), true);
    listed_ = {};
  }
  void Upsert(Json object) override { PutAndTell(Make(object), false); }
  void Erase(Json object) override {
    if (const Ptr old = store_.Remove(KeyOf(object))) Tell(old, nullptr, false);
  }
  void SeenVersion(const std::string& version) override { store_.SeenRevision(RevisionOf(version)); }

  const Decode decode_;
  Store<T> store_;
  std::vector<Handler> handlers_;
  std::unordered_map<ObjectKey, Ptr> listed_;  // the list in progress; owned by the thread
  Reflector reflector_;                        // owned by the thread while there is one
  std::atomic<bool> synced_{false};
  std::unique_ptr<ReflectorThread> thread_;
};

}  // namespace qwen::kube
