// Requests, answers, retries and the fence, against a transport with canned answers.
#include "controller/kube/client.h"

#include <gtest/gtest.h>
#include <prometheus/registry.h>

#include <algorithm>
#include <atomic>
#include <thread>

#include "tests/unit/controller/kube/fake_transport.h"

namespace qwen::kube {
namespace {
class ClientTest : public testing::Test {
 protected:
  Client MakeClient(const WriteFence* fence = nullptr, int32_t in_flight = 8) {
    return Client(transport, clock, metrics, {.field_manager = "qwen-controller", .in_flight_max = in_flight, .fence = fence});
  }
  FakeTransport transport;
  SteadyClock clock;
  prometheus::Registry registry;
  Metrics metrics{registry, "test"};
};
const Json kPod = {{"apiVersion", "v1"}, {"kind", "Pod"}, {"metadata", {{"namespace", "ns"}, {"name", "a"}}}};

TEST(Requests, PathsNameGroupNamespaceAndSubresource) {
  EXPECT_EQ(GetRequest(resources::kNodes, {"", "n1"}).path, "/api/v1/nodes/n1");
  EXPECT_EQ(GetRequest(resources::kQwenPipelines, {"ns", "q"}).path, "/apis/qwenpipeline.dev/v1alpha1/namespaces/ns/qwenpipelines/q");
  EXPECT_EQ(ListRequest(resources::kPods, {}, 500, "").path, "/api/v1/pods?limit=500");
  const HttpRequest apply = ApplyRequest(resources::kPods, kPod, {.field_manager = "me", .force = true, .subresource = {}});
  EXPECT_EQ(apply.path, "/api/v1/namespaces/ns/pods/a?fieldManager=me&force=true");
  EXPECT_EQ(apply.content_type, "application/apply-patch+yaml");
  EXPECT_EQ(MergePatchRequest(resources::kPods, {"ns", "a"}, {{"x", 1}}, "status").path, "/api/v1/namespaces/ns/pods/a/status");
  const HttpRequest gone = DeleteRequest(resources::kPods, {"ns", "a"}, {.uid = "u1", .grace_period_seconds = 0, .propagation = "Foreground"});
  EXPECT_EQ(Json::parse(gone.body)["preconditions"]["uid"], "u1");
  EXPECT_EQ(Json::parse(gone.body)["gracePeriodSeconds"], 0);
  EXPECT_EQ(PercentEncode("a=b,c in (d/e)"), "a%3Db%2Cc%20in%20%28d%2Fe%29");
}

TEST(Answers, TellAlreadyExistsFromConflictAndKeepTheServersWords) {
  const Answer exists = ParseAnswer(HttpResponse{409, R"({"reason":"AlreadyExists","message":"pods \"a\" already exists"})", -1});
  EXPECT_TRUE(exists.AlreadyExists());
  EXPECT_FALSE(exists.Conflict());
  EXPECT_EQ(exists.status().message(), "AlreadyExists (409): pods \"a\" already exists");
  EXPECT_TRUE(ParseAnswer(HttpResponse{409, R"({"reason":"Conflict"})", -1}).Conflict());
  EXPECT_TRUE(ParseAnswer(HttpResponse{404, "no json", -1}).NotFound());
  EXPECT_EQ(ParseAnswer(HttpResponse{200, "<html>", -1}).status().code(), StatusCode::kDataLoss);
  EXPECT_EQ(ParseAnswer(UnavailableError("refused")).status().code(), StatusCode::kUnavailable);
}

TEST(Retries, FollowClientGoAndNeverRepeatAWriteOfUnknownFate) {
  const Result<HttpResponse> lost = UnavailableError("reset");
  EXPECT_TRUE(RetryDelayMicros(Method::kGet, lost, 1));
  EXPECT_FALSE(RetryDelayMicros(Method::kGet, lost, 3));
  for (const Method method : {Method::kPost, Method::kPut, Method::kPatch, Method::kDelete}) EXPECT_FALSE(RetryDelayMicros(method, lost, 1));
  EXPECT_EQ(RetryDelayMicros(Method::kPost, HttpResponse{429, "", 3}, 1), 3'000'000);
  EXPECT_EQ(RetryDelayMicros(Method::kPost, HttpResponse{429, "", -1}, 9), 1'000'000);
  EXPECT_FALSE(RetryDelayMicros(Method::kPost, HttpResponse{429, "", 1}, 10));
  EXPECT_EQ(RetryDelayMicros(Method::kPost, HttpResponse{503, "", 3600}, 1), 30'000'000);
  EXPECT_FALSE(RetryDelayMicros(Method::kPost, HttpResponse{503, "", -1}, 1));
  EXPECT_EQ(RetryDelayMicros(Method::kPut, HttpResponse{401, "", -1}, 1), 0);
  EXPECT_FALSE(RetryDelayMicros(Method::kPut, HttpResponse{401, "", -1}, 2));
  EXPECT_FALSE(RetryDelayMicros(Method::kPut, HttpResponse{409, "", -1}, 1));
}

TEST_F(ClientTest, RetriesAfter401WithTheSameRequest) {
  transport.Reply(401, "{}");
  transport.Reply(200, R"({"metadata":{"name":"a"}})");
  const Answer answer = MakeClient().Create(resources::kPods, kPod);
  EXPECT_TRUE(answer.ok());
  ASSERT_EQ(transport.requests().size(), 2u);
  EXPECT_EQ(transport.requests()[0].body, transport.requests()[1].body);
}

TEST_F(ClientTest, SendsNothingThatWritesOnceTheFenceIsClosedButStillReads) {
  struct Closed final : WriteFence {
    bool MayWrite() const override { return false; }
  } fence;
  Client client = MakeClient(&fence);
  EXPECT_EQ(client.Create(resources::kPods, kPod).status().code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(client.Delete(resources::kPods, {"ns", "a"}).status().code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(client.Apply(resources::kPods, kPod).status().code(), StatusCode::kFailedPrecondition);
  EXPECT_TRUE(transport.requests().empty());
  transport.Reply(200, "{}");
  EXPECT_TRUE(client.Get(resources::kPods, {"ns", "a"}).ok());
}

TEST_F(ClientTest, AFenceThatClosesDuringABatchStopsItsRetriesToo) {
  struct OnceOpen final : WriteFence {
    mutable int left = 1;
    bool MayWrite() const override { return left-- > 0; }
  } fence;
  transport.Reply(429, "{}", 1);
  EXPECT_EQ(MakeClient(&fence).Create(resources::kPods, kPod).status().code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(transport.requests().size(), 1u);
}

// Answers on other threads, in random order, so that the bound on requests in flight can be seen.
class ThreadedTransport final : public Transport {
 public:
  ~ThreadedTransport() override {
    for (std::thread& thread : threads_) thread.join();
  }
  void Send(HttpRequest request, Done done) override {
    const int now = ++in_flight_;
    int seen = most.load();
    while (now > seen && !most.compare_exchange_weak(seen, now)) {
    }
    threads_.emplace_back([this, request = std::move(request), done = std::move(done), pause = threads_.size() % 7] {
      std::this_thread::sleep_for(std::chrono::microseconds(200 * pause));
      --in_flight_;
      done(HttpResponse{request.path.ends_with("7") ? 404 : 200, R"({"path":")" + request.path + "\"}", -1});
    });
  }
  Result<HttpResponse> Stream(const HttpRequest&, const OnChunk&, std::stop_token) override { return UnimplementedError(""); }
  std::atomic<int> most{0};

 private:
  std::atomic<int> in_flight_{0};
  std::vector<std::thread> threads_;
};

TEST_F(ClientTest, ABatchAnswersEveryRequestOnceAndKeepsItsBoundOfRequestsInFlight) {
  ThreadedTransport threaded;
  Client client(threaded, clock, metrics, {.field_manager = "m", .in_flight_max = 5, .fence = nullptr});
  std::vector<HttpRequest> requests;
  for (int i = 0; i < 100; ++i) requests.push_back(GetRequest(resources::kPods, {"ns", std::to_string(i)}));
  std::vector<int> answered(100, 0);
  const size_t failed = client.DoAll(std::move(requests), [&](size_t index, Answer answer) {
    ++answered[index];
    if (answer.ok()) {
      EXPECT_EQ(answer.body["path"], "/api/v1/namespaces/ns/pods/" + std::to_string(index));
    }
  });
  EXPECT_EQ(failed, 10u);
  EXPECT_TRUE(std::all_of(answered.begin(), answered.end(), [](int n) { return n == 1; }));
  EXPECT_LE(threaded.most, 5);
  EXPECT_GT(threaded.most, 1);
}

TEST_F(ClientTest, ListsAllPages) {
  transport.Reply(200, R"({"metadata":{"resourceVersion":"5","continue":"t"},"items":[{"metadata":{"name":"a"}}]})");
  transport.Reply(200, R"({"metadata":{"resourceVersion":"5"},"items":[{"metadata":{"name":"b"}}]})");
  std::string names, version;
  const Answer answer = MakeClient().List(resources::kPods, {}, [&](Json item) { names += KeyOf(item).name; }, &version);
  EXPECT_TRUE(answer.ok());
  EXPECT_EQ(names, "ab");
  EXPECT_EQ(version, "5");
}

TEST(ForEachItem, SeesTopLevelItemsOnlyAndRefusesWhatIsNoList) {
  std::string names;
  const auto collect = [&](Json item) { names += StringAt(item, "/metadata/name") + ";"; };
  const auto meta = ForEachItem(
      R"({"metadata":{"continue":"","resourceVersion":"9"},"items":[{"metadata":{"name":"a"},"items":[{"metadata":{"name":"no"}}]},{"metadata":{"name":"b"}}]})",
      collect);
  ASSERT_TRUE(meta.ok());
  EXPECT_EQ(meta->resource_version, "9");
  EXPECT_EQ(names, "a;b;");
  for (const char* bad : {"", "[]", "{}", R"({"items":[{])", R"({"kind":"Status"})"}) EXPECT_FALSE(ForEachItem(bad, collect).ok()) << bad;
  EXPECT_TRUE(ForEachItem(R"({"items":[],"metadata":{"resourceVersion":"1"}})", collect).ok());
}

TEST(Objects, MetadataOfAnyShapeIsReadWithoutAThrow) {
  const ObjectMeta meta = ParseMeta(Json::parse(R"({"metadata":{"name":"p","namespace":"n","uid":"u","resourceVersion":"7","generation":3,
    "deletionTimestamp":"2026-01-01T00:00:00Z","labels":{"a":"b","bad":5},
    "ownerReferences":[{"uid":"x","controller":false},{"uid":"o","kind":"QwenPipeline","name":"q","controller":true}]}})"));
  EXPECT_EQ(meta.key, (ObjectKey{"n", "p"}));
  EXPECT_TRUE(meta.deleting);
  EXPECT_EQ(meta.owner_uid, "o");
  EXPECT_EQ(meta.labels, (std::map<std::string, std::string>{{"a", "b"}}));
  for (const char* odd : {"null", "[]", "5", R"({"metadata":[]})", R"({"metadata":{"name":5,"labels":[],"ownerReferences":{"a":1}}})"}) {
    EXPECT_EQ(ParseMeta(Json::parse(odd)).key.name, "") << odd;
  }
  EXPECT_EQ(RevisionOf("12345678901"), 12345678901u);
  EXPECT_EQ(RevisionOf("1a"), 0u);
}
}  // namespace
}  // namespace qwen::kube
