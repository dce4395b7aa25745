#include "stage/text/ffi.h"

#include <cerrno>
#include <cstdio>
#include <memory>

namespace qwen::text {
namespace {
constexpr size_t kFileBytesMax = size_t{256} << 20;
}  // namespace

Status StatusOf(qt_code code, std::string message) {
  switch (code) {
    case QT_INVALID_ARGUMENT:
      return InvalidArgumentError(std::move(message));
    case QT_RESOURCE_EXHAUSTED:
      return ResourceExhaustedError(std::move(message));
    default:
      return InternalError(std::move(message));
  }
}

Result<std::string> ReadFile(const std::string& path) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
  if (!file) return ErrnoError(path, errno);
  std::string text;
  char chunk[1 << 16];
  while (const size_t count = std::fread(chunk, 1, sizeof(chunk), file.get())) {
    if (text.size() + count > kFileBytesMax) return InvalidArgumentError(path + " is larger than 256 MiB");
    text.append(chunk, count);
  }
  if (std::ferror(file.get())) return ErrnoError(path, errno);
  return text;
}

}  // namespace qwen::text
