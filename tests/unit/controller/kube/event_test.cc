// Events: series instead of repetition, a limit per object, bounded memory.
#include "controller/kube/event_recorder.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace qwen::kube {
namespace {
constexpr int64_t kSecond = 1'000'000;
Event MakeEvent(const std::string& note = "stage 1 is gone", const std::string& uid = "u1") {
  return {.regarding = {resources::kQwenPipelines, {"ns", "q"}, uid, "5"}, .type = EventType::kWarning, .reason = "StageLost",
          .action = "ReplacePod", .note = note};
}

TEST(EventAggregator, TheFirstIsCreatedWithEverythingTheApiWants) {
  EventAggregator events({.controller = "qwenpipeline.dev/controller", .instance = "pod-1"});
  bool dropped = true;
  const auto write = events.Add(MakeEvent(), 0, 1'700'000'000'123'456, &dropped);
  ASSERT_TRUE(write);
  EXPECT_FALSE(dropped);
  EXPECT_TRUE(write->create);
  EXPECT_EQ(write->body["eventTime"], "2023-11-14T22:13:20.123456Z");
  EXPECT_EQ(write->body["regarding"]["apiVersion"], "qwenpipeline.dev/v1alpha1");
  EXPECT_EQ(write->body["regarding"]["namespace"], "ns");
  EXPECT_EQ(write->body["type"], "Warning");
  EXPECT_EQ(write->body["metadata"]["namespace"], "ns");
  EXPECT_EQ(write->key.name.substr(0, 2), "q.");
}

TEST(EventAggregator, ARepetitionBecomesASeriesThatIsWrittenTwiceAndThenEverySixMinutes) {
  EventAggregator events({.controller = "c", .instance = "i"});
  bool dropped = false;
  const auto first = events.Add(MakeEvent(), 0, 0, &dropped);
  const auto second = events.Add(MakeEvent(), kSecond, kSecond, &dropped);
  ASSERT_TRUE(second);
  EXPECT_FALSE(second->create);
  EXPECT_EQ(second->key, first->key);
  EXPECT_EQ(second->body["series"]["count"], 2);
  int writes = 0, last_count = 0;
  for (int64_t now = 2; now <= 3600; ++now) {
    if (const auto write = events.Add(MakeEvent(), now * kSecond, now * kSecond, &dropped)) {
      ++writes;
      last_count = write->body["series"]["count"];
      EXPECT_FALSE(write->create);
    }
  }
  EXPECT_EQ(writes, 9);  // 3,599 s in steps of 360
  EXPECT_EQ(last_count, 3242);
  EXPECT_FALSE(dropped);
}

TEST(EventAggregator, AfterSixSilentMinutesItIsANewEvent) {
  EventAggregator events({.controller = "c", .instance = "i"});
  bool dropped = false;
  const auto first = events.Add(MakeEvent(), 0, 0, &dropped);
  const auto later = events.Add(MakeEvent(), 361 * kSecond, 361 * kSecond, &dropped);
  ASSERT_TRUE(later);
  EXPECT_TRUE(later->create);
  EXPECT_NE(later->key, first->key);
}

TEST(EventAggregator, AnObjectThatAlwaysSaysSomethingNewIsHeard25TimesAndThenEveryFiveMinutes) {
  EventAggregator events({.controller = "c", .instance = "i"});
  bool dropped = false;
  int created = 0;
  for (int i = 0; i < 100; ++i) created += events.Add(MakeEvent("note " + std::to_string(i)), kSecond, i, &dropped) ? 1 : 0;
  EXPECT_EQ(created, 25);
  EXPECT_TRUE(dropped);
  EXPECT_TRUE(events.Add(MakeEvent("x", "another object"), kSecond, 0, &dropped));
  EXPECT_TRUE(events.Add(MakeEvent("after five minutes"), 302 * kSecond, 0, &dropped));
  EXPECT_FALSE(events.Add(MakeEvent("and one more"), 302 * kSecond, 0, &dropped));
}

TEST(EventAggregator, RemembersABoundedNumberOfSeries) {
  EventAggregator events({.controller = "c", .instance = "i", .series_max = 10});
  bool dropped = false;
  for (int i = 0; i < 1000; ++i) events.Add(MakeEvent("n", std::to_string(i)), i, i, &dropped);
  EXPECT_LE(events.size(), 10u);
}

TEST(EventAggregator, CutsALongNoteBetweenCharacters) {
  EventAggregator events({.controller = "c", .instance = "i"});
  bool dropped = false;
  std::string note;
  while (note.size() < 2000) note += "\xC3\xA4";  // two bytes each; 1,024 is even, so shift by one
  const auto write = events.Add(MakeEvent("x" + note), 0, 0, &dropped);
  const std::string kept = write->body["note"];
  EXPECT_EQ(kept.size(), 1023u);
  EXPECT_NO_THROW(static_cast<void>(write->body.dump()));
}
}  // namespace
}  // namespace qwen::kube
