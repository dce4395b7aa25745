#include "controller/ctl/run_command.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <thread>

#include "controller/ctl/commands.h"
#include "controller/ctl/gpus.h"
#include "controller/ctl/manifest.h"
#include "controller/ctl/runner.h"
#include "controller/ctl/table.h"
#include "controller/ctl/units.h"
#include "controller/plan/desired.h"
#include "stage/contract/model_shape.h"
#include "stage/contract/pod_contract.h"

namespace qwen::ctl {
namespace {

constexpr const char* kHost = "127.0.0.1";

// Ports that were free a moment ago. All are held until the last is found, so that they differ.
Result<std::vector<uint16_t>> FreePorts(size_t count) {
  std::vector<int> sockets;
  std::vector<uint16_t> ports;
  Status error;
  while (ports.size() < count && error.ok()) {
    const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address);
    if (fd < 0 || ::bind(fd, reinterpret_cast<sockaddr*>(&address), size) != 0 || ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) != 0)
      error = ErrnoError("no free port", errno);
    if (fd >= 0) sockets.push_back(fd);
    ports.push_back(ntohs(address.sin_port));
  }
  for (const int fd : sockets) ::close(fd);
  if (!error.ok()) return error;
  return ports;
}

std::string RandomHex(size_t bytes) {
  std::random_device device;
  std::string hex;
  for (size_t i = 0; i < bytes; ++i) {
    char pair[3];
    std::snprintf(pair, sizeof(pair), "%02x", device() & 0xffu);
    hex += pair;
  }
  return hex;
}

// A private folder that goes when this goes.
class ScratchFolder {
 public:
  static Result<std::unique_ptr<ScratchFolder>> Make() {
    const char* base = std::getenv("TMPDIR");
    std::string pattern = std::string(base && *base ? base : "/tmp") + "/qwenctl-XXXXXX";
    if (::mkdtemp(pattern.data()) == nullptr) return ErrnoError(pattern, errno);  // mode 0700
    return std::unique_ptr<ScratchFolder>(new ScratchFolder(pattern));
  }
  ~ScratchFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;
  const std::string& path() const { return path_; }

 private:
  explicit ScratchFolder(std::string path) : path_(std::move(path)) {}
  const std::string path_;
};

Status WriteSecret(const std::string& path) {
  const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd < 0) return ErrnoError(path, errno);
  const std::string secret = RandomHex(32) + "\n";
  const bool written = ::write(fd, secret.data(), secret.size()) == static_cast<ssize_t>(secret.size());
  const int error = errno;
  ::close(fd);
  return written ? OkStatus() : ErrnoError(path, error);
}

Result<std::string> OwnFolder() {
  std::error_code error;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
  if (error) return InternalError("cannot tell where qwenctl lies: " + error.message());
  return self.parent_path().string();
}

// The first key of an API key file: what our own question is asked with.
std::string FirstKey(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  while (std::getline(file, line)) {
    while (!line.empty() && std::isspace(static_cast<unsigned char>(line.back()))) line.pop_back();
    if (!line.empty() && line[0] != '#') return line;
  }
  return "";
}

Status Apply(const RunFlags& flags, api::Spec& spec) {
  if (!flags.device.empty()) spec.engine.device = flags.device == "cpu" ? api::Device::kCpu : api::Device::kCuda;
  if (flags.stages) {
    spec.stages.list.clear();
    spec.stages.count = *flags.stages;
  }
  if (flags.port) spec.server.port = *flags.port;
  if (!spec.model.source.path) return InvalidArgumentError("spec.model.source: a local run needs path; persistentVolumeClaim is for clusters");
  if (spec.server.api_keys.secret_name && !spec.server.api_keys.file)
    return InvalidArgumentError("spec.server.apiKeys: a local run needs file; secretName is for clusters");
  return OkStatus();
}

// What only a run on this machine knows: each stage's GPU, and noise for weights.
Status PlaceStages(const RunFlags& flags, const api::Spec& spec, std::vector<plan::Process>& processes) {
  const bool cuda = spec.engine.device == api::Device::kCuda;
  const std::vector<std::string> gpus = cuda ? UsableGpus(std::getenv("CUDA_VISIBLE_DEVICES")) : std::vector<std::string>();
  if (cuda && gpus.empty()) return NotFoundError("no GPU here (/dev/nvidia0, CUDA_VISIBLE_DEVICES); --device cpu runs without");
  const size_t stages = processes.size() - 1;
  if (cuda && gpus.size() < stages && spec.transport.type == api::TransportType::kNccl)
    return InvalidArgumentError("spec.transport.type: NCCL needs a GPU for each of " + std::to_string(stages) + " stages, here are " + std::to_string(gpus.size()));
  size_t stage = 0;
  for (plan::Process& process : processes) {
    if (process.role != plan::Role::kStage) continue;
    if (cuda) {
      process.env["CUDA_VISIBLE_DEVICES"] = GpuOfStage(gpus, stage, stages);
      if (gpus.size() < stages && spec.transport.type == api::TransportType::kAuto) {
        process.args.push_back("--edges");  // NCCL does not connect two stages on one GPU
        process.args.push_back("tcp");
      }
    }
    if (flags.random_weights) {
      process.args.push_back("--random-weights");
      process.args.push_back(std::to_string(*flags.random_weights));
    }
    ++stage;
  }
  return OkStatus();
}

struct Question {
  Url api;
  std::string text, image, api_key, model;
  int max_tokens = 0;
  std::vector<std::string> stage_names;
  std::vector<uint16_t> metrics_ports;
};

Status Ask(const Question& question) {
  ChatMessage message{.role = "user", .text = question.text};
  if (!question.image.empty()) {
    ASSIGN_OR_RETURN(std::string url, ImageDataUrl(question.image));
    message.image_urls.push_back(std::move(url));
  }
  std::printf("\n> %s%s\n", question.text.c_str(), question.image.empty() ? "" : (" [" + question.image + "]").c_str());
  const ChatRequest request{.model = question.model, .messages = {message}, .api_key = question.api_key, .max_tokens = question.max_tokens, .temperature = 0.0};
  auto answer = StreamChat(question.api, request, [](std::string_view piece) {
    std::fwrite(piece.data(), 1, piece.size(), stdout);
    std::fflush(stdout);
    return true;
  });
  if (!answer.ok()) return answer.status().WithContext("the question failed");
  std::printf("\n\n");
  std::vector<StageReport> stages;
  for (size_t k = 0; k < question.metrics_ports.size(); ++k) {
    const Url url{.host = kHost, .port = question.metrics_ports[k]};
    const auto scrape = HttpGet(url, contract::kMetricsPath, std::chrono::seconds(2));
    stages.push_back(ReportOf(question.stage_names[k], Metrics::Parse(scrape.ok() ? scrape->body : "")));
  }
  std::printf("%s", AskReport(*answer, stages).c_str());
  std::fflush(stdout);
  return OkStatus();
}

Result<int> RunOrStatus(const RunFlags& flags) {
  ASSIGN_OR_RETURN(api::QwenPipeline pipeline, LoadManifest(flags.manifest));
  RETURN_IF_ERROR(Apply(flags, pipeline.spec));
  const std::string& model_dir = *pipeline.spec.model.source.path;
  if (!flags.image.empty()) RETURN_IF_ERROR(ImageDataUrl(flags.image).status());  // before half a minute of loading
  ASSIGN_OR_RETURN(const contract::ModelShape shape, contract::LoadModelShape(model_dir));
  ASSIGN_OR_RETURN(const plan::PipelineSize size, plan::SizePipeline(pipeline.spec, shape, std::nullopt));

  std::string bin_dir = flags.bin_dir;
  if (bin_dir.empty()) {
    ASSIGN_OR_RETURN(bin_dir, OwnFolder());
  }
  for (const char* program : {"qwen-head", "qwen-stage"})
    if (::access((bin_dir + "/" + program).c_str(), X_OK) != 0) return NotFoundError(bin_dir + "/" + program + ": not there or not executable (--bin-dir says where to look)");

  ASSIGN_OR_RETURN(const std::unique_ptr<ScratchFolder> scratch, ScratchFolder::Make());
  RETURN_IF_ERROR(WriteSecret(scratch->path() + "/secret"));
  ASSIGN_OR_RETURN(std::vector<uint16_t> ports, FreePorts(2 + size.stages.size()));
  const uint16_t control_port = ports[0];
  const uint16_t api_port = pipeline.spec.server.port != 0 ? static_cast<uint16_t>(pipeline.spec.server.port) : ports[1];
  const std::string control = std::string(kHost) + ":" + std::to_string(control_port);
  plan::Placement placement{.model_dir = model_dir,
                            .pipeline_uid = "local-" + RandomHex(8),
                            .secret_file = scratch->path() + "/secret",
                            .head_address = control,
                            .control_listen = control,
                            .api_listen = std::string(kHost) + ":" + std::to_string(api_port),
                            .data_listen = std::string(kHost) + ":0",
                            .data_advertise = kHost,
                            .metrics_ports = {ports.begin() + 2, ports.end()},
                            .api_keys_file = pipeline.spec.server.api_keys.file.value_or(""),
                            .cores = static_cast<int32_t>(std::max(1u, std::thread::hardware_concurrency())),
                            .log_level = flags.log_level};
  RunnerOptions options;
  ASSIGN_OR_RETURN(options.processes, plan::DesiredProcesses(pipeline, size, placement));
  RETURN_IF_ERROR(PlaceStages(flags, pipeline.spec, options.processes));
  options.bin_dir = bin_dir;
  options.api = {.host = kHost, .port = api_port};
  options.metrics_ports = placement.metrics_ports;
  options.ready_timeout = std::chrono::seconds(flags.ready_timeout_seconds);
  options.drain_timeout = std::chrono::seconds(pipeline.spec.server.drain_timeout_seconds);
  options.restart = pipeline.spec.restart;
  options.colour = ::isatty(::fileno(options.log)) == 1;
  if (!flags.ask.empty()) {
    Question question{.api = options.api, .text = flags.ask, .image = flags.image, .api_key = FirstKey(placement.api_keys_file), .model = pipeline.spec.model.id,
                      .max_tokens = flags.max_tokens, .metrics_ports = placement.metrics_ports};
    for (const plan::Process& process : options.processes)
      if (process.role == plan::Role::kStage) question.stage_names.push_back(process.name);
    options.when_ready = [question] { return Ask(question); };
  }
  return Runner(std::move(options)).Run();
}

}  // namespace

StageReport ReportOf(const std::string& name, const Metrics& metrics) {
  StageReport report{.name = name, .layers = "-"};
  if (const Sample* layers = metrics.First("qwen_stage_layers")) {
    const auto begin = layers->labels.find("begin"), end = layers->labels.find("end");
    if (begin != layers->labels.end() && end != layers->labels.end()) report.layers = begin->second + ":" + end->second;
  }
  report.weight_bytes = metrics.Sum("qwen_stage_weight_bytes").value_or(0);
  report.forward_seconds = metrics.Sum("qwen_stage_step_seconds_sum").value_or(0);
  report.transfer_seconds = metrics.Sum("qwen_stage_transfer_seconds_sum").value_or(0);
  report.transfer_bytes = metrics.Sum("qwen_stage_transfer_bytes_total").value_or(0);
  return report;
}

std::string AskReport(const ChatResult& answer, const std::vector<StageReport>& stages) {
  char rate[32];
  std::snprintf(rate, sizeof(rate), "%.1f", answer.tokens_per_second());
  Table table({"stage", "layers", "weights", "forward", "transfer", "moved"});
  for (const StageReport& s : stages)
    table.Add({s.name, s.layers, FormatBytes(s.weight_bytes), FormatSeconds(s.forward_seconds), FormatSeconds(s.transfer_seconds), FormatBytes(s.transfer_bytes)});
  return table.ToString() + "time to first token " + FormatSeconds(answer.first_token_seconds) + ", " + rate + " tokens/s, " +
         FormatCount(answer.prompt_tokens) + " prompt tokens, " + FormatCount(answer.completion_tokens) + " generated\n";
}

int Run(const RunFlags& flags) {
  const Result<int> code = RunOrStatus(flags);
  return code.ok() ? *code : Report(code.status());
}

void AddRun(CLI::App& app, int& exit_code) {
  auto flags = std::make_shared<RunFlags>();
  CLI::App* command = app.add_subcommand("run", "start the manifest's pipeline as local processes; SIGINT or SIGTERM drains it");
  command->add_option("-f,--file", flags->manifest, "manifest (YAML or JSON)")->required()->check(CLI::ExistingFile);
  command->add_option("--device", flags->device, "instead of spec.engine.device")->check(CLI::IsMember({"cpu", "cuda"}));
  command->add_option("--stages", flags->stages, "instead of spec.stages")->check(CLI::Range(1, contract::kStagesMax));
  command->add_option("--port", flags->port, "instead of spec.server.port; 0: any free one")->check(CLI::Range(0, 65535));
  command->add_option("--ask", flags->ask, "ask this question once it serves, print the answer and a table, then end");
  command->add_option("--image", flags->image, "picture that goes with --ask (PNG, JPEG, WebP)")->check(CLI::ExistingFile);
  command->add_option("--max-tokens", flags->max_tokens, "longest answer to --ask; default: the server's")->check(CLI::PositiveNumber);
  command->add_option("--random-weights", flags->random_weights, "seed: noise instead of the checkpoint's weights, for measuring a shape");
  command->add_option("--bin-dir", flags->bin_dir, "folder of qwen-head and qwen-stage; default: qwenctl's own");
  command->add_option("--log-level", flags->log_level, "of all processes")->check(CLI::IsMember({"debug", "info", "warning", "error"}))->capture_default_str();
  command->add_option("--ready-timeout", flags->ready_timeout_seconds, "seconds until it must serve")->check(CLI::Range(1, 86400))->capture_default_str();
  command->callback([flags, &exit_code] { exit_code = Run(*flags); });
}

}  // namespace qwen::ctl
