#include "stage/server/generation.h"

#include <algorithm>
#include <utility>

#include "stage/base/log.h"
#include "stage/server/guided_constraint.h"

namespace qwen::server {

void LiveGenerations::Add(const std::shared_ptr<Generation>& generation) {
  std::lock_guard<std::mutex> lock(mutex_);
  live_[generation.get()] = generation;
}
void LiveGenerations::Remove(Generation* generation) {
  std::lock_guard<std::mutex> lock(mutex_);
  live_.erase(generation);
}
size_t LiveGenerations::size() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return live_.size();
}
void LiveGenerations::CutAll() {
  std::vector<std::shared_ptr<Generation>> cut;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [key, weak] : live_) {
      if (auto generation = weak.lock()) cut.push_back(std::move(generation));
    }
  }
  for (auto& generation : cut) generation->Cut();
}

Generation::Generation(const GenerationContext& context, GenerationPlan plan, std::shared_ptr<ResponseWriter> writer)
    : context_(context), plan_(std::move(plan)), writer_(std::move(writer)), format_(plan_.header, *context_.assets.tokenizer) {
  const GenerationOptions& options = plan_.options;
  ChoiceStream::Options stream{.stops = options.stops,
                               .include_stop = options.include_stop,
                               .skip_special_tokens = options.skip_special_tokens,
                               .stop_tokens = options.params.stop_tokens,
                               .eos_tokens = context_.assets.defaults.eos_tokens,
                               .keep_tokens = options.params.logprobs >= 0 || options.return_token_ids,
                               .form = plan_.form};
  for (size_t prompt = 0; prompt < plan_.prompts.size(); ++prompt) {
    const BuiltPrompt& built = plan_.prompts[prompt];
    prompt_tokens_ += static_cast<int64_t>(built.tokens.size());
    if (options.return_token_ids) prompt_token_ids_.push_back(built.tokens);
    for (int32_t i = 0; i < options.n; ++i) {
      choices_.push_back({.id = context_.shared->next_id++, .prompt = static_cast<int32_t>(prompt), .stream = ChoiceStream(*context_.assets.tokenizer, stream)});
    }
  }
  remaining_ = choices_.size();
}

Generation::~Generation() { context_.shared->live.Remove(this); }

OrError<engine::Request> Generation::MakeRequest(int32_t index, std::vector<BuiltPrompt>& prompts) {
  const GenerationOptions& options = plan_.options;
  const int32_t of_prompt = index % options.n;
  BuiltPrompt& prompt = prompts[index / options.n];
  const bool last = of_prompt == options.n - 1;  // takes the prompt itself instead of a copy
  const int32_t prompt_tokens = static_cast<int32_t>(prompt.tokens.size());
  // Of model and group the smaller: stages may hold fewer tokens than the model could.
  const int32_t fits = context_.engine.stats().max_request_tokens;
  const int32_t limit = fits > 0 ? std::min(fits, context_.assets.max_model_len) : context_.assets.max_model_len;
  const int32_t room = limit - prompt_tokens;
  if (options.max_tokens.value_or(1) > room) {
    return BadRequest("this model's maximum context length is " + std::to_string(limit) + " tokens, but " +
                          std::to_string(prompt_tokens) + " prompt tokens and " + std::to_string(options.max_tokens.value_or(1)) +
                          " output tokens were asked for: " + std::to_string(prompt_tokens + int64_t{options.max_tokens.value_or(1)}),
                      options.max_tokens ? "max_tokens" : plan_.header.kind == AnswerHeader::Kind::kChat ? "messages" : "prompt",
                      "context_length_exceeded");
  }
  engine::Request request;
  request.id = choices_[index].id;
  request.log_id = plan_.request_id;
  request.position_delta = prompt.position_delta;
  for (const auto& span : prompt.vision) {
    // The stages key pixels by id and drop them with their sequence, so every choice has an id, and a copy, of its own.
    auto input = last ? std::const_pointer_cast<step::VisionInput>(span.input) : std::make_shared<step::VisionInput>(*span.input);
    input->id = context_.shared->next_id++;
    request.vision.push_back({.input = std::move(input), .runs = span.runs, .content_hash = span.content_hash});
  }
  request.tokens = last ? std::move(prompt.tokens) : prompt.tokens;
  request.positions = last ? std::move(prompt.positions) : prompt.positions;
  request.params = options.params;
  request.params.seed = ChoiceSeed(options.params.seed, index);
  request.max_tokens = options.max_tokens.value_or(room);
  if (options.guided.kind != GuidedDecoding::Kind::kNone) {
    auto constraint = MakeConstraint(context_.assets, options.guided, plan_.form.reasoning == ReasoningParser::Start::kInside);
    if (!constraint.ok()) return FromStatus(constraint.status(), options.guided.param);
    request.constraint = std::move(*constraint);
  }
  request.on_event = [self = shared_from_this(), index](engine::RequestEvent event) { self->OnEvent(index, std::move(event)); };
  return request;
}

void Generation::Start() {
  context_.shared->live.Add(shared_from_this());
  int64_t vision_bytes = 0;
  for (const auto& prompt : plan_.prompts) vision_bytes += prompt.vision_bytes * plan_.options.n;
  if (vision_bytes > 0 && !context_.shared->admission.Reserve(vision_bytes, vision_bytes_)) {
    return Fail(Overloaded("too many images and videos are being served: try again later"));
  }
  std::vector<engine::Request> requests;
  for (int32_t i = 0; i < static_cast<int32_t>(choices_.size()); ++i) {
    auto request = MakeRequest(i, plan_.prompts);
    if (!request.ok()) return Fail(request.error());
    requests.push_back(std::move(request.value()));
  }
  for (size_t i = 0; i < requests.size(); ++i) {
    const Status status = context_.engine.Submit(std::move(requests[i]));
    if (status.ok()) continue;
    for (size_t k = 0; k < i; ++k) context_.engine.Cancel(choices_[k].id);  // all or none
    requests.clear();  // callbacks that will never come hold this object
    if (status.code() == StatusCode::kFailedPrecondition) return Fail(Unavailable("the server is shutting down", 5));
    return Fail(FromStatus(status, status.message().starts_with("max_tokens") ? "max_tokens" : ""));
  }
  context_.metrics.CountPrompt(prompt_tokens_);
  context_.metrics.ObservePreprocess(static_cast<double>(context_.clock.NowMicros() - plan_.arrival_micros) * 1e-6);
  log::Debug("request admitted", {{"request_id", plan_.request_id},
                                  {"path", plan_.path},
                                  {"prompt_tokens", prompt_tokens_},
                                  {"choices", choices_.size()},
                                  {"stream", plan_.options.stream}});
  writer_->Post([self = shared_from_this()] { self->Begin(); });
}

// Before Begin only: nothing was sent, so the error is an HTTP answer.
void Generation::Fail(ApiError error) {
  Log(error.status, "rejected");
  writer_->Reply(ErrorResponse(error));
}

void Generation::Cut() { CancelAll(); }  // the sequences end as cancelled although the client is there: Complete sees that

void Generation::CancelAll() {
  for (const auto& choice : choices_) context_.engine.Cancel(choice.id);  // ids never change: safe from any thread
}

void Generation::OnEvent(int32_t choice, engine::RequestEvent event) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    events_.push_back({choice, std::move(event), context_.clock.NowMicros()});
    if (std::exchange(posted_, true)) return;
  }
  writer_->Post([self = shared_from_this()] { self->DrainEvents(); });
}

void Generation::Begin() {
  begun_ = true;
  writer_->OnClosed([self = shared_from_this()] { self->Abandon(); });
  if (plan_.options.stream && !abandoned_) writer_->StartStream("text/event-stream; charset=utf-8");
  DrainEvents();
}

void Generation::DrainEvents() {
  if (!begun_) return;  // Begin looks again
  std::vector<Event> events;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    events.swap(events_);
    posted_ = false;
  }
  int64_t tokens = 0;
  for (Event& event : events) {
    Choice& choice = choices_[event.choice];
    if (auto* token = std::get_if<engine::TokenEvent>(&event.event)) {
      ++tokens;
      OnToken(choice, event.choice, std::move(*token), event.at_micros);
    } else {
      OnFinish(choice, event.choice, std::get<engine::FinishEvent>(event.event));
    }
  }
  if (tokens > 0) context_.metrics.CountGenerated(tokens);
  if (remaining_ == 0 && !std::exchange(ended_, true)) Complete();
}

void Generation::BeginChoice(Choice& choice, int32_t index) {
  if (std::exchange(choice.begun, true)) return;
  const bool chat = plan_.header.kind == AnswerHeader::Kind::kChat;
  const std::string echo = plan_.echoes.empty() ? "" : plan_.echoes[choice.prompt];
  const auto* ids = prompt_token_ids_.empty() ? nullptr : &prompt_token_ids_[choice.prompt];
  if (chat || !echo.empty() || ids) SendChunk(format_.FirstChunk(index, echo, ids));
}

void Generation::OnToken(Choice& choice, int32_t index, engine::TokenEvent event, int64_t at_micros) {
  if (choice.last_token_micros == 0) {
    context_.metrics.ObserveFirstToken(static_cast<double>(at_micros - plan_.arrival_micros) * 1e-6);
    if (first_token_micros_ == 0) first_token_micros_ = at_micros;
  } else {
    context_.metrics.ObserveInterToken(static_cast<double>(at_micros - choice.last_token_micros) * 1e-6);
  }
  choice.last_token_micros = at_micros;
  if (abandoned_ || choice.stream.stopped()) return;
  ChoiceDelta delta = choice.stream.Push(std::move(event));
  if (choice.stream.stopped()) context_.engine.Cancel(choice.id);
  if (!plan_.options.stream) return choice.collected.Add(std::move(delta), plan_.header.named_call);
  BeginChoice(choice, index);
  if (delta.empty()) return;
  SendChunk(format_.DeltaChunk(index, delta, choice.calls_sent));
  for (const auto& call : delta.calls) choice.calls_sent += call.id.empty() ? 0 : 1;
}

void Generation::OnFinish(Choice& choice, int32_t index, const engine::FinishEvent& event) {
  choice.done = true;
  --remaining_;
  cached_tokens_ += index % plan_.options.n == 0 ? event.cached_prompt_tokens : 0;  // as prompt tokens: once per prompt
  if (event.queued_micros >= 0) context_.metrics.ObserveQueue(static_cast<double>(event.queued_micros) * 1e-6);
  if (event.reason == engine::FinishReason::kError) error_ = event.error.empty() ? "the engine failed" : event.error;
  ChoiceDelta delta = choice.stream.Finish(event);
  const std::string& reason = choice.stream.finish_reason();
  context_.metrics.CountFinished(reason);
  if (abandoned_) return;
  if (reason == "abort" || reason == "error") return;  // Complete tells
  if (!plan_.options.stream) {
    choice.collected.Add(std::move(delta), plan_.header.named_call);
    choice.collected.finish_reason = reason;
    choice.collected.stop_reason = choice.stream.stop_reason();
    return;
  }
  BeginChoice(choice, index);
  SendChunk(format_.FinishChunk(index, delta, reason, choice.stream.stop_reason(), choice.calls_sent));
}

void Generation::SendChunk(Json chunk) {
  if (plan_.options.continuous_usage) {
    chunk["usage"] = UsageJson(CurrentUsage());
  } else if (plan_.options.include_usage) {
    chunk["usage"] = nullptr;  // OpenAI: null on every chunk but the last
  }
  writer_->Send(SseEvent(chunk));
}

Usage Generation::CurrentUsage() const {
  Usage usage{.prompt_tokens = prompt_tokens_, .cached_tokens = cached_tokens_};
  for (const auto& choice : choices_) usage.completion_tokens += choice.stream.completion_tokens();
  return usage;
}

void Generation::Abandon() {
  if (ended_ || std::exchange(abandoned_, true)) return;
  CancelAll();
}

void Generation::Complete() {
  context_.shared->live.Remove(this);
  vision_bytes_ = ByteReservation();
  context_.metrics.ObserveRequest(static_cast<double>(context_.clock.NowMicros() - plan_.arrival_micros) * 1e-6);
  if (abandoned_) return Log(499, "abort");  // nginx's number for a client that closed the request
  const bool aborted = std::ranges::any_of(choices_, [](const Choice& c) { return c.stream.finish_reason() == "abort"; });
  if (!error_.empty() || aborted) {
    const ApiError error = !error_.empty()
                               ? ApiError{.status = 500, .message = error_ + " (request " + plan_.request_id + ")", .code = "internal_error"}
                               : Unavailable("the server is shutting down", 5);
    Log(error.status, error_.empty() ? "abort" : "error");
    if (!plan_.options.stream) return writer_->Reply(ErrorResponse(error));
    writer_->Send("data: " + ErrorJson(error) + "\n\n");
    writer_->Send(kSseDone);
    return writer_->Finish();
  }
  Log(200, choices_[0].stream.finish_reason());
  if (plan_.options.stream) {
    if (plan_.options.include_usage) writer_->Send(SseEvent(format_.UsageChunk(CurrentUsage())));
    writer_->Send(kSseDone);
    return writer_->Finish();
  }
  std::vector<Collected> collected;
  std::vector<const std::vector<int32_t>*> prompts;
  for (auto& choice : choices_) {
    if (!plan_.echoes.empty()) choice.collected.content.insert(0, plan_.echoes[choice.prompt]);
    prompts.push_back(prompt_token_ids_.empty() ? nullptr : &prompt_token_ids_[choice.prompt]);
    collected.push_back(std::move(choice.collected));
  }
  writer_->Reply({.body = DumpJson(format_.Whole(collected, CurrentUsage(), prompts))});
}

void Generation::Log(int status, const std::string& reason) const {
  const int64_t now = context_.clock.NowMicros();
  const Usage usage = CurrentUsage();
  log::Info("request", {{"request_id", plan_.request_id},
                        {"method", plan_.method},
                        {"path", plan_.path},
                        {"status", status},
                        {"prompt_tokens", usage.prompt_tokens},
                        {"completion_tokens", usage.completion_tokens},
                        {"ttft_ms", first_token_micros_ ? (first_token_micros_ - plan_.arrival_micros) / 1000 : int64_t{-1}},
                        {"duration_ms", (now - plan_.arrival_micros) / 1000},
                        {"finish_reason", reason}});
}

}  // namespace qwen::server
