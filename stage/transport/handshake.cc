#include "stage/transport/handshake.h"

#include <openssl/crypto.h>
#include <openssl/hmac.h>
#include <openssl/rand.h>

#include <fstream>

#include "stage/base/bytes.h"
#include "stage/base/check.h"

namespace qwen::transport {
namespace {

// A connection without a Hello: the bytes that a stranger can leave here are bounded by kHandshakeBytesMax.
template <typename T>
Result<T> Expect(Result<Message> message, std::string_view name) {
  if (!message.ok()) return message.status();
  if (auto* value = std::get_if<T>(&*message)) return std::move(*value);
  return InvalidArgumentError("handshake: expected " + std::string(name) + ", got " + std::string(MessageName(*message)));
}

template <typename T>
std::string AsBytes(T value) {
  std::string out;
  AppendBytes(out, value);
  return out;
}

// Every field of Hello but hmac, in the order of wire.proto. Not Protobuf's bytes: those are not canonical.
std::string HelloMac(const Secret& secret, const std::string& challenge_nonce, const Hello& hello) {
  std::string numbers;
  AppendBytes(numbers, uint64_t{hello.protocol_version});
  for (int64_t value : {int64_t{hello.stage}, int64_t{hello.stages}, int64_t{hello.layer_begin}, int64_t{hello.layer_end},
                        int64_t{hello.capacity.block_tokens}, int64_t{hello.capacity.block_count}, int64_t{hello.capacity.max_slots},
                        int64_t{hello.capacity.max_batch_tokens}, int64_t{hello.capacity.max_sequence_tokens},
                        hello.capacity.weight_bytes, int64_t{hello.loading}}) {
    AppendBytes(numbers, value);
  }
  AppendBytes(numbers, hello.epoch);
  AppendBytes(numbers, hello.pod_epoch);
  return secret.Mac("stage", {challenge_nonce, numbers, hello.pipeline_uid, hello.config_hash, hello.data_address, hello.instance,
                              hello.nonce});
}

std::string WelcomeMac(const Secret& secret, const std::string& hello_nonce, uint64_t epoch) {
  return secret.Mac("head", {hello_nonce, AsBytes(epoch)});
}

std::string RefusalMac(const Secret& secret, const std::string& hello_nonce, FailureCode code, const std::string& reason) {
  return secret.Mac("refuse", {hello_nonce, AsBytes(static_cast<uint32_t>(code)), reason});
}

Status RefusalStatus(const Failure& failure) {
  std::string text = "the head refused: " + std::string(FailureCodeName(failure.code)) + ": " + failure.reason;
  switch (failure.code) {
    case FailureCode::kAuth: return UnauthenticatedError(std::move(text));
    case FailureCode::kProtocol:
    case FailureCode::kConfig: return InvalidArgumentError(std::move(text));
    case FailureCode::kStale: return FailedPreconditionError(std::move(text));
    default: return UnavailableError(std::move(text));
  }
}

void SendRefusal(MessageStream& stream, const Secret& secret, const Hello& hello, const Refusal& refusal, Deadline deadline,
                 const Interrupt& interrupt) {
  // The reason may quote the stage's own words; 1 KiB of them is enough, and stays below what the codec accepts.
  const std::string reason = refusal.reason.substr(0, 1024);
  Failure failure{.epoch = 0, .code = refusal.code, .reason = reason, .fatal = refusal.code != FailureCode::kBusy, .hmac = {}};
  // Without proof of the secret there is nothing to prove back: an oracle for HMACs is nobody's right.
  if (refusal.code != FailureCode::kAuth) failure.hmac = RefusalMac(secret, hello.nonce, refusal.code, reason);
  (void)stream.Write(Message(failure), deadline, interrupt);  // the connection ends anyway
}

}  // namespace

Result<Secret> Secret::FromBytes(std::string bytes) {
  if (bytes.size() < kSecretBytesMin) return InvalidArgumentError("secret: shorter than " + std::to_string(kSecretBytesMin) + " bytes");
  if (bytes.size() > kSecretBytesMax) return InvalidArgumentError("secret: longer than " + std::to_string(kSecretBytesMax) + " bytes");
  return Secret(std::move(bytes), false);
}

Result<Secret> Secret::FromFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return NotFoundError("secret file " + path + ": cannot be read");
  std::string bytes(kSecretBytesMax + 3, '\0');  // room to see that it is too long
  file.read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  bytes.resize(static_cast<size_t>(file.gcount()));
  while (!bytes.empty() && (bytes.back() == '\n' || bytes.back() == '\r')) bytes.pop_back();
  auto secret = FromBytes(std::move(bytes));
  if (!secret.ok()) return secret.status().WithContext(path);
  return secret;
}

std::string Secret::Mac(std::string_view context, const std::vector<std::string_view>& parts) const {
  std::string text;
  const auto append = [&text](std::string_view part) {
    AppendBytes(text, static_cast<uint64_t>(part.size()));
    text.append(part);
  };
  append("qwen-pipeline-1");
  append(context);
  for (std::string_view part : parts) append(part);
  unsigned char mac[EVP_MAX_MD_SIZE];
  unsigned int length = 0;
  const unsigned char* done = HMAC(EVP_sha256(), bytes_.data(), static_cast<int>(bytes_.size()),
                                   reinterpret_cast<const unsigned char*>(text.data()), text.size(), mac, &length);
  QP_CHECK(done != nullptr);
  return std::string(reinterpret_cast<const char*>(mac), length);
}

Status Secret::CheckSocket(const Socket& socket) const {
  if (!loopback_only_ || socket.loopback()) return OkStatus();
  return UnauthenticatedError("no secret is set and " + socket.peer() + " is not on this host");
}

bool EqualConstantTime(std::string_view a, std::string_view b) {
  return a.size() == b.size() && CRYPTO_memcmp(a.data(), b.data(), a.size()) == 0;
}

std::string RandomBytes(size_t count) {
  std::string bytes(count, '\0');
  QP_CHECK_EQ(RAND_bytes(reinterpret_cast<unsigned char*>(bytes.data()), static_cast<int>(count)), 1);
  return bytes;
}

std::string RandomHex(size_t bytes) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string out;
  for (const char c : RandomBytes(bytes)) {
    out += kDigits[static_cast<unsigned char>(c) >> 4];
    out += kDigits[static_cast<unsigned char>(c) & 15];
  }
  return out;
}

Refusal CheckIdentity(const Hello& hello, const GroupIdentity& identity) {
  if (hello.protocol_version != kProtocolVersion) {
    return {FailureCode::kProtocol, "protocol version " + std::to_string(hello.protocol_version) + ", the head speaks " +
                                        std::to_string(kProtocolVersion)};
  }
  if (hello.pipeline_uid != identity.pipeline_uid) return {FailureCode::kConfig, "pipeline uid differs"};
  if (hello.config_hash != identity.config_hash) {
    return {FailureCode::kConfig, "config hash " + hello.config_hash + ", the head has " + identity.config_hash + ": not the same model"};
  }
  if (hello.stages != identity.stages) {
    return {FailureCode::kConfig, "stage count " + std::to_string(hello.stages) + ", the head has " + std::to_string(identity.stages)};
  }
  if (hello.stage < 0 || hello.stage >= identity.stages) {
    return {FailureCode::kConfig, "stage index " + std::to_string(hello.stage) + " out of [0, " + std::to_string(identity.stages) + ")"};
  }
  return {};
}

JoinResult JoinAsStage(MessageStream& stream, const Secret& secret, Hello hello, Deadline deadline, const Interrupt& interrupt) {
  const auto failed = [](Status status) { return JoinResult{.status = std::move(status), .refused_by_head = false, .welcome = {}}; };
  if (Status allowed = secret.CheckSocket(stream.socket()); !allowed.ok()) return failed(allowed);
  stream.set_payload_bytes_max(kHandshakeBytesMax);
  auto challenge = Expect<Challenge>(stream.Read(deadline, interrupt), "Challenge");
  if (!challenge.ok()) return failed(challenge.status());
  if (challenge->nonce.size() != kNonceBytes) return failed(InvalidArgumentError("handshake: challenge nonce of a wrong size"));
  hello.nonce = RandomBytes(kNonceBytes);
  hello.hmac = HelloMac(secret, challenge->nonce, hello);
  if (Status sent = stream.Write(Message(hello), deadline, interrupt); !sent.ok()) return failed(sent);

  auto answer = stream.Read(deadline, interrupt);
  if (!answer.ok()) return failed(answer.status());
  if (const auto* failure = std::get_if<Failure>(&*answer)) {
    const bool proved = EqualConstantTime(failure->hmac, RefusalMac(secret, hello.nonce, failure->code, failure->reason));
    return {.status = RefusalStatus(*failure), .refused_by_head = proved, .welcome = {}};
  }
  auto welcome = Expect<Welcome>(std::move(answer), "Welcome");
  if (!welcome.ok()) return failed(welcome.status());
  if (!EqualConstantTime(welcome->hmac, WelcomeMac(secret, hello.nonce, welcome->epoch))) {
    return failed(UnauthenticatedError("the head could not prove the secret"));
  }
  stream.set_payload_bytes_max(kFrameBytesMax);
  return {.status = OkStatus(), .refused_by_head = false, .welcome = *welcome};
}

Result<Hello> AcceptStage(MessageStream& stream, const Secret& secret, const GroupIdentity& identity, const Admit& admit,
                          Deadline deadline, const Interrupt& interrupt) {
  RETURN_IF_ERROR(secret.CheckSocket(stream.socket()));
  stream.set_payload_bytes_max(kHandshakeBytesMax);
  const Challenge challenge{.protocol_version = kProtocolVersion, .nonce = RandomBytes(kNonceBytes)};
  RETURN_IF_ERROR(stream.Write(Message(challenge), deadline, interrupt));
  ASSIGN_OR_RETURN(Hello hello, Expect<Hello>(stream.Read(deadline, interrupt), "Hello"));

  Refusal refusal;
  if (!EqualConstantTime(hello.hmac, HelloMac(secret, challenge.nonce, hello))) {
    refusal = {FailureCode::kAuth, "the HMAC of Hello does not match"};
  } else if (hello.nonce.size() != kNonceBytes) {
    refusal = {FailureCode::kProtocol, "Hello's nonce has a wrong size"};
  } else {
    refusal = CheckIdentity(hello, identity);
  }
  if (refusal.code == FailureCode::kUnspecified) refusal = admit(hello);
  if (refusal.code != FailureCode::kUnspecified) {
    SendRefusal(stream, secret, hello, refusal, deadline, interrupt);
    std::string text = std::string(FailureCodeName(refusal.code)) + ": " + refusal.reason;
    if (refusal.code == FailureCode::kAuth) return UnauthenticatedError(std::move(text));
    if (refusal.code == FailureCode::kBusy || refusal.code == FailureCode::kStale) return FailedPreconditionError(std::move(text));
    return InvalidArgumentError(std::move(text));
  }
  stream.set_payload_bytes_max(kFrameBytesMax);
  return hello;
}

Status SendWelcome(MessageStream& stream, const Secret& secret, const Hello& hello, uint64_t epoch, Deadline deadline,
                   const Interrupt& interrupt) {
  return stream.Write(Message(Welcome{.epoch = epoch, .hmac = WelcomeMac(secret, hello.nonce, epoch)}), deadline, interrupt);
}

}  // namespace qwen::transport
