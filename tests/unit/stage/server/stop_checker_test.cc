// Goal: stop strings end the text at the same place however it is cut into pieces, and nothing that may belong to one is
// shown early. Method: every way to cut a text in two and into single bytes, against a search over the whole text.
#include "stage/server/stop_checker.h"

#include <gtest/gtest.h>

namespace qwen::server {
namespace {

struct Outcome {
  std::string text, match;
  bool operator==(const Outcome&) const = default;
};

Outcome RunPieces(const std::vector<std::string>& pieces, const std::vector<std::string>& stops, bool include) {
  StopChecker checker(stops, include);
  Outcome outcome;
  for (const auto& piece : pieces) outcome.text += checker.Push(piece);
  outcome.text += checker.Finish();
  if (checker.stopped()) outcome.match = checker.match();
  return outcome;
}

// Slow and obvious: grow the text byte by byte; the first prefix that ends in a stop string is where it stops.
Outcome Oracle(const std::string& text, const std::vector<std::string>& stops, bool include) {
  for (size_t end = 1; end <= text.size(); ++end) {
    std::string longest;
    for (const auto& stop : stops) {
      if (text.substr(0, end).ends_with(stop) && stop.size() > longest.size()) longest = stop;
    }
    if (!longest.empty()) return {text.substr(0, include ? end : end - longest.size()), longest};
  }
  return {text, ""};
}

TEST(StopChecker, EndsAtTheSamePlaceHoweverTheTextIsCut) {
  const std::vector<std::vector<std::string>> stop_sets = {
      {"\n\n"}, {"END"}, {"abab"}, {"aab", "ab"}, {"bcd", "cd", "d"}, {"abcd", "bc"}, {"é"}, {"x", "yy", "zzz"}, {"User:", "\nUser"}, {"aaa"}};
  const std::vector<std::string> texts = {"hello\n\nworld", "the END of it", "abaabab!", "aaaab", "abcd", "café au lait", "nothing here",
                                          "EN EN E END", "line\nUser: hi", "zzyyx", "aaaa", "END"};
  for (const auto& stops : stop_sets) {
    for (const auto& text : texts) {
      for (const bool include : {false, true}) {
        const Outcome expected = Oracle(text, stops, include);
        std::vector<std::string> bytes;
        for (const char c : text) bytes.emplace_back(1, c);
        EXPECT_EQ(RunPieces(bytes, stops, include), expected) << text << " / " << stops[0] << " bytewise";
        for (size_t cut = 0; cut <= text.size(); ++cut) {
          EXPECT_EQ(RunPieces({text.substr(0, cut), text.substr(cut)}, stops, include), expected) << text << " / " << stops[0] << " cut at " << cut;
        }
      }
    }
  }
}

TEST(StopChecker, NeverShowsWhatMayBeTheBeginningOfAStop) {
  StopChecker checker({"<END>", "STOP"}, false);
  EXPECT_EQ(checker.Push("abc<E"), "abc");
  EXPECT_EQ(checker.Push("N"), "");
  EXPECT_EQ(checker.Push("X"), "<ENX");  // it was not
  EXPECT_EQ(checker.Push("ST"), "");
  EXPECT_EQ(checker.Finish(), "ST");
  EXPECT_FALSE(checker.stopped());
}

TEST(StopChecker, SwallowsEverythingAfterTheMatch) {
  StopChecker checker({"."}, false);
  EXPECT_EQ(checker.Push("one. two"), "one");
  EXPECT_TRUE(checker.stopped());
  EXPECT_EQ(checker.match(), ".");
  EXPECT_EQ(checker.Push("three"), "");
  EXPECT_EQ(checker.Finish(), "");
}

}  // namespace
}  // namespace qwen::server
