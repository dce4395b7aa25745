// Goal: the OpenAI API end to end over loopback: real HTTP, real engine, stages in memory. What the stages say is known
// (server_fixture.h), so answers are compared exactly.
#include <gtest/gtest.h>

#include "tests/unit/stage/server/server_fixture.h"

namespace qwen::server {
namespace {

std::string Joined(const std::vector<json>& chunks, const char* field, int index = 0) {
  std::string text;
  for (const auto& chunk : chunks) {
    for (const auto& choice : chunk["choices"]) {
      if (choice["index"] == index && choice["delta"].contains(field) && choice["delta"][field].is_string()) text += choice["delta"][field];
    }
  }
  return text;
}

TEST(ChatCompletions, AnswersWhole) {
  TestHead head;
  auto client = head.Connect();
  const auto response = client.Post("/v1/chat/completions", Chat("SAY:Grüße, 世界!"), "x-request-id: my-id-1\r\n");
  ASSERT_EQ(response.status, 200) << response.body;
  EXPECT_EQ(response.headers.at("x-request-id"), "my-id-1");
  EXPECT_EQ(response.headers.at("content-type"), "application/json");
  const json body = response.Json();
  EXPECT_EQ(body["object"], "chat.completion");
  EXPECT_EQ(body["id"], "chatcmpl-my-id-1");
  EXPECT_EQ(body["model"], "tiny");
  EXPECT_EQ(body["choices"].size(), 1u);
  EXPECT_EQ(body["choices"][0]["message"]["role"], "assistant");
  EXPECT_EQ(body["choices"][0]["message"]["content"], "Grüße, 世界!");
  EXPECT_EQ(body["choices"][0]["finish_reason"], "stop");
  EXPECT_TRUE(body["choices"][0]["stop_reason"].is_null()) << "the model's own end needs no reason";
  const std::string prompt = "<|im_start|>user\nSAY:Grüße, 世界!<|im_end|>\n<|im_start|>assistant\n";
  const int prompt_tokens = static_cast<int>(prompt.size()) - 2 * 11 - 9;  // a byte each but for three added tokens
  EXPECT_EQ(body["usage"]["prompt_tokens"], prompt_tokens);
  EXPECT_EQ(body["usage"]["completion_tokens"], std::string("Grüße, 世界!").size() + 1);
  EXPECT_EQ(body["usage"]["total_tokens"], body["usage"]["prompt_tokens"].get<int>() + body["usage"]["completion_tokens"].get<int>());
  EXPECT_EQ(body["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
  EXPECT_TRUE(head.BecomesIdle());
}

TEST(ChatCompletions, StreamsTheSameText) {
  TestHead head;
  auto client = head.Connect();
  const auto response = client.Post("/v1/chat/completions", Chat("SAY:one ünd two 🎈", {{"stream", true}, {"stream_options", {{"include_usage", true}}}}));
  ASSERT_EQ(response.status, 200);
  EXPECT_TRUE(response.headers.at("content-type").starts_with("text/event-stream"));
  const auto chunks = response.Chunks();
  ASSERT_GE(chunks.size(), 4u);
  EXPECT_EQ(chunks[0]["choices"][0]["delta"]["role"], "assistant");
  EXPECT_EQ(Joined(chunks, "content"), "one ünd two 🎈");
  for (const auto& chunk : chunks) {
    EXPECT_EQ(chunk["id"], chunks[0]["id"]);
    EXPECT_EQ(chunk["object"], "chat.completion.chunk");
  }
  const json& finish = chunks[chunks.size() - 2];
  EXPECT_EQ(finish["choices"][0]["finish_reason"], "stop");
  EXPECT_TRUE(finish["usage"].is_null());
  const json& usage = chunks.back();
  EXPECT_TRUE(usage["choices"].empty());
  EXPECT_EQ(usage["usage"]["completion_tokens"], std::string("one ünd two 🎈").size() + 1);
  EXPECT_EQ(chunks.size(), 1 + 13 + 1 + 1u) << "role, one chunk a character, finish, usage";
}

TEST(ChatCompletions, StopsAtStopStringsAcrossTokens) {
  TestHead head;
  auto client = head.Connect();
  for (const bool stream : {false, true}) {
    const auto response = client.Post("/v1/chat/completions", Chat("SAY:alpha beta gamma", {{"stop", {"ta g", "zzz"}}, {"stream", stream}}));
    ASSERT_EQ(response.status, 200) << response.body;
    if (stream) {
      const auto chunks = response.Chunks();
      EXPECT_EQ(Joined(chunks, "content"), "alpha be");
      EXPECT_EQ(chunks.back()["choices"][0]["finish_reason"], "stop");
      EXPECT_EQ(chunks.back()["choices"][0]["stop_reason"], "ta g");
    } else {
      const json choice = response.Json()["choices"][0];
      EXPECT_EQ(choice["message"]["content"], "alpha be");
      EXPECT_EQ(choice["stop_reason"], "ta g");
    }
  }
  const auto included = client.Post("/v1/chat/completions", Chat("SAY:alpha beta", {{"stop", "ha"}, {"include_stop_str_in_output", true}})).Json();
  EXPECT_EQ(included["choices"][0]["message"]["content"], "alpha");
  const auto token = client.Post("/v1/chat/completions", Chat("SAY:abc", {{"stop_token_ids", {'b'}}})).Json();
  EXPECT_EQ(token["choices"][0]["message"]["content"], "a");
  EXPECT_EQ(token["choices"][0]["stop_reason"], 'b');
  EXPECT_TRUE(head.BecomesIdle());
}

TEST(ChatCompletions, HonoursLengthsAndIgnoreEos) {
  TestHead head;
  auto client = head.Connect();
  const auto cut = client.Post("/v1/chat/completions", Chat("SAY:abcdef", {{"max_tokens", 3}})).Json();
  EXPECT_EQ(cut["choices"][0]["message"]["content"], "abc");
  EXPECT_EQ(cut["choices"][0]["finish_reason"], "length");
  const auto on = client.Post("/v1/chat/completions", Chat("SAY:ab", {{"max_tokens", 5}, {"ignore_eos", true}, {"skip_special_tokens", false}})).Json();
  EXPECT_EQ(on["choices"][0]["message"]["content"], "ab<|im_end|><|im_end|><|im_end|>");
  const auto least = client.Post("/v1/chat/completions", Chat("SAY:ab", {{"min_tokens", 4}})).Json();
  EXPECT_EQ(least["choices"][0]["message"]["content"], "ab..");
}

TEST(ChatCompletions, GivesDifferentRepeatableChoicesFromOneSeed) {
  TestHead head;
  auto client = head.Connect();
  const json body = Chat("random", {{"n", 4}, {"seed", 17}, {"temperature", 1}, {"max_tokens", 12}});
  const auto contents = [](const json& reply) {
    std::vector<std::string> out;
    for (const auto& choice : reply["choices"]) out.push_back(choice["message"]["content"]);
    return out;
  };
  const json first = client.Post("/v1/chat/completions", body).Json(), again = client.Post("/v1/chat/completions", body).Json();
  const auto texts = contents(first);
  ASSERT_EQ(texts.size(), 4u);
  EXPECT_EQ(std::set<std::string>(texts.begin(), texts.end()).size(), 4u);
  EXPECT_EQ(texts, contents(again));
  EXPECT_EQ(first["usage"]["completion_tokens"], 48);
  EXPECT_GT(again["usage"]["prompt_tokens_details"]["cached_tokens"].get<int>(), 0) << "the second prompt is in the prefix cache";
  json streamed = body;
  streamed["stream"] = true;
  const auto chunks = client.Post("/v1/chat/completions", streamed).Chunks();
  for (int i = 0; i < 4; ++i) EXPECT_EQ(Joined(chunks, "content", i), texts[i]);
}

TEST(ChatCompletions, ReportsLogprobsAndTokenIds) {
  TestHead head;
  auto client = head.Connect();
  const json reply = client.Post("/v1/chat/completions", Chat("SAY:hé", {{"logprobs", true}, {"top_logprobs", 2}, {"return_token_ids", true}})).Json();
  const json& choice = reply["choices"][0];
  const json& content = choice["logprobs"]["content"];
  ASSERT_EQ(content.size(), 4u) << "h, two bytes of é, and the end";
  EXPECT_EQ(content[0]["token"], "h");
  EXPECT_FLOAT_EQ(content[0]["logprob"], -0.5f);
  EXPECT_EQ(content[0]["top_logprobs"].size(), 2u);
  EXPECT_EQ(content[0]["top_logprobs"][1]["token"], "i");
  EXPECT_EQ(content[1]["bytes"], json::array({0xc3}));
  EXPECT_EQ(content[1]["token"], "\uFFFD");
  EXPECT_EQ(choice["token_ids"], json::array({'h', 0xc3, 0xa9, kImEnd}));
  EXPECT_EQ(reply["prompt_token_ids"].size(), reply["usage"]["prompt_tokens"]);
  EXPECT_EQ(reply["prompt_token_ids"][0], kImStart);

  const auto chunks = client.Post("/v1/chat/completions", Chat("SAY:hé", {{"logprobs", true}, {"return_token_ids", true}, {"stream", true}})).Chunks();
  json ids = json::array();
  size_t entries = 0;
  for (const auto& chunk : chunks) {
    const json& c = chunk["choices"][0];
    if (c.contains("token_ids")) ids.insert(ids.end(), c["token_ids"].begin(), c["token_ids"].end());
    if (c["logprobs"].is_object()) entries += c["logprobs"]["content"].size();
  }
  EXPECT_EQ(ids, json::array({'h', 0xc3, 0xa9, kImEnd}));
  EXPECT_EQ(entries, 4u);
  EXPECT_EQ(chunks[0]["prompt_token_ids"], reply["prompt_token_ids"]);
}

TEST(ChatCompletions, SplitsReasoningOff) {
  TestHead head;
  auto client = head.Connect();
  const json think{{"chat_template_kwargs", {{"enable_thinking", true}}}};
  json body = Chat("SAY:let me see</think>\n\nIt is 4.", think);
  const json message = client.Post("/v1/chat/completions", body).Json()["choices"][0]["message"];
  EXPECT_EQ(message["reasoning_content"], "let me see");
  EXPECT_EQ(message["content"], "\n\nIt is 4.");
  body["stream"] = true;
  const auto chunks = client.Post("/v1/chat/completions", body).Chunks();
  EXPECT_EQ(Joined(chunks, "reasoning_content"), "let me see");
  EXPECT_EQ(Joined(chunks, "content"), "\n\nIt is 4.");
  const json plain = client.Post("/v1/chat/completions", Chat("SAY:no thoughts")).Json()["choices"][0]["message"];
  EXPECT_FALSE(plain.contains("reasoning_content"));
}

const char kTools[] = R"([{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}},
  "required": ["city"], "additionalProperties": false}}}])";

TEST(ChatCompletions, ParsesToolCalls) {
  TestHead head;
  auto client = head.Connect();
  json body = Chat("SAY:Looking.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\"}}\n</tool_call>", {{"tools", json::parse(kTools)}});
  const json choice = client.Post("/v1/chat/completions", body).Json()["choices"][0];
  EXPECT_EQ(choice["finish_reason"], "tool_calls");
  EXPECT_EQ(choice["message"]["content"], "Looking.");
  ASSERT_EQ(choice["message"]["tool_calls"].size(), 1u);
  EXPECT_EQ(choice["message"]["tool_calls"][0]["type"], "function");
  EXPECT_EQ(choice["message"]["tool_calls"][0]["function"]["name"], "weather");
  EXPECT_EQ(json::parse(choice["message"]["tool_calls"][0]["function"]["arguments"].get<std::string>()), json({{"city", "Oslo"}}));
  body["stream"] = true;
  const auto chunks = client.Post("/v1/chat/completions", body).Chunks();
  json calls = json::array();
  for (const auto& chunk : chunks) {
    for (const auto& call : chunk["choices"][0]["delta"].value("tool_calls", json::array())) calls.push_back(call);
  }
  ASSERT_EQ(calls.size(), 1u);
  EXPECT_EQ(calls[0]["index"], 0);
  EXPECT_EQ(calls[0]["function"]["name"], "weather");
  EXPECT_EQ(chunks.back()["choices"][0]["finish_reason"], "tool_calls");
  body["tool_choice"] = "none";
  body["stream"] = false;
  EXPECT_FALSE(client.Post("/v1/chat/completions", body).Json()["choices"][0]["message"].contains("tool_calls"));
}

TEST(ChatCompletions, ForcesToolCallsAndGrammars) {
  TestHead head;
  auto client = head.Connect();
  json named = Chat("SAY:{\"city\": \"Rome\"}", {{"tools", json::parse(kTools)}, {"tool_choice", {{"type", "function"}, {"function", {{"name", "weather"}}}}}});
  const json choice = client.Post("/v1/chat/completions", named).Json()["choices"][0];
  ASSERT_TRUE(choice["message"].contains("tool_calls")) << choice;
  EXPECT_EQ(choice["message"]["tool_calls"][0]["function"]["arguments"], "{\"city\": \"Rome\"}");
  EXPECT_EQ(choice["finish_reason"], "tool_calls");
  named["stream"] = true;
  std::string arguments, name;
  for (const auto& chunk : client.Post("/v1/chat/completions", named).Chunks()) {
    for (const auto& call : chunk["choices"][0]["delta"].value("tool_calls", json::array())) {
      EXPECT_EQ(call["index"], 0);
      arguments += call["function"].value("arguments", "");
      name += call["function"].value("name", "");
    }
  }
  EXPECT_EQ(arguments, "{\"city\": \"Rome\"}");
  EXPECT_EQ(name, "weather");

  json required = Chat("SAY:[{\"name\": \"weather\", \"parameters\": {\"city\": \"Rome\"}}]", {{"tools", json::parse(kTools)}, {"tool_choice", "required"}});
  EXPECT_EQ(client.Post("/v1/chat/completions", required).Json()["choices"][0]["message"]["tool_calls"][0]["function"]["name"], "weather");

  const json regex = client.Post("/v1/chat/completions", Chat("SAY:maybe", {{"guided_regex", "(yes|no)"}, {"max_tokens", 8}})).Json();
  EXPECT_EQ(regex["choices"][0]["message"]["content"], "no") << "the stages want m, the grammar allows y and n";
  const json schema = client.Post("/v1/chat/completions",
                                  Chat("SAY:{\"a\": 12}", {{"response_format", {{"type", "json_schema"}, {"json_schema", {{"name", "x"}, {"schema", {{"type", "object"}, {"properties", {{"a", {{"type", "integer"}}}}}}}}}}}}))
                          .Json();
  EXPECT_EQ(schema["choices"][0]["message"]["content"], "{\"a\": 12}");
  // A Thinking model thinks freely; the grammar holds after </think>.
  const json after = client.Post("/v1/chat/completions", Chat("SAY:hm</think>maybe", {{"guided_regex", "(yes|no)"}, {"max_tokens", 8}, {"chat_template_kwargs", {{"enable_thinking", true}}}})).Json();
  EXPECT_EQ(after["choices"][0]["message"]["reasoning_content"], "hm");
  EXPECT_EQ(after["choices"][0]["message"]["content"], "no");
  const auto bad = client.Post("/v1/chat/completions", Chat("x", {{"guided_regex", "("}}));
  EXPECT_EQ(bad.status, 400);
  EXPECT_EQ(bad.Json()["error"]["param"], "guided_regex");
  EXPECT_TRUE(head.BecomesIdle());
}

TEST(ChatCompletions, ContinuesTheFinalMessage) {
  TestHead head;
  auto client = head.Connect();
  const json body{{"messages", {{{"role", "user"}, {"content", "q"}}, {{"role", "assistant"}, {"content", "The answer "}}}}, {"continue_final_message", true}};
  const json reply = client.Post("/tokenize", body).Json();
  const auto back = client.Post("/detokenize", {{"tokens", reply["tokens"]}}).Json();
  EXPECT_EQ(back["prompt"], "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nThe answer ");
}

// A 64x64 red PNG, made by zlib and hand-written chunks in Python.
const char kRedPng[] =
    "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAIAAAAlC+aJAAAAS0lEQVR42u3PQQkAAAgAsetfWiP4FgYrsKZeS0BAQEBAQEBAQEBAQEBAQEBAQE"
    "BAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEDgsqnc8OJg6Ln3AAAAAElFTkSuQmCC";

TEST(ChatCompletions, SendsPixelsOfEveryChoiceToTheStages) {
  TestHead head;
  auto client = head.Connect();
  const json content = {{{"type", "image_url"}, {"image_url", {{"url", kRedPng}}}}, {{"type", "text"}, {"text", "SAY:red"}}};
  const json body{{"messages", {{{"role", "user"}, {"content", content}}}}, {"n", 2}, {"return_token_ids", true}};
  const auto response = client.Post("/v1/chat/completions", body);
  ASSERT_EQ(response.status, 200) << response.body;
  EXPECT_EQ(response.Json()["choices"][1]["message"]["content"], "red");
  const auto ids = response.Json()["prompt_token_ids"].get<std::vector<int>>();
  EXPECT_EQ(std::count(ids.begin(), ids.end(), kImagePad), 4) << "64x64 is 4x4 patches, merged 2x2";
  ASSERT_TRUE(head.BecomesIdle());
  const auto vision = head.stages.vision();
  ASSERT_GE(vision.size(), 1u) << "the second choice may take the pixels' KV from the prefix cache";
  std::set<uint64_t> distinct;
  for (const auto& input : vision) {
    EXPECT_EQ(input->grid, (std::array<int32_t, 3>{1, 4, 4}));
    EXPECT_EQ(input->patches[0], 255) << "red";
    distinct.insert(input->id);
  }
  EXPECT_EQ(distinct.size(), vision.size());
}

TEST(ChatCompletions, BlamesBrokenAndForbiddenPictures) {
  TestHead head;
  auto client = head.Connect();
  const auto ask = [&](const std::string& url) {
    const json content = {{{"type", "text"}, {"text", "x"}}, {{"type", "image_url"}, {"image_url", {{"url", url}}}}};
    return client.Post("/v1/chat/completions", {{"messages", {{{"role", "user"}, {"content", content}}}}});
  };
  for (const char* url : {"data:image/png;base64,AAAA", "data:image/png;base64,!!", "http://127.0.0.1:1/x.png", "ftp://x/y"}) {
    const auto response = ask(url);
    EXPECT_EQ(response.status, 400) << url;
    EXPECT_EQ(response.Json()["error"]["param"], "messages[0].content[1].image_url") << url;
  }
  const auto spelt = client.Post("/v1/chat/completions", Chat("what is <|image_pad|>?"));
  EXPECT_EQ(spelt.status, 400);
  EXPECT_EQ(spelt.Json()["error"]["param"], "messages");
}

TEST(ChatCompletions, SaysHowMuchWasAskedWhenTheContextOverflows) {
  TestHead head;
  auto client = head.Connect();
  const auto long_prompt = client.Post("/v1/chat/completions", Chat(std::string(5000, 'a')));
  EXPECT_EQ(long_prompt.status, 400);
  EXPECT_EQ(long_prompt.Json()["error"]["code"], "context_length_exceeded");
  EXPECT_NE(long_prompt.body.find("4096"), std::string::npos);
  EXPECT_NE(long_prompt.body.find("50"), std::string::npos);
  const auto output = client.Post("/v1/chat/completions", Chat("hi", {{"max_tokens", 4096}}));
  EXPECT_EQ(output.status, 400);
  EXPECT_EQ(output.Json()["error"]["param"], "max_tokens");
  EXPECT_NE(output.body.find("4096 output tokens"), std::string::npos) << output.body;
}

TEST(Completions, AnswersSeveralPromptsWithEcho) {
  TestHead head;
  auto client = head.Connect();
  const json reply = client.Post("/v1/completions", {{"prompt", {"SAY:one", "SAY:two"}}, {"n", 2}, {"echo", true}, {"temperature", 0}}).Json();
  EXPECT_EQ(reply["object"], "text_completion");
  ASSERT_EQ(reply["choices"].size(), 4u);
  EXPECT_EQ(reply["choices"][1]["text"], "SAY:oneone");
  EXPECT_EQ(reply["choices"][2]["text"], "SAY:twotwo");
  EXPECT_EQ(reply["choices"][3]["index"], 3);
  EXPECT_EQ(reply["usage"]["prompt_tokens"], 14) << "each prompt counts once";
  const auto chunks = client.Post("/v1/completions", {{"prompt", "SAY:one"}, {"echo", true}, {"stream", true}}).Chunks();
  std::string text;
  for (const auto& chunk : chunks) text += chunk["choices"][0]["text"].get<std::string>();
  EXPECT_EQ(text, "SAY:oneone");
  const json defaulted = client.Post("/v1/completions", {{"prompt", "x"}}).Json();
  EXPECT_EQ(defaulted["usage"]["completion_tokens"], 16) << "OpenAI's default here";
}

TEST(Completions, TakesTokensAndGivesLogprobsInTheirOlderForm) {
  TestHead head;
  auto client = head.Connect();
  const json reply = client.Post("/v1/completions", {{"prompt", {'S', 'A', 'Y', ':', 'o', 'k'}}, {"logprobs", 2}, {"return_token_ids", true}}).Json();
  const json& choice = reply["choices"][0];
  EXPECT_EQ(choice["text"], "ok");
  EXPECT_EQ(choice["logprobs"]["tokens"], json::array({"o", "k", "<|im_end|>"}));
  EXPECT_EQ(choice["logprobs"]["text_offset"], json::array({0, 1, 2}));
  EXPECT_FLOAT_EQ(choice["logprobs"]["top_logprobs"][0]["p"], -1.5f);
  EXPECT_EQ(choice["prompt_token_ids"], json::array({'S', 'A', 'Y', ':', 'o', 'k'}));
  EXPECT_EQ(choice["token_ids"], json::array({'o', 'k', kImEnd}));
}

TEST(Endpoints, ModelsTokenizeVersionAndHealth) {
  TestHead head;
  auto client = head.Connect();
  const json models = client.Get("/v1/models").Json();
  EXPECT_EQ(models["object"], "list");
  EXPECT_EQ(models["data"][0]["id"], "tiny");
  EXPECT_EQ(models["data"][0]["max_model_len"], 4096);
  EXPECT_EQ(client.Get("/v1/models/tiny").Json()["object"], "model");
  EXPECT_EQ(client.Get("/v1/models/other").status, 404);
  const json tokens = client.Post("/tokenize", {{"prompt", "hi<|im_end|>"}, {"return_token_strs", true}}).Json();
  EXPECT_EQ(tokens["tokens"], json::array({'h', 'i', kImEnd}));
  EXPECT_EQ(tokens["count"], 3);
  EXPECT_EQ(tokens["token_strs"][2], "<|im_end|>");
  EXPECT_EQ(client.Post("/tokenize", Chat("hi")).Json()["tokens"][0], kImStart);
  EXPECT_EQ(client.Post("/detokenize", {{"tokens", {'h', 0xc3, 0xa9}}}).Json()["prompt"], "hé");
  EXPECT_EQ(client.Post("/detokenize", {{"tokens", {"x"}}}).Json()["error"]["param"], "tokens");
  EXPECT_EQ(client.Get("/version").Json()["version"], "test");
  for (const char* path : {"/health", "/healthz", "/ready", "/readyz", "/load"}) EXPECT_EQ(client.Get(path).status, 200) << path;
}

TEST(Endpoints, RefusesWhatIsNotThere) {
  TestHead head;
  auto client = head.Connect();
  const auto lost = client.Get("/v1/nothing");
  EXPECT_EQ(lost.status, 404);
  EXPECT_EQ(lost.Json()["error"]["type"], "not_found_error");
  const auto method = client.Get("/v1/chat/completions");
  EXPECT_EQ(method.status, 405);
  EXPECT_EQ(method.headers.at("allow"), "POST");
  const auto model = client.Post("/v1/chat/completions", Chat("x", {{"model", "gpt-4"}}));
  EXPECT_EQ(model.status, 404);
  EXPECT_EQ(model.Json()["error"]["code"], "model_not_found");
  EXPECT_EQ(model.Json()["error"]["param"], "model");
  client.Send(Client::Request("POST", "/v1/completions", "{nope"));
  EXPECT_EQ(client.Read().status, 400);
  client.Send("POST /v1/completions HTTP/1.1\r\nHost: t\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}");
  EXPECT_EQ(client.Read().status, 415);
}

TEST(Endpoints, AsksForAKeyWhereOneIsNeeded) {
  TestHead head({.api_keys = "sesame\n"});
  auto client = head.Connect();
  EXPECT_EQ(client.Get("/v1/models").status, 401);
  const auto wrong = client.Get("/v1/models", "Authorization: Bearer tahini\r\n");
  EXPECT_EQ(wrong.status, 401);
  EXPECT_EQ(wrong.headers.at("www-authenticate"), "Bearer");
  EXPECT_EQ(wrong.Json()["error"]["code"], "invalid_api_key");
  EXPECT_EQ(client.Get("/v1/models", "Authorization: Bearer sesame\r\n").status, 200);
  EXPECT_EQ(client.Get("/health").status, 200) << "probes have no key";
  EXPECT_EQ(client.Get("/metrics").status, 200);
}

TEST(Readiness, IsRefusedWhileLoadingAndQueuesWhileAGroupIsLost) {
  TestHead head({}, /*group=*/false);
  auto client = head.Connect();
  const auto ready = client.Get("/ready");
  EXPECT_EQ(ready.status, 503);
  EXPECT_FALSE(ready.Json()["reason"].get<std::string>().empty());
  const auto early = client.Post("/v1/chat/completions", Chat("x"));
  EXPECT_EQ(early.status, 503);
  EXPECT_FALSE(early.headers.at("retry-after").empty());

  auto again = head.Connect();  // a request refused before its body ends the connection
  EXPECT_EQ(again.Get("/health").status, 200) << "alive all the same";
  head.stages.Pause(false);
  for (int i = 0; i < 2000 && again.Get("/ready").status != 200; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_EQ(again.Get("/ready").status, 200);
  head.stages.LoseGroup();
  for (int i = 0; i < 2000 && again.Get("/ready").status != 503; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_EQ(again.Get("/ready").Json()["reason"], "stage 1 was lost");
  auto waiting = head.Connect();
  waiting.Send(Client::Request("POST", "/v1/chat/completions", Chat("SAY:late but here").dump()));
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  head.stages.Announce();
  const auto late = waiting.Read();
  ASSERT_EQ(late.status, 200) << late.body;
  EXPECT_EQ(late.Json()["choices"][0]["message"]["content"], "late but here");
}

TEST(Readiness, IsHeldForAWhileSoThatNobodyIsRefusedWhileALostStageComesBack) {
  const auto stages = [] { return std::vector<Api::StageProgress>{{.stage = 1, .connected = true, .load_percent = 40}}; };
  TestHead head({.api = {.workers = 2, .version = "test", .recovery_hold = std::chrono::milliseconds(2000)}, .probes = {.stages = stages}});
  auto client = head.Connect();
  EXPECT_EQ(client.Get("/ready").status, 200);
  head.stages.LoseGroup();
  for (int i = 0; i < 2000 && client.Get("/ready").Json()["status"] != "recovering"; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  const auto held = client.Get("/ready");
  EXPECT_EQ(held.status, 200);
  EXPECT_EQ(held.Json()["reason"], "stage 1 was lost");
  EXPECT_EQ(held.Json()["stages"][0]["load_percent"], 40) << "whoever asks how far it is learns that now too";
  for (int i = 0; i < 5000 && client.Get("/ready").status == 200; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_EQ(client.Get("/ready").status, 503) << "it does not come back: others shall have the requests";
  head.stages.Announce();
  for (int i = 0; i < 2000 && client.Get("/ready").status != 200; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_EQ(client.Get("/ready").Json()["status"], "ready");

  TestHead loading({.api = {.workers = 2, .version = "test", .recovery_hold = std::chrono::hours(1)}}, /*group=*/false);
  EXPECT_EQ(loading.Connect().Get("/ready").status, 503) << "one that never served has nothing to recover";
  head.stages.LoseGroup();
  head.api.StartDraining();
  EXPECT_EQ(client.Get("/ready").status, 503);
}

TEST(Overload, AnswersTooManyRequestsWhenTheQueueIsFull) {
  TestHead head({.engine = {.queue_capacity = 1}});
  head.stages.Pause(true);
  const auto inside = [&] {
    const auto stats = head.engine.stats();
    return stats.running + stats.waiting;
  };
  const auto expect_refusal = [](Client& client) {
    const auto response = client.Read();
    EXPECT_EQ(response.status, 429);
    EXPECT_EQ(response.headers.at("retry-after"), "1");
    EXPECT_EQ(response.Json()["error"]["type"], "rate_limit_error");
  };
  std::vector<std::unique_ptr<Client>> clients;
  bool full = false;
  for (int taken = 0; taken < 80 && !full; ++taken) {
    clients.push_back(std::make_unique<Client>(head.port()));
    Client& client = *clients.back();
    client.Send(Client::Request("POST", "/v1/chat/completions", Chat("SAY:x").dump()));
    // The stages stand still, so what was taken stays; how soon it is taken is the machine's business.
    for (int i = 0; i < 20000 && inside() <= taken && client.socket().available() == 0; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    full = inside() <= taken;
    if (full) expect_refusal(client);
  }
  EXPECT_TRUE(full);
  const int32_t before = inside();
  Client many(head.port());
  many.Send(Client::Request("POST", "/v1/chat/completions", Chat("SAY:x", {{"n", 64}}).dump()));
  expect_refusal(many);
  for (int i = 0; i < 20000 && inside() != before; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_EQ(inside(), before) << "an n that does not fit as a whole takes nothing";
  clients.clear();
  head.stages.Pause(false);
  EXPECT_TRUE(head.BecomesIdle());
}

TEST(Draining, FinishesWhatRunsRefusesWhatIsNewAndCutsWhatIsLate) {
  TestHead head;
  head.stages.SetPace(std::chrono::milliseconds(5));
  auto running = head.Connect(), cut = head.Connect(), whole = head.Connect(), fresh = head.Connect();
  EXPECT_EQ(fresh.Get("/ready").status, 200);
  running.Send(Client::Request("POST", "/v1/chat/completions", Chat("SAY:finish me", {{"stream", true}}).dump()));
  cut.Send(Client::Request("POST", "/v1/chat/completions", Chat("go on", {{"stream", true}, {"max_tokens", 3000}}).dump()));
  whole.Send(Client::Request("POST", "/v1/chat/completions", Chat("go on", {{"max_tokens", 3000}}).dump()));
  for (int i = 0; i < 1000 && head.engine.stats().running < 3; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  head.api.StartDraining();
  EXPECT_EQ(fresh.Get("/ready").Json()["reason"], "draining");
  EXPECT_EQ(fresh.Post("/v1/chat/completions", Chat("x")).status, 503);
  EXPECT_EQ(Joined(running.Read().Chunks(), "content"), "finish me");
  EXPECT_FALSE(head.api.idle());
  head.api.CutAll();
  const auto events = cut.Read().Events();
  ASSERT_GE(events.size(), 2u);
  EXPECT_EQ(events.back(), "[DONE]");
  EXPECT_EQ(json::parse(events[events.size() - 2])["error"]["type"], "server_error");
  EXPECT_EQ(whole.Read().status, 503);
  EXPECT_TRUE(head.BecomesIdle());
}

double MetricValue(const std::string& text, const std::string& series) {
  const size_t at = text.find("\n" + series);
  if (at == std::string::npos) return -1;
  return std::stod(text.substr(text.find("} ", at) + 2));
}

TEST(Metrics, CountWhatHappened) {
  TestHead head;
  auto client = head.Connect();
  for (int i = 0; i < 3; ++i) EXPECT_EQ(client.Post("/v1/chat/completions", Chat("SAY:hello")).status, 200);
  client.Post("/v1/chat/completions", Chat("SAY:hello", {{"max_tokens", 2}}));
  EXPECT_EQ(client.Post("/v1/chat/completions", Chat("x", {{"n", 0}})).status, 400);
  ASSERT_TRUE(head.BecomesIdle());
  const auto response = client.Get("/metrics");
  EXPECT_TRUE(response.headers.at("content-type").starts_with("text/plain; version=0.0.4"));
  const std::string& text = response.body;
  const std::string model = "model_name=\"tiny\"";
  EXPECT_EQ(MetricValue(text, "qwen_generation_tokens_total{" + model), 3 * 6 + 2);
  EXPECT_EQ(MetricValue(text, "qwen_request_success_total{finished_reason=\"stop\"," + model), 3);
  EXPECT_EQ(MetricValue(text, "qwen_request_success_total{finished_reason=\"length\"," + model), 1);
  EXPECT_EQ(MetricValue(text, "qwen_http_responses_total{code=\"200\"," + model), 4);
  EXPECT_EQ(MetricValue(text, "qwen_http_responses_total{code=\"400\"," + model), 1);
  EXPECT_EQ(MetricValue(text, "qwen_time_to_first_token_seconds_count{" + model), 4);
  EXPECT_EQ(MetricValue(text, "qwen_inter_token_latency_seconds_count{" + model), 3 * 5 + 1);
  EXPECT_EQ(MetricValue(text, "qwen_requests_running{" + model), 0);
  EXPECT_EQ(MetricValue(text, "qwen_requests_waiting{" + model), 0);
  EXPECT_EQ(MetricValue(text, "qwen_kv_usage_ratio{" + model), 0);
  EXPECT_EQ(MetricValue(text, "qwen_kv_blocks{" + model + ",state=\"used\""), 0);
  EXPECT_EQ(MetricValue(text, "qwen_group_ready{" + model), 1);
  EXPECT_GT(MetricValue(text, "qwen_prefix_cache_hits_total{" + model), 0);
}

}  // namespace
}  // namespace qwen::server
