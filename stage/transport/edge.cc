#include "stage/transport/edge.h"

#include <cstring>

#include "stage/base/bytes.h"
#include "stage/base/check.h"
#include "stage/base/log.h"

namespace qwen::transport {
namespace {

// CRC and socket take turns over pieces that stay in the L2 cache.
constexpr size_t kPieceBytes = size_t{256} << 10;
// A connection that does not identify itself must not keep the real neighbour waiting.
constexpr auto kIdentifyTimeout = std::chrono::seconds(2);
constexpr auto kDialBackoffMin = std::chrono::milliseconds(20);
constexpr auto kDialBackoffMax = std::chrono::milliseconds(1000);
constexpr size_t kMacBytes = 32;

enum class EdgeAnswer : uint32_t { kAccepted = 0, kAuth = 1, kStale = 2, kTooEarly = 3, kWrongEdge = 4 };

std::string AsBytes(uint64_t value) {
  std::string out;
  AppendBytes(out, value);
  return out;
}

std::string DialMac(const Secret& secret, const EdgeIdentity& id, std::string_view listener_nonce, std::string_view dialler_nonce) {
  return secret.Mac("edge", {id.pipeline_uid, AsBytes(id.epoch), AsBytes(static_cast<uint64_t>(id.from)),
                             AsBytes(static_cast<uint64_t>(id.to)), listener_nonce, dialler_nonce});
}
std::string AnswerMac(const Secret& secret, const EdgeIdentity& id, std::string_view dialler_nonce, EdgeAnswer answer) {
  return secret.Mac("edge-answer", {id.pipeline_uid, AsBytes(id.epoch), AsBytes(static_cast<uint64_t>(answer)), dialler_nonce});
}

std::span<const std::byte> View(const std::string& text) { return std::as_bytes(std::span(text.data(), text.size())); }

// Fixed-size records of the edge's own small handshake: challenge (magic, version, nonce), dial (magic, version, epoch,
// from, to, nonce, mac), answer (magic, code, mac).
constexpr size_t kChallengeBytes = 8 + kNonceBytes;
constexpr size_t kDialBytes = 8 + 16 + kNonceBytes + kMacBytes;
constexpr size_t kAnswerBytes = 8 + kMacBytes;

Result<std::string> ReadRecord(Socket& socket, size_t bytes, Deadline deadline, const Interrupt& interrupt) {
  std::string record(bytes, '\0');
  RETURN_IF_ERROR(socket.ReadAll(std::as_writable_bytes(std::span(record.data(), bytes)), deadline, interrupt));
  uint32_t magic = 0;
  std::memcpy(&magic, record.data(), 4);
  if (magic != kEdgeMagic) return DataLossError("edge: wrong magic");
  return record;
}

class TcpSender final : public EdgeSender {
 public:
  TcpSender(Socket socket, uint64_t epoch, OnTransfer on_transfer)
      : epoch_(epoch), on_transfer_(std::move(on_transfer)), socket_(std::move(socket)), writer_([this] { WriterLoop(); }) {}
  ~TcpSender() override {
    Abort(CancelledError("edge destroyed"));
    writer_.join();
  }

  Status Send(uint64_t step, std::span<const std::byte> data) override {
    QP_CHECK(!data.empty());
    Slot* slot = nullptr;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [&] { return !aborted_.ok() || filled_ - sent_ < slots_.size(); });
      if (!aborted_.ok()) return aborted_;
      slot = &slots_[filled_ % slots_.size()];
    }
    // Only this thread fills, and the writer does not look at a slot before filled_ says so: no lock for the copy.
    slot->step = step;
    slot->data.assign(data.begin(), data.end());
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ++filled_;
    }
    changed_.notify_all();
    return OkStatus();
  }

  void Abort(Status reason) override {
    QP_CHECK(!reason.ok());
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!aborted_.ok()) return;
      aborted_ = std::move(reason);
    }
    interrupt_.Trigger();
    socket_.Shutdown();
    changed_.notify_all();
  }

 private:
  struct Slot {
    uint64_t step = 0;
    std::vector<std::byte> data;
  };

  void WriterLoop() {
    for (;;) {
      const Slot* slot = nullptr;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return !aborted_.ok() || filled_ > sent_; });
        if (!aborted_.ok()) return;
        slot = &slots_[sent_ % slots_.size()];
      }
      const auto start = std::chrono::steady_clock::now();
      const Status status = Write(*slot);
      if (!status.ok()) return Abort(status.WithContext("edge send"));
      if (on_transfer_) on_transfer_(slot->data.size(), std::chrono::steady_clock::now() - start);
      {
        std::lock_guard<std::mutex> lock(mutex_);
        ++sent_;
      }
      changed_.notify_all();
    }
  }

  // The checksum follows the payload, so that the first piece leaves before the last one is summed.
  Status Write(const Slot& slot) {
    const auto header = EncodeEdgeHeader(epoch_, slot.step, slot.data.size());
    RETURN_IF_ERROR(socket_.WriteAll(header, kNoDeadline, interrupt_));
    uint32_t crc = 0;
    for (std::span<const std::byte> left(slot.data); !left.empty();) {
      const auto piece = left.first(std::min(left.size(), kPieceBytes));
      crc = Crc32c(piece, crc);
      RETURN_IF_ERROR(socket_.WriteAll(piece, kNoDeadline, interrupt_));
      left = left.subspan(piece.size());
    }
    return socket_.WriteAll(std::as_bytes(std::span(&crc, 1)), kNoDeadline, interrupt_);
  }

  const uint64_t epoch_;
  const OnTransfer on_transfer_;
  Socket socket_;  // written by the writer thread only
  Interrupt interrupt_;
  std::array<Slot, 2> slots_;

  std::mutex mutex_;
  std::condition_variable changed_;
  uint64_t filled_ = 0, sent_ = 0;  // guarded by mutex_; slot i % 2 is full while sent_ <= i < filled_
  Status aborted_;                  // guarded by mutex_; OK while alive
  std::thread writer_;              // last: starts when everything above is there
};

class TcpReceiver final : public EdgeReceiver {
 public:
  TcpReceiver(Socket socket, uint64_t epoch, OnTransfer on_transfer)
      : epoch_(epoch), on_transfer_(std::move(on_transfer)), socket_(std::move(socket)) {}

  Status Receive(uint64_t step, std::span<std::byte> data) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!aborted_.ok()) return aborted_;
    }
    const Status status = Read(step, data);
    if (status.ok()) return status;
    Abort(status.WithContext("edge receive"));
    std::lock_guard<std::mutex> lock(mutex_);
    return aborted_;
  }

  void Abort(Status reason) override {
    QP_CHECK(!reason.ok());
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!aborted_.ok()) return;
      aborted_ = std::move(reason);
    }
    interrupt_.Trigger();
    socket_.Shutdown();
  }

 private:
  Status Read(uint64_t step, std::span<std::byte> data) {
    std::array<std::byte, kEdgeHeaderBytes> header;
    RETURN_IF_ERROR(socket_.ReadAll(header, kNoDeadline, interrupt_));
    const auto start = std::chrono::steady_clock::now();
    RETURN_IF_ERROR(CheckEdgeHeader(header, epoch_, step, data.size()));
    uint32_t crc = 0, expected = 0;
    for (std::span<std::byte> left = data; !left.empty();) {
      const auto piece = left.first(std::min(left.size(), kPieceBytes));
      RETURN_IF_ERROR(socket_.ReadAll(piece, kNoDeadline, interrupt_));
      crc = Crc32c(piece, crc);
      left = left.subspan(piece.size());
    }
    RETURN_IF_ERROR(socket_.ReadAll(std::as_writable_bytes(std::span(&expected, 1)), kNoDeadline, interrupt_));
    if (crc != expected) return DataLossError("edge: checksum mismatch in step " + std::to_string(step));
    if (on_transfer_) on_transfer_(data.size(), std::chrono::steady_clock::now() - start);
    return OkStatus();
  }

  const uint64_t epoch_;
  const OnTransfer on_transfer_;
  Socket socket_;  // read by the caller of Receive only
  Interrupt interrupt_;
  std::mutex mutex_;
  Status aborted_;  // guarded by mutex_
};

class TcpTransport final : public EdgeTransport {
 public:
  Result<std::unique_ptr<EdgeSender>> MakeSender(Socket socket, const EdgeIdentity& identity, OnTransfer on_transfer, Deadline, const Interrupt&) override {
    return std::unique_ptr<EdgeSender>(new TcpSender(std::move(socket), identity.epoch, std::move(on_transfer)));
  }
  Result<std::unique_ptr<EdgeReceiver>> MakeReceiver(Socket socket, const EdgeIdentity& identity, OnTransfer on_transfer, Deadline, const Interrupt&) override {
    return std::unique_ptr<EdgeReceiver>(new TcpReceiver(std::move(socket), identity.epoch, std::move(on_transfer)));
  }
};

// One dial: connect, answer the challenge, hear the verdict.
Result<Socket> DialOnce(const Endpoint& endpoint, const Secret& secret, const EdgeIdentity& identity, Deadline deadline,
                        const Interrupt& interrupt) {
  ASSIGN_OR_RETURN(Socket socket, Socket::Connect(endpoint, deadline, interrupt));
  RETURN_IF_ERROR(secret.CheckSocket(socket));
  // The listener is busy with its own epoch change for as long as it wants: only `deadline` ends this wait.
  ASSIGN_OR_RETURN(const std::string challenge, ReadRecord(socket, kChallengeBytes, deadline, interrupt));
  uint32_t version = 0;
  std::memcpy(&version, challenge.data() + 4, 4);
  if (version != kEdgeVersion) return InvalidArgumentError("edge: the next stage speaks version " + std::to_string(version));
  const std::string nonce = RandomBytes(kNonceBytes);
  std::string dial;
  AppendBytes(dial, kEdgeMagic);
  AppendBytes(dial, kEdgeVersion);
  AppendBytes(dial, identity.epoch);
  AppendBytes(dial, identity.from);
  AppendBytes(dial, identity.to);
  dial += nonce;
  dial += DialMac(secret, identity, std::string_view(challenge).substr(8), nonce);
  RETURN_IF_ERROR(socket.WriteAll(View(dial), deadline, interrupt));
  ASSIGN_OR_RETURN(const std::string record, ReadRecord(socket, kAnswerBytes, deadline, interrupt));
  uint32_t code = 0;
  std::memcpy(&code, record.data() + 4, 4);
  const auto answer = static_cast<EdgeAnswer>(code);
  if (!EqualConstantTime(std::string_view(record).substr(8), AnswerMac(secret, identity, nonce, answer))) {
    return UnauthenticatedError("edge: secrets differ");
  }
  switch (answer) {
    case EdgeAnswer::kAccepted: return socket;
    case EdgeAnswer::kTooEarly: return UnavailableError("edge: the next stage is not yet in this epoch");
    case EdgeAnswer::kStale: return FailedPreconditionError("edge: stale epoch " + std::to_string(identity.epoch));
    default: return InvalidArgumentError("edge: refused as the wrong edge");
  }
}

}  // namespace

EdgeTransport& TcpEdges() {
  static TcpTransport transport;  // stateless
  return transport;
}

std::array<std::byte, kEdgeHeaderBytes> EncodeEdgeHeader(uint64_t epoch, uint64_t step, uint64_t bytes) {
  std::string text;
  AppendBytes(text, kEdgeMagic);
  AppendBytes(text, kEdgeVersion);
  AppendBytes(text, epoch);
  AppendBytes(text, step);
  AppendBytes(text, bytes);
  AppendBytes(text, Crc32c(text));
  std::array<std::byte, kEdgeHeaderBytes> header;
  QP_CHECK_EQ(text.size(), header.size());
  std::memcpy(header.data(), text.data(), header.size());
  return header;
}

Status CheckEdgeHeader(std::span<const std::byte> header, uint64_t epoch, uint64_t step, uint64_t bytes) {
  QP_CHECK_EQ(header.size(), kEdgeHeaderBytes);
  ByteReader reader(header);
  if (*reader.Read<uint32_t>() != kEdgeMagic) return DataLossError("edge: wrong magic");
  if (*reader.Read<uint32_t>() != kEdgeVersion) return DataLossError("edge: wrong version");
  const auto check = [&](const char* field, uint64_t expected) {
    const uint64_t found = *reader.Read<uint64_t>();
    if (found == expected) return OkStatus();
    return DataLossError(std::string("edge: ") + field + " " + std::to_string(found) + ", expected " + std::to_string(expected));
  };
  // The checksum first: a damaged header must not be reported as a wrong step.
  uint32_t crc = 0;
  std::memcpy(&crc, header.data() + 32, 4);
  if (Crc32c(header.first(32)) != crc) return DataLossError("edge: header checksum mismatch");
  RETURN_IF_ERROR(check("epoch", epoch));
  RETURN_IF_ERROR(check("step", step));
  return check("bytes", bytes);
}

Result<std::unique_ptr<EdgeListener>> EdgeListener::Listen(const Endpoint& endpoint, const Secret& secret) {
  ASSIGN_OR_RETURN(Listener listener, Listener::Listen(endpoint));
  return std::unique_ptr<EdgeListener>(new EdgeListener(std::move(listener), secret));
}

Status EdgeListener::Admit(Socket& socket, const EdgeIdentity& identity, Deadline deadline, const Interrupt& interrupt) {
  RETURN_IF_ERROR(secret_.CheckSocket(socket));
  const std::string nonce = RandomBytes(kNonceBytes);
  std::string challenge;
  AppendBytes(challenge, kEdgeMagic);
  AppendBytes(challenge, kEdgeVersion);
  challenge += nonce;
  RETURN_IF_ERROR(socket.WriteAll(View(challenge), deadline, interrupt));
  ASSIGN_OR_RETURN(const std::string dial, ReadRecord(socket, kDialBytes, deadline, interrupt));
  ByteReader reader(View(dial).subspan(8));
  EdgeIdentity dialled{.pipeline_uid = identity.pipeline_uid, .epoch = 0, .from = 0, .to = 0};
  dialled.epoch = *reader.Read<uint64_t>();
  dialled.from = *reader.Read<int32_t>();
  dialled.to = *reader.Read<int32_t>();
  const std::string_view dialler_nonce = std::string_view(dial).substr(8 + 16, kNonceBytes);
  const std::string_view mac = std::string_view(dial).substr(8 + 16 + kNonceBytes);

  EdgeAnswer answer = EdgeAnswer::kAccepted;
  Status verdict;
  if (!EqualConstantTime(mac, DialMac(secret_, dialled, nonce, dialler_nonce))) {
    answer = EdgeAnswer::kAuth;
    verdict = UnauthenticatedError("edge: wrong secret");
  } else if (dialled.from != identity.from || dialled.to != identity.to) {
    answer = EdgeAnswer::kWrongEdge;
    verdict = InvalidArgumentError("edge: dialled by stage " + std::to_string(dialled.from) + " for " + std::to_string(dialled.to));
  } else if (dialled.epoch < identity.epoch) {
    answer = EdgeAnswer::kStale;
    verdict = FailedPreconditionError("edge: stale epoch " + std::to_string(dialled.epoch));
  } else if (dialled.epoch > identity.epoch) {
    answer = EdgeAnswer::kTooEarly;
    verdict = UnavailableError("edge: dial of the later epoch " + std::to_string(dialled.epoch));
  }
  std::string record;
  AppendBytes(record, kEdgeMagic);
  AppendBytes(record, static_cast<uint32_t>(answer));
  // A dialler without the secret gets no HMAC to collect.
  record += answer == EdgeAnswer::kAuth ? std::string(kMacBytes, '\0') : AnswerMac(secret_, dialled, dialler_nonce, answer);
  RETURN_IF_ERROR(socket.WriteAll(View(record), deadline, interrupt));
  return verdict;
}

Result<std::unique_ptr<EdgeReceiver>> EdgeListener::Accept(const EdgeIdentity& identity, OnTransfer on_transfer, Deadline deadline,
                                                           const Interrupt& interrupt, EdgeTransport& transport) {
  for (;;) {
    ASSIGN_OR_RETURN(Socket socket, listener_.Accept(deadline, interrupt));
    const Status admitted = Admit(socket, identity, std::min(deadline, DeadlineIn(kIdentifyTimeout)), interrupt);
    if (admitted.ok()) return transport.MakeReceiver(std::move(socket), identity, std::move(on_transfer), deadline, interrupt);
    if (interrupt.triggered()) return CancelledError("interrupted");
    log::Warning("edge dial refused", {{"peer", socket.peer()}, {"reason", admitted.ToString()}});
  }
}

Result<std::unique_ptr<EdgeSender>> DialEdge(const Endpoint& endpoint, const Secret& secret, const EdgeIdentity& identity,
                                             OnTransfer on_transfer, Deadline deadline, const Interrupt& interrupt,
                                             EdgeTransport& transport) {
  Status refusal;  // the last one that says why; a deadline that ends the attempt after it knows less
  for (auto backoff = std::chrono::microseconds(kDialBackoffMin);; backoff = std::min<std::chrono::microseconds>(backoff * 2, kDialBackoffMax)) {
    auto socket = DialOnce(endpoint, secret, identity, deadline, interrupt);
    if (socket.ok()) {
      return transport.MakeSender(std::move(socket).value(), identity, std::move(on_transfer), deadline, interrupt);
    }
    const StatusCode code = socket.status().code();
    if (code != StatusCode::kDeadlineExceeded || refusal.ok()) refusal = socket.status();
    // kDataLoss and kInternal too: the port may for a moment belong to somebody else while the stage restarts.
    const bool final = code == StatusCode::kFailedPrecondition || code == StatusCode::kUnauthenticated ||
                       code == StatusCode::kCancelled || code == StatusCode::kInvalidArgument;
    if (final || std::chrono::steady_clock::now() + backoff >= deadline) {
      return refusal.WithContext("stage " + std::to_string(identity.to) + " at " + ToString(endpoint));
    }
    RETURN_IF_ERROR(SleepUntil(DeadlineIn(backoff), interrupt));
  }
}

}  // namespace qwen::transport
