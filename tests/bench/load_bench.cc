// load_bench: how fast a stage's weights come from disk or page cache into its memory, one way of loading beside another.
//
//   load_bench DIR [--ways plain,overlapped] [--rounds 3] [--cold] [--stages 1 --index 0] [--dtype bfloat16]
//              [--device cpu|cuda] [--threads 4] [--depth 4] [--request-mib 8] [--cache auto|buffered|direct] [--io auto|threads|uring]
//   load_bench DIR --check [...]     both ways in one process: every tensor must be the same, bit for bit; exit code 1 when not
//
// Every round loads once each way, in turn, each in a process of its own, so that ways share a machine's mood and no memory.
// --cold asks the kernel to drop the checkpoint's pages before each load. Prints one JSON line a load: seconds, GB/s of stored
// bytes, CPU seconds, and by how much the process's largest resident size exceeded the tensors.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <filesystem>

#include "stage/base/log.h"
#include "stage/contract/layer_plan.h"
#include "stage/contract/model_shape.h"
#include "stage/weights/stream_loader.h"

namespace qwen {
namespace {

struct Flags {
  std::string dir, dtype = "bfloat16", device = "cpu", cache = "auto", io = "auto";
  std::vector<std::string> ways = {"plain", "overlapped"};
  int rounds = 3, stages = 1, index = 0, threads = 4, depth = 4, request_mib = 8;
  bool cold = false, check = false, keep_fp8 = false;
};

void DropPages(const std::string& dir) {
  for (const auto& file : std::filesystem::directory_iterator(dir)) {
    const int fd = ::open(file.path().c_str(), O_RDONLY);
    if (fd < 0) continue;
    (void)::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    ::close(fd);
  }
}

rusage Usage() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return usage;
}
int64_t LargestResident() { return int64_t{Usage().ru_maxrss} << 10; }
double CpuSeconds() {
  const rusage usage = Usage();
  const auto seconds = [](const timeval& time) { return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) * 1e-6; };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

struct Loaded {
  weights::TensorMap tensors;
  double seconds = 0, cpu = 0;
  int64_t stored_bytes = 0;
};

Loaded Load(const Flags& flags, const std::string& way) {
  QP_CHECK(flags.device == "cpu" || dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_GLOBAL) != nullptr) << dlerror();
  auto checkpoint = weights::Checkpoint::OpenStage(flags.dir, flags.index, flags.stages);
  QP_CHECK(checkpoint.ok()) << checkpoint.status().ToString();
  const auto shape = contract::LoadModelShape(checkpoint->dir());
  QP_CHECK(shape.ok()) << shape.status().ToString();
  const auto ranges = contract::PlanLayers(*shape, flags.stages, contract::BalancePolicy::kTime);
  QP_CHECK(ranges.ok()) << ranges.status().ToString();
  weights::LoadOptions options{.spec = {.layers = (*ranges)[static_cast<size_t>(flags.index)], .index = flags.index, .stages = flags.stages},
                               .device = flags.device == "cpu" ? at::Device(at::kCPU) : at::Device(at::kCUDA, 0),
                               .dtype = flags.dtype == "float32" ? at::kFloat : at::kBFloat16,
                               .threads = flags.threads,
                               .keep_fp8 = flags.keep_fp8};
  (void)at::empty({1}, at::TensorOptions().device(options.device));  // a GPU's context is not what is measured
  auto found = checkpoint->ResolveStage(*shape, options.spec);
  QP_CHECK(found.ok() && found->report.ok()) << found.status().ToString() << found->report.ToStatus().ToString();
  weights::StreamOptions stream{.request_bytes = int64_t{flags.request_mib} << 20};
  using Options = weights::ReadPartsOptions;
  stream.read.depth = flags.depth;
  stream.read.cache = flags.cache == "auto" ? Options::Cache::kAuto : flags.cache == "direct" ? Options::Cache::kDirect : Options::Cache::kBuffered;
  stream.read.io = flags.io == "auto" ? Options::Io::kAuto : flags.io == "uring" ? Options::Io::kUring : Options::Io::kThreads;
  options.method = weights::LoadMethod::kPlain;
  const double cpu_before = CpuSeconds();
  const auto start = std::chrono::steady_clock::now();
  auto tensors = way == "plain" ? weights::LoadTensors(*checkpoint, *shape, options) : weights::StreamTensors(*checkpoint, *shape, *found, options, stream);
  QP_CHECK(tensors.ok()) << tensors.status().ToString();
  return {.tensors = std::move(tensors).value(),
          .seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(),
          .cpu = CpuSeconds() - cpu_before,
          .stored_bytes = found->report.bytes};
}

void Measure(const Flags& flags, const std::string& way) {
  const int64_t before = LargestResident();
  const Loaded loaded = Load(flags, way);
  int64_t held = 0;  // on the host
  for (const auto& [slot, tensor] : loaded.tensors) held += tensor.is_cpu() ? static_cast<int64_t>(tensor.nbytes()) : 0;
  std::printf("{\"suite\": \"load\", \"way\": \"%s\", \"device\": \"%s\", \"cold\": %s, \"seconds\": %.3f, \"gb_s\": %.2f, \"cpu_seconds\": %.2f, "
              "\"bytes\": %lld, \"beyond_tensors_mib\": %lld}\n",
              way.c_str(), flags.device.c_str(), flags.cold ? "true" : "false", loaded.seconds, static_cast<double>(loaded.stored_bytes) / loaded.seconds / 1e9,
              loaded.cpu, static_cast<long long>(loaded.stored_bytes), static_cast<long long>((LargestResident() - before - held) >> 20));
}

int Check(const Flags& flags) {
  const Loaded plain = Load(flags, "plain"), overlapped = Load(flags, "overlapped");
  int wrong = plain.tensors.size() != overlapped.tensors.size();
  for (const auto& [slot, tensor] : plain.tensors) {
    const auto other = overlapped.tensors.find(slot);
    if (other != overlapped.tensors.end() && tensor.scalar_type() == other->second.scalar_type() && tensor.sizes() == other->second.sizes() &&
        tensor.view(-1).view(at::kByte).equal(other->second.view(-1).view(at::kByte))) {
      continue;
    }
    std::fprintf(stderr, "WRONG: %s\n", slot.c_str());
    ++wrong;
  }
  std::printf("{\"suite\": \"load\", \"case\": \"same_tensors.%s\", \"unit\": \"of %zu\", \"ours\": %zu}\n", flags.device.c_str(), plain.tensors.size(),
              plain.tensors.size() - static_cast<size_t>(wrong));
  return wrong != 0;
}

int Main(int argc, char** argv) {
  Flags flags;
  CLI::App app("Loads a checkpoint's weights in several ways, in turn.", "load_bench");
  app.add_option("dir", flags.dir, "checkpoint")->required();
  app.add_option("--ways", flags.ways)->delimiter(',')->check(CLI::IsMember({"plain", "overlapped"}));
  app.add_option("--rounds", flags.rounds);
  app.add_option("--stages", flags.stages);
  app.add_option("--index", flags.index);
  app.add_option("--dtype", flags.dtype)->check(CLI::IsMember({"bfloat16", "float32"}));
  app.add_option("--threads", flags.threads)->check(CLI::Range(1, 64));
  app.add_option("--depth", flags.depth)->check(CLI::Range(1, 64));
  app.add_option("--request-mib", flags.request_mib)->check(CLI::Range(1, 256));
  app.add_option("--cache", flags.cache)->check(CLI::IsMember({"auto", "buffered", "direct"}));
  app.add_option("--io", flags.io)->check(CLI::IsMember({"auto", "threads", "uring"}));
  app.add_option("--device", flags.device)->check(CLI::IsMember({"cpu", "cuda"}));
  app.add_flag("--keep-fp8", flags.keep_fp8);
  app.add_flag("--check", flags.check);
  app.add_flag("--cold", flags.cold);
  CLI11_PARSE(app, argc, argv);
  log::Init({.process = "load_bench", .level = "warning"});
  if (flags.check) return Check(flags);
  for (int round = 0; round < flags.rounds; ++round) {
    for (const std::string& way : flags.ways) {
      if (flags.cold) DropPages(flags.dir);
      std::fflush(stdout);
      const pid_t child = fork();  // before the first thread of this process
      if (child == 0) {
        Measure(flags, way);
        std::fflush(stdout);
        std::_Exit(0);
      }
      int status = 0;
      if (waitpid(child, &status, 0) != child || status != 0) return 1;
    }
  }
  return 0;
}

}  // namespace
}  // namespace qwen

int main(int argc, char** argv) { return qwen::Main(argc, argv); }
