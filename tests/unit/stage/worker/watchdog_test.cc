// The watchdog as a table: what it sees over time, and what it says.
#include "stage/worker/watchdog.h"

#include <gtest/gtest.h>

namespace qwen::worker {
namespace {

using Verdict = Watchdog::Verdict;

TEST(Watchdog, AComputeThatDoesNotReturnIsHung) {
  Watchdog watchdog(1000);
  EXPECT_EQ(watchdog.Check({.phase = Phase::kComputing, .phase_since_micros = 500}, 1500), Verdict::kFine);
  EXPECT_EQ(watchdog.Check({.phase = Phase::kComputing, .phase_since_micros = 500}, 1501), Verdict::kHung);
}

TEST(Watchdog, TheGroupsProgressDoesNotExcuseTheOwnCompute) {
  Watchdog watchdog(1000);
  EXPECT_EQ(watchdog.Check({.phase = Phase::kComputing, .phase_since_micros = 0, .own_steps = 1, .group_progress = 77}, 1001), Verdict::kHung);
}

TEST(Watchdog, AWaitIsFineWhileTheGroupGetsOnAndEndsWhenNobodyDoes) {
  Watchdog watchdog(1000);
  for (int64_t now = 0; now <= 10'000; now += 500) {
    EXPECT_EQ(watchdog.Check({.phase = Phase::kReceiving, .phase_since_micros = 0, .own_steps = 3, .group_progress = static_cast<uint64_t>(now)}, now), Verdict::kFine);
  }
  const Watchdog::Observation stuck{.phase = Phase::kReceiving, .phase_since_micros = 0, .own_steps = 3, .group_progress = 10'000};
  EXPECT_EQ(watchdog.Check(stuck, 11'000), Verdict::kFine);
  EXPECT_EQ(watchdog.Check(stuck, 11'001), Verdict::kAbortEpoch);
}

TEST(Watchdog, ASendThatIsStuckEndsTheEpochToo) {
  Watchdog watchdog(1000);
  const Watchdog::Observation sending{.phase = Phase::kSending, .phase_since_micros = 100};
  EXPECT_EQ(watchdog.Check(sending, 1100), Verdict::kFine);
  EXPECT_EQ(watchdog.Check(sending, 1101), Verdict::kAbortEpoch);
}

TEST(Watchdog, IdleLoadingAndAssemblingAreNeverOverdue) {
  Watchdog watchdog(1000);
  for (const Phase phase : {Phase::kIdle, Phase::kLoading, Phase::kAssembling}) {
    EXPECT_EQ(watchdog.Check({.phase = phase, .phase_since_micros = 0}, 1'000'000'000), Verdict::kFine) << PhaseName(phase);
  }
}

}  // namespace
}  // namespace qwen::worker
