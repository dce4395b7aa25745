// The reflector through everything an API server does to a watcher, with canned answers and a made-up time.
#include "controller/kube/reflector.h"

#include <gtest/gtest.h>

#include <map>
#include <nlohmann/json.hpp>

namespace qwen::kube {
namespace {
constexpr int64_t kSecond = 1'000'000;

// What a correct cache would hold, kept as text.
class Recorder final : public Reflector::Sink {
 public:
  void BeginReplace() override { incoming.clear(); }
  void ReplaceItem(Json object) override { incoming[KeyOf(object).name] = StringAt(object, "/metadata/resourceVersion"); }
  void EndReplace() override {
    objects = incoming;
    ++replaced;
  }
  void Upsert(Json object) override { objects[KeyOf(object).name] = StringAt(object, "/metadata/resourceVersion"); }
  void Erase(Json object) override { objects.erase(KeyOf(object).name); }
  void SeenVersion(const std::string& version) override { seen = version; }

  std::map<std::string, std::string> objects, incoming;
  std::string seen;
  int replaced = 0;
};
using Objects = std::map<std::string, std::string>;

std::string Pod(const std::string& name, const std::string& version) {
  return R"({"metadata":{"name":")" + name + R"(","namespace":"ns","resourceVersion":")" + version + R"("}})";
}
std::string EventLine(const std::string& type, const std::string& object) { return R"({"type":")" + type + R"(","object":)" + object + "}"; }
std::string Bookmark(const std::string& version, bool end_of_list = false) {
  return R"({"type":"BOOKMARK","object":{"metadata":{"resourceVersion":")" + version + "\"" +
         (end_of_list ? R"(,"annotations":{"k8s.io/initial-events-end":"true"})" : "") + "}}}";
}
std::string ErrorEvent(int code, const std::string& reason, const std::string& message = "") {
  return R"({"type":"ERROR","object":{"kind":"Status","code":)" + std::to_string(code) + R"(,"reason":")" + reason + R"(","message":")" + message + "\"}}";
}
HttpResponse Page(const std::vector<std::string>& items, const std::string& version, const std::string& next = "") {
  std::string joined;
  for (const std::string& item : items) joined += (joined.empty() ? "" : ",") + item;
  return {200, R"({"kind":"PodList","metadata":{"resourceVersion":")" + version + R"(","continue":")" + next + R"("},"items":[)" + joined + "]}", -1};
}
const Result<HttpResponse> kCleanEnd = HttpResponse{200, {}, -1};

class ReflectorTest : public testing::Test {
 protected:
  using Kind = Reflector::Action::Kind;
  static Reflector::Options Options(bool watch_list) {
    return {.resource = resources::kPods, .selection = {.namespace_name = "ns", .label_selector = "a=b", .field_selector = {}},
            .page_items = 2, .watch_list = watch_list, .seed = 3};
  }
  // The next action that is no wait; time goes to it.
  Reflector::Action Act(Reflector& reflector) {
    Reflector::Action action = reflector.Next(now);
    if (action.kind == Kind::kWait) {
      waited = action.wait_until_micros - now;
      now = action.wait_until_micros;
      action = reflector.Next(now);
    } else {
      waited = 0;
    }
    return action;
  }
  static bool Has(const Reflector::Action& action, const std::string& text) { return action.request.path.find(text) != std::string::npos; }
  // A reflector that has listed a@1 and watches from version 10.
  void Synced(Reflector& reflector) {
    ASSERT_EQ(Act(reflector).kind, Kind::kList);
    reflector.OnList(now, Page({Pod("a", "1")}, "10"));
    ASSERT_EQ(Act(reflector).kind, Kind::kWatch);
  }

  int64_t now = 0, waited = 0;
  Recorder sink;
};

TEST_F(ReflectorTest, ListsPageByPageAndWatchesFromTheListsVersion) {
  Reflector reflector(Options(false), sink);
  auto action = Act(reflector);
  EXPECT_EQ(action.request.path, "/api/v1/namespaces/ns/pods?labelSelector=a%3Db&limit=2");
  reflector.OnList(now, Page({Pod("a", "1"), Pod("b", "2")}, "10", "t/1"));
  EXPECT_FALSE(reflector.synced());
  action = Act(reflector);
  EXPECT_TRUE(Has(action, "&continue=t%2F1"));
  reflector.OnList(now, Page({Pod("c", "3")}, "10"));
  EXPECT_TRUE(reflector.synced());
  EXPECT_EQ(sink.objects, (Objects{{"a", "1"}, {"b", "2"}, {"c", "3"}}));
  action = Act(reflector);
  EXPECT_EQ(action.kind, Kind::kWatch);
  EXPECT_TRUE(Has(action, "resourceVersion=10")) << action.request.path;
  EXPECT_TRUE(Has(action, "allowWatchBookmarks=true"));
  EXPECT_FALSE(Has(action, "sendInitialEvents"));
}

TEST_F(ReflectorTest, AnExpiredPageStartsTheListAnewWithoutItsFirstHalf) {
  Reflector reflector(Options(false), sink);
  Act(reflector);
  reflector.OnList(now, Page({Pod("gone", "1"), Pod("b", "2")}, "10", "token"));
  Act(reflector);
  reflector.OnList(now, HttpResponse{410, R"({"reason":"Expired"})", -1});
  const auto action = Act(reflector);
  EXPECT_FALSE(Has(action, "continue="));
  reflector.OnList(now, Page({Pod("b", "2")}, "12"));
  EXPECT_EQ(sink.objects, (Objects{{"b", "2"}}));
}

TEST_F(ReflectorTest, FollowsAddsChangesDeletesAndBookmarks) {
  Reflector reflector(Options(false), sink);
  Synced(reflector);
  EXPECT_TRUE(reflector.OnWatchLine(now, EventLine("ADDED", Pod("b", "11"))));
  EXPECT_TRUE(reflector.OnWatchLine(now, EventLine("MODIFIED", Pod("a", "12"))));
  EXPECT_TRUE(reflector.OnWatchLine(now, EventLine("DELETED", Pod("b", "13"))));
  EXPECT_TRUE(reflector.OnWatchLine(now, Bookmark("20")));
  EXPECT_EQ(sink.objects, (Objects{{"a", "12"}}));
  EXPECT_EQ(sink.seen, "20");
  now += 400 * kSecond;
  reflector.OnWatchEnd(now, kCleanEnd);
  const auto action = Act(reflector);
  EXPECT_EQ(waited, 0) << "the server's own timeout is no fault";
  EXPECT_TRUE(Has(action, "resourceVersion=20")) << "the bookmark saves a replay";
}

TEST_F(ReflectorTest, A410InTheStreamListsAnewAtOnceAndForgetsWhatVanishedMeanwhile) {
  Reflector reflector(Options(false), sink);
  Synced(reflector);
  EXPECT_FALSE(reflector.OnWatchLine(now, ErrorEvent(410, "Expired", "too old resource version")));
  reflector.OnWatchEnd(now, kCleanEnd);
  EXPECT_EQ(Act(reflector).kind, Kind::kList);
  EXPECT_EQ(waited, 0);
  EXPECT_EQ(sink.objects, (Objects{{"a", "1"}})) << "the old copy serves readers until the new list is complete";
  reflector.OnList(now, Page({Pod("z", "30")}, "31"));
  EXPECT_EQ(sink.objects, (Objects{{"z", "30"}}));
}

TEST_F(ReflectorTest, A410AsTheAnswerToTheWatchListsAnew) {
  Reflector reflector(Options(false), sink);
  Synced(reflector);
  reflector.OnWatchEnd(now, HttpResponse{410, R"({"kind":"Status","reason":"Gone","code":410})", -1});
  EXPECT_EQ(Act(reflector).kind, Kind::kList);
}

TEST_F(ReflectorTest, AServerThatSays410ForEverIsAskedMoreAndMoreSeldom) {
  Reflector reflector(Options(false), sink);
  Synced(reflector);
  int64_t last = 0;
  for (int i = 0; i < 12; ++i) {
    reflector.OnWatchEnd(now, HttpResponse{410, "{}", -1});
    Act(reflector);
    last = waited;
    reflector.OnList(now, Page({Pod("a", "1")}, "10"));
    Act(reflector);
  }
  EXPECT_GE(last, 3 * kSecond);
}

TEST_F(ReflectorTest, ALostConnectionWatchesAgainFromWhereItWasWithoutAList) {
  Reflector reflector(Options(false), sink);
  Synced(reflector);
  reflector.OnWatchLine(now, EventLine("ADDED", Pod("b", "15")));
  reflector.OnWatchEnd(now + 3 * kSecond, UnavailableError("connection reset"));
  now += 3 * kSecond;
  const auto action = Act(reflector);
  EXPECT_EQ(action.kind, Kind::kWatch);
  EXPECT_TRUE(Has(action, "resourceVersion=15"));
  EXPECT_GT(waited, 0);
  EXPECT_LE(waited, 800'000);
}

TEST_F(ReflectorTest, AHalfOpenConnectionIsOneThatIsSilentAndIsReplaced) {
  Reflector reflector(Options(false), sink);
  Synced(reflector);
  now += 80 * kSecond;  // the transport's bound on silence: longer than the 60 s between bookmarks
  reflector.OnWatchEnd(now, DeadlineExceededError("silent"));
  const auto action = Act(reflector);
  EXPECT_EQ(action.kind, Kind::kWatch);
  EXPECT_TRUE(Has(action, "resourceVersion=10"));
}

TEST_F(ReflectorTest, ADeadServerIsAskedAtMostEvery30SecondsAndABackoffStartsAnewAfterAHealthyWatch) {
  Reflector reflector(Options(false), sink);
  Synced(reflector);
  int64_t longest = 0;
  for (int i = 0; i < 40; ++i) {
    reflector.OnWatchEnd(now, UnavailableError("refused"));
    Act(reflector);
    EXPECT_LE(waited, 30 * kSecond);
    longest = std::max(longest, waited);
  }
  EXPECT_GT(longest, 15 * kSecond);
  now += 130 * kSecond;
  reflector.OnWatchEnd(now, UnavailableError("reset"));
  Act(reflector);
  EXPECT_LE(waited, 800'000);
}

TEST_F(ReflectorTest, AWatchThatEndsAtOnceWithoutAWordIsNotOpenedInATightLoop) {
  Reflector reflector(Options(false), sink);
  Synced(reflector);
  reflector.OnWatchEnd(now + 1000, kCleanEnd);
  now += 1000;
  Act(reflector);
  EXPECT_GT(waited, 50'000);
}

TEST_F(ReflectorTest, RetryAfterOf429IsObeyed) {
  Reflector reflector(Options(false), sink);
  Synced(reflector);
  reflector.OnWatchEnd(now, HttpResponse{429, R"({"reason":"TooManyRequests"})", 7});
  Act(reflector);
  EXPECT_GE(waited, 7 * kSecond);
}

TEST_F(ReflectorTest, StreamsTheListWhenTheServerCanAndIsSyncedOnlyAtItsEnd) {
  Reflector reflector(Options(true), sink);
  auto action = Act(reflector);
  EXPECT_EQ(action.kind, Kind::kWatch);
  EXPECT_TRUE(Has(action, "sendInitialEvents=true&resourceVersionMatch=NotOlderThan"));
  EXPECT_FALSE(Has(action, "resourceVersion="));
  reflector.OnWatchLine(now, EventLine("ADDED", Pod("a", "1")));
  EXPECT_FALSE(reflector.synced());
  EXPECT_TRUE(sink.objects.empty());
  reflector.OnWatchLine(now, Bookmark("10", true));
  EXPECT_TRUE(reflector.synced());
  EXPECT_EQ(sink.objects, (Objects{{"a", "1"}}));
  reflector.OnWatchLine(now, EventLine("ADDED", Pod("b", "11")));
  EXPECT_EQ(sink.objects, (Objects{{"a", "1"}, {"b", "11"}}));
  reflector.OnWatchEnd(now + 5 * kSecond, UnavailableError("reset"));
  now += 5 * kSecond;
  EXPECT_TRUE(Has(Act(reflector), "resourceVersion=11"));
}

TEST_F(ReflectorTest, AStreamedListThatBreaksOffStartsFromItsBeginning) {
  Reflector reflector(Options(true), sink);
  Act(reflector);
  reflector.OnWatchLine(now, EventLine("ADDED", Pod("half", "1")));
  reflector.OnWatchEnd(now, UnavailableError("reset"));
  EXPECT_TRUE(Has(Act(reflector), "sendInitialEvents=true"));
  reflector.OnWatchLine(now, EventLine("ADDED", Pod("a", "2")));
  reflector.OnWatchLine(now, Bookmark("10", true));
  EXPECT_EQ(sink.objects, (Objects{{"a", "2"}}));
}

TEST_F(ReflectorTest, FallsBackToPagesForGoodWhenTheServerRefusesToStream) {
  for (const bool in_stream : {false, true}) {
    Reflector reflector(Options(true), sink);
    Act(reflector);
    if (in_stream) {  // what a server on an etcd before 3.5.13 says
      reflector.OnWatchLine(now, ErrorEvent(500, "InternalError", "storage feature RequestWatchProgress is disabled"));
      reflector.OnWatchEnd(now, kCleanEnd);
    } else {
      reflector.OnWatchEnd(now, HttpResponse{422, R"({"reason":"Invalid","code":422})", -1});
    }
    EXPECT_EQ(Act(reflector).kind, Kind::kList);
    EXPECT_EQ(waited, 0);
    reflector.OnList(now, Page({Pod("a", "1")}, "10"));
    Act(reflector);
    reflector.OnWatchLine(now, ErrorEvent(410, "Expired"));
    EXPECT_EQ(Act(reflector).kind, Kind::kList);
  }
}

TEST_F(ReflectorTest, AnotherErrorInTheStreamKeepsTheVersion) {
  Reflector reflector(Options(false), sink);
  Synced(reflector);
  EXPECT_FALSE(reflector.OnWatchLine(now, ErrorEvent(504, "Timeout", "Too large resource version: 99, current: 5")));
  const auto action = Act(reflector);
  EXPECT_EQ(action.kind, Kind::kWatch);
  EXPECT_TRUE(Has(action, "resourceVersion=10"));
}

TEST_F(ReflectorTest, RubbishInTheStreamIsAnErrorAndNotACrash) {
  for (const char* line : {"<html>", "{}", "[1]", "null", R"({"type":5,"object":{}})", R"({"type":"ADDED"})"}) {
    Reflector reflector(Options(false), sink);
    Synced(reflector);
    EXPECT_FALSE(reflector.OnWatchLine(now, line)) << line;
    EXPECT_EQ(reflector.last_error().code(), StatusCode::kDataLoss) << line;
    Act(reflector);
    EXPECT_GT(waited, 0);
  }
}

TEST(LineSplitter, GivesTheSameLinesHoweverTheStreamIsCut) {
  const std::string text = "one\ntwo\n\nthree is longer\nunfinished";
  for (size_t size = 1; size <= text.size(); ++size) {
    LineSplitter splitter;
    std::vector<std::string> lines;
    for (size_t at = 0; at < text.size(); at += size) {
      ASSERT_TRUE(splitter.Feed(std::string_view(text).substr(at, size), [&](std::string_view line) {
        lines.emplace_back(line);
        return true;
      }).ok());
    }
    EXPECT_EQ(lines, (std::vector<std::string>{"one", "two", "", "three is longer"})) << "pieces of " << size;
  }
}

TEST(LineSplitter, RefusesALineBeyondItsBoundInsteadOfGrowing) {
  LineSplitter splitter(10);
  const auto ignore = [](std::string_view) { return true; };
  EXPECT_TRUE(splitter.Feed("12345", ignore).ok());
  EXPECT_TRUE(splitter.Feed("67890", ignore).ok());
  EXPECT_EQ(splitter.Feed("1", ignore).code(), StatusCode::kDataLoss);
}
}  // namespace
}  // namespace qwen::kube
