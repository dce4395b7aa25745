#include "controller/kube/client.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

namespace qwen::kube {
namespace {
constexpr int32_t kThrottledAttemptsMax = 10;  // client-go's
constexpr int32_t kReadAttemptsMax = 3;
constexpr int64_t kRetryAfterMaxSeconds = 30;
constexpr int32_t kPageItems = 500;

StatusCode CodeOf(const Answer& answer) {
  switch (answer.code) {
    case 400: case 422: return StatusCode::kInvalidArgument;
    case 401: case 403: return StatusCode::kUnauthenticated;
    case 404: return StatusCode::kNotFound;
    case 409: case 410: case 412: return StatusCode::kFailedPrecondition;
    case 429: return StatusCode::kResourceExhausted;
    case 504: return StatusCode::kDeadlineExceeded;
    default: return answer.code >= 500 ? StatusCode::kUnavailable : StatusCode::kInternal;
  }
}
}  // namespace

Status Answer::status() const {
  if (ok()) return OkStatus();
  if (code == 0) return transport_status;
  return Status(CodeOf(*this), reason + " (" + std::to_string(code) + "): " + message);
}

Answer ParseAnswer(Result<HttpResponse> response) {
  Answer answer;
  if (!response.ok()) {
    answer.transport_status = response.status();
    answer.reason = StatusCodeName(response.status().code());
    answer.message = response.status().message();
    return answer;
  }
  answer.code = response->status;
  Json body = Json::parse(response->body, nullptr, false);
  if (answer.ok()) {
    if (!body.is_discarded()) {
      answer.body = std::move(body);
      return answer;
    }
    answer.code = 0;  // a proxy's page, or half an answer
    answer.reason = "BadAnswer";
    answer.transport_status = DataLossError("the API server's answer is not JSON");
    answer.message = answer.transport_status.message();
    return answer;
  }
  if (!body.is_discarded()) {
    answer.reason = StringAt(body, "/reason");
    answer.message = StringAt(body, "/message");
  }
  if (answer.reason.empty()) answer.reason = "Http" + std::to_string(answer.code);
  if (answer.message.empty()) answer.message = response->body.substr(0, 256);
  return answer;
}

std::optional<int64_t> RetryDelayMicros(Method method, const Result<HttpResponse>& response, int32_t attempt) {
  if (!response.ok()) {
    const StatusCode code = response.status().code();
    const bool lost = code == StatusCode::kUnavailable || code == StatusCode::kDeadlineExceeded;
    if (method != Method::kGet || !lost || attempt >= kReadAttemptsMax) return std::nullopt;
    return 100'000 << attempt;
  }
  const int32_t status = response->status;
  if (status == 401) return attempt == 1 ? std::optional<int64_t>(0) : std::nullopt;
  const bool throttled = status == 429 || (status >= 500 && response->retry_after_seconds >= 0);
  if (!throttled || attempt >= kThrottledAttemptsMax) return std::nullopt;
  return std::clamp<int64_t>(response->retry_after_seconds, 1, kRetryAfterMaxSeconds) * 1'000'000;
}

Result<ListMeta> ForEachItem(const std::string& list, const std::function<void(Json)>& each) {
  std::string section;  // the top-level key that is being read
  std::string api_version, kind;
  bool items = false;
  const Json rest = Json::parse(
      list,
      [&](int depth, Json::parse_event_t event, Json& parsed) {
        if (depth == 1 && event == Json::parse_event_t::key) {
          section = parsed.get_ref<const std::string&>();
          items = items || section == "items";
        }
        if (depth == 2 && event == Json::parse_event_t::object_end && section == "items") {
          each(std::move(parsed));
          return false;  // dropped from the tree, which so never holds more than one item
        }
        return true;
      },
      false);
  if (rest.is_discarded() || !rest.is_object() || !items) return DataLossError("the API server's answer is not a list");
  return ListMeta{StringAt(rest, "/metadata/resourceVersion"), StringAt(rest, "/metadata/continue")};
}

Client::Client(Transport& transport, const Clock& clock, Metrics& metrics, Options options)
    : transport_(transport), clock_(clock), metrics_(metrics), options_(std::move(options)) {
  QP_CHECK_GT(options_.in_flight_max, 0);
}

HttpRequest Client::MakeApply(const Resource& resource, const Json& object) const {
  return ApplyRequest(resource, object, {.field_manager = options_.field_manager, .force = true, .subresource = {}});
}

Answer Client::PatchStatus(const Resource& resource, const ObjectKey& key, const std::string& resource_version, const Json& status) {
  return Do(MergePatchRequest(resource, key, {{"metadata", {{"resourceVersion", resource_version}}}, {"status", status}}, "status", options_.field_manager));
}

Answer Client::Do(HttpRequest request) {
  Answer answer;
  std::vector<HttpRequest> requests;
  requests.push_back(std::move(request));
  DoAll(std::move(requests), [&](size_t, Answer got) { answer = std::move(got); });
  return answer;
}

size_t Client::DoAll(std::vector<HttpRequest> requests, const std::function<void(size_t, Answer)>& on_answer) {
  struct Arrival {
    size_t index;
    Result<HttpResponse> response;
  };
  struct Inbox {  // shared: a completion may still be leaving its lock when the last answer has been taken
    std::mutex mutex;
    std::condition_variable arrived;
    std::deque<Arrival> arrivals;
  };
  auto inbox = std::make_shared<Inbox>();
  std::vector<int32_t> attempts(requests.size(), 0);
  std::multimap<int64_t, size_t> waiting;  // due time -> index: throttled requests
  size_t next = 0, in_flight = 0, finished = 0, failed = 0;

  auto finish = [&](size_t index, Answer answer) {
    requests[index] = HttpRequest();  // its body is not needed any more
    ++finished;
    if (!answer.ok()) ++failed;
    on_answer(index, std::move(answer));
  };
  auto send = [&](size_t index) {
    if (requests[index].method != Method::kGet && options_.fence != nullptr && !options_.fence->MayWrite()) {
      return finish(index, ParseAnswer(FailedPreconditionError("not the leader: nothing is written")));
    }
    ++attempts[index];
    ++in_flight;
    const int64_t sent_micros = clock_.NowMicros();
    const Method method = requests[index].method;
    transport_.Send(requests[index], [inbox, index, method, sent_micros, this](Result<HttpResponse> response) {
      metrics_.RestRequest(MethodName(method), response.ok() ? response->status : 0, clock_.NowMicros() - sent_micros);
      std::lock_guard<std::mutex> lock(inbox->mutex);
      inbox->arrivals.push_back({index, std::move(response)});
      inbox->arrived.notify_one();
    });
  };

  while (finished < requests.size()) {
    while (in_flight < static_cast<size_t>(options_.in_flight_max)) {
      if (!waiting.empty() && waiting.begin()->first <= clock_.NowMicros()) {
        const size_t index = waiting.begin()->second;
        waiting.erase(waiting.begin());
        send(index);
      } else if (next < requests.size()) {
        send(next++);
      } else {
        break;
      }
    }
    if (finished == requests.size()) break;
    std::unique_lock<std::mutex> lock(inbox->mutex);
    if (inbox->arrivals.empty()) {
      if (waiting.empty()) {
        inbox->arrived.wait(lock);
      } else {
        const int64_t micros = std::max<int64_t>(0, waiting.begin()->first - clock_.NowMicros());
        // At most 10 ms at a time, because a test's clock does not wake anybody.
        inbox->arrived.wait_for(lock, std::chrono::microseconds(std::min<int64_t>(micros, 10'000)));
      }
    }
    if (inbox->arrivals.empty()) continue;
    Arrival arrival = std::move(inbox->arrivals.front());
    inbox->arrivals.pop_front();
    lock.unlock();
    --in_flight;
    if (const auto delay = RetryDelayMicros(requests[arrival.index].method, arrival.response, attempts[arrival.index])) {
      waiting.emplace(clock_.NowMicros() + *delay, arrival.index);
    } else {
      finish(arrival.index, ParseAnswer(std::move(arrival.response)));
    }
  }
  return failed;
}

Answer Client::List(const Resource& resource, const Selection& selection, const std::function<void(Json)>& each,
                    std::string* resource_version) {
  std::string token;
  for (;;) {
    HttpRequest request = ListRequest(resource, selection, kPageItems, token);
    Result<HttpResponse> response = InternalError("not sent");
    for (int32_t attempt = 1;; ++attempt) {
      const int64_t sent_micros = clock_.NowMicros();
      response = SendAndWait(transport_, request);
      metrics_.RestRequest("GET", response.ok() ? response->status : 0, clock_.NowMicros() - sent_micros);
      const auto delay = RetryDelayMicros(Method::kGet, response, attempt);
      if (!delay) break;
      for (const int64_t due = clock_.NowMicros() + *delay; clock_.NowMicros() < due;) {
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
      }
    }
    if (!response.ok() || response->status != 200) return ParseAnswer(std::move(response));
    const Result<ListMeta> meta = ForEachItem(response->body, each);
    if (!meta.ok()) return ParseAnswer(meta.status());
    if (resource_version != nullptr) *resource_version = meta->resource_version;
    token = meta->continue_token;
    if (token.empty()) {
      Answer answer;
      answer.code = 200;
      return answer;
    }
  }
}

}  // namespace qwen::kube
