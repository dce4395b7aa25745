// controller/kube against a real kube-apiserver and etcd: what a fake cannot show. The cluster is started once, on loopback, by
// tests/cluster/cluster.py; some tests kill or freeze its API server. Called as `kube_integration elect NAME`, the program is
// one replica of an election, so that the test can kill a leader as a process.
//
// Built with a sanitizer it does less, waits longer and says nothing of memory, which is the sanitizer's then.
#include <gtest/gtest.h>
#include <prometheus/registry.h>
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>

#include "controller/kube/client.h"
#include "controller/kube/event_recorder.h"
#include "controller/kube/informer.h"
#include "controller/kube/kubeconfig.h"
#include "controller/kube/leader_election.h"

namespace qwen::kube {
namespace {
using std::chrono_literals::operator""ms;
using std::chrono_literals::operator""s;

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define QP_INSTRUMENTED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define QP_INSTRUMENTED 1
#endif
#endif
#ifdef QP_INSTRUMENTED
constexpr bool kInstrumented = true;
#else
constexpr bool kInstrumented = false;
#endif
constexpr int kSlowness = kInstrumented ? 4 : 1;

std::string Run(const std::string& command) {
  FILE* pipe = popen((command + " 2>&1").c_str(), "r");
  std::string output;
  for (std::array<char, 4096> buffer; const size_t got = fread(buffer.data(), 1, buffer.size(), pipe);) output.append(buffer.data(), got);
  if (pclose(pipe) != 0) std::cerr << command << ":\n" << output << std::endl, std::exit(1);
  return output;
}

class Cluster {
 public:
  Cluster() : dir_(std::filesystem::temp_directory_path() / ("kube_integration." + std::to_string(getpid()))) { 
    // Old versions are thrown away every 2 s instead of every 5 min, so that every test lives with what others meet in a long run.
    Do("start", "--apiserver-arg=--etcd-compaction-interval=2s --owner " + std::to_string(getpid()));
  }
  ~Cluster() { Do("stop"); }
  void Do(const std::string& verb, const std::string& argument = "") {
    Run(std::string(QP_SOURCE_DIR "/tests/cluster/cluster.py ") + verb + " " + dir_.string() + " " + argument);
  }
  std::string kubeconfig() const { return (dir_ / "admin.kubeconfig").string(); }

 private:
  const std::filesystem::path dir_;
};
Cluster* cluster = nullptr;

bool Within(std::chrono::milliseconds time, const std::function<bool()>& met) {
  for (const auto end = std::chrono::steady_clock::now() + time * kSlowness; std::chrono::steady_clock::now() < end;) {
    if (met()) return true;
    std::this_thread::sleep_for(10ms);
  }
  return met();
}

// One process's worth of client.
struct Kube {
  explicit Kube(const std::string& kubeconfig, TransportOptions options = {}, int32_t in_flight = 32) {
    Result<ClusterAccess> access = FindCluster(kubeconfig, "", clock);
    QP_CHECK(access.ok()) << access.status().ToString();
    Result<std::unique_ptr<Transport>> made = MakeTransport(std::move(access).value(), options);
    QP_CHECK(made.ok()) << made.status().ToString();
    transport = std::move(made).value();
    client.emplace(*transport, clock, metrics, Client::Options{.field_manager = "qwen-test", .in_flight_max = in_flight, .fence = nullptr});
  }
  SteadyClock clock;
  prometheus::Registry registry;
  Metrics metrics{registry, "test"};
  std::unique_ptr<Transport> transport;
  std::optional<Client> client;
};

Json ConfigMap(const std::string& name, Json data, Json labels = Json::object()) {
  return {{"apiVersion", "v1"}, {"kind", "ConfigMap"}, {"metadata", {{"namespace", "default"}, {"name", name}, {"labels", std::move(labels)}}},
          {"data", std::move(data)}};
}
Json Pod(const std::string& name) {
  Json env = Json::array();
  for (int i = 0; i < 30; ++i) env.push_back({{"name", "VARIABLE_" + std::to_string(i)}, {"value", std::string(40, 'v')}});
  return {{"apiVersion", "v1"},
          {"kind", "Pod"},
          {"metadata", {{"namespace", "default"}, {"name", name}, {"labels", {{"app", "bulk"}}}}},
          {"spec", {{"terminationGracePeriodSeconds", 0}, {"containers", {{{"name", "c"}, {"image", "x"}, {"env", env}}}}}}};
}

struct View {
  ObjectMeta meta;
  std::string value;
};
Informer<View> ConfigMaps(const std::string& labels, bool watch_list = true) {
  return Informer<View>({.resource = resources::kConfigMaps, .selection = {.namespace_name = "default", .label_selector = labels, .field_selector = {}},
                         .page_items = 3, .watch_list = watch_list, .seed = 5},
                        [](const Json& object) { return View{ParseMeta(object), StringAt(object, "/data/value")}; });
}
int64_t RssKb() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmRSS:")) return std::stol(line.substr(6));
  }
  return 0;
}

TEST(Client, CreatesReadsUpdatesPatchesAndDeletes) {
  Kube kube(cluster->kubeconfig());
  Client& client = *kube.client;
  const ObjectKey key{"default", "crud"};
  EXPECT_TRUE(client.Get(resources::kConfigMaps, key).NotFound());
  const Answer created = client.Create(resources::kConfigMaps, ConfigMap("crud", {{"value", "1"}}));
  ASSERT_TRUE(created.ok()) << created.status().ToString();
  EXPECT_TRUE(client.Create(resources::kConfigMaps, ConfigMap("crud", {})).AlreadyExists());
  Json object = created.body;
  object["data"]["value"] = "2";
  const Answer updated = client.Update(resources::kConfigMaps, object);
  ASSERT_TRUE(updated.ok());
  EXPECT_TRUE(client.Update(resources::kConfigMaps, object).Conflict()) << "its resourceVersion is old";
  EXPECT_TRUE(client.Do(MergePatchRequest(resources::kConfigMaps, key, {{"data", {{"value", nullptr}, {"other", "3"}}}})).ok());
  EXPECT_EQ(client.Get(resources::kConfigMaps, key).body["data"], (Json{{"other", "3"}}));
  EXPECT_TRUE(client.Delete(resources::kConfigMaps, key, {.uid = "not-this-one"}).Conflict());
  EXPECT_TRUE(client.Delete(resources::kConfigMaps, key, {.uid = StringAt(object, "/metadata/uid")}).ok());
  EXPECT_TRUE(client.Get(resources::kConfigMaps, key).NotFound());
  const Answer invalid = client.Create(resources::kConfigMaps, ConfigMap("Not_A_Name", {}));
  EXPECT_EQ(invalid.code, 422);
  EXPECT_EQ(invalid.reason, "Invalid");
}

TEST(Client, ServerSideApplyOwnsFieldsForcesConflictsAndWritesNothingTheSecondTime) {
  Kube kube(cluster->kubeconfig());
  Client& client = *kube.client;
  const Answer first = client.Apply(resources::kConfigMaps, ConfigMap("ssa", {{"value", "mine"}}));
  ASSERT_TRUE(first.ok()) << first.status().ToString();
  const Answer again = client.Apply(resources::kConfigMaps, ConfigMap("ssa", {{"value", "mine"}}));
  EXPECT_EQ(again.body["metadata"]["resourceVersion"], first.body["metadata"]["resourceVersion"]);
  const auto as_other = [&](bool force) {
    return client.Do(ApplyRequest(resources::kConfigMaps, ConfigMap("ssa", {{"value", "theirs"}, {"extra", "x"}}),
                                  {.field_manager = "someone-else", .force = force, .subresource = {}}));
  };
  const Answer refused = as_other(false);
  EXPECT_TRUE(refused.Conflict());
  EXPECT_NE(refused.message.find("qwen-test"), std::string::npos) << refused.message;
  EXPECT_TRUE(as_other(true).ok());
  const Answer taken_back = client.Apply(resources::kConfigMaps, ConfigMap("ssa", {{"value", "mine"}}));
  EXPECT_EQ(taken_back.body["data"], (Json{{"value", "mine"}, {"extra", "x"}})) << "what others own stays";
  client.Delete(resources::kConfigMaps, {"default", "ssa"});
}

TEST(Client, AWrongCaIsRefusedAndAnUnknownUserIsTold401) {
  Kube kube(cluster->kubeconfig());
  ClusterAccess access = *FindCluster(cluster->kubeconfig(), "", kube.clock);
  access.ca_pem.clear();  // the system's CAs did not sign this server
  auto distrusting = MakeTransport(access, {});
  EXPECT_EQ(SendAndWait(**distrusting, GetRequest(resources::kNodes, {})).status().code(), StatusCode::kUnavailable);
  access = *FindCluster(cluster->kubeconfig(), "", kube.clock);
  int loads = 0;
  access.credentials = std::make_shared<Credentials>([&]() -> Result<Credentials::Loaded> {
    ++loads;
    return Credentials::Loaded{{.bearer_token = "wrong", .certificate_pem = {}, .key_pem = {}}};
  }, kube.clock);
  auto unknown = MakeTransport(access, {});
  Client client(**unknown, kube.clock, kube.metrics, {.field_manager = "x", .in_flight_max = 1, .fence = nullptr});
  EXPECT_EQ(client.Get(resources::kNodes, {"", "n"}).code, 401);
  EXPECT_GE(loads, 2) << "401 makes the credential be read again";
}

TEST(Informer, FollowsChangesWithBothWaysOfListing) {
  Kube kube(cluster->kubeconfig());
  for (const bool watch_list : {true, false}) {
    for (int i = 0; i < 7; ++i) kube.client->Apply(resources::kConfigMaps, ConfigMap("f" + std::to_string(i), {{"value", "0"}}, {{"set", "follow"}}));
    Informer<View> informer = ConfigMaps("set=follow", watch_list);
    informer.Start(*kube.transport, kube.clock, kube.metrics);
    ASSERT_TRUE(informer.WaitForSync(20s * kSlowness));
    EXPECT_EQ(informer.store().size(), 7u);
    kube.client->Apply(resources::kConfigMaps, ConfigMap("f3", {{"value", "changed"}}, {{"set", "follow"}}));
    EXPECT_TRUE(Within(5s, [&] { return informer.store().Get({"default", "f3"})->value == "changed"; }));
    kube.client->Apply(resources::kConfigMaps, ConfigMap("f4", {{"value", "0"}}, {{"set", "other"}}));  // leaves the selection
    EXPECT_TRUE(Within(5s, [&] { return informer.store().Get({"default", "f4"}) == nullptr; }));
    kube.client->Delete(resources::kConfigMaps, {"default", "f5"});
    EXPECT_TRUE(Within(5s, [&] { return informer.store().size() == 5; }));
    const auto start = std::chrono::steady_clock::now();
    informer.Stop();
    EXPECT_LT(std::chrono::steady_clock::now() - start, 2s * kSlowness) << "a quiet stream must end when it is told to";
  }
}

TEST(Informer, GoesOnAfterTheApiServerWasKilledAndItsVersionHasExpired) {
  Kube kube(cluster->kubeconfig());
  kube.client->Apply(resources::kConfigMaps, ConfigMap("kill", {{"value", "before"}}, {{"set", "kill"}}));
  Informer<View> informer = ConfigMaps("set=kill");
  informer.Start(*kube.transport, kube.clock, kube.metrics);
  ASSERT_TRUE(informer.WaitForSync(20s * kSlowness));
  // Versions the informer does not see: a restarted server's watch cache begins after them and answers 410 to its old version.
  for (int i = 0; i < 10; ++i) kube.client->Apply(resources::kConfigMaps, ConfigMap("unseen" + std::to_string(i), {}));
  cluster->Do("kill", "kube-apiserver");
  EXPECT_FALSE(kube.client->Get(resources::kConfigMaps, {"default", "kill"}).ok());
  cluster->Do("run", "kube-apiserver");
  const Answer applied = kube.client->Apply(resources::kConfigMaps, ConfigMap("kill", {{"value", "after"}}, {{"set", "kill"}}));
  ASSERT_TRUE(applied.ok()) << applied.status().ToString();
  EXPECT_TRUE(Within(45s, [&] { return informer.store().Get({"default", "kill"})->value == "after"; }));
  const uint64_t seen = RevisionOf(StringAt(applied.body, "/metadata/resourceVersion"));
  EXPECT_GE(informer.store().seen_revision(), seen);
}

TEST(Client, APageOfACompactedVersionIsGone) {
  Kube kube(cluster->kubeconfig());
  for (int i = 0; i < 4; ++i) kube.client->Apply(resources::kConfigMaps, ConfigMap("page" + std::to_string(i), {{"value", "0"}}, {{"set", "page"}}));
  const Selection selection{.namespace_name = "default", .label_selector = "set=page", .field_selector = {}};
  const Answer first = kube.client->Do(ListRequest(resources::kConfigMaps, selection, 2, ""));
  ASSERT_TRUE(first.ok());
  const std::string token = StringAt(first.body, "/metadata/continue");
  ASSERT_FALSE(token.empty());
  int writes = 0;
  Answer next;
  EXPECT_TRUE(Within(30s, [&] {
    kube.client->Apply(resources::kConfigMaps, ConfigMap("page0", {{"value", std::to_string(++writes)}}, {{"set", "page"}}));
    next = kube.client->Do(ListRequest(resources::kConfigMaps, selection, 2, token));
    return next.Gone();
  })) << next.code << " " << next.message;
  EXPECT_EQ(next.reason, "Expired");
}

TEST(Informer, NoticesAFrozenServerByItsSilenceAndCatchesUp) {
  Kube kube(cluster->kubeconfig(), {.timeout_seconds = 5, .silence_max_seconds = 3});
  kube.client->Apply(resources::kConfigMaps, ConfigMap("frozen", {{"value", "before"}}, {{"set", "frozen"}}));
  Informer<View> informer = ConfigMaps("set=frozen");
  informer.Start(*kube.transport, kube.clock, kube.metrics);
  ASSERT_TRUE(informer.WaitForSync(20s * kSlowness));
  cluster->Do("freeze", "kube-apiserver");
  const auto errors = [&] {
    for (const auto& family : kube.registry.Collect()) {
      if (family.name == "reflector_watch_errors_total" && !family.metric.empty()) return family.metric[0].counter.value;
    }
    return 0.0;
  };
  EXPECT_TRUE(Within(15s, [&] { return errors() >= 1; })) << "a half-open stream was never given up";
  cluster->Do("thaw", "kube-apiserver");
  EXPECT_TRUE(Within(20s, [&] { return kube.client->Apply(resources::kConfigMaps, ConfigMap("frozen", {{"value", "after"}}, {{"set", "frozen"}})).ok(); }));
  EXPECT_TRUE(Within(40s, [&] { return informer.store().Get({"default", "frozen"})->value == "after"; }));
}

TEST(Events, AreWrittenAndBecomeASeries) {
  Kube kube(cluster->kubeconfig());
  {
    EventRecorder recorder({.controller = "qwenpipeline.dev/controller", .instance = "test"}, *kube.client, kube.clock, kube.metrics);
    const Answer about = kube.client->Apply(resources::kConfigMaps, ConfigMap("eventful", {}));
    for (int i = 0; i < 3; ++i) {
      recorder.Record({.regarding = {resources::kConfigMaps, {"default", "eventful"}, StringAt(about.body, "/metadata/uid"), ""},
                       .type = EventType::kWarning, .reason = "StageLost", .action = "ReplacePod", .note = "stage 1 is gone"});
    }
  }
  std::vector<Json> events;
  ASSERT_TRUE(kube.client->List(resources::kEvents, {.namespace_name = "default", .label_selector = {}, .field_selector = "regarding.name=eventful"},
                                [&](Json event) { events.push_back(std::move(event)); }).ok());
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(events[0]["reason"], "StageLost");
  EXPECT_EQ(events[0]["series"]["count"], 2) << "the third is counted here and written with a later one";
}

// What the operator's goals hang on. Prints what it measures; only the memory has a bound (design: 40 MB at 1,000 pods).
TEST(Scale, AThousandPodsArePostedInParallelAndHeldInLittleMemory) {
  Kube kube(cluster->kubeconfig());
  kube.client->Create({"", "v1", "serviceaccounts", "ServiceAccount"},
                      {{"apiVersion", "v1"}, {"kind", "ServiceAccount"}, {"metadata", {{"namespace", "default"}, {"name", "default"}}}});
  const int64_t rss_start = RssKb();
  Informer<View> informer({.resource = resources::kPods, .selection = {}, .page_items = 500, .watch_list = true, .seed = 5},
                          [](const Json& object) { return View{ParseMeta(object), StringAt(object, "/status/phase")}; });
  informer.Start(*kube.transport, kube.clock, kube.metrics);
  ASSERT_TRUE(informer.WaitForSync(20s * kSlowness));
  const size_t pods = kInstrumented ? 100 : 1000;
  std::vector<HttpRequest> requests;
  for (size_t i = 0; i < pods; ++i) requests.push_back(CreateRequest(resources::kPods, Pod("bulk-" + std::to_string(i))));
  const auto start = std::chrono::steady_clock::now();
  std::string first_error;
  const size_t failed = kube.client->DoAll(std::move(requests), [&](size_t, Answer answer) {
    if (!answer.ok() && first_error.empty()) first_error = answer.status().ToString();
  });
  const auto posted = std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - start);
  EXPECT_EQ(failed, 0u) << first_error;
  EXPECT_TRUE(Within(30s, [&] { return informer.store().size() == pods; }));
  const auto seen = std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - start);
  const int64_t rss = RssKb();
  std::cout << pods << " pods: posted in " << posted.count() << " ms, all in the store after " << seen.count() << " ms; RSS " << rss_start << " -> "
            << rss << " kB" << std::endl;
  EXPECT_TRUE(kInstrumented || rss < 40 * 1024) << rss;
  std::vector<HttpRequest> deletions;
  for (size_t i = 0; i < pods; ++i) deletions.push_back(DeleteRequest(resources::kPods, {"default", "bulk-" + std::to_string(i)}, {.grace_period_seconds = 0}));
  EXPECT_EQ(kube.client->DoAll(std::move(deletions), [](size_t, Answer) {}), 0u);
  EXPECT_TRUE(Within(30s, [&] { return informer.store().size() == 0; }));
}

// The library is said to leak in long runs; a controller reconnects its watches for months.
TEST(Scale, ReconnectingAndAskingAThousandTimesLeavesNothingBehind) {
  Kube kube(cluster->kubeconfig());
  for (int i = 0; i < 5; ++i) kube.client->Apply(resources::kConfigMaps, ConfigMap("soak" + std::to_string(i), {{"value", "x"}}, {{"set", "soak"}}));
  const auto round = [&] {
    Informer<View> informer = ConfigMaps("set=soak");
    informer.Start(*kube.transport, kube.clock, kube.metrics);
    ASSERT_TRUE(informer.WaitForSync(20s * kSlowness));
    for (int i = 0; i < 5; ++i) ASSERT_TRUE(kube.client->Get(resources::kConfigMaps, {"default", "soak" + std::to_string(i)}).ok());
  };
  const int rounds = kInstrumented ? 20 : 200;
  for (int i = 0; i < rounds / 4; ++i) round();
  const int64_t warm = RssKb();
  for (int i = 0; i < rounds; ++i) round();
  const int64_t end = RssKb();
  std::cout << rounds << " watches and " << 5 * rounds << " reads: RSS " << warm << " -> " << end << " kB" << std::endl;
  EXPECT_TRUE(kInstrumented || end - warm < 2048) << end - warm;
}

constexpr int64_t kSecond = 1'000'000;
constexpr int64_t kLeaseSeconds = kInstrumented ? 6 : 3;

// One replica as a process: says "leading" and "lost" on its standard output, ends when its input does.
int Elect(const std::string& name) {
  Kube kube(std::getenv("ELECT_KUBECONFIG"), {.timeout_seconds = 5});
  LeaderElector elector({.lease = {"default", "election"}, .identity = name, .lease_micros = kLeaseSeconds * kSecond,
                         .renew_deadline_micros = (kLeaseSeconds - 1) * kSecond, .retry_micros = kSecond / 2, .seed = std::hash<std::string>()(name)},
                        *kube.client, kube.clock, kube.metrics,
                        {.on_elected = [] { std::cout << "leading" << std::endl; }, .on_lost = [] { std::cout << "lost" << std::endl; }});
  std::string line;
  std::getline(std::cin, line);
  elector.Stop();
  return 0;
}

class ReplicaProcess {
 public:
  explicit ReplicaProcess(const std::string& name) {
    int in[2], out[2];
    QP_CHECK(pipe2(in, O_CLOEXEC) == 0 && pipe2(out, O_CLOEXEC) == 0);  // a later replica must not hold an earlier one open
    pid_ = fork();
    if (pid_ == 0) {
      dup2(in[0], 0);
      dup2(out[1], 1);
      execl("/proc/self/exe", "kube_integration", "elect", name.c_str(), nullptr);
      _exit(127);
    }
    close(in[0]);
    close(out[1]);
    in_ = in[1];
    reader_ = std::thread([this, fd = out[0]] {
      std::array<char, 256> buffer;
      for (ssize_t got; (got = read(fd, buffer.data(), buffer.size())) > 0;) {
        std::lock_guard<std::mutex> lock(mutex_);
        output_.append(buffer.data(), static_cast<size_t>(got));
      }
      close(fd);
    });
  }
  ~ReplicaProcess() { End(); }
  bool Said(const std::string& words) const {
    std::lock_guard<std::mutex> lock(mutex_);
    return output_.find(words) != std::string::npos;
  }
  // A line of its own after the line `before`; log lines may stand between.
  bool SaidAfter(const std::string& before, const std::string& line) const {
    std::lock_guard<std::mutex> lock(mutex_);
    const size_t at = output_.find(before + "\n");
    return at != std::string::npos && output_.find("\n" + line + "\n", at) != std::string::npos;
  }
  std::string output() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return output_;
  }
  void Signal(int number) const { kill(pid_, number); }
  void End() {  // lets it go in order
    if (pid_ == 0) return;
    close(in_);
    waitpid(pid_, nullptr, 0);
    reader_.join();
    pid_ = 0;
  }

 private:
  pid_t pid_ = 0;
  int in_ = -1;
  mutable std::mutex mutex_;
  std::string output_;
  std::thread reader_;
};

TEST(LeaderElection, AKilledLeaderIsReplacedAFrozenOneLosesAndALeavingOneGivesWay) {
  setenv("ELECT_KUBECONFIG", cluster->kubeconfig().c_str(), 1);
  ReplicaProcess a("a");
  ASSERT_TRUE(Within(20s, [&] { return a.Said("leading"); }));
  ReplicaProcess b("b");
  std::this_thread::sleep_for(1s);
  EXPECT_FALSE(b.Said("leading"));
  a.Signal(SIGKILL);
  const auto killed = std::chrono::steady_clock::now();
  EXPECT_TRUE(Within(10s, [&] { return b.Said("leading"); }));
  std::cout << "lease of " << kLeaseSeconds << " s: taken " << std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - killed).count()
            << " ms after the leader was killed" << std::endl;
  ReplicaProcess c("c");
  std::this_thread::sleep_for(1s);
  b.Signal(SIGSTOP);
  EXPECT_TRUE(Within(10s, [&] { return c.Said("leading"); }));
  EXPECT_FALSE(b.Said("lost"));
  b.Signal(SIGCONT);
  EXPECT_TRUE(Within(5s, [&] { return b.Said("lost"); })) << "a process that slept over its lease must know";
  const auto leaving = std::chrono::steady_clock::now();
  ReplicaProcess d("d");
  c.End();
  // One of the two within a retry of 0.5 s; the rest is for a busy machine.
  EXPECT_TRUE(Within(10s, [&] { return d.Said("leading") || b.SaidAfter("lost", "leading"); })) << "b: " << b.output() << "c: " << c.output() << "d: " << d.output();
  std::cout << "given back: taken after " << std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - leaving).count() << " ms" << std::endl;
}
}  // namespace
}  // namespace qwen::kube

int main(int argc, char** argv) {
  if (argc == 3 && std::string(argv[1]) == "elect") return qwen::kube::Elect(argv[2]);
  testing::InitGoogleTest(&argc, argv);
  qwen::kube::Cluster cluster;
  qwen::kube::cluster = &cluster;
  return RUN_ALL_TESTS();
}
