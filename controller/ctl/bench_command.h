// controller/ctl/bench_command.h — a sweep over numbers of concurrent clients. The measuring is in bench_command.cc; here is what
// is made of it. Pure.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "controller/ctl/chat_client.h"

namespace qwen::ctl {

struct BenchPoint {
  int clients = 0;
  int64_t requests = 0, failures = 0;
  int64_t prompt_tokens = 0, completion_tokens = 0;
  double wall_seconds = 0;
  double first_token_p50 = 0, first_token_p99 = 0;  // seconds
  double gap_p50 = 0, gap_p99 = 0;                  // seconds between two pieces of an answer (inter-token latency)
  std::string first_error;
  double output_tokens_per_second() const { return wall_seconds > 0 ? static_cast<double>(completion_tokens) / wall_seconds : 0; }
};
// The value below which `share` of the values lie (nearest rank); 0 of none.
double Percentile(std::vector<double> values, double share);
BenchPoint Summarise(int clients, double wall_seconds, const std::vector<Result<ChatResult>>& answers);

std::string BenchTable(const std::vector<BenchPoint>& points);
std::string BenchJson(const std::vector<BenchPoint>& points, const std::string& url, int prompt_words, int output_tokens);
std::string BenchSvg(const std::vector<BenchPoint>& points);  // output tokens/s and median first-token time over clients

}  // namespace qwen::ctl
