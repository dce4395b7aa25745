#include "controller/reconcile/reconciler.h"

#include <algorithm>
#include <functional>
#include <random>
#include <utility>

#include "controller/kube/time_text.h"
#include "stage/base/log.h"
#include "stage/contract/pod_contract.h"

namespace qwen::reconcile {
namespace {
using kube::Answer;
using kube::Json;
using kube::ObjectKey;
namespace resources = kube::resources;

constexpr char kByOwner[] = "owner";
constexpr char kByNode[] = "node";
constexpr char kByUid[] = "uid";

kube::Reflector::Options Watching(const kube::Resource& resource, const std::string& namespace_name, bool labelled) {
  kube::Reflector::Options options{.resource = resource};
  options.selection.namespace_name = namespace_name;
  if (labelled) options.selection.label_selector = std::string(contract::kLabelPipeline);
  return options;
}

template <typename View>
std::vector<std::string> OwnerUid(const View& view) {
  return view.meta.owner_uid.empty() ? std::vector<std::string>() : std::vector<std::string>{view.meta.owner_uid};
}

// What happens anyway while a group comes or goes waits for what somebody waits for: pods of other pipelines, losses, a head that has
// finished.
template <typename View>
bool Routine(const std::shared_ptr<const View>& old, const std::shared_ptr<const View>& now) {
  if constexpr (std::is_same_v<View, PodView>) {
    if (old != nullptr && old->meta.deleting && old->pod.stage >= 0) return true;
  }
  if (now == nullptr || now->meta.deleting) return false;
  if constexpr (std::is_same_v<View, PodView>) {
    if (now->pod.phase == plan::PodPhase::kEnded || (old != nullptr && old->pod.ready && !now->pod.ready)) return false;
  }
  return true;
}

// `refusal`: the server's no; `error`: a failure that another try may not meet. The first of each is kept. False: neither succeeded.
bool Judge(const Answer& answer, const std::string& what, std::string* refusal, Status* error) {
  if (answer.ok()) return true;
  if (answer.code == 403 || answer.code == 422 || answer.code == 400) {
    if (refusal->empty()) *refusal = what + ": " + answer.message;
  } else if (error->ok()) {
    *error = answer.status().WithContext(what);
  }
  return false;
}

const kube::Resource& ResourceOf(const std::string& child_name) {
  for (const kube::Resource* resource : {&resources::kServices, &resources::kNetworkPolicies, &resources::kPodDisruptionBudgets})
    if (child_name.starts_with(resource->kind + "/")) return *resource;
  QP_CHECK(false) << child_name;
  return resources::kServices;
}

// 32 bytes of the system's randomness.
std::string NewSecret() {
  std::random_device device;
  std::string hex;
  for (int i = 0; i < 32; ++i) {
    char pair[3];
    std::snprintf(pair, sizeof(pair), "%02x", device() & 0xffu);
    hex += pair;
  }
  return hex + "\n";
}

}  // namespace

Reconciler::Reconciler(kube::Transport& transport, kube::Client& client, kube::EventRecorder& recorder, const Clock& clock, kube::Metrics& metrics,
                       Options options)
    : transport_(transport),
      client_(client),
      recorder_(recorder),
      clock_(clock),
      metrics_(metrics),
      options_(std::move(options)),
      controller_({.name = "qwenpipeline", .workers = options_.workers}, [this](const ObjectKey& key) { return Reconcile(key); }, clock, metrics),
      pipelines_{{Watching(resources::kQwenPipelines, options_.namespace_name, false), DecodePipeline}, {}},
      pods_{{Watching(resources::kPods, options_.namespace_name, true), DecodePod}, {}},
      services_{{Watching(resources::kServices, options_.namespace_name, true), DecodeChild}, {}},
      policies_{{Watching(resources::kNetworkPolicies, options_.namespace_name, true), DecodeChild}, {}},
      budgets_{{Watching(resources::kPodDisruptionBudgets, options_.namespace_name, true), DecodeChild}, {}},
      claims_{{Watching(resources::kPersistentVolumeClaims, options_.namespace_name, true), DecodeClaim}, {}},
      jobs_{{Watching(resources::kJobs, options_.namespace_name, true), DecodeJob}, {}},
      secrets_{{Watching(resources::kSecrets, options_.namespace_name, true), DecodeSecret}, {}},
      nodes_({.resource = resources::kNodes}, DecodeNode),
      loads_(options_.ask_head, [this](const ObjectKey& key) { controller_.queue().Add(key, kube::Priority::kLow); }) {
  const auto enqueue = [this](const ObjectKey& key, bool can_wait) {
    controller_.queue().Add(key, can_wait ? kube::Priority::kLow : kube::Priority::kNormal);
  };
  pods_.informer.store().AddIndex(kByUid, [](const PodView& view) { return std::vector<std::string>{view.meta.uid}; });
  pipelines_.informer.AddHandler({.on_change = [enqueue](const auto& old, const auto& now, bool initial) { enqueue((now ? now : old)->meta.key, initial); }});
  const auto watch_children = [&](auto& children) {
    children.informer.store().AddIndex(kByOwner, [](const auto& view) { return OwnerUid(view); });
    children.informer.AddHandler({.on_change = [enqueue](const auto& old, const auto& now, bool initial) {
      const kube::ObjectMeta& meta = (now ? now : old)->meta;  // by the label, because somebody may have taken the owner away
      if (const auto label = meta.labels.find(std::string(contract::kLabelPipeline)); label != meta.labels.end())
        enqueue({meta.key.namespace_name, label->second}, initial || Routine(old, now));
    }});
  };
  watch_children(pods_);
  pods_.informer.AddHandler({.on_change = [this](const auto& old, const auto& now, bool) {
    const auto leaves = [](const auto& pod) { return pod != nullptr && pod->meta.deleting; };
    if (now == nullptr) last_left_micros_ = clock_.NowMicros();
    const int64_t left = leaving_ += leaves(now) - leaves(old);
    if (left != kFewLeaving || leaves(now)) return;
    std::lock_guard<std::mutex> lock(mutex_);
    for (const ObjectKey& key : std::exchange(waiting_to_tidy_, {})) controller_.queue().Add(key, kube::Priority::kLow);
  }});
  watch_children(services_);
  watch_children(policies_);
  watch_children(budgets_);
  watch_children(claims_);
  watch_children(jobs_);
  watch_children(secrets_);
  if (options_.watch_nodes) WatchNodes();
}

// A node is news only when its state changes: heartbeats are none.
void Reconciler::WatchNodes() {
  pods_.informer.store().AddIndex(kByNode, [](const PodView& view) {
    return view.pod.node.empty() ? std::vector<std::string>() : std::vector<std::string>{view.pod.node};
  });
  nodes_.AddHandler({.on_change = [this](const auto& old, const auto& now, bool initial) {
    const auto fine = [](const auto& node) { return node != nullptr && node->state == plan::NodeState::kFine; };
    if (old != nullptr && now != nullptr && old->state == now->state) return;
    const int64_t change = fine(now) - fine(old);
    const int64_t before = fine_nodes_.fetch_add(change);
    const bool first_or_last = (before == 0) != (before + change == 0);  // of the cluster: then it concerns everybody
    const auto priority = initial ? kube::Priority::kLow : kube::Priority::kHigh;
    const auto concerned = first_or_last ? pods_.informer.store().List() : pods_.informer.store().ByIndex(kByNode, (now ? now : old)->meta.key.name);
    for (const auto& pod : concerned)
      if (!pod->meta.owner_name.empty()) controller_.queue().Add({pod->meta.key.namespace_name, pod->meta.owner_name}, priority);
  }});
}

Reconciler::~Reconciler() { Stop(); }

template <typename Each>
void Reconciler::ForEachStore(const Each& each) {
  each(pipelines_);
  each(pods_);
  each(services_);
  each(policies_);
  each(budgets_);
  each(claims_);
  each(jobs_);
  each(secrets_);
}

void Reconciler::Start() {
  ForEachStore([this](auto& store) { store.informer.Start(transport_, clock_, metrics_); });
  if (options_.watch_nodes) nodes_.Start(transport_, clock_, metrics_);
}

bool Reconciler::WaitForSync(std::chrono::milliseconds timeout) {
  bool all = !options_.watch_nodes || nodes_.WaitForSync(timeout);
  ForEachStore([&](auto& store) { all = all && store.informer.WaitForSync(timeout); });
  return all;
}

bool Reconciler::synced() {
  bool all = !options_.watch_nodes || nodes_.synced();
  ForEachStore([&](auto& store) { all = all && store.informer.synced(); });
  return all;
}

void Reconciler::StartWorkers() {
  controller_.Start();
  if (options_.ask_head) loads_.Start();
}

void Reconciler::Stop() {
  loads_.Stop();
  controller_.Stop();
  ForEachStore([](auto& store) { store.informer.Stop(); });
  nodes_.Stop();
}

bool Reconciler::UpToDate(const ObjectKey& key) {
  const auto check = [&](auto& children) {
    const auto& store = children.informer.store();
    const auto alive = [&](const std::string& uid) {  // asked of pods alone: no deletion of anything else is awaited by its uid
      const auto found = store.ByIndex(kByUid, uid);
      return !found.empty() && !found.front()->meta.deleting;
    };
    return children.expectations.Satisfied(key, store.seen_revision(), alive, clock_.NowMicros());
  };
  bool all = true;
  ForEachStore([&](auto& store) { all = all && check(store); });
  return all;
}

// The store of nodes may be behind that of pods: a node that it does not know is asked for before it counts as gone.
void Reconciler::ReadNode(plan::ObservedPod& pod) {
  if (!options_.watch_nodes || pod.node.empty()) return;
  if (const auto node = nodes_.store().Get({"", pod.node})) {
    pod.node_state = node->state;
    pod.node_trouble = node->trouble;
  } else if (client_.Get(resources::kNodes, {"", pod.node}).NotFound()) {
    pod.node_state = plan::NodeState::kGone;
    pod.node_trouble = "node " + pod.node + " is gone";
  }
  if (pod.node_state == plan::NodeState::kLost && fine_nodes_ == 0) pod.node_state = plan::NodeState::kFine;
}

// Of stages that run and are not ready; the head of the same group knows.
void Reconciler::ReadLoads(const ObjectKey& key, const std::vector<std::shared_ptr<const PodView>>& views, std::vector<plan::ObservedPod>& pods) {
  if (!options_.ask_head) return;
  std::map<std::string, std::string> heads;
  for (const auto& view : views) {
    const plan::ObservedPod& head = view->pod;
    if (head.stage >= 0 || head.phase != plan::PodPhase::kRunning || head.deleting || view->ip.empty()) continue;
    bool waits = false;
    const LoadPercents loads = loads_.Of(head.uid);
    for (plan::ObservedPod& pod : pods) {
      if (pod.stage < 0 || pod.replica != head.replica || pod.group_epoch != head.group_epoch || pod.ready || pod.phase != plan::PodPhase::kRunning) continue;
      waits = true;
      if (static_cast<size_t>(pod.stage) < loads.size()) pod.load_percent = loads[static_cast<size_t>(pod.stage)];
    }
    if (waits) heads[head.uid] = view->ip + ":" + std::to_string(contract::kApiPort);
  }
  loads_.Follow(key, std::move(heads));
}

plan::Observed Reconciler::Observe(const PipelineView& view, const ObjectKey& key) {
  plan::Observed observed{.generation = view.meta.generation, .previous = view.status, .deleting = view.meta.deleting,
                          .deleting_since_seconds = view.deleting_since_seconds};
  if (view.pipeline.ok()) {
    observed.pipeline = *view.pipeline;
  } else {
    observed.pipeline.metadata = {.name = key.name, .namespace_name = key.namespace_name, .uid = view.meta.uid};
    observed.spec_error = view.pipeline.status().message();
  }
  observed.has_finalizer = std::find(view.finalizers.begin(), view.finalizers.end(), contract::kDrainFinalizer) != view.finalizers.end();
  const auto pods = pods_.informer.store().ByIndex(kByOwner, view.meta.uid);
  for (const auto& pod : pods) {
    observed.pods.push_back(pod->pod);
    ReadNode(observed.pods.back());
  }
  ReadLoads(key, pods, observed.pods);
  const auto look = [&](Children<ChildView>& children, const char* kind) {
    for (const auto& child : children.informer.store().ByIndex(kByOwner, view.meta.uid))
      if (!child->meta.deleting) observed.children[std::string(kind) + "/" + child->meta.key.name] = child->fingerprint;
  };
  look(services_, resources::kServices.kind.c_str());
  look(policies_, resources::kNetworkPolicies.kind.c_str());
  look(budgets_, resources::kPodDisruptionBudgets.kind.c_str());
  for (const auto& claim : claims_.informer.store().ByIndex(kByOwner, view.meta.uid)) observed.claims.insert(claim->meta.key.name);
  for (const auto& job : jobs_.informer.store().ByIndex(kByOwner, view.meta.uid))
    if (!job->meta.deleting) observed.jobs[job->meta.key.name] = job->job;
  for (const auto& secret : secrets_.informer.store().ByIndex(kByOwner, view.meta.uid))
    observed.has_secret |= secret->meta.key.name == plan::SecretName(observed.pipeline);
  std::lock_guard<std::mutex> lock(mutex_);
  if (const auto revised = revisions_.find(key); revised != revisions_.end() && revised->second.uid == view.meta.uid && revised->second.generation == view.meta.generation)
    observed.revision = revised->second.revision;
  if (const auto refused = refusals_.find(key); refused != refusals_.end()) observed.write_error = refused->second;
  return observed;
}

Result<kube::Requeue> Reconciler::Reconcile(const ObjectKey& key) {
  const auto view = pipelines_.informer.store().Get(key);
  if (view == nullptr) {  // the garbage collector takes what it owned
    ForEachStore([&](auto& store) { store.expectations.Forget(key); });
    loads_.Follow(key, {});
    std::lock_guard<std::mutex> lock(mutex_);
    waiting_to_tidy_.erase(key);
    refusals_.erase(key);
    pod_groups_.erase(key);
    revisions_.erase(key);
    return kube::Requeue{};
  }
  if (!UpToDate(key)) return kube::Requeue{1'000'000};  // the event that completes it comes sooner
  const plan::Observed observed = Observe(*view, key);
  return Act(*view, key, observed, plan::MakePlan(observed, options_.images, kube::UnixMicros() / 1'000'000));
}

Result<kube::Requeue> Reconciler::Act(const PipelineView& view, const ObjectKey& key, const plan::Observed& observed, plan::Actions actions) {
  if (!actions.revision.empty() && actions.revision != observed.revision) {
    std::lock_guard<std::mutex> lock(mutex_);
    revisions_[key] = {.uid = view.meta.uid, .generation = view.meta.generation, .revision = actions.revision};
  }
  Json newest;  // the pipeline, as our own write of the status left it
  if (actions.status != observed.previous) {
    // Only over the version that was looked at: a leader that slept over its lease in the middle of this must not take back an epoch
    // that the next one has given.
    Answer answer = client_.PatchStatus(resources::kQwenPipelines, key, view.meta.resource_version, Json::parse(api::StatusToJson(actions.status)));
    if (answer.NotFound()) return kube::Requeue{};
    if (answer.Conflict()) return kube::Requeue{1'000'000};  // the event of what changed comes sooner
    if (!answer.ok()) return answer.status().WithContext("status");
    pipelines_.expectations.Wrote(key, kube::StringAt(answer.body, "/metadata/resourceVersion"), clock_.NowMicros());
    newest = std::move(answer.body);
  }
  // What a group lacks is made without a word to the status, so nothing has said yet that this look's record is the newest: a new leader
  // whose watch is behind would make pods of an epoch that is over, and whose pods are gone.
  if (!actions.create_pods.empty() && newest.is_null()) {
    kube::HttpRequest request = kube::GetRequest(resources::kQwenPipelines, key);
    request.metadata_only = true;
    const Answer answer = client_.Do(std::move(request));
    if (answer.NotFound()) return kube::Requeue{};
    if (!answer.ok()) return answer.status().WithContext("newest version");
    if (kube::StringAt(answer.body, "/metadata/resourceVersion") != view.meta.resource_version) return kube::Requeue{1'000'000};
  }
  for (plan::Notice& notice : actions.notices)
    recorder_.Record({.regarding = {resources::kQwenPipelines, key, view.meta.uid, view.meta.resource_version},
                      .type = notice.warning ? kube::EventType::kWarning : kube::EventType::kNormal,
                      .reason = std::move(notice.reason), .action = std::move(notice.action), .note = std::move(notice.note)});
  // Of a pipeline that has no pods yet the pods come first: their events bring the next look, which makes Services and the rest, and
  // where a hundred pipelines begin at once the pods of all of them are there before that. The finalizer too: nothing serves yet that
  // would have to drain, and pods of a pipeline that is deleted meanwhile go with their owner.
  if (observed.pods.empty() && observed.write_error.empty() && !actions.create_pods.empty()) {
    actions.apply.clear();
    actions.add_finalizer = false;
  }
  std::string refusal;
  Status error;
  if (!actions.add_finalizer || WriteFinalizer(view, key, true, newest, &refusal, &error)) WriteAll(view, key, actions, &refusal, &error);
  const bool later = actions.remove_finalizer && OthersGoFirst(key, observed);
  if (actions.remove_finalizer && !later) WriteFinalizer(view, key, false, newest, &refusal, &error);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    std::string& known = refusals_[key];
    const bool news = known != refusal;
    known = refusal;
    if (refusal.empty()) refusals_.erase(key);
    if (news) controller_.queue().Add(key);  // for the status
  }
  if (!error.ok()) return error;
  if (!refusal.empty()) return kube::Requeue{kRefusedRetryMicros};
  if (later) return kube::Requeue{1'000'000};
  if (!actions.wake_seconds) return kube::Requeue{};
  const int64_t wait = *actions.wake_seconds * 1'000'000 - kube::UnixMicros();
  return kube::Requeue{std::max<int64_t>(wait, 0) + 1000};
}

// A pipeline's object takes some twenty requests of the garbage collector with it. Where many pipelines are deleted at once these
// would take the API server's time from the pods that still hold GPUs. Only while pods really go: one that is stuck delays nobody.
bool Reconciler::OthersGoFirst(const ObjectKey& key, const plan::Observed& observed) {
  const bool busy = leaving_ > kFewLeaving && clock_.NowMicros() - last_left_micros_ < 1'000'000;
  if (!busy || kube::UnixMicros() / 1'000'000 > observed.deleting_since_seconds + kTidyWaitSeconds) return false;
  std::lock_guard<std::mutex> lock(mutex_);
  waiting_to_tidy_.insert(key);
  return true;
}

Reconciler::Children<ChildView>& Reconciler::OfKind(const std::string& child_name) {
  const std::string kind = child_name.substr(0, child_name.find('/'));
  if (kind == resources::kServices.kind) return services_;
  if (kind == resources::kNetworkPolicies.kind) return policies_;
  QP_CHECK_EQ(kind, resources::kPodDisruptionBudgets.kind);
  return budgets_;
}

// The list is written as a whole, so it must be the one that was read: a version that is no longer the newest is a conflict.
bool Reconciler::WriteFinalizer(const PipelineView& view, const ObjectKey& key, bool present, const Json& newest, std::string* refusal, Status* error) {
  std::vector<std::string> finalizers = view.finalizers;
  std::erase(finalizers, contract::kDrainFinalizer);
  if (present) finalizers.emplace_back(contract::kDrainFinalizer);
  const std::string version = kube::StringAt(newest, "/metadata/resourceVersion", view.meta.resource_version);
  const Answer answer = client_.Do(kube::MergePatchRequest(resources::kQwenPipelines, key,
                                                           {{"metadata", {{"finalizers", finalizers}, {"resourceVersion", version}, {"uid", view.meta.uid}}}}, {},
                                                           std::string(contract::kFieldManager)));
  if (!present && answer.NotFound()) return true;
  if (!Judge(answer, "finalizer", refusal, error)) return false;
  // With its last finalizer the object goes, and its version is that of its end.
  pipelines_.expectations.Wrote(key, kube::StringAt(answer.body, "/metadata/resourceVersion"), clock_.NowMicros());
  return true;
}

void Reconciler::WriteChildren(const PipelineView& view, const ObjectKey& key, const plan::Actions& actions, std::string* refusal, Status* error) {
  const int64_t now = clock_.NowMicros();
  std::vector<kube::HttpRequest> requests;
  std::vector<std::function<void(const Answer&)>> answered;  // one a request
  const auto add = [&](kube::HttpRequest request, std::function<void(const Answer&)> then) {
    request.metadata_only = true;
    requests.push_back(std::move(request));
    answered.push_back(std::move(then));
  };
  const auto wrote = [&, now](kube::Expectations& expectations, const std::string& what) {
    return [&expectations, &key, refusal, error, now, what](const Answer& answer) {
      if (Judge(answer, what, refusal, error)) expectations.Wrote(key, kube::StringAt(answer.body, "/metadata/resourceVersion"), now);
    };
  };
  const auto unless = [](bool (Answer::*known)() const, std::function<void(const Answer&)> then) {
    return [known, then = std::move(then)](const Answer& answer) {
      if (!(answer.*known)()) then(answer);
    };
  };
  for (const plan::PodRef& pod : actions.delete_pods) {
    add(kube::DeleteRequest(resources::kPods, {key.namespace_name, pod.name},
                            {.uid = pod.uid, .grace_period_seconds = pod.force ? std::optional<int32_t>(0) : std::nullopt}),
        [this, &key, &pod, refusal, error, now](const Answer& answer) {
          if (answer.NotFound()) return;  // a conflict is tried again: nothing else may happen that wakes this key (tests/faults/storms_test.py)
          if (Judge(answer, "delete pod " + pod.name, refusal, error)) pods_.expectations.Deleted(key, pod.uid, now);
        });
  }
  if (actions.create_secret)
    add(kube::CreateRequest(resources::kSecrets, plan::HandshakeSecret(*view.pipeline, NewSecret())),
        unless(&Answer::AlreadyExists, wrote(secrets_.expectations, "secret")));
  for (const Json& child : actions.apply) {
    const std::string name = plan::ChildName(child);
    add(client_.MakeApply(ResourceOf(name), child), wrote(OfKind(name).expectations, name));
  }
  for (const Json& object : actions.create_weights) {
    const bool job = object.at("kind") == resources::kJobs.kind;
    add(kube::CreateRequest(job ? resources::kJobs : resources::kPersistentVolumeClaims, object),
        unless(&Answer::AlreadyExists, wrote(job ? jobs_.expectations : claims_.expectations, plan::ChildName(object))));
  }
  for (const std::string& name : actions.delete_children)
    add(kube::DeleteRequest(ResourceOf(name), {key.namespace_name, name.substr(name.find('/') + 1)}), unless(&Answer::NotFound, wrote(OfKind(name).expectations, name)));
  client_.DoAll(std::move(requests), [&](size_t i, const Answer& answer) { answered[i](answer); });
}

// False when anything did not succeed. Pods last: they are to find what they mount, and the room that others left.
bool Reconciler::WriteAll(const PipelineView& view, const ObjectKey& key, plan::Actions& actions, std::string* refusal, Status* error) {
  WriteChildren(view, key, actions, refusal, error);
  const int64_t now = clock_.NowMicros();
  std::vector<kube::HttpRequest> requests;
  for (const Json& pod : actions.create_pods) {
    requests.push_back(kube::CreateRequest(resources::kPods, pod));
    requests.back().metadata_only = true;
  }
  client_.DoAll(std::move(requests), [&](size_t i, const Answer& answer) {
    // A name of ours that exists is our own pod from a try whose answer was lost: names carry the epoch.
    if (answer.AlreadyExists()) return;
    if (Judge(answer, "pod " + kube::KeyOf(actions.create_pods[i]).name, refusal, error))
      pods_.expectations.Wrote(key, kube::StringAt(answer.body, "/metadata/resourceVersion"), now);
  });
  ApplyPodGroups(key, actions.pod_groups, refusal, error);
  return refusal->empty() && error->ok();
}

void Reconciler::ApplyPodGroups(const ObjectKey& key, const std::vector<Json>& groups, std::string* refusal, Status* error) {
  if (groups.empty()) return;
  std::set<std::string> known, wanted;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    known = pod_groups_[key];
  }
  for (const Json& group : groups) {
    const std::string text = group.dump();
    if (!known.contains(text)) {
      const bool volcano = group.at("apiVersion") == resources::kVolcanoPodGroups.api_version();
      const Answer answer = client_.Apply(volcano ? resources::kVolcanoPodGroups : resources::kCoschedulingPodGroups, group);
      if (answer.NotFound()) {
        if (refusal->empty()) *refusal = plan::ChildName(group) + ": the cluster has no " + group.at("apiVersion").get<std::string>() + " (" + answer.message + ")";
        continue;
      }
      if (!Judge(answer, plan::ChildName(group), refusal, error)) continue;
    }
    wanted.insert(text);
  }
  std::lock_guard<std::mutex> lock(mutex_);
  pod_groups_[key] = std::move(wanted);
}

}  // namespace qwen::reconcile
