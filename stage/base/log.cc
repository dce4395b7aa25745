#include "stage/base/log.h"

#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <atomic>
#include <cstdio>

namespace qwen::log {
namespace {

std::atomic<bool> json_format{false};

// Quotes a value when it holds a character that would end it; control characters become \xNN, so that a client's text
// can never forge a log line.
void AppendQuoted(std::string& out, std::string_view value) {
  bool plain = !value.empty();
  for (unsigned char c : value) plain = plain && c > 0x20 && c != '"' && c != '=' && c != '\\' && c != 0x7f;
  if (plain && !json_format) {
    out += value;
    return;
  }
  out += '"';
  for (unsigned char c : value) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += static_cast<char>(c);
    } else if (c < 0x20 || c == 0x7f) {
      char buffer[8];
      std::snprintf(buffer, sizeof buffer, "\\u%04x", c);
      out += buffer;
    } else {
      out += static_cast<char>(c);
    }
  }
  out += '"';
}

}  // namespace

Field::Field(std::string_view k, double v) : key(k) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%.6g", v);
  value = buffer;
}

void Init(const Options& options) {
  auto logger = spdlog::stderr_logger_mt(options.process);
  json_format = options.format == "json";
  if (json_format) {
    logger->set_pattern("{\"time\":\"%Y-%m-%dT%H:%M:%S.%eZ\",\"level\":\"%l\",\"process\":\"%n\",%v}", spdlog::pattern_time_type::utc);
  } else {
    logger->set_pattern("%Y-%m-%dT%H:%M:%S.%eZ %^%-7l%$ %n %v", spdlog::pattern_time_type::utc);
  }
  auto level = spdlog::level::from_str(options.level);
  if (level == spdlog::level::off) level = spdlog::level::info;  // from_str's answer to an unknown word
  logger->set_level(level);
  logger->flush_on(spdlog::level::debug);
  spdlog::set_default_logger(logger);
}

void Write(Level level, std::string_view message, std::initializer_list<Field> fields) {
  static constexpr spdlog::level::level_enum kLevels[] = {spdlog::level::debug, spdlog::level::info, spdlog::level::warn,
                                                          spdlog::level::err};
  // spdlog makes its registry at the first use, behind a lock inside the shared library; made behind ours, every thread
  // that logs is ordered after it in the eyes of ThreadSanitizer too, which does not see into that library.
  [[maybe_unused]] static const bool registry_made = spdlog::default_logger_raw() != nullptr;
  const auto spd_level = kLevels[static_cast<int>(level)];
  if (!spdlog::should_log(spd_level)) return;
  std::string line;
  if (json_format) {
    line += "\"message\":";
    AppendQuoted(line, message);
    for (const Field& field : fields) {
      line += ",\"";
      line += field.key;
      line += "\":";
      AppendQuoted(line, field.value);
    }
  } else {
    line += message;
    for (const Field& field : fields) {
      line += ' ';
      line += field.key;
      line += '=';
      AppendQuoted(line, field.value);
    }
  }
  spdlog::log(spd_level, "{}", line);
}

}  // namespace qwen::log
