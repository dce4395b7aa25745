#include "controller/ctl/units.h"

#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>

namespace qwen::ctl {
namespace {

std::string Digits3(double value, const char* unit) {
  char text[48];
  const int decimals = value >= 100 ? 1 : value >= 10 ? 1 : 2;
  std::snprintf(text, sizeof(text), "%.*f %s", decimals, value, unit);
  return text;
}

}  // namespace

Result<int64_t> ParseBytes(std::string_view text) {
  constexpr std::array<std::pair<std::string_view, double>, 11> kUnits = {{{"", 1},
                                                                           {"B", 1},
                                                                           {"KB", 1e3},
                                                                           {"MB", 1e6},
                                                                           {"GB", 1e9},
                                                                           {"TB", 1e12},
                                                                           {"KiB", 1024.0},
                                                                           {"MiB", 1048576.0},
                                                                           {"GiB", 1073741824.0},
                                                                           {"Gi", 1073741824.0},
                                                                           {"TiB", 1099511627776.0}}};
  double number = 0;
  const auto parsed = std::from_chars(text.data(), text.data() + text.size(), number);
  std::string_view unit(parsed.ptr, static_cast<size_t>(text.data() + text.size() - parsed.ptr));
  while (!unit.empty() && unit.front() == ' ') unit.remove_prefix(1);
  if (parsed.ec == std::errc() && number >= 0)
    for (const auto& [name, factor] : kUnits)
      if (unit == name && number * factor < 9e18) return static_cast<int64_t>(std::llround(number * factor));
  return InvalidArgumentError("\"" + std::string(text.substr(0, 40)) + "\" is not a size; write it like 141GB or 80GiB");
}

std::string FormatBytes(double bytes) {
  if (bytes < 1000) return std::to_string(static_cast<int64_t>(bytes)) + " B";
  const char* const units[] = {"KB", "MB", "GB", "TB"};
  int unit = -1;
  while (bytes >= 1000 && unit < 3) bytes /= 1000, ++unit;
  return Digits3(bytes, units[unit]);
}

std::string FormatCount(int64_t count) {
  std::string digits = std::to_string(count < 0 ? -count : count);
  for (int at = static_cast<int>(digits.size()) - 3; at > 0; at -= 3) digits.insert(static_cast<size_t>(at), 1, ',');
  return count < 0 ? "-" + digits : digits;
}

std::string FormatSeconds(double seconds) {
  if (!std::isfinite(seconds)) return "-";
  if (seconds < 1e-3) return Digits3(seconds * 1e6, "us");
  if (seconds < 1) return Digits3(seconds * 1e3, "ms");
  return Digits3(seconds, "s");
}

}  // namespace qwen::ctl
