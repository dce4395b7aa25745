#include "stage/server/json_text.h"

#include <cmath>
#include <vector>

namespace qwen::server {
namespace {

Status ScanBounds(std::string_view text, const JsonLimits& limits) {
  std::vector<int64_t> keys;  // per open bracket
  int64_t values = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      else if (c == '"') in_string = false;
      continue;
    }
    switch (c) {
      case '"':
        in_string = true;
        break;
      case '[':
      case '{':
        if (static_cast<int>(keys.size()) >= limits.depth) {
          return InvalidArgumentError("JSON is nested deeper than " + std::to_string(limits.depth) + " levels");
        }
        keys.push_back(0);
        ++values;
        break;
      case ']':
      case '}':
        if (!keys.empty()) keys.pop_back();
        break;
      case ',':
        ++values;
        break;
      case ':':
        if (!keys.empty() && ++keys.back() > limits.keys) {
          return InvalidArgumentError("a JSON object has more than " + std::to_string(limits.keys) + " keys");
        }
        break;
      default:
        break;
    }
    if (values > limits.values) return InvalidArgumentError("JSON has more than " + std::to_string(limits.values) + " values");
  }
  return OkStatus();
}

std::string Range(double low, double high) {
  auto show = [](double v) {
    std::string text = Json(v).dump();
    if (text.ends_with(".0")) text.resize(text.size() - 2);
    return text;
  };
  return "between " + show(low) + " and " + show(high);
}

}  // namespace

Result<Json> ParseJson(std::string_view text, const JsonLimits& limits) {
  RETURN_IF_ERROR(ScanBounds(text, limits));
  try {
    return Json::parse(text.begin(), text.end());
  } catch (const Json::exception& e) {
    // "[json.exception.parse_error.101] parse error at line 1, column 2: ..." without the library's tag
    std::string message = e.what();
    if (const size_t tag = message.find("] "); tag != std::string::npos) message.erase(0, tag + 2);
    return InvalidArgumentError("invalid JSON: " + message.substr(0, 200));
  }
}

std::string DumpJson(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

const Json* FieldReader::Find(const char* name) const {
  const auto it = object_.find(name);
  return it == object_.end() || it->is_null() ? nullptr : &*it;
}

void FieldReader::Fail(const char* name, const std::string& message) {
  if (!error_) error_ = BadRequest(prefix_ + name + " " + message, prefix_ + name);
}

std::optional<double> FieldReader::Number(const char* name, double low, double high) {
  const Json* value = Find(name);
  if (!value) return std::nullopt;
  if (!value->is_number()) {
    Fail(name, "must be a number");
    return std::nullopt;
  }
  const double number = value->get<double>();
  if (!(number >= low && number <= high)) {  // also NaN
    Fail(name, "must be " + Range(low, high) + ", not " + value->dump());
    return std::nullopt;
  }
  return number;
}

std::optional<int64_t> FieldReader::Integer(const char* name, int64_t low, int64_t high) {
  const Json* value = Find(name);
  if (!value) return std::nullopt;
  // 5.0 is what some clients write for 5.
  const bool integral = value->is_number_integer() ||
                        (value->is_number_float() && std::nearbyint(value->get<double>()) == value->get<double>() &&
                         std::abs(value->get<double>()) < 9e15);
  if (!integral) {
    Fail(name, "must be an integer");
    return std::nullopt;
  }
  // Above int64 only unsigned values exist; they are out of every range here.
  const bool huge = value->is_number_unsigned() && value->get<uint64_t>() > static_cast<uint64_t>(INT64_MAX);
  const int64_t number = huge ? INT64_MAX : value->get<int64_t>();
  if (huge || number < low || number > high) {
    Fail(name, "must be between " + std::to_string(low) + " and " + std::to_string(high) + ", not " + value->dump());
    return std::nullopt;
  }
  return number;
}

std::optional<bool> FieldReader::Boolean(const char* name) {
  const Json* value = Find(name);
  if (!value) return std::nullopt;
  if (!value->is_boolean()) {
    Fail(name, "must be true or false");
    return std::nullopt;
  }
  return value->get<bool>();
}

std::optional<std::string> FieldReader::String(const char* name) {
  const Json* value = Find(name);
  if (!value) return std::nullopt;
  if (!value->is_string()) {
    Fail(name, "must be a string");
    return std::nullopt;
  }
  return value->get<std::string>();
}

}  // namespace qwen::server
