// controller/reconcile/reconciler.h — the loop: key → snapshot out of the informers' stores → plan::MakePlan → writes.
//
// A pipeline carries a finalizer from the look after its first pods were made until its heads have drained and its pods are gone.
// The status goes first: it is the write-ahead record of epochs, so a controller that dies at any line is followed by one that
// goes on from there. A look waits until all own writes are back in the stores (Expectations), so nothing is created twice.
// What the API server refuses (quota, an invalid object) is told in the status and tried again every kRefusedRetryMicros.
// Thread safety: Start, WaitForSync, StartWorkers and Stop by the owner; synced from any thread.
#pragma once
#include <atomic>
#include <chrono>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "controller/kube/client.h"
#include "controller/kube/controller.h"
#include "controller/kube/event_recorder.h"
#include "controller/kube/expectations.h"
#include "controller/kube/informer.h"
#include "controller/plan/plan.h"
#include "controller/reconcile/load_watch.h"
#include "controller/reconcile/views.h"

namespace qwen::reconcile {

class Reconciler {
 public:
  static constexpr int64_t kRefusedRetryMicros = 10'000'000;
  // A pipeline without pods keeps its object while more than kFewLeaving pods of others are going (OthersGoFirst), but never longer
  // than kTidyWaitSeconds after it was deleted.
  static constexpr int64_t kFewLeaving = 8, kTidyWaitSeconds = 30;
  struct Options {
    std::string namespace_name;  // empty: all namespaces
    plan::Images images;
    int32_t workers = 4;
    LoadWatch::Ask ask_head;  // empty: the status says nothing of loading
    bool watch_nodes = true;  // false: a lost node is noticed when Kubernetes evicts its pods, after minutes
  };
  // Everything borrowed outlives the reconciler.
  Reconciler(kube::Transport& transport, kube::Client& client, kube::EventRecorder& recorder, const Clock& clock, kube::Metrics& metrics, Options options);
  ~Reconciler();

  void Start();  // watches; decides nothing yet
  bool WaitForSync(std::chrono::milliseconds timeout);
  bool synced();
  void StartWorkers();  // REQUIRES: Start, this replica leads, or there is no election
  void Stop();          // lets the reconciles in progress end

 private:
  // One store of children and our own writes that it may not show yet.
  template <typename View>
  struct Children {
    kube::Informer<View> informer;
    kube::Expectations expectations;
  };

  Result<kube::Requeue> Reconcile(const kube::ObjectKey& key);
  void WatchNodes();
  void ReadNode(plan::ObservedPod& pod);
  void ReadLoads(const kube::ObjectKey& key, const std::vector<std::shared_ptr<const PodView>>& views, std::vector<plan::ObservedPod>& pods);
  plan::Observed Observe(const PipelineView& view, const kube::ObjectKey& key);
  bool UpToDate(const kube::ObjectKey& key);
  Result<kube::Requeue> Act(const PipelineView& view, const kube::ObjectKey& key, const plan::Observed& observed, plan::Actions actions);
  Children<ChildView>& OfKind(const std::string& child_name);  // "Service/q"
  template <typename Each>
  void ForEachStore(const Each& each);  // of pipelines and what they own
  bool WriteFinalizer(const PipelineView& view, const kube::ObjectKey& key, bool present, const kube::Json& newest, std::string* refusal, Status* error);
  bool OthersGoFirst(const kube::ObjectKey& key, const plan::Observed& observed);
  void ApplyPodGroups(const kube::ObjectKey& key, const std::vector<kube::Json>& groups, std::string* refusal, Status* error);
  // Of what does not depend on another of them: what is deleted, the Secret, the other children, claims and Jobs.
  void WriteChildren(const PipelineView& view, const kube::ObjectKey& key, const plan::Actions& actions, std::string* refusal, Status* error);
  bool WriteAll(const PipelineView& view, const kube::ObjectKey& key, plan::Actions& actions, std::string* refusal, Status* error);

  kube::Transport& transport_;
  kube::Client& client_;
  kube::EventRecorder& recorder_;
  const Clock& clock_;
  kube::Metrics& metrics_;
  const Options options_;
  std::mutex mutex_;
  std::map<kube::ObjectKey, std::string> refusals_;  // guarded by mutex_; of the last writes of a pipeline
  struct Revised {
    std::string uid;
    int64_t generation = 0;
    std::string revision;
  };
  std::map<kube::ObjectKey, Revised> revisions_;  // guarded by mutex_; of the spec as last looked at: nine tenths of a look's time
  // Guarded by mutex_. Nobody watches PodGroups, whose definition a cluster may lack: each is applied once, and once more by the
  // next process, which changes nothing.
  std::map<kube::ObjectKey, std::set<std::string>> pod_groups_;
  kube::Controller controller_;
  Children<PipelineView> pipelines_;
  Children<PodView> pods_;
  Children<ChildView> services_, policies_, budgets_;
  Children<ClaimView> claims_;
  Children<JobView> jobs_;
  Children<SecretView> secrets_;
  kube::Informer<NodeView> nodes_;
  std::atomic<int64_t> fine_nodes_{0};
  std::atomic<int64_t> leaving_{0};             // pods that are being deleted
  std::atomic<int64_t> last_left_micros_{0};    // when the last one of them was gone
  std::set<kube::ObjectKey> waiting_to_tidy_;   // guarded by mutex_; OthersGoFirst said so
  LoadWatch loads_;
};

}  // namespace qwen::reconcile
