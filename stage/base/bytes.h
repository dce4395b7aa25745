// stage/base/bytes.h — little-endian integers in byte buffers, with bounds, and CRC32C. Thread safety: pure functions.
#pragma once
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>

namespace qwen {

static_assert(std::endian::native == std::endian::little, "tensors are read as they lie on disk: little-endian hosts only");

// Reads integers from the front of a buffer; never past its end.
class ByteReader {
 public:
  explicit ByteReader(std::span<const std::byte> bytes) : bytes_(bytes) {}
  template <typename T>
  std::optional<T> Read() {
    static_assert(std::is_trivially_copyable_v<T>);
    if (bytes_.size() < sizeof(T)) return std::nullopt;
    T value;
    std::memcpy(&value, bytes_.data(), sizeof(T));
    bytes_ = bytes_.subspan(sizeof(T));
    return value;
  }
  std::optional<std::span<const std::byte>> ReadBytes(size_t count) {
    if (bytes_.size() < count) return std::nullopt;
    auto front = bytes_.first(count);
    bytes_ = bytes_.subspan(count);
    return front;
  }
  size_t remaining() const { return bytes_.size(); }

 private:
  std::span<const std::byte> bytes_;
};

template <typename T>
void AppendBytes(std::string& out, const T& value) {
  static_assert(std::is_trivially_copyable_v<T>);
  out.append(reinterpret_cast<const char*>(&value), sizeof(T));
}

// CRC-32C (Castagnoli, reflected, as in iSCSI RFC 3720 and leveldb); Crc32c("123456789") == 0xE3069283.
// `seed` is the CRC of the bytes before these, so that a CRC can be taken piecewise.
uint32_t Crc32c(std::span<const std::byte> bytes, uint32_t seed = 0);
inline uint32_t Crc32c(const std::string& bytes, uint32_t seed = 0) {
  return Crc32c(std::as_bytes(std::span(bytes.data(), bytes.size())), seed);
}

}  // namespace qwen
