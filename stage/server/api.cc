#include "stage/server/api.h"

#include <algorithm>
#include <array>

#include "stage/base/log.h"
#include "stage/server/chat_request.h"
#include "stage/server/request_id.h"

namespace qwen::server {
namespace {

HttpResponse JsonResponse(const Json& json) { return {.body = DumpJson(json)}; }

enum class Endpoint { kChat, kCompletion, kTokenize, kDetokenize, kModels, kHealth, kReady, kMetrics, kVersion, kLoad };

}  // namespace

struct Api::Route {
  const char* path;
  Endpoint endpoint;
  bool post = false;       // POST, with a JSON body, on a worker; else GET or HEAD
  bool needs_key = false;
  bool generates = false;  // refused while loading and draining
  bool prefix = false;     // `path` + "/" + anything as well
};

const Api::Route* Api::FindRoute(const std::string& path) {
  static constexpr std::array<Route, 14> kRoutes = {{
      {"/v1/chat/completions", Endpoint::kChat, true, true, true},
      {"/v1/completions", Endpoint::kCompletion, true, true, true},
      {"/tokenize", Endpoint::kTokenize, true, true},
      {"/detokenize", Endpoint::kDetokenize, true, true},
      {"/v1/models", Endpoint::kModels, false, true, false, true},
      {"/health", Endpoint::kHealth},
      {"/healthz", Endpoint::kHealth},
      {"/ping", Endpoint::kHealth},
      {"/ready", Endpoint::kReady},
      {"/readyz", Endpoint::kReady},
      {"/metrics", Endpoint::kMetrics},
      {"/version", Endpoint::kVersion},
      {"/load", Endpoint::kLoad},
      {"/v1/load", Endpoint::kLoad, false, true},
  }};
  for (const Route& route : kRoutes) {
    if (path == route.path) return &route;
    if (route.prefix && path.starts_with(std::string(route.path) + "/")) return &route;
  }
  return nullptr;
}

Api::Api(const Options& options, const Dependencies& dependencies)
    : options_(options),
      deps_(dependencies),
      builder_(dependencies.assets, dependencies.fetcher),
      shared_(std::make_shared<GenerationShared>(options.vision_bytes_max)),
      workers_(options.workers, options.worker_queue) {}

Api::~Api() { workers_.Stop(); }

GenerationContext Api::Context() {
  return {.assets = deps_.assets,
          .engine = deps_.engine,
          .metrics = deps_.metrics,
          .clock = deps_.clock,
          .shared = shared_};
}

std::string Api::NotReadyReason() const {
  if (shared_->admission.draining()) return "draining";
  const engine::EngineStats stats = deps_.engine.stats();
  if (stats.group_ready) return "";
  const std::string detail = probes_.waiting_for ? probes_.waiting_for() : "";
  if (!detail.empty()) return "waiting for " + detail;
  return stats.group_lost_reason.empty() ? "waiting for the stages" : stats.group_lost_reason;
}

void Api::StartDraining() { shared_->admission.StartDraining(); }

std::optional<HttpResponse> Api::Precheck(const HttpRequest& request) const {
  const Route* route = FindRoute(request.path);
  if (!route) return ErrorResponse({.status = 404, .message = "no such path: " + request.path.substr(0, 200), .code = "not_found"});
  const bool method_ok = route->post ? request.method == "POST" : request.method == "GET" || request.method == "HEAD";
  if (!method_ok) {
    HttpResponse response = ErrorResponse({.status = 405, .message = "use " + std::string(route->post ? "POST" : "GET"), .code = "method_not_allowed"});
    response.headers.emplace_back("Allow", route->post ? "POST" : "GET, HEAD");
    return response;
  }
  if (route->needs_key && !deps_.keys.Allows(request.authorization)) {
    return ErrorResponse({.status = 401, .message = "missing or wrong API key: send Authorization: Bearer <key>", .code = "invalid_api_key"});
  }
  if (route->post && !request.content_type.empty()) {
    std::string type = request.content_type.substr(0, request.content_type.find(';'));
    std::ranges::transform(type, type.begin(), [](unsigned char c) { return std::tolower(c); });
    while (type.ends_with(' ')) type.pop_back();
    if (type != "application/json") {
      return ErrorResponse({.status = 415, .message = "the body must be application/json", .code = "unsupported_media_type"});
    }
  }
  if (route->generates) {
    if (shared_->admission.draining()) return ErrorResponse(Unavailable("the server is shutting down", 5));
    // A group that is lost after it once served comes back within seconds: requests wait for it in the queue. Before the
    // first group, stages are loading, which can take minutes.
    if (deps_.engine.stats().epoch == 0) return ErrorResponse(Unavailable("the model is loading: " + NotReadyReason(), 10));
  }
  return std::nullopt;
}

void Api::Handle(HttpRequest request, std::shared_ptr<ResponseWriter> writer) {
  const Route* route = FindRoute(request.path);
  QP_CHECK(route != nullptr) << request.path;  // Precheck let it through
  if (route->post) {
    ++queued_;
    // std::function wants copies, so the request travels in a shared_ptr.
    auto shared = std::make_shared<HttpRequest>(std::move(request));
    const bool taken = workers_.TryRun([this, shared, writer, route] {
      Work(std::move(*shared), writer, *route);
      --queued_;
    });
    if (!taken) {
      --queued_;
      writer->Reply(ErrorResponse(Overloaded("too many requests are waiting: try again later")));
    }
    return;
  }
  switch (route->endpoint) {
    case Endpoint::kModels:
      return writer->Reply(Models(request.path));
    case Endpoint::kReady:
      return writer->Reply(Ready());
    case Endpoint::kMetrics:
      return writer->Reply(MetricsText());
    case Endpoint::kVersion:
      return writer->Reply(JsonResponse({{"version", options_.version}}));
    case Endpoint::kLoad:
      return writer->Reply(Load());
    default:
      return writer->Reply(Health());
  }
}

void Api::Refuse(const HttpRequest& request, ResponseWriter& writer, const ApiError& error) const {
  log::Info("request", {{"request_id", request.request_id},
                        {"method", request.method},
                        {"path", request.path},
                        {"status", error.status},
                        {"param", error.param},
                        {"code", error.code}});
  writer.Reply(ErrorResponse(error));
}

void Api::Work(HttpRequest request, std::shared_ptr<ResponseWriter> writer, const Route& route) try {
  const int64_t arrival = deps_.clock.NowMicros();
  auto body = ParseJson(request.body, {});
  request.body = std::string();  // 64 MiB of base64 need not live as long as the request
  if (!body.ok()) return Refuse(request, *writer, BadRequest(body.status().message()));
  if (!body->is_object()) return Refuse(request, *writer, BadRequest("the body must be a JSON object"));
  switch (route.endpoint) {
    case Endpoint::kChat:
      return Chat(request, *body, writer, arrival);
    case Endpoint::kCompletion:
      return Completion(request, *body, writer, arrival);
    case Endpoint::kTokenize:
      return writer->Reply(Tokenize(*body));
    default:
      return writer->Reply(Detokenize(*body));
  }
} catch (const std::exception& e) {  // of a library, or no memory for one request: the others go on
  log::Error("request failed", {{"request_id", request.request_id}, {"path", request.path}, {"error", e.what()}});
  Refuse(request, *writer, {.status = 500, .message = "internal error (request " + request.request_id + ")", .code = "internal_error"});
}

std::optional<ApiError> Api::CheckModel(const std::string& model) const {
  if (model.empty() || model == deps_.assets.model_id) return std::nullopt;
  return ApiError{.status = 404,
                  .message = "the model " + model.substr(0, 200) + " does not exist; this server has " + deps_.assets.model_id,
                  .param = "model",
                  .code = "model_not_found"};
}

GenerationPlan Api::MakePlan(const HttpRequest& request, int64_t arrival, AnswerHeader::Kind kind, GenerationOptions options) const {
  const bool chat = kind == AnswerHeader::Kind::kChat;
  GenerationPlan plan{.method = request.method, .path = request.path, .request_id = request.request_id, .arrival_micros = arrival};
  plan.header = {.kind = kind,
                 .id = (chat ? "chatcmpl-" : "cmpl-") + request.request_id,
                 .created = std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count(),
                 .model = deps_.assets.model_id,
                 .logprobs = options.params.logprobs >= 0,
                 .token_ids = options.return_token_ids};
  plan.options = std::move(options);
  return plan;
}

void Api::Chat(const HttpRequest& request, const Json& body, std::shared_ptr<ResponseWriter> writer, int64_t arrival) {
  auto parsed = ParseChatRequest(body, deps_.assets.defaults, deps_.assets.option_limits());
  if (!parsed.ok()) return Refuse(request, *writer, parsed.error());
  ChatRequest& chat = parsed.value();
  if (auto error = CheckModel(chat.model)) return Refuse(request, *writer, *error);
  auto prompt = builder_.BuildChat(chat.prompt);
  if (!prompt.ok()) return Refuse(request, *writer, prompt.error());

  GenerationPlan plan = MakePlan(request, arrival, AnswerHeader::Kind::kChat, std::move(chat.options));
  using Choice = ToolChoice::Kind;
  using Calls = OutputForm::Calls;
  plan.form.calls = chat.tool_choice.kind == Choice::kAuto       ? Calls::kHermes
                    : chat.tool_choice.kind == Choice::kRequired ? Calls::kRequiredList
                    : chat.tool_choice.kind == Choice::kNamed    ? Calls::kNamed
                                                                 : Calls::kPlain;
  plan.form.function = chat.tool_choice.name;
  plan.form.reasoning = prompt.value().ends_in_think ? ReasoningParser::Start::kInside : ReasoningParser::Start::kIfTagged;
  plan.header.named_call = plan.form.calls == Calls::kNamed;
  plan.prompts.push_back(std::move(prompt.value()));
  std::make_shared<Generation>(Context(), std::move(plan), std::move(writer))->Start();
}

void Api::Completion(const HttpRequest& request, const Json& body, std::shared_ptr<ResponseWriter> writer, int64_t arrival) {
  auto parsed = ParseCompletionRequest(body, deps_.assets.defaults, deps_.assets.option_limits());
  if (!parsed.ok()) return Refuse(request, *writer, parsed.error());
  CompletionRequest& completion = parsed.value();
  if (auto error = CheckModel(completion.model)) return Refuse(request, *writer, *error);
  GenerationPlan plan = MakePlan(request, arrival, AnswerHeader::Kind::kCompletion, std::move(completion.options));
  for (auto& prompt : completion.prompts) {
    const auto* text = std::get_if<std::string>(&prompt);
    auto built = text ? builder_.BuildText(*text, /*add_special_tokens=*/true, "prompt")
                      : builder_.BuildTokens(std::move(std::get<std::vector<int32_t>>(prompt)), "prompt");
    if (!built.ok()) return Refuse(request, *writer, built.error());
    if (completion.echo) {
      auto echo = text ? Result<std::string>(*text) : deps_.assets.tokenizer->Decode(built.value().tokens, plan.options.skip_special_tokens);
      if (!echo.ok()) return Refuse(request, *writer, FromStatus(echo.status(), "prompt"));
      plan.echoes.push_back(std::move(*echo));
    }
    plan.prompts.push_back(std::move(built.value()));
  }
  std::make_shared<Generation>(Context(), std::move(plan), std::move(writer))->Start();
}

HttpResponse Api::Tokenize(const Json& body) const {
  FieldReader fields(body, "");
  if (auto error = CheckModel(fields.String("model").value_or(""))) return ErrorResponse(*error);
  const auto prompt = fields.String("prompt");
  const bool strings = fields.Boolean("return_token_strs").value_or(false);
  const bool special = fields.Boolean("add_special_tokens").value_or(true);
  if (fields.error()) return ErrorResponse(*fields.error());
  std::vector<int32_t> tokens;
  if (prompt) {
    if (prompt->size() > size_t{8} << 20) return ErrorResponse(BadRequest("prompt is longer than 8 MiB", "prompt"));
    auto encoded = deps_.assets.tokenizer->Encode(*prompt, special);
    if (!encoded.ok()) return ErrorResponse(FromStatus(encoded.status(), "prompt"));
    tokens = std::move(*encoded);
  } else {
    auto chat = ParseChatPrompt(body);
    if (!chat.ok()) return ErrorResponse(chat.error());
    auto built = builder_.BuildChat(chat.value());
    if (!built.ok()) return ErrorResponse(built.error());
    tokens = std::move(built.value().tokens);
  }
  Json reply{{"count", tokens.size()}, {"max_model_len", deps_.assets.max_model_len}, {"tokens", tokens}, {"token_strs", nullptr}};
  if (strings) {
    reply["token_strs"] = Json::array();
    for (const int32_t token : tokens) reply["token_strs"].push_back(deps_.assets.tokenizer->IdToToken(token));
  }
  return JsonResponse(reply);
}

HttpResponse Api::Detokenize(const Json& body) const {
  FieldReader fields(body, "");
  if (auto error = CheckModel(fields.String("model").value_or(""))) return ErrorResponse(*error);
  const Json* list = fields.Find("tokens");
  if (!list) return ErrorResponse(BadRequest("tokens is required", "tokens"));
  auto ids = ParseTokenIds(*list, "tokens", deps_.assets.shape.vocab);
  if (!ids.ok()) return ErrorResponse(ids.error());
  auto text = deps_.assets.tokenizer->Decode(ids.value(), /*skip_special_tokens=*/false);
  if (!text.ok()) return ErrorResponse(FromStatus(text.status(), "tokens"));
  return JsonResponse({{"prompt", *text}});
}

HttpResponse Api::Models(const std::string& path) const {
  const ModelAssets& assets = deps_.assets;
  const int32_t fits = deps_.engine.stats().max_request_tokens;  // 0 before the first group
  const int32_t limit = fits > 0 ? std::min(fits, assets.max_model_len) : assets.max_model_len;
  const Json model{{"id", assets.model_id},           {"object", "model"}, {"created", assets.created_unix},
                   {"owned_by", "qwen-pipeline"},     {"root", assets.model_id}, {"parent", nullptr},
                   {"max_model_len", limit}};
  constexpr std::string_view kList = "/v1/models";
  if (path.size() <= kList.size() + 1) return JsonResponse({{"object", "list"}, {"data", Json::array({model})}});
  // A model id may hold slashes ("Qwen/Qwen3-VL"); clients send them raw or as %2F.
  std::string id = path.substr(kList.size() + 1);
  for (size_t at = 0; (at = id.find('%', at)) != std::string::npos; ++at) {
    if (id.compare(at, 3, "%2F") == 0 || id.compare(at, 3, "%2f") == 0) id.replace(at, 3, "/");
  }
  if (auto error = CheckModel(id)) return ErrorResponse(*error);
  return JsonResponse(model);
}

HttpResponse Api::Health() const {
  if (!probes_.alive || probes_.alive()) return JsonResponse({{"status", "ok"}});
  HttpResponse response = JsonResponse({{"status", "stuck"}});
  response.status = 500;
  return response;
}

HttpResponse Api::Ready() const {
  const std::string reason = NotReadyReason();
  if (reason.empty()) return JsonResponse({{"status", "ready"}});
  const engine::EngineStats stats = deps_.engine.stats();
  const bool recovers = !stats.group_ready && stats.epoch > 0;
  const bool held = !shared_->admission.draining() && recovers && deps_.clock.NowMicros() - stats.not_ready_since_micros < options_.recovery_hold.count();
  Json body = {{"status", held ? "recovering" : "not ready"}, {"reason", reason}};
  for (const StageProgress& stage : probes_.stages ? probes_.stages() : std::vector<StageProgress>())
    body["stages"].push_back({{"stage", stage.stage}, {"connected", stage.connected}, {"loaded", stage.loaded}, {"load_percent", stage.load_percent}});
  HttpResponse response = JsonResponse(body);
  if (held) return response;
  response.status = 503;
  response.headers.emplace_back("Retry-After", "5");
  return response;
}

HttpResponse Api::MetricsText() {
  return {.body = deps_.metrics.Scrape(deps_.engine.stats(), probes_.connections ? probes_.connections() : 0), .content_type = "text/plain; version=0.0.4; charset=utf-8"};
}

HttpResponse Api::Load() const {
  const engine::EngineStats stats = deps_.engine.stats();
  return JsonResponse({{"server_load", stats.running + stats.waiting}});
}

}  // namespace qwen::server
