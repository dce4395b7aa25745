// Goal: reasoning and tool calls come out of a stream as they come out of the whole text, wherever it is cut.
#include <gtest/gtest.h>

#include "stage/server/reasoning_parser.h"
#include "stage/server/tool_parser.h"

namespace qwen::server {
namespace {

using Start = ReasoningParser::Start;

std::pair<std::string, std::string> Reason(const std::vector<std::string>& pieces, Start start) {
  ReasoningParser parser(start);
  std::string reasoning, content;
  const auto add = [&](const ReasoningParser::Delta& delta) {
    EXPECT_TRUE(content.empty() || delta.reasoning.empty()) << "reasoning after content";
    reasoning += delta.reasoning;
    content += delta.content;
  };
  for (const auto& piece : pieces) add(parser.Push(piece));
  add(parser.Finish());
  return {reasoning, content};
}

TEST(ReasoningParser, FollowsDeepseekR1HoweverTheTextIsCut) {
  struct Case {
    Start start;
    std::string text, reasoning, content;
  };
  const std::vector<Case> cases = {
      {Start::kInside, "because\n</think>\n\n42", "because\n", "\n\n42"},
      {Start::kInside, "<think>why</think>x", "why", "x"},  // some models repeat the tag
      {Start::kInside, "never ends </thin", "never ends </thin", ""},
      {Start::kInside, "</think>", "", ""},
      {Start::kInside, "a</think>b</think>c", "a", "b</think>c"},
      {Start::kIfTagged, "plain answer", "", "plain answer"},
      {Start::kIfTagged, "<think>r</think>c", "r", "c"},
      {Start::kIfTagged, "\n<think>\nr\n</think>c", "\nr\n", "c"},
      {Start::kIfTagged, "not <think>here</think>", "", "not <think>here</think>"},
      {Start::kIfTagged, "  ", "", "  "},
      {Start::kIfTagged, "<thinker", "", "<thinker"},
      {Start::kIfTagged, "", "", ""},
  };
  for (const auto& c : cases) {
    const auto expected = std::make_pair(c.reasoning, c.content);
    std::vector<std::string> bytes;
    for (const char ch : c.text) bytes.emplace_back(1, ch);
    EXPECT_EQ(Reason(bytes, c.start), expected) << c.text;
    for (size_t cut = 0; cut <= c.text.size(); ++cut) {
      EXPECT_EQ(Reason({c.text.substr(0, cut), c.text.substr(cut)}, c.start), expected) << c.text << " cut at " << cut;
    }
  }
}

struct Tools {
  std::string content;
  std::vector<std::pair<std::string, std::string>> calls;
  bool operator==(const Tools&) const = default;
};

Tools Parse(const std::vector<std::string>& pieces) {
  ToolParser parser;
  Tools out;
  const auto add = [&](ToolParser::Delta delta) {
    out.content += delta.content;
    for (auto& call : delta.calls) {
      EXPECT_TRUE(call.id.starts_with("call_")) << call.id;
      out.calls.emplace_back(call.name, call.arguments);
    }
  };
  for (const auto& piece : pieces) add(parser.Push(piece));
  add(parser.Finish());
  EXPECT_EQ(parser.calls(), static_cast<int>(out.calls.size()));
  return out;
}

TEST(ToolParser, FindsCallsHoweverTheTextIsCut) {
  struct Case {
    std::string text;
    Tools expected;
  };
  const std::string paris = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Paris\", \"days\": 2}}\n</tool_call>";
  const std::pair<std::string, std::string> paris_call = {"weather", R"({"city":"Paris","days":2})"};
  const std::vector<Case> cases = {
      {"no calls, a < b <tool", {"no calls, a < b <tool", {}}},
      {"ends in space \n", {"ends in space \n", {}}},
      {paris, {"", {paris_call}}},
      {"Let me look.\n" + paris, {"Let me look.", {paris_call}}},
      {paris + "\n" + paris, {"", {paris_call, paris_call}}},
      {paris + "\nDone.", {"\nDone.", {paris_call}}},
      {"<tool_call>{\"name\":\"now\"}</tool_call>", {"", {{"now", "{}"}}}},
      {"<tool_call>{\"name\":\"s\",\"arguments\":\"{\\\"a\\\":1}\"}</tool_call>", {"", {{"s", "{\"a\":1}"}}}},  // arguments as text
      {"<tool_call>{\"name\":\"b\",\"arguments\":{\"t\":\"</b> é\"}}</tool_call>", {"", {{"b", "{\"t\":\"</b> é\"}"}}}},
      {"<tool_call>not json</tool_call>!", {"<tool_call>not json</tool_call>!", {}}},
      {"<tool_call>{\"arguments\":{}}</tool_call>", {"<tool_call>{\"arguments\":{}}</tool_call>", {}}},
      {"<tool_call>{\"name\":\"cut\",\"arguments\":{\"a\":1}}", {"", {{"cut", "{\"a\":1}"}}}},  // the end tag is missing
      {"<tool_call>{\"name\":\"cut\",\"argu", {"<tool_call>{\"name\":\"cut\",\"argu", {}}},      // so is more
  };
  for (const auto& c : cases) {
    std::vector<std::string> bytes;
    for (const char ch : c.text) bytes.emplace_back(1, ch);
    EXPECT_EQ(Parse(bytes), c.expected) << c.text;
    for (size_t cut = 0; cut <= c.text.size(); ++cut) {
      EXPECT_EQ(Parse({c.text.substr(0, cut), c.text.substr(cut)}), c.expected) << c.text << " cut at " << cut;
    }
  }
}

TEST(ToolParser, ReadsAForcedListOfCalls) {
  const auto calls = ParseRequiredCalls(R"([{"name":"a","parameters":{"x":1}},{"name":"b","parameters":{}}])");
  ASSERT_EQ(calls.size(), 2u);
  EXPECT_EQ(calls[0].name, "a");
  EXPECT_EQ(calls[0].arguments, R"({"x":1})");
  EXPECT_NE(calls[0].id, calls[1].id);
  EXPECT_TRUE(ParseRequiredCalls(R"([{"name":"a","para)").empty());
  EXPECT_TRUE(ParseRequiredCalls("{}").empty());
}

}  // namespace
}  // namespace qwen::server
