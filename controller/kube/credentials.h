// controller/kube/credentials.h — who we are to the API server: a token or a client certificate that may change while we run.
//
// Thread safety: all members from any thread; one caller loads while the others wait.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "stage/base/clock.h"
#include "stage/base/status.h"

namespace qwen::kube {

struct Identity {
  std::string bearer_token;     // empty: none
  std::string certificate_pem;  // with key_pem: for mutual TLS
  std::string key_pem;
};

class Credentials {
 public:
  struct Loaded {
    Identity identity;
    int64_t valid_micros = kForever;  // from now; then it is loaded again
  };
  static constexpr int64_t kForever = INT64_MAX;
  using Loader = std::function<Result<Loaded>()>;

  Credentials(Loader loader, const Clock& clock) : loader_(std::move(loader)), clock_(clock) {}

  // The current identity. When a refresh fails the last one is used as long as there is one: the server decides if it is good.
  Result<Identity> Get();
  // The server said 401: load again at the next Get.
  void Invalidate();

 private:
  const Loader loader_;
  const Clock& clock_;
  std::mutex mutex_;
  std::optional<Identity> identity_;  // guarded by mutex_
  int64_t load_again_micros_ = 0;     // guarded by mutex_
};

// Never changes.
Credentials::Loader StaticIdentity(Identity identity);
// A projected token: the kubelet replaces the file when 80 % of its life is over, so it is read once a minute.
Credentials::Loader TokenFile(std::string path);

// A client-go credential plugin (client.authentication.k8s.io/v1 or v1beta1): a program that prints an ExecCredential.
struct ExecPlugin {
  std::string api_version;
  std::string command;
  std::vector<std::string> args;
  std::vector<std::pair<std::string, std::string>> env;  // added to our own
  int32_t timeout_seconds = 60;
};
Credentials::Loader RunPlugin(ExecPlugin plugin);
// What a plugin printed, as an identity. `unix_micros` is the wall clock's time, against which expirationTimestamp counts.
Result<Credentials::Loaded> ParseExecCredential(const std::string& output, int64_t unix_micros);

}  // namespace qwen::kube
