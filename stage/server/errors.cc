#include "stage/server/errors.h"

#include <nlohmann/json.hpp>

namespace qwen::server {

ApiError BadRequest(std::string message, std::string param, std::string code) {
  return {.status = 400, .message = std::move(message), .param = std::move(param), .code = std::move(code)};
}

ApiError Overloaded(std::string message) {
  return {.status = 429, .message = std::move(message), .code = "rate_limit_exceeded", .retry_after_seconds = 1};
}

ApiError Unavailable(std::string message, int retry_after_seconds) {
  return {.status = 503, .message = std::move(message), .code = "unavailable", .retry_after_seconds = retry_after_seconds};
}

ApiError FromStatus(const Status& status, std::string param) {
  switch (status.code()) {
    case StatusCode::kInvalidArgument:
    case StatusCode::kDataLoss:
    case StatusCode::kNotFound:
    case StatusCode::kFailedPrecondition:
    case StatusCode::kUnimplemented:
      return BadRequest(status.message(), std::move(param));
    case StatusCode::kResourceExhausted:
      return Overloaded(status.message());
    case StatusCode::kUnavailable:
    case StatusCode::kDeadlineExceeded:
      return Unavailable(status.message(), 5);
    default:
      return {.status = 500, .message = status.message(), .param = std::move(param), .code = "internal_error"};
  }
}

std::string_view ErrorType(int http_status) {
  switch (http_status) {
    case 401:
      return "authentication_error";
    case 404:
      return "not_found_error";
    case 429:
      return "rate_limit_error";
    default:
      return http_status >= 500 ? "server_error" : "invalid_request_error";
  }
}

std::string ErrorJson(const ApiError& error) {
  nlohmann::ordered_json body;
  auto& inner = body["error"];
  inner["message"] = error.message;
  inner["type"] = ErrorType(error.status);
  inner["param"] = error.param.empty() ? nlohmann::ordered_json() : nlohmann::ordered_json(error.param);
  inner["code"] = error.code.empty() ? nlohmann::ordered_json() : nlohmann::ordered_json(error.code);
  return body.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

HttpResponse ErrorResponse(const ApiError& error) {
  HttpResponse response{.status = error.status, .body = ErrorJson(error)};
  if (error.retry_after_seconds > 0) response.headers.emplace_back("Retry-After", std::to_string(error.retry_after_seconds));
  if (error.status == 401) response.headers.emplace_back("WWW-Authenticate", "Bearer");
  return response;
}

}  // namespace qwen::server
