// stage/weights/safetensors.h — the safetensors format: 8 bytes little-endian header length N, N bytes of JSON, then data.
//
//   {"__metadata__": {string: string}, "NAME": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ...}
//
// Offsets count from the end of the header. As in the format's own reference reader, the tensors must cover the data without
// holes and without overlap, and a key may appear once. Everything in a file is taken as hostile: no length is used before
// it was compared with the file's size, and no allocation is larger than the header itself.
//
// Thread safety: ParseSafetensors is pure; a SafetensorsFile may be read (pread) from any threads at once.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "stage/base/status.h"

namespace qwen::weights {

// Only what a Qwen3 checkpoint can hold in its tensors, plus the integer types that an unexpected tensor may have.
enum class StoredDtype { kFloat64, kFloat32, kFloat16, kBFloat16, kFloat8E4M3, kFloat8E5M2, kInt64, kInt32, kInt16, kInt8, kUint64, kUint32, kUint16, kUint8, kBool };
int64_t StoredDtypeBytes(StoredDtype dtype);
std::string_view StoredDtypeName(StoredDtype dtype);  // the format's own: "BF16", "F8_E4M3"

inline constexpr int64_t kSafetensorsHeaderBytesMax = 100'000'000;  // the reference reader's own bound
inline constexpr size_t kSafetensorsDimsMax = 8;

struct TensorInfo {
  std::string name;
  StoredDtype dtype = StoredDtype::kFloat32;
  std::vector<int64_t> shape;  // empty: a scalar
  int64_t offset = 0;          // of the first byte, from the start of the file
  int64_t bytes = 0;           // == product(shape) * StoredDtypeBytes(dtype)
};
std::string ShapeToString(const std::vector<int64_t>& shape);  // "[128, 4096]"

struct SafetensorsHeader {
  std::map<std::string, TensorInfo> tensors;
  std::map<std::string, std::string> metadata;
};
// `prefix` is the start of a file of `file_bytes` bytes and holds at least the whole header (more is ignored).
// kDataLoss naming the tensor and the rule that is broken.
Result<SafetensorsHeader> ParseSafetensors(std::span<const std::byte> prefix, int64_t file_bytes);
// The length of the header, out of the first 8 bytes: what has to be read before ParseSafetensors. kDataLoss when it
// exceeds kSafetensorsHeaderBytesMax or the file.
Result<int64_t> SafetensorsHeaderBytes(std::span<const std::byte> first_8_bytes, int64_t file_bytes);

class SafetensorsFile {
 public:
  static Result<std::shared_ptr<const SafetensorsFile>> Open(const std::string& path);
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const std::string& path() const { return path_; }
  const SafetensorsHeader& header() const { return header_; }
  int64_t file_bytes() const { return file_bytes_; }
  // Fills `out` from `offset` of the file. kDataLoss when the file has become shorter meanwhile.
  Status Read(int64_t offset, std::span<std::byte> out) const;
  // For readers of their own (reader.h); stays this object's.
  int descriptor() const { return fd_; }
  // kDataLoss when the file was written to or replaced by a longer or shorter one since Open.
  Status CheckUnchanged() const;

 private:
  SafetensorsFile(std::string path, int fd, int64_t file_bytes, int64_t modified_nanos, SafetensorsHeader header);
  const std::string path_;
  const int fd_;
  const int64_t file_bytes_, modified_nanos_;  // when it was opened
  const SafetensorsHeader header_;
};

}  // namespace qwen::weights
