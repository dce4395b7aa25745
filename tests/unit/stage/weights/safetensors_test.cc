// Goal: a well-formed file is read as it lies; every way to break the format is refused with the tensor and the rule, and no
// length of a file is believed before it was checked. The bytes are written out here by hand, not by a writer of ours.
#include "stage/weights/safetensors.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <fstream>

namespace qwen::weights {
namespace {

std::string WithLength(const std::string& header, const std::string& data, std::optional<uint64_t> length = std::nullopt) {
  std::string file;
  const uint64_t n = length.value_or(header.size());
  for (int i = 0; i < 8; ++i) file.push_back(static_cast<char>((n >> (8 * i)) & 0xff));
  return file + header + data;
}
std::span<const std::byte> Bytes(const std::string& text) { return std::as_bytes(std::span(text.data(), text.size())); }
Result<SafetensorsHeader> Parse(const std::string& header, const std::string& data) {
  const std::string file = WithLength(header, data);
  return ParseSafetensors(Bytes(file), static_cast<int64_t>(file.size()));
}
std::string ErrorOf(const std::string& header, const std::string& data) {
  const auto parsed = Parse(header, data);
  return parsed.ok() ? "OK" : parsed.status().message();
}

TEST(Safetensors, ReadsTensorsMetadataAndAbsoluteOffsets) {
  const std::string header = R"({"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},)"
                             R"("b.c":{"dtype":"F32","shape":[],"data_offsets":[12,16]},"empty":{"dtype":"F8_E4M3","shape":[0,7],"data_offsets":[16,16]}}   )";
  const auto parsed = Parse(header, std::string(16, 'x'));
  ASSERT_TRUE(parsed.ok()) << parsed.status().ToString();
  ASSERT_EQ(parsed->tensors.size(), 3u);
  EXPECT_EQ(parsed->metadata.at("format"), "pt");
  const TensorInfo& a = parsed->tensors.at("a");
  EXPECT_EQ(a.dtype, StoredDtype::kBFloat16);
  EXPECT_EQ(a.shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(a.offset, 8 + static_cast<int64_t>(header.size()));
  EXPECT_EQ(a.bytes, 12);
  EXPECT_EQ(parsed->tensors.at("b.c").offset, a.offset + 12);
  EXPECT_EQ(parsed->tensors.at("b.c").bytes, 4) << "a scalar has one element";
  EXPECT_EQ(parsed->tensors.at("empty").bytes, 0);
}

TEST(Safetensors, EveryBrokenRuleIsNamed) {
  const std::string four(4, 'x');
  struct Case {
    const char* header;
    const char* message;
  };
  const Case cases[] = {
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}})", "tensor a: data_offsets must be two integers inside the data of 4 bytes"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", "tensor a: data_offsets must ascend"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}})", "tensor a: data_offsets must be two integers inside the data of 4 bytes"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0.0,4]}})", "tensor a: data_offsets must be two integers inside the data of 4 bytes"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,18446744073709551615]}})", "tensor a: data_offsets must be two integers inside the data of 4 bytes"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}})", "tensor a: data_offsets must be two integers inside the data of 4 bytes"},
      {R"({"a":{"dtype":"BF16","shape":[1],"data_offsets":[0,4]}})", "tensor a: dtype and shape take 2 bytes, data_offsets cover 4"},
      {R"({"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}})", "tensor a: shape overflows 2^63 bytes"},
      {R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", "tensor a: shape must hold integers >= 0"},
      {R"({"a":{"dtype":"F32","shape":"1","data_offsets":[0,4]}})", "tensor a: shape must be an array of at most 8 sizes"},
      {R"({"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}})", "tensor a: shape must be an array of at most 8 sizes"},
      {R"({"a":{"dtype":"Q4","shape":[1],"data_offsets":[0,4]}})", "tensor a: unknown dtype \"Q4\""},
      {R"({"a":{"dtype":4,"shape":[1],"data_offsets":[0,4]}})", "tensor a: dtype must be a string"},
      {R"({"a":{"shape":[1],"data_offsets":[0,4]}})", "tensor a: must have exactly dtype, shape and data_offsets"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}})", "tensor a: must have exactly dtype, shape and data_offsets"},
      {R"({"a":7})", "tensor a: must have exactly dtype, shape and data_offsets"},
      {R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})", "tensor b: overlaps the one before it"},
      {R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", "tensor b: overlaps the one before it"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})", "tensor b: a hole lies before it"},
      {R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}})", "1 bytes after the last tensor"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", "header: key a appears twice"},
      {R"({"a":{"dtype":"F32","shape":[[[1]]],"data_offsets":[0,4]}})", "header: nested too deeply"},
      {R"({"__metadata__":{"n":1}})", "__metadata__.n must be a string"},
      {R"({"__metadata__":[]})", "__metadata__ must be an object"},
      {R"(["a"])", "header must begin with {"},
      {R"( {})", "header must begin with {"},
      {R"({"a":)", "header is not a JSON object"},
      {"{\"a\xff\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}", "header is not a JSON object"},
      {"", "header must begin with {"},
  };
  for (const Case& c : cases) EXPECT_EQ(ErrorOf(c.header, four), std::string("safetensors: ") + c.message) << c.header;
}

TEST(Safetensors, HugeHeaderLengthsAreRefusedBeforeAnythingIsAllocated) {
  for (const uint64_t length : {uint64_t{100'000'001}, uint64_t{1} << 40, UINT64_MAX, uint64_t{INT64_MAX}}) {
    const std::string file = WithLength("{}", "", length);
    const auto parsed = ParseSafetensors(Bytes(file), static_cast<int64_t>(file.size()));
    ASSERT_FALSE(parsed.ok());
    EXPECT_NE(parsed.status().message().find(std::to_string(length)), std::string::npos) << parsed.status().ToString();
  }
  const std::string file = WithLength("{}", "", 3);  // one byte more than there is
  EXPECT_FALSE(ParseSafetensors(Bytes(file), static_cast<int64_t>(file.size())).ok());
  EXPECT_FALSE(ParseSafetensors(Bytes(file).first(7), 7).ok());
  EXPECT_FALSE(ParseSafetensors(Bytes(file), 4).ok()) << "a file shorter than its own length field";
}

TEST(Safetensors, AControlCharacterInANameDoesNotReachTheLog) {
  const std::string message = ErrorOf("{\"a\\n\\u001b[31m\":7}", "");
  EXPECT_EQ(message, "safetensors: tensor a??[31m: must have exactly dtype, shape and data_offsets");
}

class SafetensorsOnDisk : public ::testing::Test {
 protected:
  std::string path_ = ::testing::TempDir() + "/one_" + std::to_string(::getpid()) + ".safetensors";
  void Write(const std::string& bytes) { std::ofstream(path_, std::ios::binary | std::ios::trunc) << bytes; }
  void TearDown() override { ::unlink(path_.c_str()); }
};

TEST_F(SafetensorsOnDisk, ReadsTheBytesOfATensorAndNoOthers) {
  Write(WithLength(R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"U8","shape":[2],"data_offsets":[3,5]}})", "ABCde"));
  const auto file = SafetensorsFile::Open(path_);
  ASSERT_TRUE(file.ok()) << file.status().ToString();
  const TensorInfo& b = (*file)->header().tensors.at("b");
  std::string out(4, '.');
  ASSERT_TRUE((*file)->Read(b.offset, std::as_writable_bytes(std::span(out).subspan(1, 2))).ok());
  EXPECT_EQ(out, ".de.");
}

TEST_F(SafetensorsOnDisk, AFileThatShrinksWhileItIsReadIsAnErrorNotAHang) {
  Write(WithLength(R"({"a":{"dtype":"U8","shape":[5],"data_offsets":[0,5]}})", "ABCde"));
  const auto file = SafetensorsFile::Open(path_);
  ASSERT_TRUE(file.ok());
  ASSERT_EQ(::truncate(path_.c_str(), (*file)->file_bytes() - 2), 0);
  std::string out(5, '.');
  const Status status = (*file)->Read((*file)->header().tensors.at("a").offset, std::as_writable_bytes(std::span(out)));
  EXPECT_EQ(status.code(), StatusCode::kDataLoss);
  EXPECT_NE(status.message().find(path_), std::string::npos);
}

TEST_F(SafetensorsOnDisk, WhatIsNoFileIsNamed) {
  EXPECT_EQ(SafetensorsFile::Open(path_ + ".absent").status().code(), StatusCode::kNotFound);
  EXPECT_NE(SafetensorsFile::Open(::testing::TempDir()).status().message().find("not a regular file"), std::string::npos);
  Write("short");
  EXPECT_EQ(SafetensorsFile::Open(path_).status().code(), StatusCode::kDataLoss);
}

}  // namespace
}  // namespace qwen::weights
