#include "stage/weights/safetensors.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <nlohmann/json.hpp>
#include <set>

#include "stage/base/bytes.h"

namespace qwen::weights {
namespace {

using Json = nlohmann::json;

struct DtypeRow {
  StoredDtype dtype;
  std::string_view name;
  int64_t bytes;
};
constexpr std::array<DtypeRow, 15> kDtypes = {{{StoredDtype::kFloat64, "F64", 8},
                                               {StoredDtype::kFloat32, "F32", 4},
                                               {StoredDtype::kFloat16, "F16", 2},
                                               {StoredDtype::kBFloat16, "BF16", 2},
                                               {StoredDtype::kFloat8E4M3, "F8_E4M3", 1},
                                               {StoredDtype::kFloat8E5M2, "F8_E5M2", 1},
                                               {StoredDtype::kInt64, "I64", 8},
                                               {StoredDtype::kInt32, "I32", 4},
                                               {StoredDtype::kInt16, "I16", 2},
                                               {StoredDtype::kInt8, "I8", 1},
                                               {StoredDtype::kUint64, "U64", 8},
                                               {StoredDtype::kUint32, "U32", 4},
                                               {StoredDtype::kUint16, "U16", 2},
                                               {StoredDtype::kUint8, "U8", 1},
                                               {StoredDtype::kBool, "BOOL", 1}}};

const DtypeRow& RowOf(StoredDtype dtype) {
  for (const DtypeRow& row : kDtypes)
    if (row.dtype == dtype) return row;
  QP_CHECK(false) << "dtype " << static_cast<int>(dtype);
  return kDtypes[0];
}

// Names go into messages: bounded, and without control characters.
std::string Shown(const std::string& name) {
  std::string out = name.substr(0, 200);
  for (char& c : out)
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  return out;
}

// A non-negative integer of the header that is at most `maximum`.
bool TakeInteger(const Json& value, int64_t maximum, int64_t& out) {
  if (!value.is_number_unsigned()) return false;  // nlohmann parses every non-negative integer literal as unsigned
  const uint64_t number = value.get<uint64_t>();
  if (number > static_cast<uint64_t>(maximum)) return false;
  out = static_cast<int64_t>(number);
  return true;
}

Status ParseTensor(const std::string& name, const Json& json, int64_t data_begin, int64_t data_bytes, TensorInfo& out) {
  const auto fail = [&](std::string_view what) { return DataLossError("tensor " + Shown(name) + ": " + std::string(what)); };
  if (!json.is_object() || json.size() != 3 || !json.contains("dtype") || !json.contains("shape") || !json.contains("data_offsets"))
    return fail("must have exactly dtype, shape and data_offsets");
  if (!json["dtype"].is_string()) return fail("dtype must be a string");
  const auto row = std::find_if(kDtypes.begin(), kDtypes.end(), [&](const DtypeRow& r) { return json["dtype"] == r.name; });
  if (row == kDtypes.end()) return fail("unknown dtype " + json["dtype"].dump(-1, ' ', true).substr(0, 40));
  out.name = name;
  out.dtype = row->dtype;

  if (!json["shape"].is_array() || json["shape"].size() > kSafetensorsDimsMax) return fail("shape must be an array of at most 8 sizes");
  int64_t bytes = row->bytes;
  for (const Json& dim : json["shape"]) {
    int64_t size = 0;
    if (!TakeInteger(dim, INT64_MAX, size)) return fail("shape must hold integers >= 0");
    if (__builtin_mul_overflow(bytes, size, &bytes)) return fail("shape overflows 2^63 bytes");
    out.shape.push_back(size);
  }
  const Json& offsets = json["data_offsets"];
  int64_t begin = 0, end = 0;
  if (!offsets.is_array() || offsets.size() != 2 || !TakeInteger(offsets[0], data_bytes, begin) || !TakeInteger(offsets[1], data_bytes, end))
    return fail("data_offsets must be two integers inside the data of " + std::to_string(data_bytes) + " bytes");
  if (begin > end) return fail("data_offsets must ascend");
  if (end - begin != bytes)
    return fail("dtype and shape take " + std::to_string(bytes) + " bytes, data_offsets cover " + std::to_string(end - begin));
  out.offset = data_begin + begin;
  out.bytes = bytes;
  return OkStatus();
}

}  // namespace

int64_t StoredDtypeBytes(StoredDtype dtype) { return RowOf(dtype).bytes; }
std::string_view StoredDtypeName(StoredDtype dtype) { return RowOf(dtype).name; }

std::string ShapeToString(const std::vector<int64_t>& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

Result<int64_t> SafetensorsHeaderBytes(std::span<const std::byte> first_8_bytes, int64_t file_bytes) {
  const auto length = ByteReader(first_8_bytes).Read<uint64_t>();
  if (!length || file_bytes < 8) return DataLossError("safetensors: shorter than 8 bytes");
  if (*length > static_cast<uint64_t>(kSafetensorsHeaderBytesMax))
    return DataLossError("safetensors: header of " + std::to_string(*length) + " bytes is larger than the bound of 100,000,000");
  if (*length > static_cast<uint64_t>(file_bytes - 8))
    return DataLossError("safetensors: header of " + std::to_string(*length) + " bytes in a file of " + std::to_string(file_bytes));
  return static_cast<int64_t>(*length);
}

Result<SafetensorsHeader> ParseSafetensors(std::span<const std::byte> prefix, int64_t file_bytes) {
  if (prefix.size() < 8) return DataLossError("safetensors: shorter than 8 bytes");
  ASSIGN_OR_RETURN(const int64_t header_bytes, SafetensorsHeaderBytes(prefix.first(8), file_bytes));
  if (static_cast<int64_t>(prefix.size()) < 8 + header_bytes) return DataLossError("safetensors: header is cut off");
  const auto* text = reinterpret_cast<const char*>(prefix.data()) + 8;
  if (header_bytes == 0 || text[0] != '{') return DataLossError("safetensors: header must begin with {");

  // A second use of a key would silently win in the DOM, so the keys are watched while parsing; nesting deeper than the
  // format has (tensor -> shape) is refused before it is built.
  std::set<std::string> keys;
  std::string problem;
  const auto watch = [&](int depth, Json::parse_event_t event, Json& value) {
    if (depth > 3 && problem.empty()) problem = "nested too deeply";
    if (event == Json::parse_event_t::key && depth == 1 && !keys.insert(value.get<std::string>()).second && problem.empty())
      problem = "key " + Shown(value.get<std::string>()) + " appears twice";
    return depth <= 3;
  };
  const Json json = Json::parse(text, text + header_bytes, watch, /*allow_exceptions=*/false);
  if (!problem.empty()) return DataLossError("safetensors: header: " + problem);
  if (json.is_discarded() || !json.is_object()) return DataLossError("safetensors: header is not a JSON object");

  SafetensorsHeader header;
  const int64_t data_begin = 8 + header_bytes, data_bytes = file_bytes - data_begin;
  for (const auto& [name, value] : json.items()) {
    if (name == "__metadata__") {
      if (!value.is_object()) return DataLossError("safetensors: __metadata__ must be an object");
      for (const auto& [key, text_value] : value.items()) {
        if (!text_value.is_string()) return DataLossError("safetensors: __metadata__." + Shown(key) + " must be a string");
        header.metadata.emplace(key, text_value.get<std::string>());
      }
      continue;
    }
    TensorInfo tensor;
    RETURN_IF_ERROR(ParseTensor(name, value, data_begin, data_bytes, tensor).WithContext("safetensors"));
    header.tensors.emplace(name, std::move(tensor));
  }

  std::vector<const TensorInfo*> in_order;
  for (const auto& [name, tensor] : header.tensors) in_order.push_back(&tensor);
  std::sort(in_order.begin(), in_order.end(),
            [](const TensorInfo* a, const TensorInfo* b) { return std::pair(a->offset, a->bytes) < std::pair(b->offset, b->bytes); });
  int64_t next = data_begin;
  for (const TensorInfo* tensor : in_order) {
    if (tensor->offset < next) return DataLossError("safetensors: tensor " + Shown(tensor->name) + ": overlaps the one before it");
    if (tensor->offset > next) return DataLossError("safetensors: tensor " + Shown(tensor->name) + ": a hole lies before it");
    next = tensor->offset + tensor->bytes;
  }
  if (next != file_bytes) return DataLossError("safetensors: " + std::to_string(file_bytes - next) + " bytes after the last tensor");
  return header;
}

SafetensorsFile::SafetensorsFile(std::string path, int fd, int64_t file_bytes, int64_t modified_nanos, SafetensorsHeader header)
    : path_(std::move(path)), fd_(fd), file_bytes_(file_bytes), modified_nanos_(modified_nanos), header_(std::move(header)) {}

SafetensorsFile::~SafetensorsFile() { ::close(fd_); }

namespace {

Status ReadFully(int fd, const std::string& path, int64_t offset, std::span<std::byte> out) {
  while (!out.empty()) {
    // One call moves at most 0x7ffff000 bytes; asking for 1 GiB keeps the loop independent of that.
    const size_t want = std::min<size_t>(out.size(), size_t{1} << 30);
    const ssize_t got = ::pread(fd, out.data(), want, offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return ErrnoError(path, errno);
    if (got == 0) return DataLossError(path + ": ends at byte " + std::to_string(offset) + ", more was expected");
    out = out.subspan(static_cast<size_t>(got));
    offset += got;
  }
  return OkStatus();
}

int64_t ModifiedNanos(const struct stat& info) { return int64_t{info.st_mtim.tv_sec} * 1'000'000'000 + info.st_mtim.tv_nsec; }

struct FdCloser {
  int fd;
  ~FdCloser() {
    if (fd >= 0) ::close(fd);
  }
};

}  // namespace

Result<std::shared_ptr<const SafetensorsFile>> SafetensorsFile::Open(const std::string& path) {
  FdCloser fd{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  if (fd.fd < 0) return ErrnoError(path, errno);
  struct stat info {};
  if (::fstat(fd.fd, &info) != 0) return ErrnoError(path, errno);
  if (!S_ISREG(info.st_mode)) return DataLossError(path + ": not a regular file");
  std::vector<std::byte> head(8);
  if (info.st_size < 8) return DataLossError(path + ": safetensors: shorter than 8 bytes");
  RETURN_IF_ERROR(ReadFully(fd.fd, path, 0, head));
  auto header_bytes = SafetensorsHeaderBytes(head, info.st_size);
  if (!header_bytes.ok()) return header_bytes.status().WithContext(path);
  head.resize(static_cast<size_t>(8 + *header_bytes));
  RETURN_IF_ERROR(ReadFully(fd.fd, path, 8, std::span(head).subspan(8)));
  auto header = ParseSafetensors(head, info.st_size);
  if (!header.ok()) return header.status().WithContext(path);
  const int owned = std::exchange(fd.fd, -1);
  return std::shared_ptr<const SafetensorsFile>(new SafetensorsFile(path, owned, info.st_size, ModifiedNanos(info), std::move(*header)));
}

Status SafetensorsFile::CheckUnchanged() const {
  struct stat info {};
  if (::fstat(fd_, &info) != 0) return ErrnoError(path_, errno);
  if (info.st_size != file_bytes_) {
    return DataLossError(path_ + ": changed while it was read: " + std::to_string(info.st_size) + " bytes, " + std::to_string(file_bytes_) + " when it was opened");
  }
  if (ModifiedNanos(info) != modified_nanos_) return DataLossError(path_ + ": changed while it was read");
  return OkStatus();
}

Status SafetensorsFile::Read(int64_t offset, std::span<std::byte> out) const {
  QP_CHECK(offset >= 0 && static_cast<int64_t>(out.size()) <= file_bytes_ - offset) << path_ << " offset " << offset << " size " << out.size();
  return ReadFully(fd_, path_, offset, out);
}

}  // namespace qwen::weights
