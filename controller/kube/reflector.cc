#include "controller/kube/reflector.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "controller/kube/client.h"

namespace qwen::kube {
namespace {
// client-go's numbers: a whole fleet of watchers must not come back at once, and a dead server is asked twice a minute.
constexpr int64_t kBackoffMinMicros = 800'000;
constexpr int64_t kBackoffMaxMicros = 30'000'000;
constexpr int64_t kHealthyWatchMicros = 120'000'000;
// The server ends a watch after 5 to 10 minutes, spread so that the reconnections are.
constexpr int32_t kWatchMinSeconds = 300;
// A clean end so soon and without an event is a broken server or proxy, not a timeout.
constexpr int64_t kSuspiciousWatchMicros = 1'000'000;
constexpr char kInitialEventsEnd[] = "/metadata/annotations/k8s.io~1initial-events-end";
}  // namespace

Reflector::Reflector(Options options, Sink& sink)
    : options_(std::move(options)),
      sink_(sink),
      random_(options_.seed),
      watch_list_works_(options_.watch_list),
      backoff_micros_(kBackoffMinMicros) {
  QP_CHECK_GT(options_.page_items, 0);
}

Reflector::Action Reflector::Next(int64_t now_micros) {
  if (now_micros < wait_until_micros_) return {Action::Kind::kWait, {}, wait_until_micros_};
  if (version_.empty() && !watch_list_works_) {
    if (!listing_) {
      listing_ = true;
      continue_token_.clear();
      sink_.BeginReplace();
    }
    return {Action::Kind::kList, ListRequest(options_.resource, options_.selection, options_.page_items, continue_token_)};
  }
  streaming_list_ = version_.empty();
  if (streaming_list_) {
    listing_ = true;
    sink_.BeginReplace();
  }
  watch_started_micros_ = now_micros;
  events_in_watch_ = 0;
  failed_in_stream_ = false;
  const int32_t seconds = kWatchMinSeconds + static_cast<int32_t>(random_() % kWatchMinSeconds);
  return {Action::Kind::kWatch,
          WatchRequest(options_.resource, options_.selection,
                       {.resource_version = version_, .initial_events = streaming_list_, .timeout_seconds = seconds})};
}

void Reflector::Fail(int64_t now_micros, Status why) {
  last_error_ = std::move(why);
  // Full jitter: anything between a tenth of the step and all of it.
  const double share = 0.1 + 0.9 * static_cast<double>(random_() - random_.min()) / static_cast<double>(random_.max() - random_.min());
  wait_until_micros_ = now_micros + static_cast<int64_t>(share * static_cast<double>(backoff_micros_));
  backoff_micros_ = std::min(backoff_micros_ * 2, kBackoffMaxMicros);
}

void Reflector::StartOver(int64_t now_micros) {
  version_.clear();
  listing_ = false;
  continue_token_.clear();
  Fail(now_micros, FailedPreconditionError("the resource version is too old; listing anew"));
}

void Reflector::FinishList(std::string version) {
  version_ = std::move(version);
  listing_ = false;
  continue_token_.clear();
  sink_.EndReplace();
  sink_.SeenVersion(version_);
  synced_ = true;
  last_error_ = OkStatus();
}

void Reflector::OnList(int64_t now_micros, const Result<HttpResponse>& response) {
  if (!response.ok()) {
    listing_ = false;  // a page that is asked again after a while has expired anyway: from the start
    return Fail(now_micros, response.status());
  }
  if (response->status == 410) return StartOver(now_micros);  // the continue token expired
  if (response->status != 200) {
    listing_ = false;
    Fail(now_micros, ParseAnswer(*response).status().WithContext("list " + name()));
    if (response->retry_after_seconds > 0) {
      wait_until_micros_ = std::max(wait_until_micros_, now_micros + response->retry_after_seconds * int64_t{1'000'000});
    }
    return;
  }
  const Result<ListMeta> meta = ForEachItem(response->body, [this](Json item) { sink_.ReplaceItem(std::move(item)); });
  if (!meta.ok()) {
    listing_ = false;
    return Fail(now_micros, meta.status());
  }
  continue_token_ = meta->continue_token;
  if (continue_token_.empty()) FinishList(meta->resource_version);
}

bool Reflector::OnErrorEvent(int64_t now_micros, const Json& status) {
  failed_in_stream_ = true;
  const int64_t code = IntAt(status, "/code");
  const std::string reason = StringAt(status, "/reason");
  if (code == 410 || reason == "Expired" || reason == "Gone") {
    StartOver(now_micros);
    // The first relist after a 410 is no fault of anybody's: at once.
    if (backoff_micros_ == kBackoffMinMicros * 2) wait_until_micros_ = now_micros;
    return false;
  }
  if (streaming_list_ && listing_ && reason != "Timeout" && code != 504 && code != 429) {
    watch_list_works_ = false;  // an old server, or one whose etcd cannot report progress
    listing_ = false;
    return false;
  }
  listing_ = false;
  Fail(now_micros, UnavailableError("watch " + name() + ": " + StringAt(status, "/message")));
  return false;
}

bool Reflector::OnWatchLine(int64_t now_micros, std::string_view line) {
  if (line.empty()) return true;
  Json event = Json::parse(line, nullptr, false);
  const std::string type = event.is_discarded() ? "" : StringAt(event, "/type");
  if (type.empty() || !event.contains("object")) {
    failed_in_stream_ = true;
    listing_ = false;
    Fail(now_micros, DataLossError("watch " + name() + ": a line is not an event"));
    return false;
  }
  Json& object = event["object"];
  if (type == "ERROR") return OnErrorEvent(now_micros, object);
  const std::string version = StringAt(object, "/metadata/resourceVersion");
  ++events_in_watch_;
  if (streaming_list_ && listing_) {
    if (type == "BOOKMARK") {
      if (StringAt(object, kInitialEventsEnd) == "true") FinishList(version);
    } else if (type != "DELETED") {  // none before the end of the initial events
      sink_.ReplaceItem(std::move(object));
    }
    return true;
  }
  if (type == "ADDED" || type == "MODIFIED") {
    sink_.Upsert(std::move(object));
  } else if (type == "DELETED") {
    sink_.Erase(std::move(object));
  } else if (type != "BOOKMARK") {
    return true;  // of a newer server; its version is not ours to take
  }
  if (!version.empty()) {
    version_ = version;
    sink_.SeenVersion(version_);
  }
  return true;
}

void Reflector::OnWatchEnd(int64_t now_micros, const Result<HttpResponse>& end) {
  if (failed_in_stream_) return;  // an ERROR event came first and has been dealt with
  const bool unfinished_list = streaming_list_ && listing_;
  listing_ = false;
  if (now_micros - watch_started_micros_ >= kHealthyWatchMicros) backoff_micros_ = kBackoffMinMicros;
  if (end.ok() && end->status == 410) return StartOver(now_micros);
  if (end.ok() && end->status != 200) {
    // 400 and 422: sendInitialEvents is not known or not allowed here.
    if (unfinished_list && (end->status == 400 || end->status == 422)) {
      watch_list_works_ = false;
      return;
    }
    Fail(now_micros, ParseAnswer(*end).status().WithContext("watch " + name()));
    if (end->retry_after_seconds > 0) {
      wait_until_micros_ = std::max(wait_until_micros_, now_micros + end->retry_after_seconds * int64_t{1'000'000});
    }
    return;
  }
  if (!end.ok()) return Fail(now_micros, end.status().WithContext("watch " + name()));
  if (unfinished_list || (events_in_watch_ == 0 && now_micros - watch_started_micros_ < kSuspiciousWatchMicros)) {
    return Fail(now_micros, UnavailableError("watch " + name() + " ended before it said anything"));
  }
  wait_until_micros_ = now_micros;  // the server's own timeout: go on where it ended
  last_error_ = OkStatus();
}

}  // namespace qwen::kube
