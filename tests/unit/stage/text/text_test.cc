// Goal: the text room does what transformers does, with no Python at hand: tests/data/text/expected.json holds what
// transformers 5.17.0 answered for tests/data/text/tokenizer.json (make.py there). Streaming and grammars are checked
// against oracles written here.
#include <gtest/gtest.h>

#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>

#include "stage/text/chat_template.h"
#include "stage/text/constraint.h"
#include "stage/text/detokenizer.h"
#include "stage/text/tokenizer.h"

namespace qwen::text {
namespace {

using Json = nlohmann::ordered_json;

const std::string kData = std::string(QP_SOURCE_DIR) + "/tests/data/text";

const Json& Expected() {
  static const Json expected = Json::parse(std::ifstream(kData + "/expected.json"));
  return expected;
}

const Tokenizer& Tiny() {
  static const std::unique_ptr<Tokenizer> tokenizer = [] {
    auto loaded = Tokenizer::Load(kData);
    QP_CHECK(loaded.ok()) << loaded.status().ToString();
    return std::move(loaded).value();
  }();
  return *tokenizer;
}

int32_t Id(std::string_view token) {
  const auto id = Tiny().TokenToId(token);
  QP_CHECK(id.has_value()) << token;
  return *id;
}

TEST(Tokenizer, EncodesEveryTextToTheIdsOfTransformers) {
  ASSERT_GT(Expected()["encoded"].size(), 100u);
  for (const Json& entry : Expected()["encoded"]) {
    const auto ids = Tiny().Encode(entry["text"].get<std::string>(), false);
    ASSERT_TRUE(ids.ok()) << ids.status().ToString();
    EXPECT_EQ(*ids, entry["ids"].get<std::vector<int32_t>>()) << entry["text"];
  }
}

TEST(Tokenizer, DecodesArbitraryIdsToTheTextOfTransformers) {
  for (const Json& entry : Expected()["decoded"]) {
    const auto text = Tiny().Decode(entry["ids"].get<std::vector<int32_t>>(), entry["skip"]);
    ASSERT_TRUE(text.ok());
    EXPECT_EQ(*text, entry["text"].get<std::string>()) << entry["ids"];
  }
}

TEST(Tokenizer, KnowsItsVocabularyTheControlTokensAndNothingElse) {
  const int32_t size = Tiny().size();
  EXPECT_EQ(Tiny().IdToToken(size - 1), "</think>");
  EXPECT_FALSE(Tiny().IsSpecial(size - 1)) << "think tokens are added but stay in the text";
  EXPECT_TRUE(Tiny().IsSpecial(Id("<|im_end|>")));
  EXPECT_EQ(Tiny().TokenBytes(Id("<|im_end|>")), "<|im_end|>");
  EXPECT_EQ(Tiny().TokenBytes(Id("\u0120")), " ");
  EXPECT_EQ(Tiny().TokenBytes(Id("\u00e4")), "\xe4") << "half a character is a byte";
  for (const int32_t id : {-1, size, size + 1000, INT32_MAX, INT32_MIN}) {
    EXPECT_EQ(Tiny().IdToToken(id), "");
    EXPECT_EQ(Tiny().TokenBytes(id), "");
    EXPECT_FALSE(Tiny().IsSpecial(id));
    EXPECT_EQ(*Tiny().Decode(std::vector<int32_t>{Id("a"), id, Id("b")}, false), "ab");
  }
  EXPECT_EQ(Tiny().TokenToId("no such token"), std::nullopt);
}

TEST(Tokenizer, RefusesWhatItCannotRead) {
  EXPECT_EQ(Tokenizer::Load("/nowhere").status().code(), StatusCode::kNotFound);
  for (const std::string json : {"", "{", "[]", "{\"model\": 1}", "\xff"}) {
    EXPECT_EQ(Tokenizer::FromJson(json).status().code(), StatusCode::kInvalidArgument) << json;
  }
  EXPECT_EQ(Tiny().Encode("\xff\xfe", false).status().code(), StatusCode::kInvalidArgument);
}

TEST(Tokenizer, AnswersManyThreadsAtOnceAsItAnswersOne) {
  const std::string text = "The quick brown fox, 你好 123 <|im_end|>";
  const std::vector<int32_t> alone = *Tiny().Encode(text, false);
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 200; ++i) wrong += *Tiny().Encode(text, false) != alone;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST(Detokenizer, StreamedPiecesAddUpToTheWholeDecode) {
  for (const Json& entry : Expected()["decoded"]) {
    Detokenizer detokenizer(Tiny(), entry["skip"]);
    std::string text;
    for (const int32_t id : entry["ids"].get<std::vector<int32_t>>()) text += detokenizer.Push(id);
    EXPECT_EQ(text + detokenizer.Finish(), entry["text"].get<std::string>()) << entry["ids"];
  }
}

TEST(Utf8Stream, GivesEveryCharacterWholeAtWhateverByteItIsCut) {
  const std::string text = "aé漢😀\u0301\u200d👩‍👩‍👧 \uffff\U0010ffff z";
  for (size_t cut = 0; cut <= text.size(); ++cut) {
    for (size_t second = cut; second <= text.size(); ++second) {
      Utf8Stream stream;
      std::string out;
      for (const auto& [from, to] : {std::pair{size_t{0}, cut}, {cut, second}, {second, text.size()}}) {
        const std::string piece = stream.Push(std::string_view(text).substr(from, to - from));
        EXPECT_EQ(piece.find("\uFFFD"), std::string::npos);
        out += piece;
      }
      EXPECT_EQ(out, text);
      EXPECT_EQ(stream.Finish(), "");
    }
  }
}

// Examples of the Unicode Standard 15, tables 3-8 to 3-11, and ends of input.
TEST(Utf8Stream, ReplacesEachMaximalIllFormedPartOnce) {
  const std::string r = "\uFFFD";
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"\xC0\xAF\xE0\x80\xBF\xF0\x81\x82"
       "A",
       r + r + r + r + r + r + r + r + "A"},
      {"\xED\xA0\x80\xED\xBF\xBF\xED\xAF"
       "A",
       r + r + r + r + r + r + r + r + "A"},
      {"\xF4\x91\x92\x93\xFF"
       "A\x80\xBF"
       "B",
       r + r + r + r + r + "A" + r + r + "B"},
      {"\xE1\x80\xE2\xF0\x91\x92\xF1\xBF"
       "A",
       r + r + r + r + "A"},
      {"a\xE6\xBC", "a" + r},
      {"\xF0\x9F\x98", r},
      {"\xE6\xE6\xBC\xA2", r + "漢"},
  };
  for (const auto& [bytes, expected] : cases) {
    Utf8Stream stream;
    std::string out;
    for (const char byte : bytes) out += stream.Push(std::string_view(&byte, 1));
    EXPECT_EQ(out + stream.Finish(), expected);
    EXPECT_EQ(stream.Push("b"), "b") << "a finished stream is as new";
  }
}

TEST(ChatTemplate, RendersConversationsAsTransformersDoes) {
  const auto chat_template = ChatTemplate::FromSource(Expected()["template"].get<std::string>());
  ASSERT_TRUE(chat_template.ok()) << chat_template.status().ToString();
  for (const Json& entry : Expected()["rendered"]) {
    const auto text = (*chat_template)->Render(entry["context"].get<std::string>());
    ASSERT_TRUE(text.ok()) << text.status().ToString();
    EXPECT_EQ(*text, entry["text"].get<std::string>());
  }
}

Result<std::string> RenderOnce(std::string_view source, std::string_view context) {
  ASSIGN_OR_RETURN(const auto chat_template, ChatTemplate::FromSource(source));
  return chat_template->Render(context);
}

TEST(ChatTemplate, CarriesTheMessageOfRaiseExceptionAlone) {
  const auto text =
      RenderOnce("{% if messages[0].role != 'system' %}{{ raise_exception('No system, \"sir\"') }}{% endif %}",
                 R"({"messages": [{"role": "user"}]})");
  EXPECT_EQ(text.status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(text.status().message(), "No system, \"sir\"");
}

TEST(ChatTemplate, RefusesAContextThatIsNoConversation) {
  for (const std::string context :
       {"", "[]", "{}", R"({"messages": []})", R"({"messages": "x"})", "{\"messages\": [1}"}) {
    EXPECT_EQ(RenderOnce("x", context).status().code(), StatusCode::kInvalidArgument) << context;
  }
  std::string deep(100'000, '[');
  EXPECT_EQ(RenderOnce("x", "{\"messages\": " + deep).status().code(), StatusCode::kInvalidArgument);
}

TEST(ChatTemplate, StopsATemplateThatNeverEndsAndAPromptThatIsTooLong) {
  const std::string context = R"({"messages": [1]})";
  const auto endless = RenderOnce(
      "{% for a in range(9999) %}{% for b in range(99999) %}{% set c = a + b %}{% endfor %}{% endfor %}", context);
  EXPECT_EQ(endless.status().code(), StatusCode::kResourceExhausted) << endless.status().ToString();
  const auto large = RenderOnce("{% set a = 'x' * 100000 %}{% for i in range(1000) %}{{ a }}{% endfor %}", context);
  EXPECT_EQ(large.status().code(), StatusCode::kResourceExhausted) << large.status().ToString();
  const auto recursive = RenderOnce("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", context);
  EXPECT_FALSE(recursive.ok());
}

// Drives a constraint with random choices among what the mask allows and returns the text.
class Walk {
 public:
  Walk(const Tokenizer& tokenizer, TokenConstraint& constraint, int32_t columns)
      : tokenizer_(tokenizer), constraint_(constraint), columns_(columns) {}
  std::vector<int32_t> Allowed() {
    std::vector<uint32_t> mask((columns_ + 31) / 32, 0);
    constraint_.FillMask(mask);
    std::vector<int32_t> ids;
    for (size_t i = 0; i < mask.size() * 32; ++i) {
      if (mask[i / 32] >> (i % 32) & 1) ids.push_back(static_cast<int32_t>(i));
    }
    return ids;
  }
  // Up to `steps` tokens; true when an end-of-sequence id was taken.
  bool Run(std::mt19937& rng, int steps, std::string& text) {
    for (int step = 0; step < steps; ++step) {
      const std::vector<int32_t> allowed = Allowed();
      EXPECT_FALSE(allowed.empty());
      if (allowed.empty()) return false;
      // Prefer ending, closing and quoting, so that most walks end.
      std::vector<int32_t> closing;
      for (const int32_t id : allowed) {
        const std::string bytes = tokenizer_.TokenBytes(id);
        if (tokenizer_.IsSpecial(id) || bytes == "}" || bytes == "]" || bytes == "\"") closing.push_back(id);
      }
      const auto& pool = !closing.empty() && rng() % 3 == 0 ? closing : allowed;
      const int32_t id = pool[rng() % pool.size()];
      EXPECT_LT(id, tokenizer_.size()) << "padding columns are never allowed";
      const Status accepted = constraint_.Accept(id);
      EXPECT_TRUE(accepted.ok()) << accepted.ToString() << " " << id << " after " << text;
      if (tokenizer_.IsSpecial(id)) return true;
      text += tokenizer_.TokenBytes(id);
    }
    return false;
  }

 private:
  const Tokenizer& tokenizer_;
  TokenConstraint& constraint_;
  const int32_t columns_;
};

class ConstraintTest : public ::testing::Test {
 protected:
  ConstraintTest() {
    auto made = ConstraintCompiler::Load(Tiny(), kData, Columns(), {Id("<|im_end|>"), Id("<|endoftext|>")});
    QP_CHECK(made.ok()) << made.status().ToString();
    compiler_ = std::move(made).value();
  }
  static int32_t Columns() { return Tiny().size() + 70; }  // padded, and no multiple of 32
  std::unique_ptr<ConstraintCompiler> compiler_;
  std::mt19937 rng_{20260731};
};

TEST_F(ConstraintTest, EveryFinishedWalkThroughASchemaIsAValidDocument) {
  const auto schema = R"({"type": "object", "properties": {"digit": {"type": "integer", "minimum": 0, "maximum": 9},
      "sure": {"type": "boolean"}, "tags": {"type": "array", "items": {"enum": ["a", "b\"c", "漢"]}, "maxItems": 3}},
      "required": ["digit", "sure"], "additionalProperties": false})";
  int finished = 0;
  for (int round = 0; round < 60; ++round) {
    auto constraint = compiler_->JsonSchema(schema);
    ASSERT_TRUE(constraint.ok()) << constraint.status().ToString();
    std::string text;
    if (!Walk(Tiny(), **constraint, Columns()).Run(rng_, 400, text)) continue;
    ++finished;
    EXPECT_TRUE((*constraint)->finished());
    const Json value = Json::parse(text, nullptr, false);
    ASSERT_TRUE(value.is_object()) << text;
    ASSERT_TRUE(value.contains("digit") && value["digit"].is_number_integer()) << text;
    EXPECT_TRUE(value["digit"] >= 0 && value["digit"] <= 9) << text;
    ASSERT_TRUE(value.contains("sure") && value["sure"].is_boolean()) << text;
    for (const auto& [key, item] : value.items()) {
      EXPECT_TRUE(key == "digit" || key == "sure" || key == "tags") << text;
      if (key == "tags") {
        EXPECT_LE(item.size(), 3u) << text;
        for (const Json& tag : item) EXPECT_TRUE(tag == "a" || tag == "b\"c" || tag == "漢") << text;
      }
    }
  }
  EXPECT_GE(finished, 30);
}

TEST_F(ConstraintTest, AnyJsonObjectIsAnObject) {
  int finished = 0;
  for (int round = 0; round < 40; ++round) {
    auto constraint = compiler_->AnyJsonObject();
    ASSERT_TRUE(constraint.ok());
    std::string text;
    if (!Walk(Tiny(), **constraint, Columns()).Run(rng_, 200, text)) continue;
    ++finished;
    EXPECT_TRUE(Json::parse(text, nullptr, false).is_object()) << text;
  }
  EXPECT_GE(finished, 5);
}

TEST_F(ConstraintTest, ARegexAllowsExactlyTheTokensThatCanStillMatch) {
  auto constraint = compiler_->Regex("(yes|no), [0-9]{2}");
  ASSERT_TRUE(constraint.ok()) << constraint.status().ToString();
  Walk walk(Tiny(), **constraint, Columns());
  // Oracle: a token may start the output iff its bytes are a prefix of "yes, dd" or "no, dd".
  const auto can_start = [](const std::string& bytes) {
    for (const std::string shape : {"yes, 00", "no, 00"}) {
      if (bytes.empty() || bytes.size() > shape.size()) continue;
      bool same = true;
      for (size_t i = 0; i < bytes.size(); ++i) {
        same &= shape[i] == '0' ? (bytes[i] >= '0' && bytes[i] <= '9') : bytes[i] == shape[i];
      }
      if (same) return true;
    }
    return false;
  };
  std::vector<int32_t> expected;
  for (int32_t id = 0; id < Tiny().size(); ++id) {
    if (!Tiny().IsSpecial(id) && can_start(Tiny().TokenBytes(id))) expected.push_back(id);
  }
  EXPECT_EQ(walk.Allowed(), expected);
  const auto ids = Tiny().Encode("no, 42", false);
  ASSERT_TRUE(ids.ok());
  for (const int32_t id : *ids) ASSERT_TRUE((*constraint)->Accept(id).ok());
  EXPECT_EQ(walk.Allowed(), (std::vector<int32_t>{Id("<|endoftext|>"), Id("<|im_end|>")})) << "only the end is left";
  EXPECT_TRUE((*constraint)->Accept(Id("<|im_end|>")).ok());
  EXPECT_TRUE((*constraint)->finished());
}

TEST_F(ConstraintTest, ATokenThatIsNotAllowedIsRefusedAndChangesNothing) {
  auto constraint = compiler_->Regex("ab");
  ASSERT_TRUE(constraint.ok());
  Walk walk(Tiny(), **constraint, Columns());
  const auto before = walk.Allowed();
  for (const int32_t id : {Id("z"), Id("<|im_end|>"), Id("<think>"), -1, Tiny().size(), Columns() - 1, INT32_MAX}) {
    EXPECT_EQ((*constraint)->Accept(id).code(), StatusCode::kInvalidArgument) << id;
  }
  EXPECT_EQ(walk.Allowed(), before);
  EXPECT_TRUE((*constraint)->Accept(Id("a")).ok());
  EXPECT_TRUE((*constraint)->Accept(Id("b")).ok());
}

TEST_F(ConstraintTest, ControlTokensAreNeverTextInsideAString) {
  auto constraint = compiler_->JsonSchema(R"({"type": "string"})");
  ASSERT_TRUE(constraint.ok());
  ASSERT_TRUE((*constraint)->Accept(Id("\"")).ok());
  Walk walk(Tiny(), **constraint, Columns());
  for (const int32_t id : walk.Allowed()) {
    const std::string name = Tiny().IdToToken(id);
    EXPECT_FALSE(name.starts_with("<|") && name.ends_with("|>")) << name;
    EXPECT_NE(name, "</tool_call>");
    EXPECT_NE(name, "<think>");
  }
}

TEST_F(ConstraintTest, ALarkGrammarMayNameAControlToken) {
  auto constraint = compiler_->Lark("start: <tool_call> /[a-z]+/ </tool_call>");
  ASSERT_TRUE(constraint.ok()) << constraint.status().ToString();
  Walk walk(Tiny(), **constraint, Columns());
  EXPECT_EQ(walk.Allowed(), std::vector<int32_t>{Id("<tool_call>")});
  EXPECT_TRUE((*constraint)->Accept(Id("<tool_call>")).ok());
  EXPECT_TRUE((*constraint)->Accept(Id("a")).ok());
  EXPECT_TRUE((*constraint)->Accept(Id("</tool_call>")).ok());
  EXPECT_EQ(walk.Allowed(), (std::vector<int32_t>{Id("<|endoftext|>"), Id("<|im_end|>")}));
}

TEST_F(ConstraintTest, MalformedAndHostileGrammarsAreRefusedNotCrashedOn) {
  EXPECT_EQ(compiler_->JsonSchema("{").status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(compiler_->JsonSchema(R"({"type": "no such type"})").status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(compiler_->JsonSchema(R"({"$ref": "https://example.com/x"})").status().code(),
            StatusCode::kInvalidArgument);
  EXPECT_EQ(compiler_->Regex("(").status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(compiler_->Regex("\xff").status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(compiler_->Lark("start: nothing").status().code(), StatusCode::kInvalidArgument);
  const std::string open(200'000, '(');
  EXPECT_FALSE(compiler_->Regex(open + "a" + std::string(open.size(), ')')).ok());
  EXPECT_FALSE(compiler_->Regex(std::string(200'000, '[')).ok());
  EXPECT_FALSE(compiler_->Lark("start: " + open).ok());
  EXPECT_FALSE(compiler_->Lark("start: " + std::string(200'000, '[')).ok());
  EXPECT_EQ(compiler_->Regex(std::string(2 << 20, 'a')).status().code(), StatusCode::kResourceExhausted);
  std::string deep;
  for (int i = 0; i < 100'000; ++i) deep += R"({"items":)";
  EXPECT_FALSE(compiler_->JsonSchema(deep).ok());
}

// A model that falls into blanks would fill its answer with them, as far as the grammar lets it.
TEST_F(ConstraintTest, BlanksBetweenJsonTokensAreAllowedButEnd) {
  auto constraint = compiler_->JsonSchema(R"({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})");
  ASSERT_TRUE(constraint.ok()) << constraint.status().ToString();
  ASSERT_TRUE((*constraint)->Accept(Id("{")).ok());
  for (int i = 0; i < 32; ++i) ASSERT_TRUE((*constraint)->Accept(*Tiny().TokenToId(i == 0 ? "\u010A" : "\u0120")).ok()) << i;
  for (const int32_t id : Walk(Tiny(), **constraint, Columns()).Allowed()) EXPECT_EQ(Tiny().TokenBytes(id)[0], '"');
  for (const char* token : {"\"", "a", "\"", ":"}) ASSERT_TRUE((*constraint)->Accept(Id(token)).ok()) << token;
}

// Lexers are built lazily: what cannot be afforded must be refused with the request, not end its answer at the first
// token, by the thread that serves everybody.
TEST_F(ConstraintTest, ARepeatThatCannotBeAffordedIsRefusedAndOneThatCanIsServed) {
  EXPECT_EQ(compiler_->Regex("yes(a{1000}){1000}").status().code(), StatusCode::kInvalidArgument);
  auto affordable = compiler_->Regex("(a{10}){10}");
  ASSERT_TRUE(affordable.ok()) << affordable.status().ToString();
  for (int i = 0; i < 100; ++i) ASSERT_TRUE((*affordable)->Accept(Id("a")).ok()) << i;
  EXPECT_EQ(Walk(Tiny(), **affordable, Columns()).Allowed(), (std::vector<int32_t>{Id("<|endoftext|>"), Id("<|im_end|>")}));
}

TEST_F(ConstraintTest, ARecursiveSchemaCompiles) {
  auto constraint = compiler_->JsonSchema(
      R"({"$defs": {"n": {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"})");
  ASSERT_TRUE(constraint.ok()) << constraint.status().ToString();
  const auto ids = Tiny().Encode(R"({"next": {"next": {}}})", false);
  ASSERT_TRUE(ids.ok());
  for (const int32_t id : *ids) {
    EXPECT_TRUE((*constraint)->Accept(id).ok()) << Tiny().IdToToken(id);
  }
}

TEST(ConstraintCompiler, RefusesColumnsAndEndsThatDoNotFitTheTokenizer) {
  const int32_t size = Tiny().size();
  EXPECT_FALSE(ConstraintCompiler::Load(Tiny(), kData, size - 1, {Id("<|im_end|>")}).ok());
  EXPECT_FALSE(ConstraintCompiler::Load(Tiny(), kData, size, {}).ok());
  EXPECT_FALSE(ConstraintCompiler::Load(Tiny(), kData, size, {size}).ok());
  EXPECT_FALSE(ConstraintCompiler::Load(Tiny(), kData, size, {-1}).ok());
}

TEST_F(ConstraintTest, OutlivesItsCompiler) {
  auto constraint = compiler_->Regex("a+");
  ASSERT_TRUE(constraint.ok());
  compiler_.reset();
  EXPECT_TRUE((*constraint)->Accept(Id("a")).ok());
}

}  // namespace
}  // namespace qwen::text
