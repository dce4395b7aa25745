// stage/text/ffi.h — what the wrappers of this room share over qwen_text.h. Not for other rooms.
// Thread safety: pure functions.
#pragma once
#include <cstddef>
#include <string>

#include "stage/base/status.h"
#include "stage/text/qwen_text.h"

namespace qwen::text {

// A qt_sink whose context is a std::string.
extern "C" inline void AppendToString(void* context, const void* data, size_t size) {
  static_cast<std::string*>(context)->append(static_cast<const char*>(data), size);
}

// REQUIRES: code is not QT_OK.
Status StatusOf(qt_code code, std::string message);

// The whole file, at most 256 MiB (a tokenizer.json of 150,000 tokens is 11 MB). kNotFound when it is not there.
Result<std::string> ReadFile(const std::string& path);

}  // namespace qwen::text
