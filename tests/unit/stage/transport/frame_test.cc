// Frames: what was put in comes out whatever the pieces it arrives in; everything else is refused by name, and nothing is
// allocated for a length that was only announced.
#include "stage/transport/frame.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "stage/base/bytes.h"

namespace qwen::transport {
namespace {

std::span<const std::byte> View(const std::string& text) { return std::as_bytes(std::span(text.data(), text.size())); }

// A bitwise CRC-32C, sharing no table with the one under test.
uint32_t SlowCrc32c(const std::string& bytes) {
  uint32_t crc = ~0u;
  for (const char c : bytes) {
    crc ^= static_cast<uint8_t>(c);
    for (int bit = 0; bit < 8; ++bit) crc = (crc & 1) ? (crc >> 1) ^ 0x82F63B78u : crc >> 1;
  }
  return ~crc;
}

// docs/wire.md by hand.
std::string FrameByHand(const std::string& payload) {
  std::string head = "QWF1";
  head += std::string("\x01\0\0\0", 4);
  for (int shift = 0; shift < 32; shift += 8) head += static_cast<char>(payload.size() >> shift);
  const uint32_t crc = SlowCrc32c(head + payload);
  for (int shift = 0; shift < 32; shift += 8) head += static_cast<char>(crc >> shift);
  return head + payload;
}

TEST(Frame, IsTheOneOfTheDocument) {
  EXPECT_EQ(EncodeFrame(std::string("hidden states")), FrameByHand("hidden states"));
  EXPECT_EQ(EncodeFrame(std::string()), FrameByHand(""));
}

TEST(Frame, ComesOutWholeWhateverThePiecesItArrivesIn) {
  std::mt19937 random(7);
  std::vector<std::string> payloads;
  std::string stream;
  for (int i = 0; i < 200; ++i) {
    std::string payload(random() % (i % 10 == 0 ? 70'000 : 300), '\0');
    for (char& c : payload) c = static_cast<char>(random());
    stream += FrameByHand(payload);
    payloads.push_back(std::move(payload));
  }
  FrameParser parser;
  size_t at = 0, found = 0;
  while (at < stream.size()) {
    const size_t count = std::min<size_t>(stream.size() - at, 1 + random() % 9000);
    parser.Feed(View(stream).subspan(at, count));
    at += count;
    for (;;) {
      auto payload = parser.Next();
      ASSERT_TRUE(payload.ok()) << payload.status().ToString();
      if (!payload->has_value()) break;
      ASSERT_LT(found, payloads.size());
      EXPECT_EQ(**payload, payloads[found++]);
    }
  }
  EXPECT_EQ(found, payloads.size());
  EXPECT_EQ(parser.buffered_bytes(), 0u);
}

TEST(Frame, AnyFlippedBitIsFound) {
  const std::string good = FrameByHand("sixteen tokens.");
  for (size_t byte = 0; byte < good.size(); ++byte) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string bad = good;
      bad[byte] = static_cast<char>(bad[byte] ^ (1 << bit));
      FrameParser parser;
      parser.Feed(View(bad));
      auto payload = parser.Next();
      // A flipped length may also ask for bytes that never come; it must not come out as a payload.
      if (payload.ok()) {
        EXPECT_FALSE(payload->has_value()) << byte << "." << bit;
        EXPECT_TRUE(byte >= 8 && byte < 12) << byte << "." << bit;
      } else {
        EXPECT_EQ(payload.status().code(), StatusCode::kDataLoss);
      }
    }
  }
}

TEST(Frame, ALengthBeyondTheBoundIsRefusedBeforeItsBytesArrive) {
  std::string header = "QWF1" + std::string("\x01\0\0\0\xff\xff\xff\xff\0\0\0\0", 12);
  FrameParser parser(1000);
  parser.Feed(View(header));
  auto payload = parser.Next();
  ASSERT_FALSE(payload.ok());
  EXPECT_EQ(payload.status().message(), "frame: 4294967295 bytes, at most 1000");
}

TEST(Frame, ABrokenStreamStaysBroken) {
  FrameParser parser;
  parser.Feed(View(std::string("GET / HTTP/1.1\r\n\r\n")));
  EXPECT_EQ(parser.Next().status().message(), "frame: wrong magic");
  parser.Feed(View(FrameByHand("fine")));
  EXPECT_EQ(parser.Next().status().message(), "frame: wrong magic");
}

}  // namespace
}  // namespace qwen::transport
