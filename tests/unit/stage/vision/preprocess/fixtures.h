// What the tests of this folder share: fixtures/ and expected.txt (written by make_fixtures.py from the references).
#pragma once
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <map>
#include <span>
#include <sstream>
#include <string>
#include <vector>

namespace qwen::preprocess::fixtures {

inline std::string Folder() { return std::string(QP_SOURCE_DIR) + "/tests/unit/stage/vision/preprocess/fixtures/"; }

inline std::vector<std::byte> Load(const std::string& name) {
  std::ifstream file(Folder() + name, std::ios::binary);
  EXPECT_TRUE(file.good()) << name;
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const auto view = std::as_bytes(std::span(bytes));
  return {view.begin(), view.end()};
}

// The fields of every line of expected.txt that starts with `kind`, without it.
inline std::vector<std::vector<std::string>> Expected(const std::string& kind) {
  std::ifstream file(Folder() + "expected.txt");
  std::vector<std::vector<std::string>> rows;
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::vector<std::string> fields{std::istream_iterator<std::string>(words), {}};
    if (!fields.empty() && fields[0] == kind) rows.emplace_back(fields.begin() + 1, fields.end());
  }
  EXPECT_FALSE(rows.empty()) << kind;
  return rows;
}

inline std::vector<int64_t> SplitNumbers(const std::string& text) {
  std::vector<int64_t> numbers;
  std::istringstream stream(text);
  for (std::string word; std::getline(stream, word, ',');) numbers.push_back(std::stoll(word));
  return numbers;
}

inline uint64_t Fnv1a(std::span<const uint8_t> bytes, uint64_t value = 0xCBF29CE484222325) {
  for (const uint8_t byte : bytes) value = (value ^ byte) * 0x100000001B3;
  return value;
}
inline std::string Hex(uint64_t value) {
  char text[17];
  std::snprintf(text, sizeof(text), "%016llx", static_cast<unsigned long long>(value));
  return text;
}

// The same bytes as lcg_pixels of make_fixtures.py.
inline std::vector<uint8_t> LcgPixels(size_t count, uint32_t seed) {
  std::vector<uint8_t> pixels(count);
  for (uint8_t& pixel : pixels) {
    seed = seed * 1664525 + 1013904223;
    pixel = static_cast<uint8_t>(seed >> 24);
  }
  return pixels;
}

}  // namespace qwen::preprocess::fixtures
