// stage/weights/guarded.h — where LibTorch's exceptions end and Status begins.
#pragma once
#include <c10/util/Exception.h>

#include <string>

#include "stage/base/status.h"

namespace qwen::weights {

// body() and what it returns, a Status or a Result; kResourceExhausted where the device's memory did not suffice, kInternal for whatever
// else LibTorch throws. `what` begins the message.
template <typename F>
auto Guarded(const char* what, F&& body) -> decltype(body()) {
  try {
    return body();
  } catch (const c10::OutOfMemoryError& error) {
    return ResourceExhaustedError(std::string(what) + ": " + error.what_without_backtrace());
  } catch (const c10::Error& error) {
    return InternalError(std::string(what) + ": " + error.what_without_backtrace());
  }
}

}  // namespace qwen::weights
