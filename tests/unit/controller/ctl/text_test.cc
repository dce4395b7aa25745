// Goal: what qwenctl reads and prints: YAML, sizes, tables, metrics, event streams, URLs, bench figures.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "controller/ctl/bench_command.h"
#include "controller/ctl/chat_client.h"
#include "controller/ctl/http_client.h"
#include "controller/ctl/manifest.h"
#include "controller/ctl/metrics_text.h"
#include "controller/ctl/plan_command.h"
#include "controller/ctl/table.h"
#include "controller/ctl/units.h"

namespace qwen::ctl {
namespace {

TEST(Yaml, PlainScalarsHaveTypesAndQuotedOnesAreText) {
  const auto json = YamlToJson("a: 4\nb: '4'\nc: true\nd: \"true\"\ne: 1.5\nf: ~\ng: v1alpha1\nh: [1, x]\ni: {j: -3}\nk: 2e3\nl: ''\nm: 0x10\n");
  ASSERT_TRUE(json.ok()) << json.status().ToString();
  EXPECT_EQ(nlohmann::json::parse(*json), nlohmann::json::parse(R"({"a":4,"b":"4","c":true,"d":"true","e":1.5,"f":null,"g":"v1alpha1","h":[1,"x"],
    "i":{"j":-3},"k":2000.0,"l":"","m":"0x10"})"));
  EXPECT_EQ(*YamlToJson("{\"a\": 1}"), "{\"a\":1}") << "JSON is YAML";
}

TEST(Yaml, WhatIsWrongIsNamedWithItsPlace) {
  EXPECT_NE(YamlToJson("a: 1\nb: [1, 2\n").status().message().find("line"), std::string::npos);
  EXPECT_EQ(YamlToJson("a: 1\na: 2\n").status().message(), "manifest: key a appears twice at line 2, column 1");
  EXPECT_EQ(YamlToJson("a: 1\n---\nb: 2\n").status().message(), "manifest: must hold one document, found 2");
  EXPECT_NE(YamlToJson(std::string(100, '[')).status().code(), StatusCode::kOk);
  std::string deep;
  for (int i = 0; i < 40; ++i) deep += "[";
  deep += std::string(40, ']');
  EXPECT_NE(YamlToJson(deep).status().message().find("deeper than 32"), std::string::npos);
  // "Billion laughs": ten levels of ten aliases each.
  std::string bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n";
  for (int i = 1; i < 10; ++i) {
    const std::string p = "*a" + std::to_string(i - 1);
    bomb += "a" + std::to_string(i) + ": &a" + std::to_string(i) + " [" + p + "," + p + "," + p + "," + p + "," + p + "," + p + "," + p + "," + p + "," + p + "," + p + "]\n";
  }
  EXPECT_NE(YamlToJson(bomb).status().message().find("more than 100,000 values"), std::string::npos);
  EXPECT_EQ(YamlToJson(std::string((1 << 20) + 1, ' ')).status().message(), "manifest: larger than 1 MiB");
}

TEST(Units, SizesAreReadAndWritten) {
  EXPECT_EQ(*ParseBytes("141GB"), 141'000'000'000);
  EXPECT_EQ(*ParseBytes("80 GiB"), 85899345920);
  EXPECT_EQ(*ParseBytes("1.5MiB"), 1572864);
  EXPECT_EQ(*ParseBytes("1000"), 1000);
  for (const char* bad : {"", "GB", "-1GB", "12XB", "1GB x", "1e300GB"}) EXPECT_FALSE(ParseBytes(bad).ok()) << bad;
  EXPECT_EQ(FormatBytes(119.4e9), "119.4 GB");
  EXPECT_EQ(FormatBytes(8192), "8.19 KB");
  EXPECT_EQ(FormatBytes(12), "12 B");
  EXPECT_EQ(FormatCount(262144), "262,144");
  EXPECT_EQ(FormatCount(-1234), "-1,234");
  EXPECT_EQ(FormatCount(12), "12");
  EXPECT_EQ(FormatSeconds(0.0123), "12.3 ms");
  EXPECT_EQ(FormatSeconds(1.52), "1.52 s");
  EXPECT_EQ(FormatSeconds(2e-5), "20.0 us");
}

TEST(Table, ColumnsAreAligned) {
  Table table({"stage", "n"});
  table.Add({"0", "1,000"});
  table.Add({"all", ""});
  EXPECT_EQ(table.ToString(),
            "stage      n\n"
            "------------\n"
            "0      1,000\n"
            "all\n");
}

TEST(Metrics, SamplesAreFoundByNameAndLabels) {
  const Metrics m = Metrics::Parse(
      "# HELP x y\n# TYPE x counter\nx{stage=\"0\",phase=\"prefill\"} 1.5\nx{stage=\"0\",phase=\"decode\"} 2\r\ny 7 1700000000\n"
      "z{a=\"q\\\"\\\\\\n}\",b=\"2\"} NaN\nbroken{a=\"1\n{} 4\n\nlayers{begin=\"0\",end=\"3\"} 1");
  EXPECT_EQ(m.Sum("x"), 3.5);
  EXPECT_EQ(m.Sum("x", {{"phase", "decode"}}), 2.0);
  EXPECT_FALSE(m.Sum("x", {{"phase", "none"}}));
  EXPECT_FALSE(m.Sum("absent"));
  EXPECT_EQ(m.Sum("y"), 7.0);
  ASSERT_NE(m.First("z"), nullptr);
  EXPECT_EQ(m.First("z")->labels.at("a"), "q\"\\\n}");
  EXPECT_EQ(m.First("layers")->labels.at("end"), "3");
  EXPECT_EQ(m.First("broken"), nullptr);
}

TEST(Sse, EventsAreWholeHoweverTheBytesArrive) {
  const std::string stream = ": comment\ndata: {\"a\":1}\n\nevent: x\r\ndata:two\r\ndata: lines\r\n\r\n\n\ndata: [DONE]\n\n";
  for (const size_t piece : {size_t{1}, size_t{3}, stream.size()}) {
    SseParser parser;
    std::vector<std::string> events;
    for (size_t at = 0; at < stream.size(); at += piece)
      ASSERT_TRUE(parser.Feed(std::string_view(stream).substr(at, piece), [&](std::string_view data) { events.emplace_back(data); }).ok());
    EXPECT_EQ(events, (std::vector<std::string>{"{\"a\":1}", "two\nlines", "[DONE]"})) << piece;
  }
  SseParser parser;
  EXPECT_EQ(parser.Feed(std::string(SseParser::kEventBytesMax + 1, 'x'), [](std::string_view) {}).code(), StatusCode::kDataLoss);
}

TEST(Url, PartsAreTakenApart) {
  const auto url = ParseUrl("http://[::1]:8080/base/");
  ASSERT_TRUE(url.ok());
  EXPECT_EQ(url->host, "::1");
  EXPECT_EQ(url->port, 8080);
  EXPECT_EQ(url->prefix, "/base");
  EXPECT_EQ(ParseUrl("http://h")->port, 80);
  for (const char* bad : {"https://h", "h:80", "http://", "http://h:0", "http://h:65536", "http://h:8x", "http://[::1", "http://h /x", "http://h/\r\nX: y"})
    EXPECT_FALSE(ParseUrl(bad).ok()) << bad;
}

ChatResult Answer(double first, std::vector<double> gaps, int64_t tokens) {
  ChatResult r;
  r.first_token_seconds = first;
  r.total_seconds = first;
  for (const double gap : gaps) r.total_seconds += gap;
  r.gaps_seconds = std::move(gaps);
  r.prompt_tokens = 10;
  r.completion_tokens = tokens;
  return r;
}

TEST(Bench, FiguresOfAPointComeFromItsAnswers) {
  EXPECT_EQ(Percentile({3, 1, 2}, 0.5), 2);
  EXPECT_EQ(Percentile({1, 2, 3, 4}, 0.5), 2);
  EXPECT_EQ(Percentile({1, 2, 3, 4}, 0.99), 4);
  EXPECT_EQ(Percentile({}, 0.5), 0);
  std::vector<Result<ChatResult>> answers;
  answers.push_back(Answer(0.1, {0.02, 0.04}, 3));
  answers.push_back(UnavailableError("gone"));
  answers.push_back(Answer(0.3, {0.06}, 2));
  const BenchPoint p = Summarise(2, 2.0, answers);
  EXPECT_EQ(p.requests, 3);
  EXPECT_EQ(p.failures, 1);
  EXPECT_EQ(p.first_error, "gone");
  EXPECT_EQ(p.output_tokens_per_second(), 2.5);
  EXPECT_EQ(p.first_token_p50, 0.1);
  EXPECT_EQ(p.first_token_p99, 0.3);
  EXPECT_EQ(p.gap_p50, 0.04);
  EXPECT_NE(BenchTable({p}).find("2.5"), std::string::npos);
  const auto json = nlohmann::json::parse(BenchJson({p}, "http://h", 128, 64));
  EXPECT_EQ(json["points"][0]["clients"], 2);
  EXPECT_EQ(json["points"][0]["output_tokens_per_second"], 2.5);
  const std::string svg = BenchSvg({p, Summarise(4, 1.0, answers)});
  EXPECT_TRUE(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
  EXPECT_NE(svg.find(">5</text>"), std::string::npos) << "5 tokens/s at the second point";
  EXPECT_DOUBLE_EQ(Answer(0.5, {1, 1}, 5).tokens_per_second(), 2.0);  // 4 tokens after the first, in 2 s
}

TEST(Plan, TheTextNamesEveryStageAndSaysWhatDoesNotFit) {
  api::Spec spec;
  spec.stages.count = 4;
  spec.stages.balance = contract::BalancePolicy::kEvenLayers;
  const auto shape = *contract::NamedModelShape("Qwen3-VL-235B-A22B");
  const std::string fits = PlanText("m", shape, *plan::SizePipeline(spec, shape, 141'000'000'000), 141'000'000'000);
  for (const char* part : {"m: 94 layers on 4 stages", "0:24", "24:48", "48:71", "71:94", "119.4 GB", "49,152", "47,104", "192,512", "471.3 GB", "yes"})
    EXPECT_NE(fits.find(part), std::string::npos) << part << "\n" << fits;
  EXPECT_EQ(fits.find("NO"), std::string::npos);
  const std::string too_big = PlanText("m", shape, *plan::SizePipeline(spec, shape, 80'000'000'000), 80'000'000'000);
  EXPECT_NE(too_big.find("NO"), std::string::npos);
  EXPECT_NE(too_big.find("does not fit"), std::string::npos);
  EXPECT_NE(PlanText("m", shape, *plan::SizePipeline(spec, shape, std::nullopt), std::nullopt).find("--gpu-memory"), std::string::npos);
}

}  // namespace
}  // namespace qwen::ctl
