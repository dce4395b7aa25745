#include "stage/base/check.h"

#include <cstdio>
#include <cstdlib>

namespace qwen::internal {

CheckFailure::CheckFailure(const char* file, int line, const char* text) {
  stream_ << file << ":" << line << ": check failed: " << text << " ";
}

CheckFailure::~CheckFailure() {
  std::fprintf(stderr, "%s\n", stream_.str().c_str());
  std::fflush(stderr);
  std::abort();
}

}  // namespace qwen::internal
