// Goal: what a head says of its stages' loading arrives once, in tens, and a head that says nonsense or nothing harms nobody.
#include "controller/reconcile/load_watch.h"

#include <gtest/gtest.h>

namespace qwen::reconcile {
namespace {

TEST(Loads, AreCutToTens) {
  EXPECT_EQ(ParseLoads(R"({"status": "not ready", "stages": [
    {"stage": 0, "connected": true, "loaded": true, "load_percent": 100}, {"stage": 1, "connected": true, "loaded": false, "load_percent": 49},
    {"stage": 2, "connected": true, "loaded": false, "load_percent": 100}, {"stage": 3, "connected": false, "loaded": false, "load_percent": 0}]})"),
            (LoadPercents{100, 40, 90, -1}));
}

TEST(Loads, OfWhatIsNoAnswerAreNone) {
  for (const char* body : {"", "no", "[]", "{}", R"({"stages": 3})", R"({"stages": [3]})"}) EXPECT_EQ(ParseLoads(body), LoadPercents()) << body;
  EXPECT_EQ(ParseLoads(R"({"stages": [{"connected": true, "load_percent": "x"}, {"connected": true, "load_percent": -7}]})"), (LoadPercents{-1, 0}));
  std::string many = R"({"stages": [{})";
  for (int i = 0; i < 1000; ++i) many += ",{}";
  EXPECT_EQ(ParseLoads(many + "]}"), LoadPercents()) << "more than a pipeline can have";
}

TEST(LoadWatch, TellsOnlyWhatIsNewAndForgetsWhoIsNotFollowed) {
  std::map<std::string, std::string> answers = {{"a:1", R"({"stages": [{"connected": true, "load_percent": 11}]})"}};
  std::vector<std::string> asked;
  int news = 0;
  LoadWatch watch(
      [&](const std::string& address) -> Result<std::string> {
        asked.push_back(address);
        if (!answers.contains(address)) return UnavailableError("nobody");
        return answers[address];
      },
      [&](const kube::ObjectKey& key) {
        ++news;
        EXPECT_EQ(key.name, "p");
      });
  watch.Follow({"ns", "p"}, {{"u1", "a:1"}, {"u2", "b:1"}});
  EXPECT_EQ(watch.Of("u1"), LoadPercents());
  watch.AskAll();
  EXPECT_EQ(asked, (std::vector<std::string>{"a:1", "b:1"}));
  EXPECT_EQ(news, 1);
  EXPECT_EQ(watch.Of("u1"), LoadPercents{10});
  answers["a:1"] = R"({"stages": [{"connected": true, "load_percent": 19}]})";
  watch.AskAll();
  EXPECT_EQ(news, 1) << "still ten";
  answers.clear();
  watch.AskAll();
  EXPECT_EQ(watch.Of("u1"), LoadPercents{10}) << "no answer is no news";
  answers["a:1"] = R"({"stages": [{"connected": true, "loaded": true}]})";
  watch.AskAll();
  EXPECT_EQ(news, 2);
  watch.Follow({"ns", "p"}, {{"u1", "a:1"}});
  EXPECT_EQ(watch.Of("u1"), LoadPercents{100}) << "what was known of it stays";
  watch.Follow({"ns", "p"}, {});
  EXPECT_EQ(watch.Of("u1"), LoadPercents());
  asked.clear();
  watch.AskAll();
  EXPECT_TRUE(asked.empty());
}

TEST(LoadWatch, ItsThreadAsksAndEnds) {
  std::atomic<int> asked{0};
  LoadWatch watch([&](const std::string&) -> Result<std::string> { return ++asked, std::string("{}"); }, [](const kube::ObjectKey&) {});
  watch.Start();
  watch.Follow({"ns", "p"}, {{"u1", "a:1"}});
  for (int i = 0; i < 5000 && asked == 0; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_GT(asked, 0);
  watch.Stop();
}

}  // namespace
}  // namespace qwen::reconcile
