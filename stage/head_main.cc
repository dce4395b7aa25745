// qwen-head: the CPU process of a pipeline. Flags → rooms from the bottom up → serve → drain. No logic of its own.
#include <csignal>
#include <ctime>

#include <CLI/CLI.hpp>
#include <prometheus/registry.h>

#include <cstdio>
#include <cstdlib>

#include "stage/base/clock.h"
#include "stage/base/log.h"
#include "stage/contract/pod_contract.h"
#include "stage/engine/engine.h"
#include "stage/pipeline/pipeline_executor.h"
#include "stage/server/api.h"
#include "stage/server/engine_thread.h"
#include "stage/server/http_server.h"

#ifndef QWEN_VERSION
#define QWEN_VERSION "0.1.0"
#endif

namespace {
using namespace qwen;  // NOLINT: main only
using contract::ExitCode;

struct Flags {
  std::string model, model_id, pipeline_uid = "local", secret_file, api_keys_file, ca_file;
  std::string control_listen = "127.0.0.1:7000", listen = "127.0.0.1:8000", log_level = "info", log_format = "text";
  std::vector<std::string> image_hosts;
  int32_t stages = 1, block_tokens = 0, batch_tokens = 0, sequences = 0, model_len = 0, queue = 256, io_threads = 2, workers = 4;
  uint64_t epoch = 0, body_mib = 64;
  double drain_seconds = 30, stall_seconds = 10, recovery_seconds = 120;
  bool print_ports = false;
};

void AddFlags(CLI::App& app, Flags& f) {
  app.set_version_flag("--version", std::string("qwen-head ") + QWEN_VERSION);
  app.add_option("--model", f.model, "folder of the checkpoint (config, tokenizer, chat template; no weights are read)")->required();
  app.add_option("--model-id", f.model_id, "the model's name for clients; default: the folder's name");
  app.add_option("--stages", f.stages, "number of qwen-stage processes")->check(CLI::Range(1, contract::kStagesMax));
  app.add_option("--listen", f.listen, "ADDR:PORT of the HTTP API; port 0: any free one");
  app.add_option("--control-listen", f.control_listen, "ADDR:PORT where stages dial in; port 0: any free one");
  app.add_option("--pipeline-uid", f.pipeline_uid, "only stages of this pipeline may join")->envname(std::string(contract::kEnvPipelineUid));
  app.add_option("--secret-file", f.secret_file, "file with the handshake secret; without it stages must be on this host's loopback")
      ->envname(std::string(contract::kEnvSecretFile));
  app.add_option("--epoch", f.epoch, "the first group's epoch is above this")->envname(std::string(contract::kEnvEpoch));
  app.add_option("--block-tokens", f.block_tokens, "tokens a KV block; 0: as the stages have it")->check(CLI::Range(0, 256));
  app.add_option("--max-batch-tokens", f.batch_tokens, "tokens a plan; 0: as the stages allow")->check(CLI::NonNegativeNumber);
  app.add_option("--max-sequences", f.sequences, "sequences at once; 0: as the stages allow")->check(CLI::NonNegativeNumber);
  app.add_option("--max-model-len", f.model_len, "prompt + output tokens; 0: max_position_embeddings")->check(CLI::NonNegativeNumber);
  app.add_option("--queue", f.queue, "sequences that may wait; more are answered with 429")->check(CLI::Range(1, 1 << 20));
  app.add_option("--api-keys-file", f.api_keys_file, "one API key a line; without it everybody may ask");
  app.add_option("--allow-image-host", f.image_hosts, "host that image and video URLs may name (repeatable); data: URLs always work");
  app.add_option("--image-ca-file", f.ca_file, "PEM certificate authorities for https image hosts; default: the system's");
  app.add_option("--max-body-mib", f.body_mib, "size limit of a request body")->check(CLI::Range(1, 4096));
  app.add_option("--io-threads", f.io_threads, "threads for connections")->check(CLI::Range(1, 64));
  app.add_option("--workers", f.workers, "threads for tokenizing and images")->check(CLI::Range(1, 256));
  app.add_option("--drain-timeout", f.drain_seconds, "seconds that running requests get after SIGTERM")->check(CLI::NonNegativeNumber);
  app.add_option("--stall-timeout", f.stall_seconds, "seconds of silence that count as the loss of a stage")->check(CLI::PositiveNumber);
  app.add_option("--recovery-hold", f.recovery_seconds, "seconds after the loss of a stage in which /ready stays 200 and requests wait for its return")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--log-level", f.log_level)->check(CLI::IsMember({"debug", "info", "warning", "error"}));
  app.add_option("--log-format", f.log_format)->check(CLI::IsMember({"text", "json"}))->envname(std::string(contract::kEnvLogFormat));
  app.add_flag("--print-ports", f.print_ports, "print {\"http\":PORT,\"control\":PORT} on stdout when both listen");
}

std::vector<server::Api::StageProgress> Progress(const pipeline::PipelineStatus& status) {
  std::vector<server::Api::StageProgress> stages;
  for (const pipeline::StageStatus& stage : status.stages)
    stages.push_back({.stage = stage.stage, .connected = stage.connected, .loaded = stage.loaded, .load_percent = static_cast<int32_t>(stage.load_percent())});
  return stages;
}

int Fail(ExitCode code, const char* what, const Status& status) {
  log::Error(what, {{"error", status.ToString()}});
  return static_cast<int>(code);
}

std::chrono::microseconds Seconds(double seconds) { return std::chrono::microseconds(static_cast<int64_t>(seconds * 1e6)); }

// True when SIGTERM or SIGINT came within `milliseconds`.
bool WaitForSignal(const sigset_t& signals, int milliseconds) {
  const timespec timeout{milliseconds / 1000, (milliseconds % 1000) * 1'000'000L};
  return sigtimedwait(&signals, nullptr, &timeout) > 0;
}

int Run(const Flags& flags, const sigset_t& signals) {
  auto assets = server::ModelAssets::Load(flags.model, flags.model_id, flags.model_len);
  if (!assets.ok()) return Fail(ExitCode::kBadCheckpoint, "cannot use the model", assets.status());
  server::ApiKeys keys;
  if (!flags.api_keys_file.empty()) {
    auto loaded = server::ApiKeys::Load(flags.api_keys_file);
    if (!loaded.ok()) return Fail(ExitCode::kBadFlags, "cannot use the API keys", loaded.status());
    keys = std::move(*loaded);
  }
  auto secret = flags.secret_file.empty() ? Result<transport::Secret>(transport::Secret::InsecureLoopback())
                                          : transport::Secret::FromFile(flags.secret_file);
  if (!secret.ok()) return Fail(ExitCode::kBadFlags, "cannot use the secret", secret.status());
  auto control = transport::ParseEndpoint(flags.control_listen);
  if (!control.ok()) return Fail(ExitCode::kBadFlags, "--control-listen", control.status());
  auto listen = transport::ParseEndpoint(flags.listen);
  if (!listen.ok()) return Fail(ExitCode::kBadFlags, "--listen", listen.status());

  const SteadyClock clock;
  pipeline::PipelineOptions pipeline_options{.listen = *control, .secret = *secret};
  pipeline_options.identity = {.pipeline_uid = flags.pipeline_uid, .config_hash = contract::ConfigHash((*assets)->shape), .stages = flags.stages};
  pipeline_options.layers = (*assets)->shape.layers;
  pipeline_options.initial_epoch = flags.epoch;
  pipeline_options.limits = {.block_tokens = flags.block_tokens,
                             .block_count = 0,
                             .max_slots = flags.sequences,
                             .max_batch_tokens = flags.batch_tokens,
                             .max_sequence_tokens = (*assets)->max_model_len,
                             .vocab_size = (*assets)->shape.vocab};
  pipeline_options.stall_timeout = Seconds(flags.stall_seconds);
  auto executor = pipeline::PipelineExecutor::Start(pipeline_options);
  if (!executor.ok()) return Fail(ExitCode::kPortInUse, "cannot listen for stages", executor.status());
  engine::Engine engine({.queue_capacity = flags.queue, .max_batch_tokens = flags.batch_tokens, .block_ahead = flags.stages == 1}, **executor);
  server::EngineThread engine_thread(engine, clock);

  prometheus::Registry registry;
  server::Metrics metrics(registry, (*assets)->model_id);
  const server::UrlFetcher fetcher({.allowed_hosts = {flags.image_hosts.begin(), flags.image_hosts.end()}, .ca_file = flags.ca_file});
  server::Api api({.workers = flags.workers, .version = QWEN_VERSION, .recovery_hold = Seconds(flags.recovery_seconds)},
                  {.assets = **assets, .engine = engine, .metrics = metrics, .clock = clock, .fetcher = fetcher, .keys = keys});
  server::HttpServer::Options http_options{.address = listen->host.empty() ? "0.0.0.0" : listen->host, .port = listen->port, .io_threads = flags.io_threads};
  http_options.body_bytes_max = flags.body_mib << 20;
  std::atomic<const server::HttpServer*> http_view{nullptr};
  api.set_probes({.connections = [&] { return http_view.load() ? http_view.load()->connections() : 0; },
                  .alive = [&] { return engine_thread.alive(); },
                  .waiting_for = [&] { return (*executor)->status().waiting_for; },
                  .stages = [&] { return Progress((*executor)->status()); }});
  auto http = server::HttpServer::Start(
      http_options, [&](const server::HttpRequest& request) { return api.Precheck(request); },
      [&](server::HttpRequest request, std::shared_ptr<server::ResponseWriter> writer) { api.Handle(std::move(request), std::move(writer)); },
      [&](int status) { metrics.CountResponse(status); });
  if (!http.ok()) return Fail(ExitCode::kPortInUse, "cannot listen for clients", http.status());
  http_view = http->get();

  log::Info("serving", {{"model", (*assets)->model_id}, {"http", (*http)->port()}, {"control", (*executor)->port()}, {"stages", flags.stages}});
  if (flags.print_ports) {
    std::printf("{\"http\":%d,\"control\":%d}\n", (*http)->port(), (*executor)->port());
    std::fflush(stdout);
  }
  while (!WaitForSignal(signals, 1000)) {
    if (engine_thread.alive()) continue;
    // It cannot be joined, so nothing can be wound up; whoever started this process starts another.
    log::Error("the scheduler makes no progress: giving the process up", {});
    std::_Exit(static_cast<int>(ExitCode::kStalled));
  }

  log::Info("draining", {{"timeout_s", flags.drain_seconds}});
  api.StartDraining();
  const int64_t deadline = clock.NowMicros() + Seconds(flags.drain_seconds).count();
  bool hurry = false;  // a second signal
  while (!api.idle() && !hurry && clock.NowMicros() < deadline) hurry = WaitForSignal(signals, 20);
  const bool cut = !api.idle();
  engine.Drain();
  api.CutAll();
  const int64_t cut_deadline = clock.NowMicros() + 2'000'000;  // enough for error events to leave
  while (!api.idle() && !hurry && clock.NowMicros() < cut_deadline) hurry = WaitForSignal(signals, 20);
  (*http)->StopAccepting();
  const int64_t close_deadline = clock.NowMicros() + 3'000'000;  // what was answered also leaves
  while ((*http)->connections() > 0 && !hurry && clock.NowMicros() < close_deadline) hurry = WaitForSignal(signals, 20);
  http_view = nullptr;
  *http = nullptr;
  (*executor)->Shutdown(hurry ? std::chrono::milliseconds(200) : std::chrono::milliseconds(5000));
  log::Info("stopped", {{"requests_cut", cut}});
  return static_cast<int>(cut ? ExitCode::kDrainTimeout : ExitCode::kOk);
}

}  // namespace

int main(int argc, char** argv) {
  // Blocked before any thread starts, so that all of them inherit it and main alone takes them, synchronously.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  std::signal(SIGPIPE, SIG_IGN);  // a client that went away is an error code

  CLI::App app("qwen-head: OpenAI-compatible server and scheduler of a Qwen3-VL pipeline");
  Flags flags;
  AddFlags(app, flags);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    const int code = app.exit(e);
    return code == 0 ? 0 : static_cast<int>(ExitCode::kBadFlags);
  }
  if (flags.model_id.empty()) {
    std::string path = flags.model;
    while (path.size() > 1 && path.ends_with('/')) path.pop_back();
    flags.model_id = path.substr(path.rfind('/') + 1);
  }
  log::Init({.process = "qwen-head", .level = flags.log_level, .format = flags.log_format});
  return Run(flags, signals);
}
