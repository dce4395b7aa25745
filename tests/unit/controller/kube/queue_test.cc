// The work queue's promises, on its pure state with a made-up time: once in the queue, on one worker at a time, no add lost.
#include <gtest/gtest.h>
#include <prometheus/registry.h>

#include <atomic>
#include <random>
#include <set>
#include <thread>

#include "controller/kube/controller.h"
#include "controller/kube/rate_limiter.h"
#include "controller/kube/work_queue.h"

namespace qwen::kube {
namespace {
ObjectKey Key(const std::string& name) { return {"ns", name}; }
constexpr Priority kNormal = Priority::kNormal;

TEST(QueueState, AKeyThatIsAddedThriceIsHandedOutOnce) {
  QueueState queue;
  for (int i = 0; i < 3; ++i) queue.Add(Key("a"), kNormal, 0);
  EXPECT_EQ(queue.depth(), 1u);
  EXPECT_TRUE(queue.Get(0));
  EXPECT_FALSE(queue.Get(0));
}

TEST(QueueState, AKeyAddedWhileItIsProcessedComesAgainAfterDoneAndNotBefore) {
  QueueState queue;
  queue.Add(Key("a"), kNormal, 0);
  ASSERT_TRUE(queue.Get(0));
  queue.Add(Key("a"), kNormal, 1);
  queue.Add(Key("a"), kNormal, 2);
  EXPECT_FALSE(queue.Get(2)) << "two workers would have it at once";
  EXPECT_EQ(queue.Done(Key("a"), 5), 5);
  ASSERT_TRUE(queue.Get(5));
  queue.Done(Key("a"), 6);
  EXPECT_FALSE(queue.Get(6)) << "both adds are one more look, not two";
}

TEST(QueueState, HigherPriorityGoesFirstAndEqualOnesKeepTheirOrder) {
  QueueState queue;
  queue.Add(Key("resync1"), Priority::kLow, 0);
  queue.Add(Key("resync2"), Priority::kLow, 0);
  queue.Add(Key("event1"), kNormal, 0);
  queue.Add(Key("event2"), kNormal, 0);
  queue.Add(Key("resync2"), Priority::kHigh, 0);  // moves up
  queue.Add(Key("event1"), Priority::kLow, 0);    // stays
  std::vector<std::string> order;
  while (auto item = queue.Get(0)) order.push_back(item->key.name);
  EXPECT_EQ(order, (std::vector<std::string>{"resync2", "event1", "event2", "resync1"}));
}

TEST(QueueState, ADelayedKeyComesWhenItIsDueAndTheEarlierOfTwoTimesHolds) {
  QueueState queue;
  queue.AddAfter(Key("a"), kNormal, 1000, 0);
  queue.AddAfter(Key("a"), kNormal, 5000, 0);
  EXPECT_EQ(queue.NextDue(), 1000);
  queue.AddAfter(Key("a"), kNormal, 300, 100);
  EXPECT_EQ(queue.NextDue(), 400);
  EXPECT_FALSE(queue.Get(399));
  EXPECT_TRUE(queue.Get(400));
  EXPECT_EQ(queue.delayed(), 0u);
}

TEST(QueueState, FailuresOfOneKeyWaitTwiceAsLongEachTimeUntilItIsForgotten) {
  QueueState queue({.base_micros = 5000, .max_micros = 1'000'000'000, .per_second = 1e9, .burst = 1e9});
  int64_t now = 0;
  for (const int64_t expected : {5000, 10000, 20000, 40000}) {
    queue.AddRateLimited(Key("a"), kNormal, now);
    EXPECT_EQ(*queue.NextDue() - now, expected);
    now = *queue.NextDue();
    ASSERT_TRUE(queue.Get(now));
    queue.Done(Key("a"), now);
  }
  queue.Forget(Key("a"));
  queue.AddRateLimited(Key("a"), kNormal, now);
  EXPECT_EQ(*queue.NextDue() - now, 5000);
}

TEST(RateLimiter, BackoffEndsAtItsMaximumHoweverOftenAKeyFails) {
  RateLimiter limiter({.base_micros = 5000, .max_micros = 1'000'000'000, .per_second = 1e9, .burst = 1e9});
  int64_t last = 0;
  for (int i = 0; i < 200; ++i) last = limiter.When(Key("a"), 0);
  EXPECT_EQ(last, 1'000'000'000);
}

TEST(RateLimiter, NobodyWaitsLongerThanHalfAMinuteForAKeyThatFailedInAStorm) {
  RateLimiter limiter({.per_second = 1e9, .burst = 1e9});
  int64_t last = 0;
  for (int i = 0; i < 20; ++i) last = limiter.When(Key("a"), 0);
  EXPECT_EQ(last, 30'000'000);
}

TEST(RateLimiter, ManyKeysThatFailAtOnceShareTenASecondAfterTheFirstHundred) {
  RateLimiter limiter({});
  int64_t last = 0;
  for (int i = 0; i < 150; ++i) last = limiter.When(Key(std::to_string(i)), 0);
  EXPECT_EQ(last, 5'000'000);  // the 150th is 50 tokens late at 10 a second
}

TEST(TokenBucket, RefillsOverTimeButNeverBeyondItsBurst) {
  TokenBucket bucket(2, 3);
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(bucket.TryTake(0));
  EXPECT_FALSE(bucket.TryTake(499'999));
  EXPECT_TRUE(bucket.TryTake(500'000));
  int taken = 0;
  while (bucket.TryTake(1'000'000'000)) ++taken;
  EXPECT_EQ(taken, 3);
}

// Against a model that shares no code: what every key is owed, as a set of flags.
TEST(QueueState, NoAddIsLostAndNoKeyIsHandedOutTwiceInARandomRun) {
  std::mt19937 random(7);
  QueueState queue;
  std::set<std::string> owed, busy;
  int64_t now = 0;
  for (int step = 0; step < 20000; ++step) {
    const std::string name(1, static_cast<char>('a' + random() % 12));
    now += random() % 50;
    switch (random() % 3) {
      case 0:
        queue.Add(Key(name), random() % 2 ? kNormal : Priority::kLow, now);
        owed.insert(name);
        break;
      case 1:
        if (const auto item = queue.Get(now)) {
          ASSERT_TRUE(owed.erase(item->key.name)) << "seed 7 step " << step;
          ASSERT_TRUE(busy.insert(item->key.name).second) << "seed 7 step " << step;
        } else {
          for (const std::string& waiting : owed) ASSERT_TRUE(busy.contains(waiting)) << "seed 7 step " << step;
        }
        break;
      default:
        if (busy.contains(name)) {
          queue.Done(Key(name), now);
          busy.erase(name);
        }
    }
  }
}

TEST(Controller, RunsOneReconcileAtATimePerKeyOnManyWorkersAndRetriesFailures) {
  SteadyClock clock;
  prometheus::Registry registry;
  Metrics metrics(registry, "test");
  std::atomic<int> at_once[4] = {}, runs{0}, overlaps{0};
  std::atomic<int> failures_left{5};
  Controller controller({.name = "test", .workers = 8, .limits = {}},
                        [&](const ObjectKey& key) -> Result<Requeue> {
                          const int index = key.name[0] - 'a';
                          if (++at_once[index] > 1) ++overlaps;
                          std::this_thread::sleep_for(std::chrono::microseconds(200));
                          --at_once[index];
                          ++runs;
                          if (failures_left.fetch_sub(1) > 0) return UnavailableError("injected");
                          return Requeue{};
                        },
                        clock, metrics);
  controller.Start();
  for (int i = 0; i < 400; ++i) {
    controller.queue().Add(Key(std::string(1, static_cast<char>('a' + i % 4))));
    if (i % 10 == 0) std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  const int64_t deadline = clock.NowMicros() + 10'000'000;
  const auto count = [&](const std::string& name, const std::string& result) {
    double sum = 0;
    for (const auto& family : registry.Collect()) {
      if (family.name != name) continue;
      for (const auto& metric : family.metric) {
        for (const auto& label : metric.label) {
          if (label.name == "result" && label.value == result) sum += metric.counter.value;
        }
      }
    }
    return sum;
  };
  while ((count("controller_runtime_reconcile_total", "error") < 5 || controller.queue().depth() > 0) && clock.NowMicros() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  controller.Stop();
  EXPECT_EQ(overlaps, 0);
  EXPECT_EQ(count("controller_runtime_reconcile_total", "error"), 5);
  EXPECT_EQ(count("controller_runtime_reconcile_total", "error") + count("controller_runtime_reconcile_total", "success"), runs);
}
}  // namespace
}  // namespace qwen::kube
