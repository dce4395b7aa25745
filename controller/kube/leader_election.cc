#include "controller/kube/leader_election.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "controller/kube/time_text.h"
#include "stage/base/check.h"
#include "stage/base/log.h"

namespace qwen::kube {

LeaseElection::LeaseElection(ElectionOptions options) : options_(std::move(options)), random_(options_.seed) {
  QP_CHECK(!options_.identity.empty());
  QP_CHECK_GT(options_.lease_micros, options_.renew_deadline_micros);
  QP_CHECK_GT(options_.renew_deadline_micros, options_.retry_micros + options_.retry_micros / 5);
}

Json LeaseElection::Claim(int64_t unix_micros) const {
  Json lease = lease_;
  if (lease.is_null()) {
    lease = {{"apiVersion", resources::kLeases.api_version()},
             {"kind", resources::kLeases.kind},
             {"metadata", {{"namespace", options_.lease.namespace_name}, {"name", options_.lease.name}}}};
  }
  Json& spec = lease["spec"];
  const std::string now = MicroTimeText(unix_micros);
  if (holder_ != options_.identity) {
    spec["acquireTime"] = now;
    spec["leaseTransitions"] = missing_ ? 0 : IntAt(lease, "/spec/leaseTransitions") + 1;
  }
  spec["holderIdentity"] = options_.identity;
  spec["leaseDurationSeconds"] = options_.lease_micros / 1'000'000;
  spec["renewTime"] = now;
  return lease;
}

LeaseElection::Action LeaseElection::Next(int64_t now_micros, int64_t unix_micros) {
  if (now_micros < wait_until_micros_) return {Action::Kind::kWait, {}, wait_until_micros_};
  sent_micros_ = now_micros;
  if (missing_) {
    sent_ = Action::Kind::kCreate;
    return {sent_, Claim(unix_micros)};
  }
  const bool free = holder_.empty() || now_micros >= observed_micros_ + observed_lease_micros_;
  // Ours, or free: one PUT with the resourceVersion that was seen; whoever comes second gets a Conflict.
  if (!read_first_ && !lease_.is_null() && (holder_ == options_.identity || free)) {
    sent_ = Action::Kind::kUpdate;
    return {sent_, Claim(unix_micros)};
  }
  sent_ = Action::Kind::kGet;
  return {sent_, {}};
}

void LeaseElection::RetryLater(int64_t now_micros) {
  // Up to 20 % later, so that replicas that started together do not stay in step.
  const int64_t jitter = static_cast<int64_t>(random_() % static_cast<uint64_t>(options_.retry_micros / 5 + 1));
  wait_until_micros_ = now_micros + options_.retry_micros + jitter;
}

void LeaseElection::Observe(int64_t now_micros, Json lease) {
  missing_ = false;
  read_first_ = false;
  const bool changed = lease_.is_null() || StringAt(lease_, "/metadata/resourceVersion") != StringAt(lease, "/metadata/resourceVersion");
  lease_ = std::move(lease);
  holder_ = StringAt(lease_, "/spec/holderIdentity");
  observed_lease_micros_ = std::max<int64_t>(1, IntAt(lease_, "/spec/leaseDurationSeconds")) * 1'000'000;
  if (changed) observed_micros_ = now_micros;
}

void LeaseElection::OnAnswer(int64_t now_micros, const Answer& answer) {
  const Action::Kind sent = std::exchange(sent_, Action::Kind::kWait);
  if (answer.ok()) {
    Observe(now_micros, answer.body);
    if (holder_ == options_.identity) {
      if (sent == Action::Kind::kGet) return;  // ours by name: the next action renews it
      leader_until_micros_ = sent_micros_ + options_.renew_deadline_micros;
    } else {
      leader_until_micros_ = 0;  // somebody else's, whatever we thought
      if (holder_.empty()) return;  // given back: the next action takes it
    }
    return RetryLater(now_micros);
  }
  if (answer.NotFound()) {  // not there yet, or deleted under us
    missing_ = sent == Action::Kind::kGet;
    lease_ = nullptr;
    holder_.clear();
    return;
  }
  missing_ = false;
  if (answer.Conflict() || answer.AlreadyExists()) {  // another version is stored; the next GET tells whose it is
    read_first_ = true;
    return;
  }
  RetryLater(now_micros);  // unknown: what was observed stays, and so does the time it was observed at
}

void LeaseElection::Learn(int64_t now_micros, const Answer& answer) {
  if (answer.ok()) Observe(now_micros, answer.body);
}

Json LeaseElection::Release(int64_t unix_micros) {
  if (lease_.is_null() || holder_ != options_.identity) return nullptr;
  leader_until_micros_ = 0;
  holder_.clear();
  read_first_ = true;
  Json lease = lease_;
  lease["spec"]["holderIdentity"] = "";
  lease["spec"]["leaseDurationSeconds"] = 1;
  lease["spec"]["renewTime"] = MicroTimeText(unix_micros);
  return lease;
}

LeaderElector::LeaderElector(ElectionOptions options, Client& client, const Clock& clock, Metrics& metrics, Callbacks callbacks)
    : options_(options),
      client_(client),
      clock_(clock),
      metrics_(metrics),
      callbacks_(std::move(callbacks)),
      election_(std::move(options)),
      thread_([this](std::stop_token stop) { Run(stop); }) {}

LeaderElector::~LeaderElector() { Stop(); }

void LeaderElector::Run(std::stop_token stop) {
  bool led = false;
  metrics_.Leader(options_.lease.name, false);
  while (!stop.stop_requested()) {
    const int64_t now = clock_.NowMicros();
    if (led && !election_.leading(now)) {
      led = false;
      metrics_.Leader(options_.lease.name, false);
      log::Error("leadership lost", {{"lease", options_.lease.ToString()}, {"holder", election_.holder()}});
      if (callbacks_.on_lost) callbacks_.on_lost();
      continue;
    }
    LeaseElection::Action action = election_.Next(now, UnixMicros());
    if (action.kind == LeaseElection::Action::Kind::kWait) {
      int64_t until = action.wait_until_micros;
      if (led) until = std::min(until, election_.leader_until_micros());
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait_for(lock, stop, std::chrono::microseconds(std::max<int64_t>(until - now, 1)), [] { return false; });
      continue;
    }
    Answer answer;
    if (action.kind == LeaseElection::Action::Kind::kGet) {
      if (led) metrics_.LeaderSlowpath(options_.lease.name);
      answer = client_.Get(resources::kLeases, options_.lease);
    } else if (action.kind == LeaseElection::Action::Kind::kCreate) {
      answer = client_.Create(resources::kLeases, action.lease);
    } else {
      answer = client_.Update(resources::kLeases, action.lease);
    }
    election_.OnAnswer(clock_.NowMicros(), answer);
    if (!answer.ok() && !answer.NotFound() && !answer.Conflict()) {
      log::Warning("lease cannot be read or renewed", {{"lease", options_.lease.ToString()}, {"error", answer.status().ToString()}});
    }
    if (!led && election_.leading(clock_.NowMicros())) {
      led = true;
      metrics_.Leader(options_.lease.name, true);
      log::Info("leading", {{"lease", options_.lease.ToString()}, {"identity", options_.identity}});
      if (callbacks_.on_elected) callbacks_.on_elected();
    }
  }
}

void LeaderElector::Stop() {
  if (!thread_.joinable()) return;
  thread_.request_stop();
  thread_.join();
  // A second try when the stored version is another than ours: the answer to the last renewal may have been lost.
  for (int attempt = 0; attempt < 2; ++attempt) {
    const Json lease = election_.Release(UnixMicros());
    if (lease.is_null()) break;
    const Answer answer = client_.Update(resources::kLeases, lease);
    if (answer.ok()) break;
    log::Warning("lease was not given back", {{"lease", options_.lease.ToString()}, {"error", answer.status().ToString()}});
    if (!answer.Conflict()) break;
    election_.Learn(clock_.NowMicros(), client_.Get(resources::kLeases, options_.lease));
  }
  metrics_.Leader(options_.lease.name, false);
}

}  // namespace qwen::kube
