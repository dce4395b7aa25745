// load_bench: how fast a stage's weights come from disk or page cache into its memory, one way of loading beside another.
//
//   load_bench DIR [--ways plain,overlapped] [--rounds 3] [--cold] [--stages 1 --index 0] [--dtype bfloat16]
//              [--threads 4] [--depth 4] [--request-mib 8] [--cache auto|buffered|direct] [--io auto|threads|uring]
//
// Every round loads once each way, in turn, each in a process of its own, so that ways share a machine's mood and no memory.
// --cold asks the kernel to drop the checkpoint's pages before each load. Prints one JSON line a load: seconds, GB/s of stored
// bytes, CPU seconds, and by how much the process's largest resident size exceeded the tensors.
#include <ATen/ATen.h>
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
  std::string dir, dtype = "bfloat16", cache = "auto", io = "auto";
  std::vector<std::string> ways = {"plain", "overlapped"};
  int rounds = 3, stages = 1, index = 0, threads = 4, depth = 4, request_mib = 8;
  bool cold = false;
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

int Load(const Flags& flags, const std::string& way) {
  auto checkpoint = weights::Checkpoint::OpenStage(flags.dir, flags.index, flags.stages);
  QP_CHECK(checkpoint.ok()) << checkpoint.status().ToString();
  const auto shape = contract::LoadModelShape(checkpoint->dir());
  QP_CHECK(shape.ok()) << shape.status().ToString();
  const auto ranges = contract::PlanLayers(*shape, flags.stages, contract::BalancePolicy::kTime);
  QP_CHECK(ranges.ok()) << ranges.status().ToString();
  weights::LoadOptions options{.spec = {.layers = (*ranges)[static_cast<size_t>(flags.index)], .index = flags.index, .stages = flags.stages},
                               .dtype = flags.dtype == "float32" ? at::kFloat : at::kBFloat16,
                               .threads = flags.threads};
  auto found = checkpoint->ResolveStage(*shape, options.spec);
  QP_CHECK(found.ok() && found->report.ok()) << found.status().ToString() << found->report.ToStatus().ToString();
  weights::StreamOptions stream{.request_bytes = int64_t{flags.request_mib} << 20};
  using Options = weights::ReadPartsOptions;
  stream.read.depth = flags.depth;
  stream.read.cache = flags.cache == "auto" ? Options::Cache::kAuto : flags.cache == "direct" ? Options::Cache::kDirect : Options::Cache::kBuffered;
  stream.read.io = flags.io == "auto" ? Options::Io::kAuto : flags.io == "uring" ? Options::Io::kUring : Options::Io::kThreads;
  options.method = way == "plain" ? weights::LoadMethod::kPlain : weights::LoadMethod::kOverlapped;
  const int64_t before = LargestResident();
  const double cpu_before = CpuSeconds();
  const auto start = std::chrono::steady_clock::now();
  const auto tensors = way == "plain" ? weights::LoadTensors(*checkpoint, *shape, options)
                                      : weights::StreamTensors(*checkpoint, *shape, *found, options, stream);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const double cpu = CpuSeconds() - cpu_before;
  QP_CHECK(tensors.ok()) << tensors.status().ToString();
  int64_t held = 0;
  for (const auto& [slot, tensor] : *tensors) held += static_cast<int64_t>(tensor.nbytes());
  std::printf("{\"suite\": \"load\", \"way\": \"%s\", \"cold\": %s, \"seconds\": %.3f, \"gb_s\": %.2f, \"cpu_seconds\": %.2f, \"bytes\": %lld, \"beyond_tensors_mib\": %lld}\n",
              way.c_str(), flags.cold ? "true" : "false", seconds, static_cast<double>(found->report.bytes) / seconds / 1e9, cpu,
              static_cast<long long>(found->report.bytes), static_cast<long long>((LargestResident() - before - held) >> 20));
  return 0;
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
  app.add_flag("--cold", flags.cold);
  CLI11_PARSE(app, argc, argv);
  log::Init({.process = "load_bench", .level = "warning"});
  for (int round = 0; round < flags.rounds; ++round) {
    for (const std::string& way : flags.ways) {
      if (flags.cold) DropPages(flags.dir);
      std::fflush(stdout);
      const pid_t child = fork();  // before the first thread of this process
      if (child == 0) {
        const int code = Load(flags, way);
        std::fflush(stdout);
        std::_Exit(code);
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
