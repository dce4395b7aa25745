#include "stage/server/chat_request.h"

#include <algorithm>

namespace qwen::server {
namespace {

constexpr int kMessagesMax = 4096;
constexpr int kToolsMax = 256;

std::string At(const std::string& base, size_t index) { return base + "[" + std::to_string(index) + "]"; }

// {"url": "…"} or "…".
OrError<std::string> ParseUrl(const Json& value, const std::string& param) {
  const Json* url = &value;
  if (value.is_object()) {
    const auto it = value.find("url");
    if (it == value.end()) return BadRequest(param + ".url is required", param + ".url");
    url = &*it;
  }
  if (!url->is_string() || url->get_ref<const std::string&>().empty()) return BadRequest(param + " must be a URL", param);
  return url->get<std::string>();
}

// Fills `media` and returns the part that the template sees.
OrError<Json> ParseMediaPart(const Json& part, const std::string& type, const std::string& where, std::vector<MediaPart>& media) {
  const bool video = type == "video" || type == "video_url";
  const auto it = part.find(type);
  if (it == part.end()) return BadRequest(where + "." + type + " is required", where + "." + type);
  MediaPart item{.param = where + "." + type};
  if (type == "video" && it->is_array()) {
    item.kind = MediaPart::Kind::kFrames;
    if (it->empty() || it->size() > kVideoFramesMax) {
      return BadRequest(item.param + " must hold 1 to " + std::to_string(kVideoFramesMax) + " frames", item.param);
    }
    for (size_t i = 0; i < it->size(); ++i) {
      auto url = ParseUrl((*it)[i], At(item.param, i));
      if (!url.ok()) return url.error();
      item.urls.push_back(std::move(url.value()));
    }
    FieldReader fields(part, where + ".");
    item.fps = fields.Number("fps", 0.01, 1000);
    if (fields.error()) return *fields.error();
  } else {
    item.kind = video ? MediaPart::Kind::kVideo : MediaPart::Kind::kImage;
    auto url = ParseUrl(*it, item.param);
    if (!url.ok()) return url.error();
    item.urls.push_back(std::move(url.value()));
  }
  if (media.size() >= kMediaPartsMax) {
    return BadRequest("a request may hold at most " + std::to_string(kMediaPartsMax) + " images and videos", where);
  }
  media.push_back(std::move(item));
  return Json{{"type", video ? "video" : "image"}};
}

OrError<Json> ParseContent(const Json& content, const std::string& where, std::vector<MediaPart>& media) {
  if (content.is_string()) return content;
  if (!content.is_array()) return BadRequest(where + " must be a string or a list of parts", where);
  Json parts = Json::array();
  for (size_t i = 0; i < content.size(); ++i) {
    const Json& part = content[i];
    const std::string here = At(where, i);
    if (!part.is_object()) return BadRequest(here + " must be an object", here);
    FieldReader fields(part, here + ".");
    const std::string type = fields.String("type").value_or("");
    if (fields.error()) return *fields.error();
    if (type == "text") {
      auto text = fields.String("text");
      if (fields.error()) return *fields.error();
      if (!text) return BadRequest(here + ".text is required", here + ".text");
      parts.push_back({{"type", "text"}, {"text", std::move(*text)}});
    } else if (type == "image_url" || type == "image" || type == "video_url" || type == "video") {
      auto parsed = ParseMediaPart(part, type, here, media);
      if (!parsed.ok()) return parsed.error();
      parts.push_back(std::move(parsed.value()));
    } else {
      return BadRequest(here + ".type must be text, image_url, image, video_url or video", here + ".type");
    }
  }
  return parts;
}

// An assistant's earlier calls. Their arguments are JSON text on the wire and an object for the template, which prints
// them with tojson; text that is no JSON stays text.
OrError<Json> ParseToolCalls(const Json& calls, const std::string& where) {
  if (!calls.is_array()) return BadRequest(where + " must be a list", where);
  Json out = Json::array();
  for (size_t i = 0; i < calls.size(); ++i) {
    const std::string here = At(where, i) + ".function";
    const auto function = calls[i].is_object() ? calls[i].find("function") : calls[i].end();
    if (!calls[i].is_object() || function == calls[i].end() || !function->is_object()) {
      return BadRequest(here + " must be an object", here);
    }
    FieldReader fields(*function, here + ".");
    const auto name = fields.String("name");
    if (fields.error()) return *fields.error();
    if (!name) return BadRequest(here + ".name is required", here + ".name");
    Json arguments = Json::object();
    if (const Json* value = fields.Find("arguments")) {
      arguments = *value;
      if (value->is_string()) {
        auto parsed = ParseJson(value->get_ref<const std::string&>(), {});
        if (parsed.ok() && parsed->is_object()) arguments = std::move(*parsed);
      }
    }
    Json call{{"type", "function"}, {"function", {{"name", *name}, {"arguments", std::move(arguments)}}}};
    if (const auto id = calls[i].find("id"); id != calls[i].end() && id->is_string()) call["id"] = *id;
    out.push_back(std::move(call));
  }
  return out;
}

OrError<Json> ParseMessage(const Json& message, const std::string& where, std::vector<MediaPart>& media) {
  if (!message.is_object()) return BadRequest(where + " must be an object", where);
  FieldReader fields(message, where + ".");
  std::string role = fields.String("role").value_or("");
  if (fields.error()) return *fields.error();
  if (role == "developer") role = "system";  // OpenAI's newer name of the same thing
  if (role != "system" && role != "user" && role != "assistant" && role != "tool") {
    return BadRequest(where + ".role must be system, developer, user, assistant or tool", where + ".role");
  }
  Json out{{"role", role}};
  const Json* calls = role == "assistant" ? fields.Find("tool_calls") : nullptr;
  if (const Json* content = fields.Find("content")) {
    auto parsed = ParseContent(*content, where + ".content", media);
    if (!parsed.ok()) return parsed.error();
    out["content"] = std::move(parsed.value());
  } else if (role == "assistant") {
    out["content"] = "";  // null beside tool_calls
  } else {
    return BadRequest(where + ".content is required", where + ".content");
  }
  if (calls) {
    auto parsed = ParseToolCalls(*calls, where + ".tool_calls");
    if (!parsed.ok()) return parsed.error();
    if (!parsed.value().empty()) out["tool_calls"] = std::move(parsed.value());
  }
  for (const char* name : {"name", "tool_call_id", "reasoning_content"}) {
    if (auto text = fields.String(name)) out[name] = std::move(*text);
  }
  if (fields.error()) return *fields.error();
  return out;
}

std::optional<ApiError> ParseTools(const Json& body, Json& tools) {
  FieldReader fields(body, "");
  const Json* list = fields.Find("tools");
  if (!list) return std::nullopt;
  if (!list->is_array() || list->size() > kToolsMax) {
    return BadRequest("tools must be a list of at most " + std::to_string(kToolsMax) + " tools", "tools");
  }
  for (size_t i = 0; i < list->size(); ++i) {
    const std::string here = At("tools", i);
    const Json& tool = (*list)[i];
    const auto function = tool.is_object() ? tool.find("function") : tool.end();
    if (!tool.is_object() || tool.value("type", Json("function")) != "function" || function == tool.end() || !function->is_object()) {
      return BadRequest(here + " must be {\"type\":\"function\",\"function\":{…}}", here);
    }
    const auto name = function->find("name");
    if (name == function->end() || !name->is_string()) return BadRequest(here + ".function.name is required", here + ".function.name");
    const auto parameters = function->find("parameters");
    if (parameters != function->end() && !parameters->is_object() && !parameters->is_null()) {
      return BadRequest(here + ".function.parameters must be a JSON schema", here + ".function.parameters");
    }
  }
  if (!list->empty()) tools = *list;
  return std::nullopt;
}

OrError<ToolChoice> ParseToolChoice(const Json& body, const Json& tools) {
  using Kind = ToolChoice::Kind;
  FieldReader fields(body, "");
  const Json* choice = fields.Find("tool_choice");
  if (!choice) return ToolChoice{.kind = tools.is_array() ? Kind::kAuto : Kind::kNone};
  ToolChoice result;
  if (*choice == "none") return result;
  if (*choice == "auto") return ToolChoice{.kind = tools.is_array() ? Kind::kAuto : Kind::kNone};
  if (*choice == "required") {
    result.kind = Kind::kRequired;
  } else if (choice->is_object() && choice->contains("function") && (*choice)["function"].is_object() &&
             (*choice)["function"].contains("name") && (*choice)["function"]["name"].is_string()) {
    result = {.kind = Kind::kNamed, .name = (*choice)["function"]["name"].get<std::string>()};
  } else {
    return BadRequest("tool_choice must be none, auto, required or {\"type\":\"function\",\"function\":{\"name\":…}}", "tool_choice");
  }
  if (!tools.is_array()) return BadRequest("tool_choice needs tools", "tool_choice");
  if (result.kind == Kind::kNamed &&
      std::ranges::none_of(tools, [&](const Json& tool) { return tool["function"]["name"] == result.name; })) {
    return BadRequest("tool_choice names a function that is not in tools", "tool_choice.function.name");
  }
  return result;
}

// A forced call is a JSON schema for the whole output, as vLLM does it: the arguments of the named function, or a list of
// {"name", "parameters"} of any of them.
std::optional<ApiError> GuideToolChoice(const ToolChoice& choice, const Json& tools, GenerationOptions& options) {
  using Kind = ToolChoice::Kind;
  if (choice.kind != Kind::kRequired && choice.kind != Kind::kNamed) return std::nullopt;
  if (options.guided.kind != GuidedDecoding::Kind::kNone) {
    return BadRequest("tool_choice cannot be combined with " + options.guided.param, "tool_choice");
  }
  const auto parameters = [](const Json& tool) {
    const auto it = tool["function"].find("parameters");
    return it == tool["function"].end() || it->is_null() ? Json{{"type", "object"}} : *it;
  };
  Json schema;
  if (choice.kind == Kind::kNamed) {
    for (const auto& tool : tools) {
      if (tool["function"]["name"] == choice.name) schema = parameters(tool);
    }
  } else {
    Json any = Json::array();
    for (const auto& tool : tools) {
      any.push_back({{"type", "object"},
                     {"properties", {{"name", {{"const", tool["function"]["name"]}}}, {"parameters", parameters(tool)}}},
                     {"required", {"name", "parameters"}},
                     {"additionalProperties", false}});
    }
    schema = {{"type", "array"}, {"minItems", 1}, {"items", {{"anyOf", any}}}};
  }
  options.guided = {.kind = GuidedDecoding::Kind::kJsonSchema, .text = DumpJson(schema), .param = "tools"};
  return std::nullopt;
}

}  // namespace

OrError<ChatPrompt> ParseChatPrompt(const Json& body) {
  ChatPrompt prompt;
  FieldReader fields(body, "");
  const Json* messages = fields.Find("messages");
  if (!messages) return BadRequest("messages is required", "messages");
  if (!messages->is_array() || messages->empty() || messages->size() > kMessagesMax) {
    return BadRequest("messages must be a list of 1 to " + std::to_string(kMessagesMax) + " messages", "messages");
  }
  prompt.messages = Json::array();
  for (size_t i = 0; i < messages->size(); ++i) {
    auto message = ParseMessage((*messages)[i], At("messages", i), prompt.media);
    if (!message.ok()) return message.error();
    prompt.messages.push_back(std::move(message.value()));
  }
  if (auto error = ParseTools(body, prompt.tools)) return *error;
  if (const Json* kwargs = fields.Find("chat_template_kwargs")) {
    if (!kwargs->is_object()) return BadRequest("chat_template_kwargs must be an object", "chat_template_kwargs");
    prompt.template_kwargs = *kwargs;
  }
  prompt.continue_final_message = fields.Boolean("continue_final_message").value_or(false);
  prompt.add_generation_prompt = fields.Boolean("add_generation_prompt").value_or(!prompt.continue_final_message);
  if (prompt.continue_final_message && prompt.add_generation_prompt) {
    fields.Fail("continue_final_message", "cannot be combined with add_generation_prompt");
  }
  if (fields.error()) return *fields.error();
  return prompt;
}

OrError<ChatRequest> ParseChatRequest(const Json& body, const GenerationDefaults& defaults, const OptionLimits& limits) {
  if (!body.is_object()) return BadRequest("the body must be a JSON object");
  ChatRequest request;
  FieldReader fields(body, "");
  request.model = fields.String("model").value_or("");
  if (fields.error()) return *fields.error();
  auto prompt = ParseChatPrompt(body);
  if (!prompt.ok()) return prompt.error();
  request.prompt = std::move(prompt.value());
  auto options = ParseGenerationOptions(body, defaults, limits);
  if (!options.ok()) return options.error();
  request.options = std::move(options.value());
  request.logprobs = fields.Boolean("logprobs").value_or(false);
  if (auto top = fields.Integer("top_logprobs", 0, kLogprobsMax)) {
    if (!request.logprobs && *top > 0) fields.Fail("top_logprobs", "needs logprobs: true");
    request.top_logprobs = static_cast<int32_t>(*top);
  }
  if (fields.error()) return *fields.error();
  if (request.logprobs) request.options.params.logprobs = request.top_logprobs;
  auto choice = ParseToolChoice(body, request.prompt.tools);
  if (!choice.ok()) return choice.error();
  request.tool_choice = std::move(choice.value());
  if (auto error = GuideToolChoice(request.tool_choice, request.prompt.tools, request.options)) return *error;
  if (body.value("tool_choice", Json()) == "none") request.prompt.tools = nullptr;  // the model need not hear of them
  return request;
}

OrError<std::vector<int32_t>> ParseTokenIds(const Json& list, const std::string& param, int32_t vocab_size) {
  if (!list.is_array()) return BadRequest(param + " must be a list of token ids", param);
  std::vector<int32_t> ids;
  ids.reserve(list.size());
  for (const auto& id : list) {
    if (!id.is_number_integer() || id.get<int64_t>() < 0 || id.get<int64_t>() >= vocab_size) {
      return BadRequest(param + " has an entry that is no token id below " + std::to_string(vocab_size) + ": " + id.dump().substr(0, 40), param);
    }
    ids.push_back(id.get<int32_t>());
  }
  return ids;
}

OrError<CompletionRequest> ParseCompletionRequest(const Json& body, const GenerationDefaults& defaults,
                                                  const OptionLimits& limits) {
  if (!body.is_object()) return BadRequest("the body must be a JSON object");
  CompletionRequest request;
  FieldReader fields(body, "");
  request.model = fields.String("model").value_or("");
  const Json* prompt = fields.Find("prompt");
  if (!prompt) return BadRequest("prompt is required", "prompt");
  // A string, a list of strings, a list of ids, or a list of lists of ids.
  const bool many = prompt->is_array() && !prompt->empty() && !prompt->front().is_number();
  const Json list = many ? *prompt : Json::array({*prompt});
  for (size_t i = 0; i < list.size(); ++i) {
    const std::string param = many ? At("prompt", i) : "prompt";
    if (list[i].is_string()) {
      request.prompts.emplace_back(list[i].get<std::string>());
      continue;
    }
    if (!list[i].is_array()) return BadRequest("prompt must be a string, a list of token ids, or a list of these", param);
    auto ids = ParseTokenIds(list[i], param, limits.vocab_size);
    if (!ids.ok()) return ids.error();
    request.prompts.emplace_back(std::move(ids.value()));
  }
  auto options = ParseGenerationOptions(body, defaults, limits);
  if (!options.ok()) return options.error();
  request.options = std::move(options.value());
  if (!request.options.max_tokens) request.options.max_tokens = std::max(16, request.options.params.min_tokens);
  if (static_cast<int64_t>(request.prompts.size()) * request.options.n > limits.choices_max) {
    fields.Fail("prompt", "times n gives more than " + std::to_string(limits.choices_max) + " choices");
  }
  if (auto count = fields.Integer("logprobs", 0, kLogprobsMax)) {
    request.logprobs = static_cast<int32_t>(*count);
    request.options.params.logprobs = *request.logprobs;
  }
  request.echo = fields.Boolean("echo").value_or(false);
  if (request.echo && request.logprobs) fields.Fail("echo", "cannot be combined with logprobs");
  if (auto suffix = fields.String("suffix"); suffix && !suffix->empty()) fields.Fail("suffix", "is not offered by this model");
  if (fields.error()) return *fields.error();
  return request;
}

}  // namespace qwen::server
