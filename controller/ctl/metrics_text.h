// controller/ctl/metrics_text.h — reads Prometheus text (what /metrics answers). Pure.
#pragma once
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace qwen::ctl {

struct Sample {
  std::string name;
  std::map<std::string, std::string> labels;
  double value = 0;
};
class Metrics {
 public:
  // Lines that are not samples are passed over: a scrape is for show.
  static Metrics Parse(std::string_view text);
  // The sum over all samples of that name whose labels include `labels`; empty when there is none.
  std::optional<double> Sum(std::string_view name, const std::map<std::string, std::string>& labels = {}) const;
  const Sample* First(std::string_view name) const;  // null when there is none

 private:
  std::vector<Sample> samples_;
};

}  // namespace qwen::ctl
