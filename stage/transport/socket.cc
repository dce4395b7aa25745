#include "stage/transport/socket.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <thread>
#include <utility>

#include "stage/base/check.h"

namespace qwen::transport {
namespace {

constexpr int kListenBacklog = 128;  // stages (64) and as many stale dials

// A dead route is noticed after 5 + 3 * 5 s also when nobody writes; heartbeats notice earlier.
constexpr int kKeepIdleSeconds = 5, kKeepIntervalSeconds = 5, kKeepProbes = 3;

int PollTimeout(Deadline deadline) {
  if (deadline == kNoDeadline) return -1;
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now()).count();
  if (left <= 0) return 0;
  return left > 60'000 ? 60'000 : static_cast<int>(left);
}

// Waits until `fd` is ready for `events`.
Status Wait(int fd, short events, Deadline deadline, const Interrupt& interrupt) {
  for (;;) {
    pollfd fds[2] = {{interrupt.fd(), POLLIN, 0}, {fd, events, 0}};
    const int timeout = PollTimeout(deadline);
    const int ready = poll(fds, 2, timeout);
    if (ready < 0 && errno != EINTR) return ErrnoError("poll", errno);
    if (ready > 0 && fds[0].revents != 0) return CancelledError("interrupted");
    if (ready > 0 && fds[1].revents != 0) return OkStatus();
    if (ready == 0 && deadline != kNoDeadline && std::chrono::steady_clock::now() >= deadline) {
      return DeadlineExceededError("timed out");
    }
  }
}

void SetOption(int fd, int level, int name, int value) { (void)setsockopt(fd, level, name, &value, sizeof value); }

struct AddressList {
  addrinfo* head = nullptr;
  ~AddressList() {
    if (head != nullptr) freeaddrinfo(head);
  }
};

Status Resolve(const Endpoint& endpoint, int flags, AddressList& out) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags | AI_NUMERICSERV;
  const std::string port = std::to_string(endpoint.port);
  const int error = getaddrinfo(endpoint.host.empty() ? nullptr : endpoint.host.c_str(), port.c_str(), &hints, &out.head);
  // A name that does not resolve yet is normal while a pod starts, hence kUnavailable.
  if (error != 0) return UnavailableError("resolve " + endpoint.host + ": " + gai_strerror(error));
  return OkStatus();
}

std::string HostOf(const sockaddr_storage& address) {
  char text[INET6_ADDRSTRLEN] = "";
  if (address.ss_family == AF_INET) {
    inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in&>(address).sin_addr, text, sizeof text);
  } else if (address.ss_family == AF_INET6) {
    const auto& v6 = reinterpret_cast<const sockaddr_in6&>(address).sin6_addr;
    if (IN6_IS_ADDR_V4MAPPED(&v6)) {
      inet_ntop(AF_INET, &v6.s6_addr[12], text, sizeof text);
    } else {
      inet_ntop(AF_INET6, &v6, text, sizeof text);
    }
  }
  return text;
}

uint16_t PortOf(const sockaddr_storage& address) {
  if (address.ss_family == AF_INET) return ntohs(reinterpret_cast<const sockaddr_in&>(address).sin_port);
  return ntohs(reinterpret_cast<const sockaddr_in6&>(address).sin6_port);
}

bool IsLoopback(const std::string& host) { return host.starts_with("127.") || host == "::1"; }

}  // namespace

Interrupt::Interrupt() : fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) { QP_CHECK(fd_ >= 0) << std::strerror(errno); }
Interrupt::~Interrupt() { close(fd_); }
void Interrupt::Trigger() {
  const uint64_t one = 1;
  (void)!write(fd_, &one, sizeof one);  // fails only when the counter is full: then it is readable already
}
bool Interrupt::triggered() const {
  pollfd fd = {fd_, POLLIN, 0};
  return poll(&fd, 1, 0) > 0;
}

Status SleepUntil(Deadline deadline, const Interrupt& interrupt) {
  pollfd fd = {interrupt.fd(), POLLIN, 0};
  do {
    if (poll(&fd, 1, PollTimeout(deadline)) > 0) return CancelledError("interrupted");
  } while (std::chrono::steady_clock::now() < deadline);
  return OkStatus();
}

Result<Endpoint> ParseEndpoint(std::string_view text) {
  const auto bad = [&](const char* why) { return InvalidArgumentError("address '" + std::string(text) + "': " + why); };
  Endpoint endpoint;
  const size_t colon = text.rfind(':');
  if (colon == std::string_view::npos) return bad("expected HOST:PORT");
  std::string_view host = text.substr(0, colon);
  const std::string_view port = text.substr(colon + 1);
  if (!host.empty() && host.front() == '[') {
    if (host.back() != ']') return bad("expected [IPv6]:PORT");
    host = host.substr(1, host.size() - 2);
  } else if (host.find(':') != std::string_view::npos) {
    return bad("IPv6 addresses are written [ADDRESS]:PORT");
  }
  if (host.size() > 253) return bad("host name too long");
  const auto [end, error] = std::from_chars(port.data(), port.data() + port.size(), endpoint.port);
  if (error != std::errc() || end != port.data() + port.size()) return bad("port is not a number below 65536");
  endpoint.host = std::string(host);
  return endpoint;
}

std::string ToString(const Endpoint& endpoint) {
  const bool v6 = endpoint.host.find(':') != std::string::npos;
  return (v6 ? "[" + endpoint.host + "]" : endpoint.host) + ":" + std::to_string(endpoint.port);
}

Socket::Socket(int fd) : fd_(fd) {
  QP_CHECK(fd >= 0);
  fcntl(fd_, F_SETFL, fcntl(fd_, F_GETFL) | O_NONBLOCK);
  SetOption(fd_, IPPROTO_TCP, TCP_NODELAY, 1);  // plans and results are small and latency is the product
  SetOption(fd_, SOL_SOCKET, SO_KEEPALIVE, 1);
  SetOption(fd_, IPPROTO_TCP, TCP_KEEPIDLE, kKeepIdleSeconds);
  SetOption(fd_, IPPROTO_TCP, TCP_KEEPINTVL, kKeepIntervalSeconds);
  SetOption(fd_, IPPROTO_TCP, TCP_KEEPCNT, kKeepProbes);
}
Socket::Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)), spin_(other.spin_) {}
Socket& Socket::operator=(Socket&& other) noexcept {
  if (this != &other) {
    if (fd_ >= 0) close(fd_);
    fd_ = std::exchange(other.fd_, -1);
    spin_ = other.spin_;
  }
  return *this;
}
Socket::~Socket() {
  if (fd_ >= 0) close(fd_);
}

namespace {

// One of `parts` equal parts of the time that is left; without a deadline 5 s, but for the last.
Deadline ShareOf(Deadline deadline, int parts) {
  if (parts <= 1) return deadline;
  const auto now = std::chrono::steady_clock::now();
  if (deadline == kNoDeadline) return now + std::chrono::seconds(5);
  return now + (deadline - now) / parts;
}

}  // namespace

Result<Socket> Socket::Connect(const Endpoint& endpoint, Deadline deadline, const Interrupt& interrupt) {
  AddressList addresses;
  RETURN_IF_ERROR(Resolve(endpoint, 0, addresses));
  Status last = UnavailableError("connect " + ToString(endpoint) + ": no address");
  // A name may have an address where nobody answers any more beside the one that counts: each gets its share of the time.
  int left = 0;
  for (const addrinfo* a = addresses.head; a != nullptr; a = a->ai_next) ++left;
  for (const addrinfo* a = addresses.head; a != nullptr; a = a->ai_next, --left) {
    const Deadline share = ShareOf(deadline, left);
    const int fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) {
      last = ErrnoError("socket", errno);
      continue;
    }
    Socket candidate(fd);
    if (connect(fd, a->ai_addr, a->ai_addrlen) != 0) {
      int error = errno;
      if (error == EINPROGRESS) {
        Status waited = Wait(fd, POLLOUT, share, interrupt);
        if (!waited.ok()) {
          if (waited.code() == StatusCode::kCancelled) return waited;
          last = UnavailableError("connect " + ToString(endpoint) + ": " + waited.message());
          continue;
        }
        socklen_t length = sizeof error;
        getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length);
      }
      if (error != 0) {
        last = UnavailableError("connect " + ToString(endpoint) + ": " + std::strerror(error));
        continue;
      }
    }
    return candidate;
  }
  return last;
}

Result<size_t> Socket::ReadSome(std::span<std::byte> buffer, Deadline deadline, const Interrupt& interrupt) {
  QP_CHECK(!buffer.empty());
  const Deadline spin_until = spin_.count() > 0 ? std::min(deadline, DeadlineIn(spin_)) : Deadline::min();
  for (;;) {
    const ssize_t count = recv(fd_, buffer.data(), buffer.size(), 0);
    if (count > 0) return static_cast<size_t>(count);
    if (count == 0) return UnavailableError("connection closed by peer");
    if (errno == EINTR) continue;
    if (errno != EAGAIN && errno != EWOULDBLOCK) return UnavailableError(std::string("receive: ") + std::strerror(errno));
    if (spin_.count() > 0 && std::chrono::steady_clock::now() < spin_until) {
      std::this_thread::yield();
      continue;
    }
    RETURN_IF_ERROR(Wait(fd_, POLLIN, deadline, interrupt));
  }
}

Status Socket::ReadAll(std::span<std::byte> buffer, Deadline deadline, const Interrupt& interrupt) {
  while (!buffer.empty()) {
    if (interrupt.triggered()) return CancelledError("interrupted");  // a peer that keeps sending must not hide it
    ASSIGN_OR_RETURN(const size_t count, ReadSome(buffer, deadline, interrupt));
    buffer = buffer.subspan(count);
  }
  return OkStatus();
}

Result<size_t> Socket::WriteNow(std::span<const std::byte> bytes) {
  size_t written = 0;
  while (written < bytes.size()) {
    const ssize_t count = send(fd_, bytes.data() + written, bytes.size() - written, MSG_NOSIGNAL);
    if (count > 0) {
      written += static_cast<size_t>(count);
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      break;
    } else if (errno != EINTR) {
      return UnavailableError(std::string("send: ") + std::strerror(errno));
    }
  }
  return written;
}

Status Socket::WriteAll(std::span<const std::byte> bytes, Deadline deadline, const Interrupt& interrupt) {
  for (;;) {
    ASSIGN_OR_RETURN(const size_t written, WriteNow(bytes));
    bytes = bytes.subspan(written);
    if (bytes.empty()) return OkStatus();
    RETURN_IF_ERROR(Wait(fd_, POLLOUT, deadline, interrupt));
  }
}

void Socket::Shutdown() {
  if (fd_ >= 0) shutdown(fd_, SHUT_RDWR);
}

namespace {
sockaddr_storage NameOf(int fd, int (*get)(int, sockaddr*, socklen_t*)) {
  sockaddr_storage address{};
  socklen_t length = sizeof address;
  if (get(fd, reinterpret_cast<sockaddr*>(&address), &length) != 0) address.ss_family = AF_UNSPEC;
  return address;
}
}  // namespace

bool Socket::loopback() const {
  return IsLoopback(HostOf(NameOf(fd_, getpeername))) && IsLoopback(HostOf(NameOf(fd_, getsockname)));
}
std::string Socket::peer() const {
  const sockaddr_storage address = NameOf(fd_, getpeername);
  if (address.ss_family == AF_UNSPEC) return "(gone)";
  return ToString(Endpoint{HostOf(address), PortOf(address)});
}
std::string Socket::local_address() const { return HostOf(NameOf(fd_, getsockname)); }

Result<Listener> Listener::Listen(const Endpoint& endpoint) {
  AddressList addresses;
  RETURN_IF_ERROR(Resolve(endpoint, AI_PASSIVE, addresses));
  Status last = UnavailableError("listen " + ToString(endpoint) + ": no address");
  // Any address: prefer the IPv6 socket, which takes IPv4 too, when the host has IPv6.
  for (const int family : {AF_INET6, AF_INET}) {
    for (const addrinfo* a = addresses.head; a != nullptr; a = a->ai_next) {
      if (a->ai_family != family) continue;
      const int fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
      if (fd < 0) {
        last = ErrnoError("socket", errno);
        continue;
      }
      Listener listener(fd, 0);
      SetOption(fd, SOL_SOCKET, SO_REUSEADDR, 1);
      if (family == AF_INET6) SetOption(fd, IPPROTO_IPV6, IPV6_V6ONLY, 0);
      if (bind(fd, a->ai_addr, a->ai_addrlen) != 0 || listen(fd, kListenBacklog) != 0) {
        last = UnavailableError("listen " + ToString(endpoint) + ": " + std::strerror(errno));
        continue;
      }
      listener.port_ = PortOf(NameOf(fd, getsockname));
      return listener;
    }
  }
  return last;
}
Listener::Listener(Listener&& other) noexcept : fd_(std::exchange(other.fd_, -1)), port_(other.port_) {}
Listener& Listener::operator=(Listener&& other) noexcept {
  if (this != &other) {
    if (fd_ >= 0) close(fd_);
    fd_ = std::exchange(other.fd_, -1);
    port_ = other.port_;
  }
  return *this;
}
Listener::~Listener() {
  if (fd_ >= 0) close(fd_);
}

Result<Socket> Listener::Accept(Deadline deadline, const Interrupt& interrupt) {
  for (;;) {
    RETURN_IF_ERROR(Wait(fd_, POLLIN, deadline, interrupt));
    const int fd = accept4(fd_, nullptr, nullptr, SOCK_CLOEXEC);
    if (fd >= 0) return Socket(fd);
    if (errno == EMFILE || errno == ENFILE) return ResourceExhaustedError("accept: out of file descriptors");
    // Everything else is the one dial's own trouble (ECONNABORTED and the like), not the listener's.
  }
}

}  // namespace qwen::transport
