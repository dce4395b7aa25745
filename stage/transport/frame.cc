#include "stage/transport/frame.h"

#include "stage/base/bytes.h"
#include "stage/base/check.h"

namespace qwen::transport {

std::string EncodeFrame(std::span<const std::byte> payload) {
  QP_CHECK_LE(payload.size(), kFrameBytesMax);
  std::string frame;
  frame.reserve(kFrameHeaderBytes + payload.size());
  AppendBytes(frame, kFrameMagic);
  AppendBytes(frame, kFrameVersion);
  AppendBytes(frame, static_cast<uint32_t>(payload.size()));
  AppendBytes(frame, Crc32c(payload, Crc32c(frame)));
  frame.append(reinterpret_cast<const char*>(payload.data()), payload.size());
  return frame;
}
std::string EncodeFrame(const std::string& payload) {
  return EncodeFrame(std::as_bytes(std::span(payload.data(), payload.size())));
}

void FrameParser::Feed(std::span<const std::byte> bytes) {
  if (!broken_.ok()) return;
  if (begin_ > 0 && begin_ == buffer_.size()) {
    buffer_.clear();
    begin_ = 0;
  }
  buffer_.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

Status FrameParser::CheckHeader(const std::byte* header, uint32_t& length, uint32_t& crc) const {
  ByteReader reader(std::span(header, kFrameHeaderBytes));
  const uint32_t magic = *reader.Read<uint32_t>();
  const uint32_t version = *reader.Read<uint32_t>();
  length = *reader.Read<uint32_t>();
  crc = *reader.Read<uint32_t>();
  if (magic != kFrameMagic) return DataLossError("frame: wrong magic");
  if (version != kFrameVersion) {
    return DataLossError("frame: version " + std::to_string(version) + ", this is " + std::to_string(kFrameVersion));
  }
  if (length > payload_bytes_max_) {
    return DataLossError("frame: " + std::to_string(length) + " bytes, at most " + std::to_string(payload_bytes_max_));
  }
  return OkStatus();
}

Result<std::optional<std::string>> FrameParser::Next() {
  if (!broken_.ok()) return broken_;
  if (buffered_bytes() < kFrameHeaderBytes) return std::optional<std::string>();
  const auto* front = reinterpret_cast<const std::byte*>(buffer_.data()) + begin_;
  uint32_t length = 0, crc = 0;
  broken_ = CheckHeader(front, length, crc);
  if (!broken_.ok()) return broken_;
  if (buffered_bytes() < kFrameHeaderBytes + length) return std::optional<std::string>();
  const uint32_t header_crc = Crc32c(std::span(front, 12));
  if (Crc32c(std::span(front + kFrameHeaderBytes, length), header_crc) != crc) {
    broken_ = DataLossError("frame: checksum mismatch");
    return broken_;
  }
  std::string payload = buffer_.substr(begin_ + kFrameHeaderBytes, length);
  begin_ += kFrameHeaderBytes + length;
  // Moving the rest down costs at most one copy of what was consumed, and keeps the buffer at one frame plus one read.
  if (begin_ >= buffer_.size() - begin_) {
    buffer_.erase(0, begin_);
    begin_ = 0;
    if (buffer_.empty() && buffer_.capacity() > (size_t{8} << 20)) buffer_.shrink_to_fit();
  }
  return std::optional<std::string>(std::move(payload));
}

}  // namespace qwen::transport
