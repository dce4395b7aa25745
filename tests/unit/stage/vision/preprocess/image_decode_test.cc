// Decoding against hashes that PIL computed (fixtures/expected.txt), and against files that want to do harm.
#include "stage/vision/preprocess/image_decode.h"

#include <gtest/gtest.h>

#include <random>

#include "stage/vision/preprocess/orientation.h"
#include "tests/unit/stage/vision/preprocess/fixtures.h"

namespace qwen::preprocess {
namespace {

using fixtures::Load;

TEST(ImageDecode, EveryFormatGivesThePixelsThatPilGives) {
  for (const auto& row : fixtures::Expected("image")) {
    const auto image = DecodeImage(Load(row[0]));
    ASSERT_TRUE(image.ok()) << row[0] << ": " << image.status().ToString();
    EXPECT_EQ(image->height, std::stoi(row[1])) << row[0];
    EXPECT_EQ(image->width, std::stoi(row[2])) << row[0];
    ASSERT_EQ(image->rgb.size(), size_t{3} * image->height * image->width) << row[0];
    EXPECT_EQ(fixtures::Hex(fixtures::Fnv1a(image->rgb)), row[3]) << row[0];
  }
}

TEST(ImageDecode, DropsAlphaInsteadOfBlending) {
  // The transparent WebP holds the same colours as the PNG of the same picture.
  EXPECT_EQ(DecodeImage(Load("rgba.png"))->rgb, DecodeImage(Load("lossless_alpha.webp"))->rgb);
}

TEST(ImageDecode, ClipsSixteenBitGrayAsPilDoes) {
  const auto image = DecodeImage(Load("gray16.png"));  // 0, 1, 2, ... 399
  for (int i = 0; i < 400; ++i) ASSERT_EQ(image->rgb[3 * i], std::min(i, 255)) << i;
}

TEST(ApplyOrientation, TurnsASmallPictureInAllEightWays) {
  // a b c
  // d e f   one letter a pixel; expected rows written by hand from the EXIF standard's "0th row / 0th column".
  const struct {
    int orientation;
    int32_t width;
    std::string pixels;
  } cases[] = {{1, 3, "abcdef"}, {2, 3, "cbafed"}, {3, 3, "fedcba"}, {4, 3, "defabc"}, {5, 2, "adbecf"},
               {6, 2, "daebfc"}, {7, 2, "fcebda"}, {8, 2, "cfbead"}, {0, 3, "abcdef"}, {9, 3, "abcdef"}};
  for (const auto& test : cases) {
    Image image{.width = 3, .height = 2, .rgb = {}};
    for (const char c : std::string("abcdef")) image.rgb.insert(image.rgb.end(), {uint8_t(c), uint8_t(c + 1), uint8_t(c + 2)});
    const Image turned = ApplyOrientation(image, test.orientation);
    EXPECT_EQ(turned.width, test.width) << test.orientation;
    EXPECT_EQ(turned.height, 6 / test.width) << test.orientation;
    std::string pixels;
    for (size_t i = 0; i < turned.rgb.size(); i += 3) {
      pixels += static_cast<char>(turned.rgb[i]);
      EXPECT_EQ(turned.rgb[i + 2], turned.rgb[i] + 2) << test.orientation;
    }
    EXPECT_EQ(pixels, test.pixels) << test.orientation;
  }
}

TEST(Orientation, ReadsBothByteOrdersAndIgnoresWhatIsNotOneInteger) {
  using std::string_literals::operator""s;
  const std::string little = "II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"s;
  const std::string big = "MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x08\0\0"s;
  EXPECT_EQ(OrientationFromExif(little), 6);
  EXPECT_EQ(OrientationFromExif("Exif\0\0"s + big), 8);
  EXPECT_EQ(OrientationFromExif("Exif\0\0Exif\0\0"s + big), 8);
  for (size_t length = 0; length < little.size() - 2; ++length) {
    EXPECT_EQ(OrientationFromExif(little.substr(0, length)), std::nullopt) << length;
  }
  std::string two_values = little;
  two_values[14] = 2;
  EXPECT_EQ(OrientationFromExif(two_values), std::nullopt);
  std::string text_type = little;
  text_type[12] = 2;
  EXPECT_EQ(OrientationFromExif(text_type), std::nullopt);
  std::string far_away = little;
  far_away[7] = '\x7f';  // the IFD at 2 GiB
  EXPECT_EQ(OrientationFromExif(far_away), std::nullopt);
}

TEST(Orientation, FallsBackToXmpOnlyWithoutExif) {
  using std::string_literals::operator""s;
  const std::string exif = "II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x01\0\0\0"s;
  EXPECT_EQ(Orientation("", R"(<rdf tiff:Orientation="7"/>)"), 7);
  EXPECT_EQ(Orientation("", "<tiff:Orientation>3</tiff:Orientation>"), 3);
  EXPECT_EQ(Orientation("", "tiff:Orientation tiff:Orientation=\""), 1);
  EXPECT_EQ(Orientation(exif, R"(tiff:Orientation="7")"), 1);
}

void ExpectRefused(std::span<const std::byte> bytes, const std::string& part, const DecodeLimits& limits = {}) {
  const auto image = DecodeImage(bytes, limits);
  ASSERT_FALSE(image.ok()) << part;
  EXPECT_EQ(image.status().code(), StatusCode::kInvalidArgument);
  EXPECT_NE(image.status().message().find(part), std::string::npos) << image.status().ToString();
}
std::span<const std::byte> Bytes(const std::string& text) { return std::as_bytes(std::span(text)); }

TEST(ImageDecode, RefusesOtherFormatsByName) {
  ExpectRefused({}, "not a PNG, JPEG or WebP");
  ExpectRefused(Bytes("GIF89a......"), "GIF");
  ExpectRefused(Bytes("BM.........."), "BMP");
  ExpectRefused(Bytes("<svg/>"), "not a PNG, JPEG or WebP");
  ExpectRefused(Bytes("RIFF....WAVE"), "not a PNG, JPEG or WebP");
}

TEST(ImageDecode, ChecksLimitsOnWhatTheHeaderSays) {
  for (const char* name : {"rgb.png", "baseline_420.jpg", "lossy.webp", "animated.webp"}) {
    ExpectRefused(Load(name), "over the limit of 30 pixels a side", {.max_side = 30});
    ExpectRefused(Load(name), "over the limit of 700 pixels", {.max_pixels = 700});  // 23 x 31 = 713
    ExpectRefused(Load(name), "bytes is over the limit", {.max_bytes = 10});
    EXPECT_TRUE(DecodeImage(Load(name), {.max_pixels = 713}).ok()) << name;
  }
}

TEST(ImageDecode, RefusesBombsBeforeAllocating) {
  auto png = Load("rgb.png");
  for (int i = 16; i < 24; ++i) png[i] = std::byte{0x7f};  // IHDR: 2 G x 2 G pixels
  ExpectRefused(png, "over the limit");
  auto jpeg = Load("baseline_420.jpg");
  for (size_t i = 0; i + 9 < jpeg.size(); ++i) {
    if (jpeg[i] == std::byte{0xff} && jpeg[i + 1] == std::byte{0xc0}) {  // SOF0: 65,280 x 65,280
      jpeg[i + 5] = jpeg[i + 7] = std::byte{0xff};
      jpeg[i + 6] = jpeg[i + 8] = std::byte{0x00};
      break;
    }
  }
  ExpectRefused(jpeg, "over the limit");
  auto webp = Load("animated.webp");
  for (int i = 24; i < 30; ++i) webp[i] = std::byte{0xff};  // VP8X canvas: 2^24 x 2^24
  ExpectRefused(webp, "");
}

TEST(ImageDecode, RefusesMoreScansThanAllowed) {
  ExpectRefused(Load("progressive_444.jpg"), "more than 2 scans", {.max_jpeg_scans = 2});
}

TEST(ImageDecode, RefusesEveryTruncationOrDecodesTheSamePixels) {
  for (const auto& row : fixtures::Expected("image")) {
    const auto whole = Load(row[0]);
    for (size_t length = 0; length < whole.size(); ++length) {
      const auto image = DecodeImage(std::span(whole).first(length));
      if (image.ok()) {  // what is missing came after the picture (a PNG without IEND)
        EXPECT_EQ(image->rgb.size(), size_t{3} * std::stoi(row[1]) * std::stoi(row[2])) << row[0] << " " << length;
      } else {
        EXPECT_EQ(image.status().code(), StatusCode::kInvalidArgument) << row[0] << " " << length;
      }
      if (length < whole.size() / 2) {
        EXPECT_FALSE(image.ok()) << row[0] << " " << length;
      }
    }
  }
}

TEST(ImageDecode, SurvivesFlippedBits) {
  std::mt19937 random(20260101);
  const DecodeLimits limits{.max_pixels = 1 << 20};
  for (const auto& row : fixtures::Expected("image")) {
    const auto whole = Load(row[0]);
    for (int round = 0; round < 150; ++round) {
      auto broken = whole;
      for (int flips = 1 + round % 5; flips > 0; --flips) broken[random() % broken.size()] ^= std::byte(1 << random() % 8);
      const auto image = DecodeImage(broken, limits);
      if (image.ok()) {
        EXPECT_EQ(image->rgb.size(), size_t{3} * image->width * image->height);
      } else {
        for (const char c : image.status().message()) EXPECT_TRUE(c >= ' ' && c <= '~') << row[0];
      }
    }
  }
}

}  // namespace
}  // namespace qwen::preprocess
