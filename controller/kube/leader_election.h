// controller/kube/leader_election.h — one writer among several replicas, by a coordination.k8s.io/v1 Lease (client-go's protocol:
// 15 s lease, 10 s to renew it, tried every 2 s), so that kubectl and other tools read it as usual.
//
// LeaseElection is the pure part: Next(now) says what to send, OnAnswer takes what came. It counts only its own monotonic clock:
// another holder's lease has expired when we have *observed* it unchanged for its duration, whatever its timestamps say.
// Fencing: MayWrite() is true for renew_deadline after the start of the last successful renewal, which ends 5 s before anybody
// else may take over; the Client asks it before each write. What it does not promise: a request that is already on its way when
// the deadline passes may still be carried out; deterministic names and server-side apply make that harmless.
// LeaderElector is the thread around it. A process that lost the lease should exit: its caches and workers are of another time.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>

#include "controller/kube/client.h"
#include "controller/kube/object.h"
#include "stage/base/clock.h"

namespace qwen::kube {

struct ElectionOptions {
  ObjectKey lease;
  std::string identity;  // unique in the cluster: pod name and a random part
  int64_t lease_micros = 15'000'000;
  int64_t renew_deadline_micros = 10'000'000;  // REQUIRES: lease > renew deadline > 1.2 * retry
  int64_t retry_micros = 2'000'000;
  uint64_t seed = 1;  // of the jitter between retries
};

// Thread safety: none but leader_until_micros(), which any thread may read.
class LeaseElection {
 public:
  explicit LeaseElection(ElectionOptions options);

  struct Action {
    enum class Kind { kGet, kCreate, kUpdate, kWait } kind;
    Json lease;                     // kCreate, kUpdate
    int64_t wait_until_micros = 0;  // kWait
  };
  // `unix_micros` is only written into the lease.
  Action Next(int64_t now_micros, int64_t unix_micros);
  void OnAnswer(int64_t now_micros, const Answer& answer);  // to the last action that was no wait

  // Gives the lease up, so that another takes it at once: the update to send, or null when it is not ours.
  Json Release(int64_t unix_micros);
  void Learn(int64_t now_micros, const Answer& answer);  // the answer to a GET that Next did not ask for

  bool leading(int64_t now_micros) const { return now_micros < leader_until_micros_.load(); }
  int64_t leader_until_micros() const { return leader_until_micros_.load(); }  // 0: never led, or lost
  const std::string& holder() const { return holder_; }  // as last observed; empty: nobody

 private:
  Json Claim(int64_t unix_micros) const;
  void Observe(int64_t now_micros, Json lease);
  void RetryLater(int64_t now_micros);

  const ElectionOptions options_;
  std::minstd_rand random_;
  Json lease_;                  // as last observed; null: unknown or not there
  bool missing_ = false;        // the server said that there is none
  bool read_first_ = false;     // an update met another version than ours
  std::string holder_;
  int64_t observed_micros_ = 0;  // when the lease was last seen to change, on our clock
  int64_t observed_lease_micros_ = 0;
  int64_t sent_micros_ = 0;      // when the request in progress was made: what it wins counts from then
  Action::Kind sent_ = Action::Kind::kWait;
  int64_t wait_until_micros_ = 0;
  std::atomic<int64_t> leader_until_micros_{0};
};

class LeaderElector final : public WriteFence {
 public:
  // `client` has no fence of its own, and a transport whose timeout is well below the renew deadline (5 s). Callbacks run on the elector's thread: on_lost when leadership was held and is no more
  // (not after Stop). Everything borrowed outlives the elector.
  struct Callbacks {
    std::function<void()> on_elected;
    std::function<void()> on_lost;
  };
  LeaderElector(ElectionOptions options, Client& client, const Clock& clock, Metrics& metrics, Callbacks callbacks);
  ~LeaderElector() override;  // Stop()

  bool MayWrite() const override { return election_.leading(clock_.NowMicros()); }
  // Ends the thread and gives the lease back if it is ours: the next replica leads within a retry instead of 15 s. Call it
  // after the last write. Idempotent.
  void Stop();

 private:
  void Run(std::stop_token stop);

  const ElectionOptions options_;
  Client& client_;
  const Clock& clock_;
  Metrics& metrics_;
  const Callbacks callbacks_;
  LeaseElection election_;  // owned by the thread; leading() is read by all
  std::mutex mutex_;
  std::condition_variable_any wake_;
  std::jthread thread_;
};

}  // namespace qwen::kube
