// stage/transport/socket.h — blocking TCP with a deadline and a way to be interrupted from another thread. Nothing above
// this file sees a file descriptor or errno.
//
// Sockets are non-blocking underneath; every wait polls the socket together with an Interrupt, so that no call outlives
// its deadline, and Trigger() ends all of them at once.
#pragma once
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "stage/base/status.h"

namespace qwen::transport {

using Deadline = std::chrono::steady_clock::time_point;
inline Deadline DeadlineIn(std::chrono::microseconds time) { return std::chrono::steady_clock::now() + time; }
inline constexpr Deadline kNoDeadline = Deadline::max();

// A sticky flag that can be polled. Thread safety: any thread; lives longer than the calls that were given it.
class Interrupt {
 public:
  Interrupt();
  ~Interrupt();
  Interrupt(const Interrupt&) = delete;
  Interrupt& operator=(const Interrupt&) = delete;
  void Trigger();
  bool triggered() const;
  int fd() const { return fd_; }  // readable once triggered

 private:
  int fd_;
};

// Sleeps until `deadline`; kCancelled at once when interrupted.
Status SleepUntil(Deadline deadline, const Interrupt& interrupt);

struct Endpoint {
  std::string host;  // IPv4, IPv6 (without brackets) or a DNS name; empty: any local address (listening)
  uint16_t port = 0;
};
// "host:port", "[v6]:port", ":port". kInvalidArgument otherwise. Pure.
Result<Endpoint> ParseEndpoint(std::string_view text);
std::string ToString(const Endpoint& endpoint);

// One connected stream. Thread safety: one thread may read while another writes.
class Socket {
 public:
  Socket() = default;
  explicit Socket(int fd);  // takes `fd`, sets TCP_NODELAY, keepalive and O_NONBLOCK
  Socket(Socket&& other) noexcept;
  Socket& operator=(Socket&& other) noexcept;
  ~Socket();

  // Resolves and tries every address once. kUnavailable when none answers: the caller decides about trying again.
  static Result<Socket> Connect(const Endpoint& endpoint, Deadline deadline, const Interrupt& interrupt);

  // At least 1 byte into `buffer`. kUnavailable "connection closed by peer" at the end of the stream, kDeadlineExceeded,
  // kCancelled when interrupted.
  Result<size_t> ReadSome(std::span<std::byte> buffer, Deadline deadline, const Interrupt& interrupt);
  Status ReadAll(std::span<std::byte> buffer, Deadline deadline, const Interrupt& interrupt);
  Status WriteAll(std::span<const std::byte> bytes, Deadline deadline, const Interrupt& interrupt);
  // As much of `bytes` as the kernel takes without waiting, perhaps nothing; how much it was.
  Result<size_t> WriteNow(std::span<const std::byte> bytes);
  // A read looks for so long before it sleeps: a sleeping thread's wake-up costs 50 us and more on a virtual machine, a
  // spinning one a core. Call between reads; default 0.
  void set_spin(std::chrono::microseconds spin) { spin_ = spin; }
  // Ends the stream for both sides: waiting calls return, what was written is still delivered. Any thread.
  void Shutdown();

  bool valid() const { return fd_ >= 0; }
  bool loopback() const;             // both ends are on this host's loopback addresses
  std::string peer() const;          // "10.0.0.7:41234"
  std::string local_address() const;  // the host part only: the address by which the peer was reached

 private:
  int fd_ = -1;
  std::chrono::microseconds spin_{0};
};

class Listener {
 public:
  // `endpoint.port` 0 takes any free one. kUnavailable with "address in use" when taken.
  static Result<Listener> Listen(const Endpoint& endpoint);
  Listener(Listener&& other) noexcept;
  Listener& operator=(Listener&& other) noexcept;
  ~Listener();
  Result<Socket> Accept(Deadline deadline, const Interrupt& interrupt);
  uint16_t port() const { return port_; }

 private:
  Listener(int fd, uint16_t port) : fd_(fd), port_(port) {}
  int fd_ = -1;
  uint16_t port_ = 0;
};

}  // namespace qwen::transport
