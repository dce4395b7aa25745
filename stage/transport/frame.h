// stage/transport/frame.h — length-prefixed frames of the control channel (docs/wire.md "Frame").
//
//   offset 0  u32 magic   0x31465751 ("QWF1")
//          4  u32 version kFrameVersion
//          8  u32 length  of the payload, <= kFrameBytesMax
//         12  u32 crc32c  of header bytes [0, 12) followed by the payload
//         16  payload
// All little-endian. A stream with a wrong frame has no way back: the connection is closed with the error's name.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "stage/base/status.h"

namespace qwen::transport {

inline constexpr uint32_t kFrameMagic = 0x31465751;
inline constexpr uint32_t kFrameVersion = 1;
inline constexpr size_t kFrameHeaderBytes = 16;
// A plan of 256 first spans with 64k-token histories is 50 MB in Protobuf; vision chunks are 4 MiB.
inline constexpr size_t kFrameBytesMax = size_t{64} << 20;

// The whole frame around `payload`. REQUIRES: payload.size() <= kFrameBytesMax.
std::string EncodeFrame(std::span<const std::byte> payload);
std::string EncodeFrame(const std::string& payload);

// Cuts frames out of a byte stream that arrives in pieces of any size. Memory grows with bytes that really arrived, never
// with a length that was only announced. Thread safety: none.
class FrameParser {
 public:
  explicit FrameParser(size_t payload_bytes_max = kFrameBytesMax) : payload_bytes_max_(payload_bytes_max) {}

  void Feed(std::span<const std::byte> bytes);
  // The next payload; nullopt when more bytes are needed; kDataLoss "frame: ..." when the stream is broken, and from then
  // on always.
  Result<std::optional<std::string>> Next();
  void set_payload_bytes_max(size_t bytes) { payload_bytes_max_ = bytes; }
  size_t buffered_bytes() const { return buffer_.size() - begin_; }

 private:
  Status CheckHeader(const std::byte* header, uint32_t& length, uint32_t& crc) const;

  size_t payload_bytes_max_;
  std::string buffer_;   // [begin_, size) not yet consumed
  size_t begin_ = 0;
  Status broken_;
};

}  // namespace qwen::transport
