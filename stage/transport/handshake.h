// stage/transport/handshake.h — who may join: Challenge -> Hello -> Welcome or Failure (docs/wire.md "Handshake").
//
// Both ends prove that they know the pipeline's secret without sending it (HMAC-SHA256 over the other's fresh nonce). An
// authenticated refusal is the only message that can send a stage away for good.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "stage/base/status.h"
#include "stage/transport/control_channel.h"
#include "stage/transport/message.h"

namespace qwen::transport {

inline constexpr size_t kNonceBytes = 32;
inline constexpr size_t kSecretBytesMin = 16;
inline constexpr size_t kSecretBytesMax = 4096;
// Nobody who has not proved the secret may make us hold more than this.
inline constexpr size_t kHandshakeBytesMax = 64 << 10;

// The pipeline's secret, or the explicit absence of one (both ends on this host's loopback only). Never logged.
class Secret {
 public:
  // The file's bytes without trailing line ends. kNotFound, or kInvalidArgument when shorter than kSecretBytesMin.
  static Result<Secret> FromFile(const std::string& path);
  static Result<Secret> FromBytes(std::string bytes);
  // Accepts peers on loopback only; a tool on the same host could join, hence the name of the flag.
  static Secret InsecureLoopback() { return Secret("", true); }

  // HMAC-SHA256 over `context` and then every part, each preceded by its length: no two lists give the same bytes.
  std::string Mac(std::string_view context, const std::vector<std::string_view>& parts) const;
  bool loopback_only() const { return loopback_only_; }
  // kUnauthenticated when this secret is the absent one and `socket` leaves the host.
  Status CheckSocket(const Socket& socket) const;

 private:
  Secret(std::string bytes, bool loopback_only) : bytes_(std::move(bytes)), loopback_only_(loopback_only) {}
  std::string bytes_;
  bool loopback_only_;
};

bool EqualConstantTime(std::string_view a, std::string_view b);
std::string RandomBytes(size_t count);      // of the system's cryptographic source
std::string RandomHex(size_t bytes);

// What the head demands of a stage.
struct GroupIdentity {
  std::string pipeline_uid;
  std::string config_hash;
  int32_t stages = 0;
};

// A stage's side. `hello` carries everything but nonce and hmac. On success the stream is ready for ControlChannel.
// Errors: kUnauthenticated (secrets differ, on either side), kInvalidArgument (refused for protocol or configuration),
// kFailedPrecondition (stale), kUnavailable (busy or connection trouble: try again).
// `refused_by_head` tells whether the refusal carried the head's proof: only then may it end the process.
struct JoinResult {
  Status status;
  bool refused_by_head = false;
  Welcome welcome;
};
JoinResult JoinAsStage(MessageStream& stream, const Secret& secret, Hello hello, Deadline deadline, const Interrupt& interrupt);

// The head's side. `admit` looks at an authenticated Hello and gives OK or a refusal. The Failure is sent here.
struct Refusal {
  FailureCode code = FailureCode::kUnspecified;  // kUnspecified: admitted
  std::string reason;
};
using Admit = std::function<Refusal(const Hello&)>;
Result<Hello> AcceptStage(MessageStream& stream, const Secret& secret, const GroupIdentity& identity, const Admit& admit,
                          Deadline deadline, const Interrupt& interrupt);
// Sent by the caller once the stage's place is taken (Welcome carries the group's epoch).
Status SendWelcome(MessageStream& stream, const Secret& secret, const Hello& hello, uint64_t epoch, Deadline deadline,
                   const Interrupt& interrupt);

// Protocol version, pipeline, config hash, stage index and count. Pure.
Refusal CheckIdentity(const Hello& hello, const GroupIdentity& identity);

}  // namespace qwen::transport
