// Any bytes as a safetensors file: the parser may refuse them, and may not crash, hang, allocate more than the file is worth or
// accept a tensor that leaves the file. What it accepts is checked against the format's own rules.
#include <cstdlib>

#include "stage/weights/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace qwen::weights;
  const auto parsed = ParseSafetensors(std::as_bytes(std::span(data, size)), static_cast<int64_t>(size));
  if (!parsed.ok()) return 0;
  int64_t covered = 0;
  for (const auto& [name, tensor] : parsed->tensors) {
    int64_t bytes = StoredDtypeBytes(tensor.dtype);
    for (const int64_t dim : tensor.shape) bytes *= dim;
    if (tensor.name != name || tensor.bytes != bytes || tensor.offset < 8 || tensor.bytes > static_cast<int64_t>(size) - tensor.offset) std::abort();
    covered += tensor.bytes;
  }
  if (covered > static_cast<int64_t>(size) - 10) std::abort();  // 8 bytes of length and {} are not data
  return 0;
}
