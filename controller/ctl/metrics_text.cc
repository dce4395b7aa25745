#include "controller/ctl/metrics_text.h"

#include <algorithm>
#include <cstdlib>

namespace qwen::ctl {
namespace {

// NAME{label="value",...} NUMBER [TIMESTAMP]
std::optional<Sample> ParseLine(std::string_view line) {
  Sample sample;
  const size_t name_end = line.find_first_of("{ ");
  if (line.empty() || line[0] == '#' || name_end == std::string_view::npos) return std::nullopt;
  sample.name = std::string(line.substr(0, name_end));
  line.remove_prefix(name_end);
  if (line[0] == '{') {
    line.remove_prefix(1);
    while (!line.empty() && line[0] != '}') {
      const size_t equals = line.find("=\"");
      if (equals == std::string_view::npos) return std::nullopt;
      std::string key(line.substr(0, equals)), value;
      line.remove_prefix(equals + 2);
      while (!line.empty() && line[0] != '"') {
        if (line[0] == '\\' && line.size() > 1) {
          line.remove_prefix(1);
          value.push_back(line[0] == 'n' ? '\n' : line[0]);
        } else {
          value.push_back(line[0]);
        }
        line.remove_prefix(1);
      }
      if (line.empty()) return std::nullopt;
      line.remove_prefix(1);
      if (!line.empty() && line[0] == ',') line.remove_prefix(1);
      sample.labels[std::move(key)] = std::move(value);
    }
    if (line.empty()) return std::nullopt;
    line.remove_prefix(1);
  }
  const std::string number(line);
  char* end = nullptr;
  sample.value = std::strtod(number.c_str(), &end);  // NaN and +Inf are in the format
  if (end == number.c_str()) return std::nullopt;
  return sample;
}

}  // namespace

Metrics Metrics::Parse(std::string_view text) {
  Metrics metrics;
  while (!text.empty()) {
    const size_t end = std::min(text.find('\n'), text.size());
    std::string_view line = text.substr(0, end);
    if (line.ends_with('\r')) line.remove_suffix(1);
    if (auto sample = ParseLine(line)) metrics.samples_.push_back(std::move(*sample));
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return metrics;
}

std::optional<double> Metrics::Sum(std::string_view name, const std::map<std::string, std::string>& labels) const {
  std::optional<double> sum;
  for (const Sample& sample : samples_) {
    if (sample.name != name) continue;
    const bool matches = std::all_of(labels.begin(), labels.end(), [&](const auto& label) {
      const auto found = sample.labels.find(label.first);
      return found != sample.labels.end() && found->second == label.second;
    });
    if (matches) sum = sum.value_or(0) + sample.value;
  }
  return sum;
}

const Sample* Metrics::First(std::string_view name) const {
  const auto found = std::find_if(samples_.begin(), samples_.end(), [&](const Sample& sample) { return sample.name == name; });
  return found == samples_.end() ? nullptr : &*found;
}

}  // namespace qwen::ctl
