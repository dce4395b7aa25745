// Store, indices, expectations, and an informer on its own thread over scripted streams.
#include "controller/kube/informer.h"

#include <gtest/gtest.h>
#include <prometheus/registry.h>

#include <algorithm>

#include "controller/kube/expectations.h"
#include "tests/unit/controller/kube/fake_transport.h"

namespace qwen::kube {
namespace {
using std::chrono_literals::operator""s;
struct Pod {
  ObjectMeta meta;
  std::string node;
};
std::shared_ptr<const Pod> MakePod(const std::string& name, const std::string& node, const std::string& version = "1") {
  Pod pod;
  pod.meta.key = {"ns", name};
  pod.meta.resource_version = version;
  pod.node = node;
  return std::make_shared<const Pod>(pod);
}
std::vector<std::string> Names(const std::vector<std::shared_ptr<const Pod>>& pods) {
  std::vector<std::string> names;
  for (const auto& pod : pods) names.push_back(pod->meta.key.name);
  return names;
}
using Strings = std::vector<std::string>;

TEST(Store, AnIndexFollowsObjectsThatMoveAndVanish) {
  Store<Pod> store;
  store.AddIndex("node", [](const Pod& pod) { return Strings{pod.node}; });
  store.Put(MakePod("b", "n1"));
  store.Put(MakePod("a", "n1"));
  EXPECT_EQ(Names(store.ByIndex("node", "n1")), (Strings{"a", "b"}));
  const auto old = store.Put(MakePod("a", "n2", "2"));
  EXPECT_EQ(old->node, "n1");
  EXPECT_EQ(Names(store.ByIndex("node", "n1")), (Strings{"b"}));
  EXPECT_EQ(Names(store.ByIndex("node", "n2")), (Strings{"a"}));
  store.Remove({"ns", "b"});
  EXPECT_TRUE(store.ByIndex("node", "n1").empty());
  EXPECT_EQ(store.Remove({"ns", "b"}), nullptr);
  EXPECT_EQ(store.size(), 1u);
}

TEST(Store, AReadersObjectOutlivesItsReplacement) {
  Store<Pod> store;
  store.Put(MakePod("a", "n1"));
  const auto held = store.Get({"ns", "a"});
  store.Put(MakePod("a", "n2"));
  store.Remove({"ns", "a"});
  EXPECT_EQ(held->node, "n1");
}

TEST(Expectations, AReconcileWaitsUntilTheStoreHasSeenItsOwnWrites) {
  Expectations expectations;
  const ObjectKey owner{"ns", "q"};
  bool alive = true;
  const auto is_alive = [&](const std::string&) { return alive; };
  EXPECT_TRUE(expectations.Satisfied(owner, 0, is_alive, 0));
  expectations.Wrote(owner, "100", 0);
  expectations.Wrote(owner, "90", 0);
  EXPECT_FALSE(expectations.Satisfied(owner, 99, is_alive, 1));
  EXPECT_TRUE(expectations.Satisfied({"ns", "other"}, 0, is_alive, 1));
  EXPECT_TRUE(expectations.Satisfied(owner, 100, is_alive, 1));
  expectations.Deleted(owner, "uid-1", 2);
  EXPECT_FALSE(expectations.Satisfied(owner, 1000, is_alive, 3));
  alive = false;
  EXPECT_TRUE(expectations.Satisfied(owner, 1000, is_alive, 3));
  alive = true;
  EXPECT_TRUE(expectations.Satisfied(owner, 1000, is_alive, 4)) << "met once, it is over";
}

TEST(Expectations, AreGivenUpAfterFiveMinutesInsteadOfBlockingForEver) {
  Expectations expectations;
  expectations.Wrote({"ns", "q"}, "100", 0);
  const auto alive = [](const std::string&) { return true; };
  EXPECT_FALSE(expectations.Satisfied({"ns", "q"}, 1, alive, Expectations::kGiveUpMicros - 1));
  EXPECT_TRUE(expectations.Satisfied({"ns", "q"}, 1, alive, Expectations::kGiveUpMicros));
}

std::string Line(const std::string& type, const std::string& name, const std::string& version, const std::string& node = "n1") {
  return R"({"type":")" + type + R"(","object":{"metadata":{"namespace":"ns","name":")" + name + R"(","resourceVersion":")" + version +
         R"("},"spec":{"nodeName":")" + node + "\"}}}\n";
}
std::string EndOfList(const std::string& version) {
  return R"({"type":"BOOKMARK","object":{"metadata":{"resourceVersion":")" + version +
         R"(","annotations":{"k8s.io/initial-events-end":"true"}}}})" "\n";
}

TEST(Informer, KeepsItsStoreThroughARelistAndTellsEveryDifferenceOnce) {
  FakeTransport transport;
  const Result<HttpResponse> clean = HttpResponse{200, {}, -1};
  const std::string first = Line("ADDED", "a", "1") + Line("ADDED", "b", "2") + Line("ADDED", "c", "3") + EndOfList("5");
  // Cut in the middle of a line, as TCP does.
  transport.AddStream({{first.substr(0, 77), first.substr(77), Line("MODIFIED", "a", "6", "n2"), Line("DELETED", "b", "7")},
                       HttpResponse{410, "{}", -1}});
  // After the 410: b is back, c is gone, a is the same.
  transport.AddStream({{Line("ADDED", "a", "6", "n2") + Line("ADDED", "b", "9") + EndOfList("10")}, clean});
  SteadyClock clock;
  prometheus::Registry registry;
  Metrics metrics(registry, "test");

  std::mutex mutex;
  Strings heard;
  Informer<Pod> informer({.resource = resources::kPods, .selection = {}, .page_items = 500, .watch_list = true, .seed = 1},
                         [](const Json& object) { return Pod{ParseMeta(object), object.at("spec").at("nodeName").get<std::string>()}; });
  informer.store().AddIndex("node", [](const Pod& pod) { return Strings{pod.node}; });
  informer.AddHandler({.on_change = [&](const auto& old, const auto& now, bool initial) {
    std::lock_guard<std::mutex> lock(mutex);
    heard.push_back((old ? (now ? "~" : "-") : "+") + (now ? now : old)->meta.key.name + (initial ? "!" : ""));
  }});
  informer.Start(transport, clock, metrics);
  ASSERT_TRUE(informer.WaitForSync(5s));
  for (int i = 0; i < 2000 && informer.store().seen_revision() < 10; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  informer.Stop();

  EXPECT_EQ(Names(informer.store().ByIndex("node", "n2")), (Strings{"a"}));
  EXPECT_EQ(Names(informer.store().ByIndex("node", "n1")), (Strings{"b"}));
  EXPECT_EQ(informer.store().seen_revision(), 10u);
  ASSERT_EQ(heard.size(), 7u);
  std::sort(heard.begin(), heard.begin() + 3);
  EXPECT_EQ(heard, (Strings{"+a!", "+b!", "+c!", "~a", "-b", "-c", "+b!"}));
}

// A readiness probe comes when it likes, also while the process starts and while it ends.
TEST(Informer, IsAskedWhetherItIsSyncedByAnotherThreadThroughoutItsLife) {
  FakeTransport transport;
  transport.AddStream({{EndOfList("5")}, HttpResponse{200, {}, -1}});
  SteadyClock clock;
  prometheus::Registry registry;
  Metrics metrics(registry, "test");
  Informer<Pod> informer({.resource = resources::kPods, .selection = {}, .page_items = 500, .watch_list = true, .seed = 1},
                         [](const Json& object) { return Pod{ParseMeta(object), ""}; });
  std::atomic<int> answers{0};
  std::jthread prober([&](std::stop_token stop) {
    while (!stop.stop_requested()) answers += informer.synced() ? 1 : 0;
  });
  informer.Start(transport, clock, metrics);
  ASSERT_TRUE(informer.WaitForSync(5s));
  for (int i = 0; i < 5000 && answers == 0; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  informer.Stop();
  EXPECT_FALSE(informer.synced());
  EXPECT_GT(answers, 0);
}
TEST(Informer, LeavesOutAnObjectThatCannotBeDecodedAndGoesOn) {
  FakeTransport transport;
  transport.AddStream({{R"({"type":"ADDED","object":{"metadata":{"namespace":"ns","name":"odd","resourceVersion":"1"}}})" "\n" +
                        Line("ADDED", "good", "2") + EndOfList("5")}, HttpResponse{200, {}, -1}});
  SteadyClock clock;
  prometheus::Registry registry;
  Metrics metrics(registry, "test");
  Informer<Pod> informer({.resource = resources::kPods, .selection = {}, .page_items = 500, .watch_list = true, .seed = 1},
                         [](const Json& object) { return Pod{ParseMeta(object), object.at("spec").at("nodeName").get<std::string>()}; });
  informer.Start(transport, clock, metrics);
  ASSERT_TRUE(informer.WaitForSync(5s));
  EXPECT_EQ(Names(informer.store().List()), (Strings{"good"}));
}
}  // namespace
}  // namespace qwen::kube
