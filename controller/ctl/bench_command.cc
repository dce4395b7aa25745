#include "controller/ctl/bench_command.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <mutex>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>

#include "controller/ctl/commands.h"
#include "controller/ctl/table.h"
#include "controller/ctl/units.h"

namespace qwen::ctl {
namespace {

constexpr int kClientsMax = 512;  // threads of this process

struct BenchFlags {
  std::string url = "http://127.0.0.1:8000", model, api_key, image, json, plot;
  std::vector<int> clients{1, 2, 4, 8, 16};
  int requests_per_client = 4, prompt_words = 128, output_tokens = 64, seed = 1;
};

// Words that no two requests share in this order, so that no prefix cache answers for the model.
std::string RandomPrompt(int words, uint64_t seed) {
  static constexpr const char* kWords[] = {"river", "stone", "green", "seven", "cloud", "paper", "night", "horse", "glass", "north", "music", "field", "winter", "table", "orange", "letter"};
  std::mt19937_64 random(seed);
  std::string text = "Continue this list of words: ";
  for (int i = 0; i < words; ++i) text += std::string(i ? " " : "") + kWords[random() % std::size(kWords)];
  return text;
}

BenchPoint Measure(const BenchFlags& flags, const Url& url, const std::string& model, const std::string& image_url, int clients) {
  std::mutex mutex;
  std::vector<Result<ChatResult>> answers;  // guarded by mutex
  std::atomic<int> next{0};
  const int total = clients * flags.requests_per_client;
  const auto start = std::chrono::steady_clock::now();
  const auto client = [&] {
    for (int i; (i = next++) < total;) {
      const uint64_t seed = static_cast<uint64_t>(flags.seed) * 1000003 + static_cast<uint64_t>(clients) * 65537 + static_cast<uint64_t>(i);
      ChatMessage message{.role = "user", .text = RandomPrompt(flags.prompt_words, seed)};
      if (!image_url.empty()) message.image_urls.push_back(image_url);
      auto answer = StreamChat(url, {.model = model, .messages = {message}, .api_key = flags.api_key, .max_tokens = flags.output_tokens, .temperature = 0.0, .ignore_eos = true},
                               [](std::string_view) { return true; });
      std::lock_guard<std::mutex> lock(mutex);
      answers.push_back(std::move(answer));
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < clients; ++i) threads.emplace_back(client);
  for (std::thread& thread : threads) thread.join();
  return Summarise(clients, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), answers);
}

Status WriteFile(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << text;
  file.close();
  return file ? OkStatus() : InternalError(path + ": cannot be written");
}

Result<int> Bench(const BenchFlags& flags) {
  ASSIGN_OR_RETURN(const Url url, ParseUrl(flags.url));
  std::string model = flags.model, image_url;
  if (model.empty()) {
    ASSIGN_OR_RETURN(model, FirstModel(url, flags.api_key));
  }
  if (!flags.image.empty()) {
    ASSIGN_OR_RETURN(image_url, ImageDataUrl(flags.image));
  }
  std::vector<BenchPoint> points;
  for (const int clients : flags.clients) {
    points.push_back(Measure(flags, url, model, image_url, clients));
    std::fprintf(stderr, "%d clients: %.1f tokens/s\n", clients, points.back().output_tokens_per_second());
    if (points.back().failures == points.back().requests) return UnavailableError("every request failed: " + points.back().first_error);
  }
  std::fputs(BenchTable(points).c_str(), stdout);
  if (!flags.json.empty()) RETURN_IF_ERROR(WriteFile(flags.json, BenchJson(points, flags.url, flags.prompt_words, flags.output_tokens)));
  if (!flags.plot.empty()) RETURN_IF_ERROR(WriteFile(flags.plot, BenchSvg(points)));
  return std::any_of(points.begin(), points.end(), [](const BenchPoint& p) { return p.failures > 0; }) ? 1 : 0;
}

std::string Number(double value, const char* format = "%.1f") {
  char text[48];
  std::snprintf(text, sizeof(text), format, value);
  return text;
}

// One panel of the plot: a line through (log2 clients, value), with the value at each point.
std::string Panel(const std::vector<BenchPoint>& points, double top, const char* title, const char* colour, const std::function<double(const BenchPoint&)>& value) {
  constexpr double kLeft = 60, kWidth = 560, kHeight = 180;
  double greatest = 1e-9;
  for (const BenchPoint& p : points) greatest = std::max(greatest, value(p));
  const double first = std::log2(points.front().clients), span = std::max(1e-9, std::log2(points.back().clients) - first);
  const auto x = [&](const BenchPoint& p) { return kLeft + kWidth * (points.size() > 1 ? (std::log2(p.clients) - first) / span : 0.5); };
  const auto y = [&](const BenchPoint& p) { return top + kHeight - kHeight * value(p) / greatest; };
  std::string line, marks;
  for (const BenchPoint& p : points) {
    line += Number(x(p)) + "," + Number(y(p)) + " ";
    marks += "<circle cx='" + Number(x(p)) + "' cy='" + Number(y(p)) + "' r='3' fill='" + colour + "'/><text x='" + Number(x(p)) + "' y='" + Number(y(p) - 8) +
             "' text-anchor='middle'>" + Number(value(p), "%.3g") + "</text><text x='" + Number(x(p)) + "' y='" + Number(top + kHeight + 16) +
             "' text-anchor='middle' fill='#666'>" + std::to_string(p.clients) + "</text>";
  }
  return "<text x='" + Number(kLeft) + "' y='" + Number(top - 22) + "' font-weight='bold'>" + title + "</text><line x1='" + Number(kLeft) + "' y1='" + Number(top + kHeight) + "' x2='" +
         Number(kLeft + kWidth) + "' y2='" + Number(top + kHeight) + "' stroke='#999'/><polyline fill='none' stroke-width='2' stroke='" + colour + "' points='" + line + "'/>" + marks;
}

}  // namespace

double Percentile(std::vector<double> values, double share) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const auto rank = static_cast<size_t>(std::ceil(share * static_cast<double>(values.size())));
  return values[std::clamp<size_t>(rank, 1, values.size()) - 1];
}

BenchPoint Summarise(int clients, double wall_seconds, const std::vector<Result<ChatResult>>& answers) {
  BenchPoint point{.clients = clients, .requests = static_cast<int64_t>(answers.size()), .wall_seconds = wall_seconds};
  std::vector<double> first, gaps;
  for (const Result<ChatResult>& answer : answers) {
    if (!answer.ok()) {
      if (point.failures++ == 0) point.first_error = answer.status().message();
      continue;
    }
    point.prompt_tokens += answer->prompt_tokens;
    point.completion_tokens += answer->completion_tokens;
    first.push_back(answer->first_token_seconds);
    gaps.insert(gaps.end(), answer->gaps_seconds.begin(), answer->gaps_seconds.end());
  }
  point.first_token_p50 = Percentile(first, 0.5);
  point.first_token_p99 = Percentile(first, 0.99);
  point.gap_p50 = Percentile(gaps, 0.5);
  point.gap_p99 = Percentile(std::move(gaps), 0.99);
  return point;
}

std::string BenchTable(const std::vector<BenchPoint>& points) {
  Table table({"clients", "requests", "failed", "tokens/s", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99", "prompt", "output"});
  for (const BenchPoint& p : points)
    table.Add({std::to_string(p.clients), std::to_string(p.requests), std::to_string(p.failures), Number(p.output_tokens_per_second()), FormatSeconds(p.first_token_p50),
               FormatSeconds(p.first_token_p99), FormatSeconds(p.gap_p50), FormatSeconds(p.gap_p99), FormatCount(p.prompt_tokens), FormatCount(p.completion_tokens)});
  return table.ToString();
}

std::string BenchJson(const std::vector<BenchPoint>& points, const std::string& url, int prompt_words, int output_tokens) {
  nlohmann::json json = {{"url", url}, {"prompt_words", prompt_words}, {"output_tokens", output_tokens}, {"points", nlohmann::json::array()}};
  for (const BenchPoint& p : points)
    json["points"].push_back({{"clients", p.clients}, {"requests", p.requests}, {"failures", p.failures}, {"prompt_tokens", p.prompt_tokens},
                              {"completion_tokens", p.completion_tokens}, {"wall_seconds", p.wall_seconds}, {"output_tokens_per_second", p.output_tokens_per_second()},
                              {"ttft_p50_seconds", p.first_token_p50}, {"ttft_p99_seconds", p.first_token_p99}, {"itl_p50_seconds", p.gap_p50}, {"itl_p99_seconds", p.gap_p99}});
  return json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

std::string BenchSvg(const std::vector<BenchPoint>& points) {
  std::string out = "<svg xmlns='http://www.w3.org/2000/svg' width='660' height='560' font-family='sans-serif' font-size='11'><rect width='660' height='560' fill='white'/>";
  if (!points.empty()) {
    out += Panel(points, 50, "output tokens/s over concurrent clients", "#0969da", [](const BenchPoint& p) { return p.output_tokens_per_second(); });
    out += Panel(points, 320, "median time to first token (ms) over concurrent clients", "#cf222e", [](const BenchPoint& p) { return p.first_token_p50 * 1e3; });
  }
  return out + "</svg>\n";
}

void AddBench(CLI::App& app, int& exit_code) {
  auto flags = std::make_shared<BenchFlags>();
  CLI::App* command = app.add_subcommand("bench", "measure a running pipeline over numbers of concurrent clients");
  command->add_option("--url", flags->url, "of the head")->capture_default_str();
  command->add_option("--model", flags->model, "default: the first that the server lists");
  command->add_option("--clients", flags->clients, "numbers of concurrent clients, ascending")->delimiter(',')->check(CLI::Range(1, kClientsMax))->capture_default_str();
  command->add_option("--requests", flags->requests_per_client, "requests of each client")->check(CLI::Range(1, 10000))->capture_default_str();
  command->add_option("--prompt-words", flags->prompt_words, "random words of a prompt (about a token each)")->check(CLI::Range(1, 100000))->capture_default_str();
  command->add_option("--output-tokens", flags->output_tokens, "tokens of every answer (ignore_eos)")->check(CLI::Range(1, 100000))->capture_default_str();
  command->add_option("--image", flags->image, "a picture that goes with every prompt")->check(CLI::ExistingFile);
  command->add_option("--seed", flags->seed, "of the prompts")->capture_default_str();
  command->add_option("--json", flags->json, "write the figures to this file");
  command->add_option("--plot", flags->plot, "write a plot (SVG) to this file");
  command->add_option("--api-key", flags->api_key, "sent as Authorization: Bearer")->envname("QWEN_API_KEY");
  command->callback([flags, &exit_code] {
    std::sort(flags->clients.begin(), flags->clients.end());
    const Result<int> code = Bench(*flags);
    exit_code = code.ok() ? *code : Report(code.status());
  });
}

}  // namespace qwen::ctl
