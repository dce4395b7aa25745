// controller/reconcile/load_watch.h — asks the heads of groups that are not ready yet how far their stages are with their weights. The
// only thing that the operator asks anybody but the API server; nothing depends on the answer, it is told in the status.
//
// A head answers GET /ready with 503 and {"stages": [{"stage": 0, "connected": true, "loaded": false, "load_percent": 41}, ...]}.
// Percentages are cut to tens, so that a load costs a dozen writes of the status at most. One thread, one question at a time: a head that
// does not answer costs its patience and nothing else.
// Thread safety: Follow and Of from any thread.
#pragma once
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "controller/kube/object.h"
#include "stage/base/status.h"

namespace qwen::reconcile {

// By stage: 0 to 100 in tens; -1: not known, or not connected to its head.
using LoadPercents = std::vector<int32_t>;
// Of a head's answer. Empty: it does not say.
LoadPercents ParseLoads(const std::string& body);

class LoadWatch {
 public:
  static constexpr std::chrono::seconds kPeriod{3};
  // `ask`: GET http://ADDRESS/ready, the body whatever the code; blocks for a second or two at most. `on_news`: another answer than before.
  using Ask = std::function<Result<std::string>(const std::string& address)>;
  using OnNews = std::function<void(const kube::ObjectKey& pipeline)>;
  LoadWatch(Ask ask, OnNews on_news) : ask_(std::move(ask)), on_news_(std::move(on_news)) {}
  ~LoadWatch() { Stop(); }

  void Start();
  void Stop();
  // The heads of this pipeline to ask from now on: uid of the pod -> "ip:port". Empty: none.
  void Follow(const kube::ObjectKey& pipeline, std::map<std::string, std::string> heads);
  LoadPercents Of(const std::string& head_uid) const;
  void AskAll();  // one round; the thread's work, and the tests'

 private:
  struct Head {
    kube::ObjectKey pipeline;
    std::string address;
    LoadPercents loads;
  };
  const Ask ask_;
  const OnNews on_news_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::string, Head> heads_;  // guarded by mutex_; by uid
  bool stopping_ = false;              // guarded by mutex_
  std::thread thread_;
};

}  // namespace qwen::reconcile
