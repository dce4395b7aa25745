// stage/server/errors.h — the OpenAI error body {"error":{message,type,param,code}} and which HTTP status it travels with.
//
// Thread safety: values and pure functions.
#pragma once
#include <optional>
#include <string>
#include <variant>

#include "stage/base/check.h"
#include "stage/base/status.h"
#include "stage/server/http_types.h"

namespace qwen::server {

struct ApiError {
  int status = 400;
  std::string message;
  std::string param;            // the request field to blame, "messages[0].content"; empty: null
  std::string code;             // "context_length_exceeded", ...; empty: null
  int retry_after_seconds = 0;  // > 0: a Retry-After header
};

ApiError BadRequest(std::string message, std::string param = "", std::string code = "");
ApiError Overloaded(std::string message);                            // 429
ApiError Unavailable(std::string message, int retry_after_seconds);  // 503
// The status of a room below, blamed on `param`: kInvalidArgument and its kin become 400, kUnimplemented 400 as well (the
// request asks for what is not offered), kResourceExhausted 429, kUnavailable 503, the rest 500.
ApiError FromStatus(const Status& status, std::string param = "");

std::string ErrorJson(const ApiError& error);         // the body
HttpResponse ErrorResponse(const ApiError& error);    // body, status, Retry-After, Allow left to the caller
std::string_view ErrorType(int http_status);          // "invalid_request_error", "server_error", ...

// A value or the error to answer with. REQUIRES of value(): ok().
template <typename T>
class OrError {
 public:
  OrError(T value) : rep_(std::in_place_index<0>, std::move(value)) {}        // NOLINT: implicit on purpose
  OrError(ApiError error) : rep_(std::in_place_index<1>, std::move(error)) {}  // NOLINT: implicit on purpose
  bool ok() const { return rep_.index() == 0; }
  T& value() {
    QP_CHECK(ok()) << std::get<1>(rep_).message;
    return std::get<0>(rep_);
  }
  const ApiError& error() const {
    QP_CHECK(!ok());
    return std::get<1>(rep_);
  }

 private:
  std::variant<T, ApiError> rep_;
};

}  // namespace qwen::server
