// stage/base/status.h — how a failure of the outside world travels: Status, or Result<T> for a value or a Status.
//
// Network, files, API answers and user input give a Status; a broken invariant of our own is a QP_CHECK (check.h).
// Exceptions of libraries stop at the file that wraps the library and become a Status there.
// Thread safety: values; copy freely. An OK Status holds no allocation.
#pragma once
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "stage/base/check.h"

namespace qwen {

enum class StatusCode {
  kOk = 0,
  kInvalidArgument,     // the caller's input is wrong, and would be wrong again
  kNotFound,            // the named thing is not there
  kFailedPrecondition,  // not in this state (for example: still loading, draining)
  kResourceExhausted,   // a bound was reached (queue, memory, KV blocks): try later
  kUnavailable,         // a peer cannot be reached: try again
  kDeadlineExceeded,    // no progress in the time allowed
  kCancelled,           // the caller gave up
  kDataLoss,            // bytes do not match their checksum, format or size
  kUnauthenticated,     // wrong or missing credential
  kUnimplemented,       // valid, but not offered here
  kInternal,            // a library or the system failed in a way that has no better name
};
std::string_view StatusCodeName(StatusCode code);

class [[nodiscard]] Status {
 public:
  Status() = default;  // OK
  Status(StatusCode code, std::string message);

  bool ok() const { return rep_ == nullptr; }
  StatusCode code() const { return rep_ ? rep_->code : StatusCode::kOk; }
  const std::string& message() const;  // empty when OK
  std::string ToString() const;        // "OK" or "NotFound: message"
  // The same failure with "context: " in front of its message; OK stays OK.
  Status WithContext(std::string_view context) const;

 private:
  struct Rep {
    StatusCode code;
    std::string message;
  };
  std::shared_ptr<const Rep> rep_;  // shared because a sticky error is handed to many readers; immutable
};

inline Status OkStatus() { return Status(); }
Status InvalidArgumentError(std::string message);
Status NotFoundError(std::string message);
Status FailedPreconditionError(std::string message);
Status ResourceExhaustedError(std::string message);
Status UnavailableError(std::string message);
Status DeadlineExceededError(std::string message);
Status CancelledError(std::string message);
Status DataLossError(std::string message);
Status UnauthenticatedError(std::string message);
Status UnimplementedError(std::string message);
Status InternalError(std::string message);
// "what: strerror(error_number)", with kNotFound for ENOENT, kUnavailable for connection errors, else kInternal.
Status ErrnoError(std::string_view what, int error_number);

template <typename T>
class [[nodiscard]] Result {
 public:
  Result(Status status) : status_(std::move(status)) { QP_CHECK(!status_.ok()); }  // NOLINT: implicit on purpose
  Result(T value) : value_(std::move(value)) {}                                    // NOLINT: implicit on purpose

  bool ok() const { return value_.has_value(); }
  const Status& status() const { return status_; }
  // REQUIRES: ok().
  T& value() & {
    QP_CHECK(ok()) << status_.ToString();
    return *value_;
  }
  const T& value() const& {
    QP_CHECK(ok()) << status_.ToString();
    return *value_;
  }
  T&& value() && {
    QP_CHECK(ok()) << status_.ToString();
    return std::move(*value_);
  }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T&& operator*() && { return std::move(*this).value(); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }

 private:
  Status status_;
  std::optional<T> value_;
};

}  // namespace qwen

#define QP_CONCAT_INNER(a, b) a##b
#define QP_CONCAT(a, b) QP_CONCAT_INNER(a, b)
#define RETURN_IF_ERROR(expression)                                        \
  do {                                                                     \
    if (::qwen::Status qp_status_ = (expression); !qp_status_.ok()) return qp_status_; \
  } while (false)
// ASSIGN_OR_RETURN(auto x, MakeX());
#define ASSIGN_OR_RETURN(declaration, expression) ASSIGN_OR_RETURN_(QP_CONCAT(qp_result_, __LINE__), declaration, expression)
#define ASSIGN_OR_RETURN_(result, declaration, expression) \
  auto result = (expression);                              \
  if (!result.ok()) return result.status();                \
  declaration = std::move(result).value()
