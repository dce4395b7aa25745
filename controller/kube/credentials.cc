#include "controller/kube/credentials.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <algorithm>
#include <chrono>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <thread>

#include "controller/kube/object.h"
#include "controller/kube/time_text.h"
#include "stage/base/log.h"

extern char** environ;

namespace qwen::kube {
namespace {
constexpr int64_t kTokenFileMicros = 60'000'000;
constexpr size_t kPluginOutputMax = 1 << 20;

// Runs the program without a shell, its standard output into a string, its standard error into ours.
Result<std::string> RunProgram(const ExecPlugin& plugin) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return ErrnoError("pipe", errno);
  std::vector<std::string> env;
  for (char** entry = environ; *entry != nullptr; ++entry) env.emplace_back(*entry);
  for (const auto& [name, value] : plugin.env) env.push_back(name + "=" + value);
  const Json info = {{"apiVersion", plugin.api_version}, {"kind", "ExecCredential"}, {"spec", {{"interactive", false}}}};
  env.push_back("KUBERNETES_EXEC_INFO=" + info.dump());
  std::vector<char*> argv{const_cast<char*>(plugin.command.c_str())}, envp;
  for (const std::string& arg : plugin.args) argv.push_back(const_cast<char*>(arg.c_str()));
  for (const std::string& entry : env) envp.push_back(const_cast<char*>(entry.c_str()));
  argv.push_back(nullptr);
  envp.push_back(nullptr);

  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
  pid_t pid = 0;
  const int failed = posix_spawnp(&pid, plugin.command.c_str(), &actions, nullptr, argv.data(), envp.data());
  posix_spawn_file_actions_destroy(&actions);
  close(ends[1]);
  if (failed != 0) {
    close(ends[0]);
    return ErrnoError("credential plugin " + plugin.command, failed);
  }
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(plugin.timeout_seconds);
  std::string output;
  Status read_status;
  for (char buffer[4096];;) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now()).count();
    pollfd readable{ends[0], POLLIN, 0};
    const int ready = left > 0 ? poll(&readable, 1, static_cast<int>(left)) : 0;
    if (ready < 0 && errno == EINTR) continue;
    if (ready <= 0) {
      read_status = DeadlineExceededError("credential plugin " + plugin.command + " did not answer in time");
      break;
    }
    const ssize_t got = read(ends[0], buffer, sizeof buffer);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) break;
    output.append(buffer, static_cast<size_t>(got));
    if (output.size() > kPluginOutputMax) {
      read_status = DataLossError("credential plugin " + plugin.command + " prints more than 1 MiB");
      break;
    }
  }
  close(ends[0]);
  int exit_status = 0;
  for (;;) {  // a plugin may close its output and live on: the deadline holds for its end too
    if (!read_status.ok() || std::chrono::steady_clock::now() > deadline) kill(pid, SIGKILL);
    const pid_t ended = waitpid(pid, &exit_status, WNOHANG);
    if (ended == pid || (ended < 0 && errno != EINTR)) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  RETURN_IF_ERROR(read_status);
  if (!WIFEXITED(exit_status) || WEXITSTATUS(exit_status) != 0) {
    return UnauthenticatedError("credential plugin " + plugin.command + " failed with status " + std::to_string(exit_status));
  }
  return output;
}
}  // namespace

Result<Identity> Credentials::Get() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (identity_ && clock_.NowMicros() < load_again_micros_) return *identity_;
  Result<Loaded> loaded = loader_();
  const int64_t now = clock_.NowMicros();  // a plugin may have taken its time
  if (!loaded.ok()) {
    if (!identity_) return loaded.status();
    log::Warning("credential could not be read again; using the last one", {{"error", loaded.status().ToString()}});
    load_again_micros_ = now + 10'000'000;
    return *identity_;
  }
  identity_ = std::move(loaded->identity);
  load_again_micros_ = loaded->valid_micros > kForever - now ? kForever : now + loaded->valid_micros;
  return *identity_;
}

void Credentials::Invalidate() {
  std::lock_guard<std::mutex> lock(mutex_);
  load_again_micros_ = 0;
}

Credentials::Loader StaticIdentity(Identity identity) {
  return [identity = std::move(identity)]() -> Result<Credentials::Loaded> { return Credentials::Loaded{identity}; };
}

Credentials::Loader TokenFile(std::string path) {
  return [path = std::move(path)]() -> Result<Credentials::Loaded> {
    std::ifstream file(path);
    if (!file) return NotFoundError("token file " + path + " cannot be read");
    std::string token{std::istreambuf_iterator<char>(file), {}};
    while (!token.empty() && (token.back() == '\n' || token.back() == '\r' || token.back() == ' ')) token.pop_back();
    if (token.empty()) return DataLossError("token file " + path + " is empty");
    return Credentials::Loaded{{.bearer_token = std::move(token)}, kTokenFileMicros};
  };
}

Result<Credentials::Loaded> ParseExecCredential(const std::string& output, int64_t unix_micros) {
  const Json answer = Json::parse(output, nullptr, false);
  if (answer.is_discarded() || StringAt(answer, "/kind") != "ExecCredential") {
    return DataLossError("the credential plugin did not print an ExecCredential");
  }
  Credentials::Loaded loaded;
  loaded.identity.bearer_token = StringAt(answer, "/status/token");
  loaded.identity.certificate_pem = StringAt(answer, "/status/clientCertificateData");
  loaded.identity.key_pem = StringAt(answer, "/status/clientKeyData");
  if (loaded.identity.bearer_token.empty() && loaded.identity.certificate_pem.empty()) {
    return UnauthenticatedError("the credential plugin gave neither a token nor a certificate");
  }
  if (const std::string expires = StringAt(answer, "/status/expirationTimestamp"); !expires.empty()) {
    ASSIGN_OR_RETURN(const int64_t at, ParseTime(expires));
    loaded.valid_micros = std::max<int64_t>(0, at - unix_micros);
  }
  return loaded;
}

Credentials::Loader RunPlugin(ExecPlugin plugin) {
  return [plugin = std::move(plugin)]() -> Result<Credentials::Loaded> {
    ASSIGN_OR_RETURN(const std::string output, RunProgram(plugin));
    return ParseExecCredential(output, UnixMicros());
  };
}

}  // namespace qwen::kube
