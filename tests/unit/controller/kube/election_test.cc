// Leader election between replicas that share one simulated Lease, with clocks that do not agree.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <random>

#include "controller/kube/leader_election.h"

namespace qwen::kube {
namespace {
constexpr int64_t kSecond = 1'000'000;
using Kind = LeaseElection::Action::Kind;

// One Lease with the API server's rule: a PUT with an old resourceVersion is a Conflict.
struct Server {
  Json lease;
  int64_t version = 0;
  bool reachable = true;

  static Answer Fail(int code, const std::string& reason) {
    Answer answer;
    answer.code = code;
    answer.reason = reason;
    if (code == 0) answer.transport_status = UnavailableError(reason);
    return answer;
  }
  Answer Store(Json next) {
    next["metadata"]["resourceVersion"] = std::to_string(++version);
    lease = next;
    return Got();
  }
  Answer Got() const {
    Answer answer;
    answer.code = 200;
    answer.body = lease;
    return answer;
  }
  Answer Serve(const LeaseElection::Action& action) {
    if (!reachable) return Fail(0, "refused");
    if (action.kind == Kind::kGet) return lease.is_null() ? Fail(404, "NotFound") : Got();
    if (action.kind == Kind::kCreate) return lease.is_null() ? Store(action.lease) : Fail(409, "AlreadyExists");
    return Put(action.lease);
  }
  Answer Put(const Json& next) {
    if (lease.is_null()) return Fail(404, "NotFound");
    if (StringAt(next, "/metadata/resourceVersion") != StringAt(lease, "/metadata/resourceVersion")) return Fail(409, "Conflict");
    return Store(next);
  }
};

struct Replica {
  explicit Replica(const std::string& name, uint64_t seed = 1)
      : election({.lease = {"ns", "lease"}, .identity = name, .lease_micros = 15 * kSecond, .renew_deadline_micros = 10 * kSecond,
                  .retry_micros = 2 * kSecond, .seed = seed}) {}
  // Does everything that is due at `now`.
  void Run(Server& server, int64_t now, int64_t unix_micros = 0) {
    for (int i = 0; i < 10; ++i) {
      const auto action = election.Next(now, unix_micros);
      if (action.kind == Kind::kWait) return;
      election.OnAnswer(now, server.Serve(action));
    }
    ADD_FAILURE() << "more than ten requests at one time";
  }
  LeaseElection election;
};

TEST(LeaseElection, TheFirstCreatesTheLeaseAndTheSecondWaits) {
  Server server;
  Replica a("a"), b("b");
  a.Run(server, 0, 1'700'000'000'000'000);
  b.Run(server, 0);
  EXPECT_TRUE(a.election.leading(1));
  EXPECT_FALSE(b.election.leading(1));
  EXPECT_EQ(b.election.holder(), "a");
  EXPECT_EQ(server.lease["spec"]["leaseTransitions"], 0);
  EXPECT_EQ(server.lease["spec"]["leaseDurationSeconds"], 15);
  EXPECT_EQ(server.lease["spec"]["renewTime"], "2023-11-14T22:13:20.000000Z");
}

TEST(LeaseElection, ADeadLeadersLeaseIsTakenAfterItsDurationAndNotBefore) {
  Server server;
  Replica a("a"), b("b");
  a.Run(server, 0);
  int64_t taken = 0;
  for (int64_t now = 0; now < 40 * kSecond && taken == 0; now += kSecond / 10) {
    b.Run(server, now);
    if (b.election.leading(now)) taken = now;
    if (a.election.leading(now)) {
      EXPECT_FALSE(b.election.leading(now)) << now;
    }
  }
  EXPECT_GE(taken, 15 * kSecond);
  EXPECT_LE(taken, 18 * kSecond);
  EXPECT_EQ(server.lease["spec"]["leaseTransitions"], 1);
}

TEST(LeaseElection, TimestampsInTheLeaseDoNotCountOnlyWhatIsObservedToChange) {
  Server server;
  Replica a("a"), b("b");
  // a writes times of 1970: to b the lease looks expired for decades, yet it changes, so it is alive.
  for (int64_t now = 0; now < 60 * kSecond; now += kSecond / 2) {
    a.Run(server, now, 0);
    b.Run(server, now, 1'800'000'000'000'000);
    ASSERT_TRUE(a.election.leading(now));
    ASSERT_FALSE(b.election.leading(now));
  }
}

TEST(LeaseElection, ALeaderThatCannotRenewStopsWritingBeforeAnybodyElseMayStart) {
  Server server;
  Replica a("a"), b("b");
  a.Run(server, 0);
  b.Run(server, 0);
  int64_t a_stopped = 0, b_started = 0;
  for (int64_t now = 0; now < 40 * kSecond; now += kSecond / 10) {
    server.reachable = false;  // for a only
    a.Run(server, now);
    server.reachable = true;
    b.Run(server, now);
    if (a_stopped == 0 && !a.election.leading(now)) a_stopped = now;
    if (b_started == 0 && b.election.leading(now)) b_started = now;
  }
  EXPECT_EQ(a_stopped, 10 * kSecond);
  EXPECT_GE(b_started - a_stopped, 4 * kSecond);
}

TEST(LeaseElection, AReleasedLeaseIsTakenWithinARetry) {
  Server server;
  Replica a("a"), b("b");
  a.Run(server, 0);
  b.Run(server, 0);
  server.Put(a.election.Release(0));
  EXPECT_FALSE(a.election.leading(1));
  int64_t taken = 0;
  for (int64_t now = 0; now < 20 * kSecond && taken == 0; now += kSecond / 10) {
    b.Run(server, now);
    if (b.election.leading(now)) taken = now;
  }
  EXPECT_LE(taken, 5 * kSecond / 2);
  EXPECT_TRUE(a.election.Release(0).is_null()) << "what is not held is not released";
}

TEST(LeaseElection, ALeaseWhoseLastRenewalWasNotHeardOfIsReleasedAfterAnotherLook) {
  Server server;
  Replica a("a");
  a.Run(server, 0);
  server.Store(server.lease);  // the renewal that was committed, its answer lost
  EXPECT_TRUE(server.Put(a.election.Release(0)).Conflict());
  EXPECT_TRUE(a.election.Release(0).is_null());
  a.election.Learn(1, server.Got());
  EXPECT_TRUE(server.Put(a.election.Release(0)).ok());
  EXPECT_EQ(server.lease["spec"]["holderIdentity"], "");
}

TEST(LeaseElection, AStolenLeaseEndsLeadershipAtTheNextRenewal) {
  Server server;
  Replica a("a");
  a.Run(server, 0);
  Json stolen = server.lease;
  stolen["spec"]["holderIdentity"] = "thief";
  server.Put(stolen);
  for (int64_t now = 0; now <= 3 * kSecond; now += kSecond / 10) a.Run(server, now);
  EXPECT_FALSE(a.election.leading(3 * kSecond));
  EXPECT_EQ(a.election.holder(), "thief");
}

TEST(LeaseElection, ALeaseThatSomebodyDeletedIsMadeAgain) {
  Server server;
  Replica a("a");
  a.Run(server, 0);
  server.lease = nullptr;
  for (int64_t now = 0; now <= 5 * kSecond; now += kSecond / 10) a.Run(server, now);
  EXPECT_TRUE(a.election.leading(5 * kSecond));
  EXPECT_FALSE(server.lease.is_null());
}

TEST(LeaseElection, ARenewalWhoseAnswerWasLostIsNoLossOfLeadership) {
  Server server;
  Replica a("a");
  a.Run(server, 0);
  bool lost_one = false;
  for (int64_t now = 0; now <= 30 * kSecond; now += kSecond / 10) {
    for (int i = 0; i < 5; ++i) {
      const auto action = a.election.Next(now, 0);
      if (action.kind == Kind::kWait) break;
      Answer answer = server.Serve(action);
      if (action.kind == Kind::kUpdate && !lost_one) {
        answer = Server::Fail(0, "reset after the commit");
        lost_one = true;
      }
      a.election.OnAnswer(now, answer);
    }
    ASSERT_TRUE(a.election.leading(now)) << now;
  }
  EXPECT_TRUE(lost_one);
}

// Random failures, three replicas whose clocks started at different times and run at different speeds (2 %).
TEST(LeaseElection, ThereAreNeverTwoLeadersAndSoonerOrLaterOne) {
  for (const uint64_t seed : {1, 2, 3, 4, 5}) {
    std::mt19937_64 random(seed);
    Server server;
    Replica replicas[3] = {Replica("a", seed), Replica("b", seed + 10), Replica("c", seed + 20)};
    const double speed[3] = {1.0, 1.02, 0.98};
    const int64_t start[3] = {0, 7'000 * kSecond, 123 * kSecond};
    bool cut[3] = {false, false, false};
    int64_t led = 0, steps = 0;
    for (int64_t now = 0; now < 1200 * kSecond; now += kSecond / 5, ++steps) {
      int leaders = 0;
      for (int i = 0; i < 3; ++i) {
        if (random() % 150 == 0) cut[i] = !cut[i];
        const int64_t local = start[i] + static_cast<int64_t>(static_cast<double>(now) * speed[i]);
        server.reachable = !cut[i] && random() % 20 != 0;
        replicas[i].Run(server, local);
        leaders += replicas[i].election.leading(local) ? 1 : 0;
      }
      ASSERT_LE(leaders, 1) << "seed " << seed << " at " << now;
      led += leaders;
    }
    EXPECT_GT(led, steps / 2) << "seed " << seed;
  }
}
}  // namespace
}  // namespace qwen::kube
