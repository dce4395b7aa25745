// qwen-stage: one stage of a pipeline. Flags → checkpoint → rooms from the bottom up → run → leave. No logic of its own.
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <CLI/CLI.hpp>
#include <atomic>
#include <csignal>
#include <cstdlib>
#include <ctime>
#include <optional>
#include <thread>

#include "stage/base/http_listener.h"
#include "stage/base/log.h"
#include "stage/contract/layer_plan.h"
#include "stage/contract/model_shape.h"
#include "stage/contract/pod_contract.h"
#include "stage/weights/checkpoint.h"
#include "stage/worker/model_compute.h"
#include "stage/worker/worker.h"

#ifndef QWEN_VERSION
#define QWEN_VERSION "0.1.0"
#endif

namespace {
using namespace qwen;  // NOLINT: main only
using contract::ExitCode;

// A plan that computes when the stage is told to stop gets so long; then the process just ends.
constexpr auto kLeaveTimeout = std::chrono::seconds(10);
// Loading ends between two requests; a disk that does not answer is not waited for.
constexpr auto kLeaveLoadingTimeout = std::chrono::milliseconds(700);
// One plan takes as long as a CPU needs for a large prefill: a CPU stage counts as hung only after so many stall time-outs.
constexpr double kCpuStepFactor = 10.0;

struct Flags {
  std::string model, layers, head, data_listen = "0.0.0.0:0", data_advertise, pipeline_uid = "local", secret_file;
  std::string log_level = "info", log_format = "text";
  worker::ModelComputeOptions compute;
  uint64_t epoch = 0;
  uint16_t metrics_port = contract::kStageMetricsPort;
  double stall_seconds = 10, head_seconds = 0;
  int64_t spin_micros = -1;
  bool insecure_loopback = false;
};

void AddFlags(CLI::App& app, Flags& f) {
  app.set_version_flag("--version", std::string("qwen-stage ") + QWEN_VERSION);
  app.add_option("--model", f.model, "checkpoint: a Hugging Face folder, a per-stage export, or the folder that holds stage-KK-of-SS/")->required();
  app.add_option("--index", f.compute.stage, "this stage, from 0")->envname(std::string(contract::kEnvStage))->required()->check(CLI::NonNegativeNumber);
  app.add_option("--stages", f.compute.stages, "number of stages")->envname(std::string(contract::kEnvStages))->required()->check(CLI::Range(1, contract::kStagesMax));
  app.add_option("--layers", f.layers, "decoder layers BEGIN:END of this stage (END exclusive); default: the planner's range");
  app.add_option("--head", f.head, "HOST:PORT of qwen-head's control port; dialled until it answers")->required();
  app.add_option("--data-listen", f.data_listen, "ADDR:PORT where the previous stage delivers hidden states; port 0: any free one");
  app.add_option("--data-advertise", f.data_advertise, "host name or address under which the previous stage reaches this one; default: the one used towards the head")
      ->envname(std::string(contract::kEnvPodIp));
  app.add_option("--device", f.compute.device, "where to compute")->check(CLI::IsMember({"cpu", "cuda"}));
  app.add_option("--dtype", f.compute.dtype, "of weights, activations and KV cache")->check(CLI::IsMember({"auto", "float32", "bfloat16"}));
  app.add_option("--backend", f.compute.backend, "on a GPU: auto (kernels where they fit the shape) or reference (ATen operators alone)")
      ->check(CLI::IsMember({"auto", "reference"}));
  app.add_option("--sampler", f.compute.sampler, "on a GPU: auto (a kernel samples what it can) or host (for comparison: the CPU samples)")
      ->envname("QWEN_SAMPLER")
      ->check(CLI::IsMember({"auto", "host"}));
  app.add_option("--edges", f.compute.edges, "how hidden states travel: auto (NCCL on a GPU, else TCP), nccl (every stage has its own GPU) or tcp")
      ->check(CLI::IsMember({"auto", "nccl", "tcp"}));
  app.add_option("--fp8", f.compute.fp8, "of a block-FP8 checkpoint: keep (FP8 in the GPU's memory, half the bytes), expand (multiplied out to the dtype when loaded); auto: keep where kernels take it")
      ->check(CLI::IsMember({"auto", "expand", "keep"}))
      ->envname("QWEN_FP8");
  app.add_option("--load", f.compute.load, "how weights are read: overlapped (requests of 8 MiB through a ring of buffers), plain (tensor by tensor)")
      ->envname("QWEN_LOAD")
      ->check(CLI::IsMember({"overlapped", "plain"}));
  app.add_option("--random-weights", f.compute.random_seed, "seed: noise instead of the checkpoint's weights, for measuring; config and tokenizer are still read");
  app.add_option("--block-tokens", f.compute.block_tokens, "tokens of a KV block; the same on all stages")->check(CLI::Range(1, 256));
  app.add_option("--kv-blocks", f.compute.kv_blocks, "KV blocks; 0: what the free memory holds")->check(CLI::NonNegativeNumber);
  app.add_option("--max-batch-tokens", f.compute.max_batch_tokens, "tokens of one plan")->check(CLI::Range(1, 1 << 20));
  app.add_option("--max-sequences", f.compute.max_sequences, "sequences at once")->check(CLI::Range(1, 1 << 16));
  app.add_option("--max-model-len", f.compute.max_model_len, "prompt + output tokens of a sequence; 0: the model's, or what fits")->check(CLI::NonNegativeNumber);
  app.add_option("--metrics-port", f.metrics_port, "port of /healthz, /ready and /metrics; 0: any free one");
  app.add_option("--pipeline-uid", f.pipeline_uid, "must be the head's")->envname(std::string(contract::kEnvPipelineUid));
  app.add_option("--secret-file", f.secret_file, "file with the handshake secret, the same as the head's")->envname(std::string(contract::kEnvSecretFile));
  app.add_flag("--insecure-loopback", f.insecure_loopback, "run without a secret; head and neighbours must be on this host's loopback");
  app.add_option("--epoch", f.epoch, "epoch at which the operator made this process")->envname(std::string(contract::kEnvEpoch));
  app.add_option("--spin-us", f.spin_micros, "microseconds for which a thread looks for the next plan before it sleeps; -1: 10000 on a GPU with eight or more CPUs, else 0")
      ->check(CLI::Range(-1, 1'000'000));
  app.add_option("--threads", f.compute.threads, "CPU threads of the tensor operators; 0: LibTorch's choice")->check(CLI::NonNegativeNumber);
  app.add_option("--stall-timeout", f.stall_seconds, "seconds of silence that count as the loss of the head, and (tenfold on a CPU) of one step that counts as hung")
      ->check(CLI::PositiveNumber);
  app.add_option("--head-timeout", f.head_seconds, "seconds without a head after which to give up; 0: never")->check(CLI::NonNegativeNumber);
  app.add_option("--log-level", f.log_level)->check(CLI::IsMember({"debug", "info", "warning", "error"}));
  app.add_option("--log-format", f.log_format)->check(CLI::IsMember({"text", "json"}))->envname(std::string(contract::kEnvLogFormat));
  app.footer("Exit codes: 0 told to stop; 64 flags; 65 checkpoint; 66 does not fit into memory; 67 no head; 68 refused by the head;\n"
             "69 secrets differ; 70 GPU fault; 71 hung; 72 port in use (docs/operations.md).");
}

int Fail(ExitCode code, const char* what, const Status& status) {
  log::Error(what, {{"error", status.ToString()}, {"exit_code", static_cast<int>(code)}});
  return static_cast<int>(code);
}

std::chrono::microseconds Seconds(double seconds) { return std::chrono::microseconds(static_cast<int64_t>(seconds * 1e6)); }

Result<contract::LayerRange> Layers(const Flags& flags, const contract::ModelShape& shape) {
  if (!flags.layers.empty()) return contract::ParseLayerRange(flags.layers);
  ASSIGN_OR_RETURN(const auto ranges, contract::PlanLayers(shape, flags.compute.stages, contract::BalancePolicy::kTime));
  return ranges[static_cast<size_t>(flags.compute.stage)];
}

Result<worker::WorkerOptions> MakeWorkerOptions(const Flags& flags, const contract::ModelShape& shape) {
  worker::WorkerOptions options;
  ASSIGN_OR_RETURN(options.head, transport::ParseEndpoint(flags.head));
  ASSIGN_OR_RETURN(options.data_listen, transport::ParseEndpoint(flags.data_listen));
  if (flags.secret_file.empty() == !flags.insecure_loopback) {
    return InvalidArgumentError("give one of --secret-file and --insecure-loopback");
  }
  if (!flags.secret_file.empty()) {
    ASSIGN_OR_RETURN(options.secret, transport::Secret::FromFile(flags.secret_file));
  }
  options.data_advertise = flags.data_advertise;
  options.pipeline_uid = flags.pipeline_uid;
  options.config_hash = contract::ConfigHash(shape);
  options.stage = flags.compute.stage;
  options.stages = flags.compute.stages;
  options.layers = flags.compute.layers;
  options.pod_epoch = flags.epoch;
  options.stall_timeout = Seconds(flags.stall_seconds);
  options.step_timeout = Seconds(flags.stall_seconds * (flags.compute.device == "cpu" ? kCpuStepFactor : 1.0));
  options.head_timeout = Seconds(flags.head_seconds);
  const bool spins = flags.compute.device == "cuda" && std::thread::hardware_concurrency() >= 8;
  options.spin = std::chrono::microseconds(flags.spin_micros >= 0 ? flags.spin_micros : spins ? 10'000 : 0);
  options.compute_fault_code = flags.compute.device == "cuda" ? ExitCode::kGpuFault : ExitCode::kInternal;
  return options;
}

HttpListener::Routes Routes(const worker::Worker& worker, const prometheus::Registry& registry) {
  const auto ready = [&worker] {
    const worker::WorkerHealth health = worker.health();
    if (health.in_group) return HttpReply{.status = 200, .body = "ready: epoch " + std::to_string(health.epoch) + "\n"};
    const char* why = !health.loaded ? "loading weights" : !health.connected ? "no connection to the head" : "waiting for the group";
    return HttpReply{.status = 503, .body = std::string(why) + "\n"};
  };
  return {{std::string(contract::kHealthPath),
           [&worker] {
             const worker::WorkerHealth health = worker.health();
             return HttpReply{.status = health.overdue ? 500 : 200,
                              .body = std::string(worker::PhaseName(health.phase)) + " for " + std::to_string(health.seconds_in_phase) +
                                      " s, " + std::to_string(health.steps_done) + " steps done\n"};
           }},
          {std::string(contract::kReadyPath), ready},
          {"/readyz", ready},
          {std::string(contract::kMetricsPath), [&registry] {
             return HttpReply{.body = prometheus::TextSerializer().Serialize(registry.Collect()), .content_type = "text/plain; version=0.0.4; charset=utf-8"};
           }}};
}

// Waits for SIGTERM or SIGINT until `done`; then lets the worker leave, and ends the process if it cannot.
void WatchSignals(const sigset_t& signals, worker::Worker& worker, const std::atomic<bool>& done) {
  const timespec tick{0, 100'000'000};
  while (!done.load()) {
    if (sigtimedwait(&signals, nullptr, &tick) <= 0) continue;
    log::Info("told to stop");
    const bool loaded = worker.health().loaded;
    worker.Stop();
    const auto deadline = std::chrono::steady_clock::now() + (loaded ? std::chrono::milliseconds(kLeaveTimeout) : kLeaveLoadingTimeout);
    while (!done.load()) {
      if (sigtimedwait(&signals, nullptr, &tick) > 0 || std::chrono::steady_clock::now() > deadline) {
        log::Warning("leaving in the middle of a plan or of loading");
        std::_Exit(static_cast<int>(ExitCode::kOk));  // the head has been told; nothing here outlives the process
      }
    }
  }
}

int Run(Flags& flags, const sigset_t& signals) {
  if (flags.compute.stage >= flags.compute.stages) return Fail(ExitCode::kBadFlags, "--index", InvalidArgumentError("not below --stages"));
  // The checkpoint's index is read before anything is dialled: what is wrong with it ends the start at once.
  std::optional<weights::Checkpoint> checkpoint;
  if (!flags.compute.random_seed) {
    auto opened = weights::Checkpoint::OpenStage(flags.model, flags.compute.stage, flags.compute.stages);
    if (!opened.ok()) return Fail(ExitCode::kBadCheckpoint, "cannot use the checkpoint", opened.status());
    checkpoint = std::move(opened).value();
  }
  auto shape = contract::LoadModelShape(checkpoint ? checkpoint->dir() : flags.model);
  if (!shape.ok()) return Fail(ExitCode::kBadCheckpoint, "cannot use the checkpoint", shape.status());
  auto layers = Layers(flags, *shape);
  if (!layers.ok()) return Fail(ExitCode::kBadFlags, "--layers", layers.status());
  flags.compute.layers = *layers;
  if (layers->begin < 0 || layers->count() <= 0 || layers->end > shape->layers) {
    return Fail(ExitCode::kBadFlags, "--layers", InvalidArgumentError(contract::ToString(*layers) + " of " + std::to_string(shape->layers)));
  }
  auto options = MakeWorkerOptions(flags, *shape);
  if (!options.ok()) return Fail(ExitCode::kBadFlags, "cannot start", options.status());

  prometheus::Registry registry;
  worker::WorkerMetrics metrics(registry, flags.compute.stage, flags.compute.layers);
  const auto loader = [&](const worker::LoadProgress& progress) {
    return worker::LoadModelCompute(checkpoint ? &*checkpoint : nullptr, *shape, flags.compute, progress);
  };
  worker::Worker worker(*options, loader, metrics);
  auto http = HttpListener::Start({.address = "0.0.0.0", .port = flags.metrics_port}, Routes(worker, registry));
  if (!http.ok()) return Fail(ExitCode::kPortInUse, "--metrics-port", http.status());
  log::Info("starting", {{"stage", flags.compute.stage}, {"stages", flags.compute.stages}, {"layers", contract::ToString(*layers)},
                         {"head", flags.head}, {"metrics_port", (*http)->port()}});

  std::atomic<bool> done{false};
  std::thread watcher([&] { WatchSignals(signals, worker, done); });
  const worker::WorkerExit ended = worker.Run();
  done = true;
  watcher.join();
  if (ended.code == ExitCode::kOk) {
    log::Info("stopped");
    return 0;
  }
  return Fail(ended.code, contract::ExitReason(static_cast<int>(ended.code)).data(), ended.status);
}

}  // namespace

int main(int argc, char** argv) {
  Flags flags;
  CLI::App app("One stage of a Qwen3-VL pipeline: holds a range of decoder layers and executes the head's plans.", "qwen-stage");
  AddFlags(app, flags);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : static_cast<int>(ExitCode::kBadFlags);
  }
  log::Init({.process = "qwen-stage[" + std::to_string(flags.compute.stage) + "]", .level = flags.log_level, .format = flags.log_format});
  sigset_t signals;  // blocked before the first thread starts, so that only the watcher takes them
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  return Run(flags, signals);
}
