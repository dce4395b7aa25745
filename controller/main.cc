// qwen-controller: the operator. Flags → cluster access → informers → leader election → workers → SIGTERM gives the lease back.
#include <malloc.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <csignal>
#include <cstdlib>
#include <latch>
#include <mutex>
#include <random>

#include "controller/kube/kubeconfig.h"
#include "controller/kube/leader_election.h"
#include "controller/reconcile/reconciler.h"
#include "stage/base/http_listener.h"
#include "stage/base/log.h"
#include "stage/contract/pod_contract.h"

namespace qwen {
namespace {
using contract::ExitCode;

struct Flags {
  std::string kubeconfig, context, namespace_name, lease_namespace, identity;
  std::string image_head, image_stage, image_export;
  bool leader_election = true, watch_nodes = true, load_progress = true;
  int32_t workers = 4;
  int32_t lease_seconds = 15;
  uint16_t metrics_port = 8080;
  std::string log_level = "info", log_format = "text";
};

void AddFlags(CLI::App& app, Flags& f) {
  app.set_version_flag("--version", "qwen-controller " QWEN_VERSION);
  app.add_option("--kubeconfig", f.kubeconfig, "default: $KUBECONFIG, else the pod's service account, else ~/.kube/config");
  app.add_option("--context", f.context, "of the kubeconfig; default: its current one");
  app.add_option("--namespace", f.namespace_name, "the only one to serve; default: all of them");
  app.add_option("--image-head", f.image_head, "image with qwen-head")->required();
  app.add_option("--image-stage", f.image_stage, "image with qwen-stage")->required();
  app.add_option("--image-export", f.image_export, "image with python_export, for spec.weights.mode Export; default: pipelines name their own");
  app.add_option("--leader-election", f.leader_election, "false: this is the only controller, always");
  app.add_option("--lease-namespace", f.lease_namespace, "of the lease qwen-controller; default: the own one");
  app.add_option("--lease-seconds", f.lease_seconds, "after which another replica takes over from one that is silent")->check(CLI::Range(6, 300));
  app.add_option("--identity", f.identity, "of this replica in the lease; default: the pod's name and a random part")->envname(std::string(contract::kEnvPodName));
  app.add_option("--load-progress", f.load_progress, "ask the heads of groups that are not ready how far their stages have loaded, for the status");
  app.add_option("--watch-nodes", f.watch_nodes, "false: no right to see nodes; pods of a dead one are replaced when Kubernetes evicts them");
  app.add_option("--workers", f.workers, "pipelines reconciled at once")->check(CLI::Range(1, 64));
  app.add_option("--metrics-port", f.metrics_port, "of /healthz, /readyz and /metrics; 0: any free one, which is logged");
  app.add_option("--log-level", f.log_level)->check(CLI::IsMember({"debug", "info", "warning", "error"}));
  app.add_option("--log-format", f.log_format)->check(CLI::IsMember({"text", "json"}))->envname(std::string(contract::kEnvLogFormat));
  app.footer("Exit codes: 0 told to stop; 1 no cluster, no port, or the lease was lost (a restart begins anew); 64 flags.");
}

int Fail(const char* what, const Status& status) {
  log::Error(what, {{"error", status.ToString()}});
  return static_cast<int>(ExitCode::kInternal);
}

std::string Identity(const Flags& flags) {
  std::string name = flags.identity;
  if (name.empty()) {
    char host[256] = {};
    ::gethostname(host, sizeof(host) - 1);
    name = host;
  }
  std::random_device device;
  return name + "_" + std::to_string(device());
}

// GET /ready of a head. A transport a question: heads come and go, and there is one question in three seconds.
Result<std::string> AskHead(const std::string& address) {
  static const SteadyClock clock;
  kube::ClusterAccess access{.server = "http://" + address};
  access.credentials = std::make_shared<kube::Credentials>(kube::StaticIdentity({}), clock);
  ASSIGN_OR_RETURN(const auto transport, kube::MakeTransport(std::move(access), {.timeout_seconds = 2}));
  ASSIGN_OR_RETURN(kube::HttpResponse response, kube::SendAndWait(*transport, {.path = std::string(contract::kReadyPath)}));
  return std::move(response.body);
}

HttpListener::Routes Routes(reconcile::Reconciler& reconciler, const prometheus::Registry& registry) {
  const auto ready = [&reconciler] {
    return reconciler.synced() ? HttpReply{.body = "ready\n"} : HttpReply{.status = 503, .body = "reading the cluster's state\n"};
  };
  return {{std::string(contract::kHealthPath), [] { return HttpReply{.body = "ok\n"}; }},
          {std::string(contract::kReadyPath), ready},
          {"/readyz", ready},
          {std::string(contract::kMetricsPath), [&registry] {
             return HttpReply{.body = prometheus::TextSerializer().Serialize(registry.Collect()), .content_type = "text/plain; version=0.0.4; charset=utf-8"};
           }}};
}

// The client is built before the elector that fences it; until then it may not write.
class LateFence final : public kube::WriteFence {
 public:
  void Set(const kube::WriteFence* fence) { fence_ = fence; }
  bool MayWrite() const override {
    const kube::WriteFence* fence = fence_;
    return fence != nullptr && fence->MayWrite();
  }

 private:
  std::atomic<const kube::WriteFence*> fence_{nullptr};
};

int Run(const Flags& flags, const sigset_t& signals) {
  SteadyClock clock;
  prometheus::Registry registry;
  Result<kube::ClusterAccess> access = kube::FindCluster(flags.kubeconfig, flags.context, clock);
  if (!access.ok()) return Fail("no cluster", access.status());
  kube::Metrics metrics(registry, access->server.substr(access->server.rfind('/') + 1));
  auto transport = kube::MakeTransport(*access, {});
  if (!transport.ok()) return Fail("no cluster", transport.status());
  // Shorter than the renew deadline, so that one lost request does not lose the lease.
  auto lease_transport = kube::MakeTransport(*access, {.timeout_seconds = std::max(1, flags.lease_seconds / 3)});
  if (!lease_transport.ok()) return Fail("no cluster", lease_transport.status());

  kube::Client lease_client(**lease_transport, clock, metrics, {.field_manager = std::string(contract::kFieldManager)});
  LateFence fence;
  kube::Client client(**transport, clock, metrics,
                      {.field_manager = std::string(contract::kFieldManager), .fence = flags.leader_election ? &fence : nullptr});
  const std::string identity = Identity(flags);
  kube::EventRecorder recorder({.controller = "qwenpipeline.dev/controller", .instance = identity}, client, clock, metrics);
  reconcile::Reconciler reconciler(**transport, client, recorder, clock, metrics,
                                   {.namespace_name = flags.namespace_name, .images = {.head = flags.image_head, .stage = flags.image_stage, .exporter = flags.image_export}, .workers = flags.workers,
                                    .ask_head = flags.load_progress ? AskHead : reconcile::LoadWatch::Ask(), .watch_nodes = flags.watch_nodes});
  auto listener = HttpListener::Start({.port = flags.metrics_port}, Routes(reconciler, registry));
  if (!listener.ok()) return Fail("--metrics-port", listener.status());
  log::Info("watching", {{"server", access->server}, {"namespace", flags.namespace_name}, {"metrics_port", (*listener)->port()}});
  reconciler.Start();
  while (!reconciler.WaitForSync(std::chrono::milliseconds(100))) {
    const timespec at_once{};
    if (sigtimedwait(&signals, nullptr, &at_once) > 0) return 0;
  }
  log::Info("synced");

  std::unique_ptr<kube::LeaderElector> elector;
  std::latch built(1);
  std::mutex ending;  // being elected and being told to stop may meet
  bool stopping = false;
  if (flags.leader_election) {
    const int64_t lease_micros = int64_t{flags.lease_seconds} * 1'000'000;  // the other two in client-go's proportions: 15, 10, 2
    const kube::ElectionOptions election{.lease = {flags.lease_namespace.empty() ? access->namespace_name : flags.lease_namespace, "qwen-controller"},
                                         .identity = identity, .lease_micros = lease_micros, .renew_deadline_micros = lease_micros * 2 / 3,
                                         .retry_micros = lease_micros * 2 / 15, .seed = std::random_device()()};
    const auto on_elected = [&] {
      built.wait();
      std::lock_guard<std::mutex> lock(ending);
      if (!stopping) reconciler.StartWorkers();
    };
    const auto on_lost = [] {
      log::Error("the lease was lost: what this process knows is of another time");
      std::_Exit(static_cast<int>(ExitCode::kInternal));
    };
    elector = std::make_unique<kube::LeaderElector>(election, lease_client, clock, metrics, kube::LeaderElector::Callbacks{on_elected, on_lost});
    fence.Set(elector.get());
  } else {
    reconciler.StartWorkers();
  }
  built.count_down();
  int signal = 0;
  sigwait(&signals, &signal);
  log::Info("stopping", {{"signal", signal}});
  {
    std::lock_guard<std::mutex> lock(ending);
    stopping = true;
  }
  reconciler.Stop();
  if (elector != nullptr) elector->Stop();  // after the last write: another replica leads within a retry
  return 0;
}

}  // namespace
}  // namespace qwen

int main(int argc, char** argv) {
  // A dozen threads, each of which decodes objects now and then, would otherwise keep an arena of freed JSON trees each.
  mallopt(M_ARENA_MAX, 2);
  // Blocked before any thread starts, so that all of them inherit it and main alone takes them, synchronously.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  std::signal(SIGPIPE, SIG_IGN);

  CLI::App app("qwen-controller: runs QwenPipelines as pods and keeps them running.");
  qwen::Flags flags;
  qwen::AddFlags(app, flags);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    const int code = app.exit(e);
    return code == 0 ? 0 : static_cast<int>(qwen::contract::ExitCode::kBadFlags);
  }
  qwen::log::Init({.process = "qwen-controller", .level = flags.log_level, .format = flags.log_format});
  return qwen::Run(flags, signals);
}
