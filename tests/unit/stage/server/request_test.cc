// Goal: every field of a request is checked, and an error names the field. Tables of (body, param).
#include <gtest/gtest.h>

#include "stage/server/chat_request.h"

namespace qwen::server {
namespace {

const GenerationDefaults kDefaults{.temperature = 0.6f, .top_p = 0.95f, .top_k = 20, .repetition_penalty = 1.05f, .eos_tokens = {7, 3}};
const OptionLimits kLimits{.vocab_size = 320, .tokenizer_size = 300};

Json Body(const std::string& more) {
  const std::string text = R"({"model": "m", "messages": [{"role": "user", "content": "hi"}])" + (more.empty() ? "" : ", " + more) + "}";
  auto json = ParseJson(text, {});
  EXPECT_TRUE(json.ok()) << text << ": " << json.status().ToString();
  return std::move(*json);
}
ChatRequest Good(const std::string& more) {
  auto request = ParseChatRequest(Body(more), kDefaults, kLimits);
  EXPECT_TRUE(request.ok()) << more << ": " << (request.ok() ? "" : request.error().message);
  return std::move(request.value());
}

TEST(ChatRequest, NamesTheFieldThatIsWrong) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {R"("temperature": "hot")", "temperature"},
      {R"("temperature": -0.1)", "temperature"},
      {R"("temperature": 2.5)", "temperature"},
      {R"("top_p": 0)", "top_p"},
      {R"("top_p": 1.01)", "top_p"},
      {R"("top_k": -2)", "top_k"},
      {R"("top_k": 1.5)", "top_k"},
      {R"("min_p": 1)", "min_p"},
      {R"("repetition_penalty": 0)", "repetition_penalty"},
      {R"("presence_penalty": 3)", "presence_penalty"},
      {R"("frequency_penalty": -3)", "frequency_penalty"},
      {R"("no_repeat_ngram_size": -1)", "no_repeat_ngram_size"},
      {R"("seed": "x")", "seed"},
      {R"("seed": 18446744073709551615)", "seed"},
      {R"("max_tokens": 0)", "max_tokens"},
      {R"("max_tokens": true)", "max_tokens"},
      {R"("max_completion_tokens": -5)", "max_completion_tokens"},
      {R"("min_tokens": 5, "max_tokens": 4)", "min_tokens"},
      {R"("n": 0)", "n"},
      {R"("n": 129)", "n"},
      {R"("n": 1, "best_of": 2)", "best_of"},
      {R"("stop": "")", "stop"},
      {R"("stop": [1])", "stop"},
      {R"("stop": ["1","2","3","4","5","6","7","8","9","10","11","12","13","14","15","16","17"])", "stop"},
      {R"("stop_token_ids": [320])", "stop_token_ids"},
      {R"("stop_token_ids": ["a"])", "stop_token_ids"},
      {R"("logit_bias": [])", "logit_bias"},
      {R"("logit_bias": {"x": 1})", "logit_bias"},
      {R"("logit_bias": {"320": 1})", "logit_bias"},
      {R"("logit_bias": {"-1": 1})", "logit_bias"},
      {R"("logit_bias": {"1": 101})", "logit_bias"},
      {R"("logit_bias": {"1": "a"})", "logit_bias"},
      {R"("logit_bias": {"7": 1, "07": 2})", "logit_bias"},
      {R"("logprobs": 1)", "logprobs"},
      {R"("logprobs": true, "top_logprobs": 21)", "top_logprobs"},
      {R"("top_logprobs": 3)", "top_logprobs"},
      {R"("stream": "yes")", "stream"},
      {R"("stream_options": {"include_usage": true})", "stream_options"},
      {R"("stream": true, "stream_options": [])", "stream_options"},
      {R"("stream": true, "stream_options": {"include_usage": 1})", "stream_options"},
      {R"("response_format": "json")", "response_format"},
      {R"("response_format": {"type": "xml"})", "response_format.type"},
      {R"("response_format": {"type": "json_schema"})", "response_format.json_schema"},
      {R"("response_format": {"type": "json_schema", "json_schema": {"name": "x"}})", "response_format.json_schema.schema"},
      {R"("guided_json": 5)", "guided_json"},
      {R"("guided_json": "{")", "guided_json"},
      {R"("guided_regex": "a", "guided_grammar": "b")", "guided_grammar"},
      {R"("tools": {})", "tools"},
      {R"("tools": [{"type": "function"}])", "tools[0]"},
      {R"("tools": [{"type": "function", "function": {}}])", "tools[0].function.name"},
      {R"("tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}])", "tools[0].function.parameters"},
      {R"("tool_choice": "required")", "tool_choice"},
      {R"("tool_choice": "sometimes")", "tool_choice"},
      {R"("tools": [{"type":"function","function":{"name":"f"}}], "tool_choice": {"type":"function","function":{"name":"g"}})", "tool_choice.function.name"},
      {R"("tools": [{"type":"function","function":{"name":"f"}}], "tool_choice": "required", "guided_regex": "a")", "tool_choice"},
      {R"("chat_template_kwargs": [])", "chat_template_kwargs"},
      {R"("continue_final_message": true, "add_generation_prompt": true)", "continue_final_message"},
      {R"("model": 5)", "model"},
      {R"("user": {})", "user"},
      {R"("messages": [])", "messages"},
      {R"("messages": "hi")", "messages"},
      {R"("messages": [5])", "messages[0]"},
      {R"("messages": [{"role": "king", "content": "x"}])", "messages[0].role"},
      {R"("messages": [{"role": "user"}])", "messages[0].content"},
      {R"("messages": [{"role": "user", "content": 5}])", "messages[0].content"},
      {R"("messages": [{"role": "user", "content": ["x"]}])", "messages[0].content[0]"},
      {R"("messages": [{"role": "user", "content": [{"type": "text"}]}])", "messages[0].content[0].text"},
      {R"("messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "audio"}]}])", "messages[0].content[1].type"},
      {R"("messages": [{"role": "user", "content": [{"type": "image_url"}]}])", "messages[0].content[0].image_url"},
      {R"("messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])", "messages[0].content[0].image_url.url"},
      {R"("messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 5}}]}])", "messages[0].content[0].image_url"},
      {R"("messages": [{"role": "user", "content": [{"type": "video", "video": []}]}])", "messages[0].content[0].video"},
      {R"("messages": [{"role": "user", "content": [{"type": "video", "video": ["a"], "fps": 0}]}])", "messages[0].content[0].fps"},
      {R"("messages": [{"role": "assistant", "content": null, "tool_calls": [{"id": "x"}]}])", "messages[0].tool_calls[0].function"},
      {R"("messages": [{"role": "assistant", "content": null, "tool_calls": [{"function": {}}]}])", "messages[0].tool_calls[0].function.name"},
      {R"("messages": [{"role": "tool", "content": "x", "tool_call_id": 5}])", "messages[0].tool_call_id"},
  };
  for (const auto& [more, param] : cases) {
    auto request = ParseChatRequest(Body(more), kDefaults, kLimits);
    ASSERT_FALSE(request.ok()) << more;
    EXPECT_EQ(request.error().status, 400) << more;
    EXPECT_EQ(request.error().param, param) << more << ": " << request.error().message;
    const Json error = Json::parse(ErrorJson(request.error()));
    EXPECT_EQ(error["error"]["type"], "invalid_request_error");
    EXPECT_EQ(error["error"]["param"], param);
  }
}

TEST(ChatRequest, TakesDefaultsFromTheCheckpointAndIgnoresWhatItDoesNotKnow) {
  const ChatRequest r = Good(R"("service_tier": "auto", "store": false, "metadata": {"a": "b"}, "temperature": null, "parallel_tool_calls": true)");
  EXPECT_FLOAT_EQ(r.options.params.temperature, 0.6f);
  EXPECT_FLOAT_EQ(r.options.params.top_p, 0.95f);
  EXPECT_EQ(r.options.params.top_k, 20);
  EXPECT_FLOAT_EQ(r.options.params.repetition_penalty, 1.05f);
  EXPECT_EQ(r.options.params.stop_tokens, (std::vector<int32_t>{3, 7}));
  EXPECT_EQ(r.options.params.token_limit, 300);
  EXPECT_EQ(r.options.params.logprobs, -1);
  EXPECT_FALSE(r.options.max_tokens);
  EXPECT_EQ(r.options.n, 1);
  EXPECT_TRUE(r.prompt.add_generation_prompt);
  EXPECT_NE(r.options.params.seed, Good("").options.params.seed) << "without a seed every request draws its own";
}

TEST(ChatRequest, ReadsEveryField) {
  const ChatRequest r = Good(R"("temperature": 0, "top_p": 0.5, "top_k": -1, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1,
    "no_repeat_ngram_size": 3, "seed": -5, "n": 3, "max_tokens": 10, "max_completion_tokens": 20, "min_tokens": 2, "stop": ["a", "b"],
    "stop_token_ids": [9], "ignore_eos": true, "include_stop_str_in_output": true, "skip_special_tokens": false, "logprobs": true,
    "top_logprobs": 4, "logit_bias": {"5": -100}, "stream": true, "stream_options": {"include_usage": true, "continuous_usage_stats": true},
    "return_token_ids": true, "guided_regex": "x+", "chat_template_kwargs": {"enable_thinking": false}, "add_generation_prompt": false)");
  const auto& p = r.options.params;
  EXPECT_EQ(p.temperature, 0);
  EXPECT_EQ(p.top_k, 0);
  EXPECT_EQ(p.no_repeat_ngram_size, 3);
  EXPECT_EQ(p.seed, static_cast<uint64_t>(-5));
  EXPECT_EQ(p.min_tokens, 2);
  EXPECT_EQ(p.logprobs, 4);
  EXPECT_EQ(p.stop_tokens, std::vector<int32_t>{9}) << "ignore_eos leaves only what was named";
  ASSERT_EQ(p.logit_bias.size(), 1u);
  EXPECT_EQ(p.logit_bias[0], std::make_pair(5, -100.0f));
  EXPECT_EQ(r.options.max_tokens, 20) << "the newer name wins";
  EXPECT_EQ(r.options.n, 3);
  EXPECT_EQ(r.options.stops, (std::vector<std::string>{"a", "b"}));
  EXPECT_TRUE(r.options.include_stop && r.options.ignore_eos && r.options.include_usage && r.options.continuous_usage && r.options.return_token_ids);
  EXPECT_FALSE(r.options.skip_special_tokens || r.prompt.add_generation_prompt);
  EXPECT_EQ(r.options.guided.kind, GuidedDecoding::Kind::kRegex);
  EXPECT_EQ(r.prompt.template_kwargs["enable_thinking"], false);
}

TEST(ChatRequest, TurnsPartsIntoPlaceholdersAndMediaInOrder) {
  const ChatRequest r = Good(R"("messages": [{"role": "developer", "content": "sys"}, {"role": "user", "content": [
    {"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "data:a", "detail": "low"}},
    {"type": "video", "video": ["f0", {"url": "f1"}], "fps": 2}, {"type": "video_url", "video_url": "data:v"}, {"type": "image", "image": "data:b"}]}])");
  EXPECT_EQ(r.prompt.messages[0]["role"], "system");
  EXPECT_EQ(r.prompt.messages[1]["content"].dump(),
            R"([{"type":"text","text":"look"},{"type":"image"},{"type":"video"},{"type":"video"},{"type":"image"}])");
  ASSERT_EQ(r.prompt.media.size(), 4u);
  EXPECT_EQ(r.prompt.media[0].urls, std::vector<std::string>{"data:a"});
  EXPECT_EQ(r.prompt.media[0].param, "messages[1].content[1].image_url");
  EXPECT_EQ(r.prompt.media[1].kind, MediaPart::Kind::kFrames);
  EXPECT_EQ(r.prompt.media[1].urls, (std::vector<std::string>{"f0", "f1"}));
  EXPECT_EQ(r.prompt.media[1].fps, 2.0);
  EXPECT_EQ(r.prompt.media[2].kind, MediaPart::Kind::kVideo);
  EXPECT_EQ(r.prompt.media[3].kind, MediaPart::Kind::kImage);
}

TEST(ChatRequest, GivesTheTemplateToolCallsWithArgumentsAsObjects) {
  const ChatRequest r = Good(R"("messages": [{"role": "assistant", "content": null, "tool_calls": [
    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"b\": 1, \"a\": [2]}"}},
    {"id": "c2", "type": "function", "function": {"name": "g", "arguments": "no json"}}]}, {"role": "tool", "tool_call_id": "c1", "content": "ok"}])");
  const Json& calls = r.prompt.messages[0]["tool_calls"];
  EXPECT_EQ(calls[0]["function"]["arguments"].dump(), R"({"b":1,"a":[2]})") << "keys keep their order";
  EXPECT_EQ(calls[1]["function"]["arguments"], "no json");
  EXPECT_EQ(r.prompt.messages[0]["content"], "");
  EXPECT_EQ(r.prompt.messages[1]["tool_call_id"], "c1");
}

TEST(ChatRequest, ForcesToolCallsThroughASchema) {
  const std::string tools = R"("tools": [{"type":"function","function":{"name":"f","parameters":{"type":"object","properties":{"x":{"type":"integer"}}}}}])";
  EXPECT_EQ(Good(tools).tool_choice.kind, ToolChoice::Kind::kAuto);
  EXPECT_EQ(Good(tools).options.guided.kind, GuidedDecoding::Kind::kNone);
  const auto named = Good(tools + R"(, "tool_choice": {"type":"function","function":{"name":"f"}})");
  EXPECT_EQ(named.options.guided.text, R"({"type":"object","properties":{"x":{"type":"integer"}}})");
  const auto required = Good(tools + R"(, "tool_choice": "required")");
  EXPECT_EQ(Json::parse(required.options.guided.text)["items"]["anyOf"][0]["properties"]["name"]["const"], "f");
  EXPECT_TRUE(Good(tools + R"(, "tool_choice": "none")").prompt.tools.is_null());
}

TEST(CompletionRequest, TakesTheFourFormsOfAPrompt) {
  const auto parse = [](const std::string& prompt) {
    auto request = ParseCompletionRequest(*ParseJson(R"({"prompt": )" + prompt + "}", {}), kDefaults, kLimits);
    EXPECT_TRUE(request.ok()) << prompt;
    return std::move(request.value().prompts);
  };
  EXPECT_EQ(std::get<std::string>(parse(R"("hi")")[0]), "hi");
  EXPECT_EQ(parse(R"(["a", "b"])").size(), 2u);
  EXPECT_EQ(std::get<std::vector<int32_t>>(parse("[1, 2]")[0]), (std::vector<int32_t>{1, 2}));
  EXPECT_EQ(std::get<std::vector<int32_t>>(parse("[[1], [2, 3]]")[1]), (std::vector<int32_t>{2, 3}));
}

TEST(CompletionRequest, NamesTheFieldThatIsWrong) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {R"({})", "prompt"},
      {R"({"prompt": 5})", "prompt"},
      {R"({"prompt": [1, 320]})", "prompt"},
      {R"({"prompt": [1, -1]})", "prompt"},
      {R"({"prompt": [[1], ["x"]]})", "prompt[1]"},
      {R"({"prompt": ["a", {}]})", "prompt[1]"},
      {R"({"prompt": ["a", "b"], "n": 100})", "prompt"},
      {R"({"prompt": "a", "logprobs": 21})", "logprobs"},
      {R"({"prompt": "a", "logprobs": true})", "logprobs"},
      {R"({"prompt": "a", "echo": true, "logprobs": 1})", "echo"},
      {R"({"prompt": "a", "suffix": "b"})", "suffix"},
  };
  for (const auto& [body, param] : cases) {
    auto request = ParseCompletionRequest(*ParseJson(body, {}), kDefaults, kLimits);
    ASSERT_FALSE(request.ok()) << body;
    EXPECT_EQ(request.error().param, param) << body << ": " << request.error().message;
  }
}

TEST(ParseJson, BoundsWhatStrangersSend) {
  EXPECT_FALSE(ParseJson(std::string(100'000, '['), {}).ok());
  EXPECT_FALSE(ParseJson("{\"a\":1", {}).ok());
  EXPECT_FALSE(ParseJson("\"\xff\"", {}).ok()) << "no UTF-8";
  EXPECT_FALSE(ParseJson("", {}).ok());
  std::string keys = "{";
  for (int i = 0; i < 2000; ++i) keys += (i ? "," : "") + ("\"" + std::to_string(i) + "\":1");
  EXPECT_FALSE(ParseJson(keys + "}", {}).ok());
  EXPECT_FALSE(ParseJson("[1,1,1,1]", {.values = 3}).ok());
  EXPECT_TRUE(ParseJson(R"({"a:b,c[": "\"[[[[{{{:::,,,"})", {.depth = 1, .values = 1, .keys = 1}).ok()) << "strings do not count";
}

TEST(ChoiceSeed, DiffersPerChoiceAndRepeats) {
  std::set<uint64_t> seeds;
  for (int i = 0; i < 128; ++i) seeds.insert(ChoiceSeed(42, i));
  EXPECT_EQ(seeds.size(), 128u);
  EXPECT_EQ(ChoiceSeed(42, 0), 42u);
  EXPECT_EQ(ChoiceSeed(42, 5), ChoiceSeed(42, 5));
}

TEST(GenerationDefaults, ReadGenerationConfig) {
  const auto d = ParseGenerationDefaults(R"({"bos_token_id": 1, "eos_token_id": 9, "temperature": 0.7, "top_k": 20, "do_sample": true})");
  ASSERT_TRUE(d.ok());
  EXPECT_FLOAT_EQ(d->temperature, 0.7f);
  EXPECT_EQ(d->eos_tokens, std::vector<int32_t>{9});
  EXPECT_EQ(ParseGenerationDefaults(R"({"do_sample": false, "temperature": 0.7})")->temperature, 0);
  EXPECT_FALSE(ParseGenerationDefaults(R"({"temperature": "x"})").ok());
  EXPECT_FALSE(ParseGenerationDefaults(R"({"eos_token_id": "x"})").ok());
}

}  // namespace
}  // namespace qwen::server
