#include "controller/ctl/chat_client.h"

#include <boost/beast/core/detail/base64.hpp>
#include <fstream>
#include <nlohmann/json.hpp>

namespace qwen::ctl {
namespace {

using Json = nlohmann::json;
using SteadyTime = std::chrono::steady_clock;

constexpr size_t kImageBytesMax = 20 << 20;
constexpr size_t kAnswerBytesMax = 64 << 20;

double SecondsSince(SteadyTime::time_point start) { return std::chrono::duration<double>(SteadyTime::now() - start).count(); }

Json MessageJson(const ChatMessage& message) {
  if (message.image_urls.empty()) return {{"role", message.role}, {"content", message.text}};
  Json parts = Json::array();
  for (const std::string& url : message.image_urls) parts.push_back({{"type", "image_url"}, {"image_url", {{"url", url}}}});
  parts.push_back({{"type", "text"}, {"text", message.text}});
  return {{"role", message.role}, {"content", std::move(parts)}};
}

// {"error": {"message": ...}} as OpenAI has it; else the beginning of the body.
Status ServerError(const HttpResult& result) {
  std::string message = "the server answered " + std::to_string(result.status);
  const Json json = Json::parse(result.body, nullptr, false);
  if (json.is_object() && json.contains("error") && json["error"].is_object() && json["error"].contains("message") && json["error"]["message"].is_string()) {
    message += ": " + json["error"]["message"].get<std::string>();
  } else if (!result.body.empty()) {
    message += ": " + result.body.substr(0, 200);
  }
  if (result.status == 429) return ResourceExhaustedError(message);
  if (result.status == 401 || result.status == 403) return UnauthenticatedError(message);
  if (result.status == 503) return UnavailableError(message);
  return result.status >= 500 ? InternalError(message) : InvalidArgumentError(message);
}

std::string TextAt(const Json& object, const char* key) {
  return object.is_object() && object.contains(key) && object[key].is_string() ? object[key].get<std::string>() : "";
}
int64_t NumberAt(const Json& object, const char* key) {
  return object.is_object() && object.contains(key) && object[key].is_number_integer() ? object[key].get<int64_t>() : 0;
}

}  // namespace

Status SseParser::Feed(std::string_view bytes, const std::function<void(std::string_view)>& on_data) {
  for (const char c : bytes) {
    if (c != '\n') {
      line_.push_back(c);
      if (line_.size() + data_.size() > kEventBytesMax) return DataLossError("an event of the stream is larger than 4 MiB");
      continue;
    }
    if (line_.ends_with('\r')) line_.pop_back();
    if (line_.empty()) {  // the end of an event
      if (!data_.empty()) on_data(data_);
      data_.clear();
    } else if (line_.starts_with("data:")) {
      std::string_view value = std::string_view(line_).substr(5);
      if (value.starts_with(' ')) value.remove_prefix(1);
      if (!data_.empty()) data_ += '\n';
      data_ += value;
    }
    line_.clear();
  }
  return OkStatus();
}

double ChatResult::tokens_per_second() const {
  const double seconds = total_seconds - first_token_seconds;
  return completion_tokens > 1 && seconds > 0 ? static_cast<double>(completion_tokens - 1) / seconds : 0;
}

Result<ChatResult> StreamChat(const Url& url, const ChatRequest& request, const std::function<bool(std::string_view)>& on_text) {
  Json body = {{"stream", true}, {"stream_options", {{"include_usage", true}}}};
  body["model"] = request.model;
  for (const ChatMessage& message : request.messages) body["messages"].push_back(MessageJson(message));
  if (request.max_tokens > 0) body["max_tokens"] = request.max_tokens;
  if (request.temperature) body["temperature"] = *request.temperature;
  if (request.ignore_eos) body["ignore_eos"] = true;
  PostOptions options{.path = "/v1/chat/completions", .body = body.dump(-1, ' ', false, Json::error_handler_t::replace)};
  if (!request.api_key.empty()) options.headers["Authorization"] = "Bearer " + request.api_key;

  ChatResult result;
  SseParser parser;
  Status problem;
  bool done = false, stopped = false;
  const auto start = SteadyTime::now();
  auto last = start;
  const auto on_event = [&](std::string_view data) {
    if (data == "[DONE]") {
      done = true;
      return;
    }
    const Json event = Json::parse(data, nullptr, false);
    if (!event.is_object()) {
      if (problem.ok()) problem = DataLossError("an event of the stream is not JSON");
      return;
    }
    if (event.contains("error") && problem.ok()) problem = InternalError("the stream ended with an error: " + TextAt(event["error"], "message"));
    if (event.contains("usage") && event["usage"].is_object()) {
      result.prompt_tokens = NumberAt(event["usage"], "prompt_tokens");
      result.completion_tokens = NumberAt(event["usage"], "completion_tokens");
    }
    if (!event.contains("choices") || !event["choices"].is_array() || event["choices"].empty()) return;
    const Json& choice = event["choices"][0];
    if (const std::string reason = TextAt(choice, "finish_reason"); !reason.empty()) result.finish_reason = reason;
    if (!choice.is_object() || !choice.contains("delta")) return;
    const std::string text = TextAt(choice["delta"], "reasoning_content") + TextAt(choice["delta"], "content");
    if (text.empty()) return;
    const auto now = SteadyTime::now();
    if (result.text.empty()) {
      result.first_token_seconds = std::chrono::duration<double>(now - start).count();
    } else {
      result.gaps_seconds.push_back(std::chrono::duration<double>(now - last).count());
    }
    last = now;
    if (result.text.size() + text.size() > kAnswerBytesMax) {
      problem = DataLossError("the answer is larger than 64 MiB");
      return;
    }
    result.text += text;
    stopped = stopped || !on_text(text);
  };
  auto http = HttpPostStream(url, options, [&](std::string_view bytes) {
    if (Status status = parser.Feed(bytes, on_event); !status.ok() && problem.ok()) problem = status;
    return problem.ok() && !stopped;
  });
  if (!http.ok()) return http.status();
  if (http->status != 200) return ServerError(*http);
  if (!problem.ok()) return problem;
  if (!done && !stopped) return UnavailableError("the stream ended before [DONE]");
  result.total_seconds = SecondsSince(start);
  if (result.text.empty()) result.first_token_seconds = result.total_seconds;
  return result;
}

Result<std::string> FirstModel(const Url& url, const std::string& api_key) {
  std::map<std::string, std::string> headers;
  if (!api_key.empty()) headers["Authorization"] = "Bearer " + api_key;
  ASSIGN_OR_RETURN(const HttpResult result, HttpGet(url, "/v1/models", std::chrono::seconds(10), headers));
  if (result.status != 200) return ServerError(result);
  const Json json = Json::parse(result.body, nullptr, false);
  if (json.is_object() && json.contains("data") && json["data"].is_array() && !json["data"].empty())
    if (const std::string id = TextAt(json["data"][0], "id"); !id.empty()) return id;
  return DataLossError("GET /v1/models lists no model");
}

Result<std::string> ImageDataUrl(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return NotFoundError(path + ": cannot be opened");
  std::string bytes(kImageBytesMax + 1, '\0');
  file.read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  bytes.resize(static_cast<size_t>(file.gcount()));
  if (bytes.size() > kImageBytesMax) return InvalidArgumentError(path + ": larger than 20 MiB");
  std::string type;
  if (bytes.starts_with("\x89PNG")) type = "image/png";
  if (bytes.starts_with("\xff\xd8\xff")) type = "image/jpeg";
  if (bytes.starts_with("RIFF") && bytes.substr(8, 4) == "WEBP") type = "image/webp";
  if (type.empty()) return InvalidArgumentError(path + ": neither PNG, JPEG nor WebP");
  namespace base64 = boost::beast::detail::base64;
  std::string encoded(base64::encoded_size(bytes.size()), '\0');
  encoded.resize(base64::encode(encoded.data(), bytes.data(), bytes.size()));
  return "data:" + type + ";base64," + encoded;
}

}  // namespace qwen::ctl
