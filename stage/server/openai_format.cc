#include "stage/server/openai_format.h"

#include <utility>

namespace qwen::server {
namespace {

Json CallJson(const ToolCall& call) {
  return {{"id", call.id}, {"type", "function"}, {"function", {{"name", call.name}, {"arguments", call.arguments}}}};
}

Json CallDelta(const ToolCall& call, int32_t index) {
  if (call.id.empty()) return {{"index", index}, {"function", {{"arguments", call.arguments}}}};  // a later piece
  Json json{{"index", index}};
  json.update(CallJson(call));
  return json;
}

Json TokenIds(const std::vector<engine::TokenEvent>& tokens) {
  Json ids = Json::array();
  for (const auto& token : tokens) ids.push_back(token.token);
  return ids;
}

}  // namespace

std::string SseEvent(const Json& json) { return "data: " + DumpJson(json) + "\n\n"; }

Json UsageJson(const Usage& usage) {
  return {{"prompt_tokens", usage.prompt_tokens},
          {"completion_tokens", usage.completion_tokens},
          {"total_tokens", usage.prompt_tokens + usage.completion_tokens},
          {"prompt_tokens_details", {{"cached_tokens", usage.cached_tokens}}}};
}

void Collected::Add(ChoiceDelta delta, bool named_call) {
  content += delta.content;
  reasoning += delta.reasoning;
  for (auto& call : delta.calls) {
    if (named_call && !calls.empty()) {
      calls.back().arguments += call.arguments;
    } else {
      calls.push_back(std::move(call));
    }
  }
  tokens.insert(tokens.end(), std::make_move_iterator(delta.tokens.begin()), std::make_move_iterator(delta.tokens.end()));
  text_offsets.insert(text_offsets.end(), delta.text_offsets.begin(), delta.text_offsets.end());
}

Json OpenAiFormat::Envelope(bool chunk) const {
  const bool chat = header_.kind == AnswerHeader::Kind::kChat;
  return {{"id", header_.id},
          {"object", !chat ? "text_completion" : chunk ? "chat.completion.chunk" : "chat.completion"},
          {"created", header_.created},
          {"model", header_.model},
          {"choices", Json::array()}};
}

// A token's text by itself; bytes that are a part of a character show as U+FFFD, and `bytes` has them exactly.
std::string OpenAiFormat::TokenText(int32_t token) const { return std::string(tokenizer_.TokenBytes(token)); }

Json OpenAiFormat::ChatLogprobs(const std::vector<engine::TokenEvent>& tokens) const {
  const auto entry = [this](int32_t token, float logprob) {
    const std::string text = TokenText(token);
    Json bytes = Json::array();
    for (const char c : text) bytes.push_back(static_cast<unsigned char>(c));
    return Json{{"token", text}, {"logprob", logprob}, {"bytes", std::move(bytes)}};
  };
  Json content = Json::array();
  for (const auto& token : tokens) {
    Json item = entry(token.token, token.logprob);
    item["top_logprobs"] = Json::array();
    for (const auto& top : token.top) item["top_logprobs"].push_back(entry(top.token, top.logprob));
    content.push_back(std::move(item));
  }
  return {{"content", std::move(content)}, {"refusal", nullptr}};
}

Json OpenAiFormat::CompletionLogprobs(const std::vector<engine::TokenEvent>& tokens, const std::vector<size_t>& offsets) const {
  Json json{{"text_offset", Json::array()}, {"token_logprobs", Json::array()}, {"tokens", Json::array()}, {"top_logprobs", Json::array()}};
  for (size_t i = 0; i < tokens.size(); ++i) {
    const auto& token = tokens[i];
    json["text_offset"].push_back(offsets[i]);
    json["token_logprobs"].push_back(token.logprob);
    json["tokens"].push_back(TokenText(token.token));
    Json top = Json::object();
    for (const auto& candidate : token.top) top[TokenText(candidate.token)] = candidate.logprob;
    top[TokenText(token.token)] = token.logprob;  // the sampled one is always among them
    json["top_logprobs"].push_back(std::move(top));
  }
  return json;
}

void OpenAiFormat::AddTokens(Json& choice, const std::vector<engine::TokenEvent>& tokens, const std::vector<size_t>& offsets) const {
  choice["logprobs"] = nullptr;
  if (header_.logprobs && !tokens.empty()) {
    choice["logprobs"] = header_.kind == AnswerHeader::Kind::kChat ? ChatLogprobs(tokens) : CompletionLogprobs(tokens, offsets);
  }
  if (header_.token_ids) choice["token_ids"] = TokenIds(tokens);
}

Json OpenAiFormat::FirstChunk(int32_t index, const std::string& echo, const std::vector<int32_t>* prompt_token_ids) const {
  Json chunk = Envelope(true);
  Json choice{{"index", index}};
  if (header_.kind == AnswerHeader::Kind::kChat) {
    choice["delta"] = {{"role", "assistant"}, {"content", ""}};
    if (prompt_token_ids) chunk["prompt_token_ids"] = *prompt_token_ids;
  } else {
    choice["text"] = echo;
    if (prompt_token_ids) choice["prompt_token_ids"] = *prompt_token_ids;
  }
  choice["logprobs"] = nullptr;
  choice["finish_reason"] = nullptr;
  chunk["choices"].push_back(std::move(choice));
  return chunk;
}

Json OpenAiFormat::DeltaChunk(int32_t index, const ChoiceDelta& delta, int32_t calls_before) const {
  Json chunk = Envelope(true);
  Json choice{{"index", index}};
  if (header_.kind == AnswerHeader::Kind::kChat) {
    Json& fields = choice["delta"] = Json::object();
    if (!delta.reasoning.empty()) fields["reasoning_content"] = delta.reasoning;
    if (!delta.content.empty()) fields["content"] = delta.content;
    for (const auto& call : delta.calls) {
      const bool piece = call.id.empty();  // belongs to the call before it
      fields["tool_calls"].push_back(CallDelta(call, piece ? std::max(0, calls_before - 1) : calls_before));
      if (!piece) ++calls_before;
    }
  } else {
    choice["text"] = delta.content;
  }
  AddTokens(choice, delta.tokens, delta.text_offsets);
  choice["finish_reason"] = nullptr;
  chunk["choices"].push_back(std::move(choice));
  return chunk;
}

Json OpenAiFormat::FinishChunk(int32_t index, const ChoiceDelta& last, const std::string& finish_reason, const Json& stop_reason,
                               int32_t calls_before) const {
  Json chunk = DeltaChunk(index, last, calls_before);
  chunk["choices"][0]["finish_reason"] = finish_reason;
  chunk["choices"][0]["stop_reason"] = stop_reason;
  return chunk;
}

Json OpenAiFormat::UsageChunk(const Usage& usage) const {
  Json chunk = Envelope(true);
  chunk["usage"] = UsageJson(usage);
  return chunk;
}

Json OpenAiFormat::Whole(const std::vector<Collected>& choices, const Usage& usage,
                         const std::vector<const std::vector<int32_t>*>& prompts) const {
  const bool chat = header_.kind == AnswerHeader::Kind::kChat;
  Json body = Envelope(false);
  for (size_t i = 0; i < choices.size(); ++i) {
    const Collected& collected = choices[i];
    Json choice{{"index", i}};
    if (chat) {
      Json message{{"role", "assistant"}};
      // A message that is calls alone, or reasoning alone, has null content, as OpenAI's and vLLM's have.
      const bool no_content = collected.content.empty() && (!collected.calls.empty() || !collected.reasoning.empty());
      message["content"] = no_content ? Json() : Json(collected.content);
      if (!collected.reasoning.empty()) message["reasoning_content"] = collected.reasoning;
      for (const auto& call : collected.calls) message["tool_calls"].push_back(CallJson(call));
      choice["message"] = std::move(message);
    } else {
      choice["text"] = collected.content;
    }
    AddTokens(choice, collected.tokens, collected.text_offsets);
    choice["finish_reason"] = collected.finish_reason;
    choice["stop_reason"] = collected.stop_reason;
    if (!chat && prompts[i]) choice["prompt_token_ids"] = *prompts[i];
    body["choices"].push_back(std::move(choice));
  }
  if (chat && !prompts.empty() && prompts[0]) body["prompt_token_ids"] = *prompts[0];
  body["usage"] = UsageJson(usage);
  return body;
}

}  // namespace qwen::server
