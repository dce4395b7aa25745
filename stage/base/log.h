// stage/base/log.h — a constant message and key=value fields, on stderr: log::Info("stage ready", {{"stage", 2}}).
// Thread safety: any thread, after Init() (before it, lines still appear, without a name). Never log API keys, secrets
// or a user's content; request ids, counts and sizes are what an operator needs.
#pragma once
#include <concepts>
#include <initializer_list>
#include <string>
#include <string_view>

namespace qwen::log {

enum class Level { kDebug, kInfo, kWarning, kError };

struct Field {
  std::string_view key;
  std::string value;
  Field(std::string_view k, std::string_view v) : key(k), value(v) {}
  Field(std::string_view k, const std::string& v) : key(k), value(v) {}
  Field(std::string_view k, const char* v) : key(k), value(v) {}
  Field(std::string_view k, bool v) : key(k), value(v ? "true" : "false") {}
  template <std::integral T>
  Field(std::string_view k, T v) : key(k), value(std::to_string(v)) {}
  Field(std::string_view k, double v);
};

// `process` appears in every line ("qwen-stage[2]"). `level` is debug, info, warning or error; anything else is info.
// `format` text gives "2026-01-31T10:00:00.123Z INFO qwen-head message key=value"; json gives one object a line.
struct Options {
  std::string process;
  std::string level = "info";
  std::string format = "text";
};
void Init(const Options& options);

void Write(Level level, std::string_view message, std::initializer_list<Field> fields);
inline void Debug(std::string_view message, std::initializer_list<Field> fields = {}) { Write(Level::kDebug, message, fields); }
inline void Info(std::string_view message, std::initializer_list<Field> fields = {}) { Write(Level::kInfo, message, fields); }
inline void Warning(std::string_view message, std::initializer_list<Field> fields = {}) { Write(Level::kWarning, message, fields); }
inline void Error(std::string_view message, std::initializer_list<Field> fields = {}) { Write(Level::kError, message, fields); }

}  // namespace qwen::log
