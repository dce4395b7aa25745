// A TCP proxy that a test puts between a stage and the head: it forwards, and on demand cuts, freezes (a half-open
// connection) or damages what passes. Everything on loopback.
#pragma once
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "stage/transport/socket.h"

namespace qwen::test {

class Proxy {
 public:
  explicit Proxy(uint16_t to) : to_(to), listener_(transport::Listener::Listen({"127.0.0.1", 0}).value()) {
    acceptor_ = std::thread([this] { AcceptLoop(); });
  }
  ~Proxy() {
    stop_.Trigger();
    acceptor_.join();
    Cut();
    for (std::thread& thread : pumps_) thread.join();
  }
  uint16_t port() const { return listener_.port(); }
  void Cut() {  // ends all connections; new ones are forwarded again
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& socket : sockets_) socket->Shutdown();
  }
  void Freeze(bool frozen) { frozen_ = frozen; }  // nothing passes, nothing ends
  void DamageNextToHead() { damage_to_head_ = true; }
  void DamageNextToStage() { damage_to_stage_ = true; }
  int connections() const { return connections_; }

 private:
  using SharedSocket = std::shared_ptr<transport::Socket>;  // one pump reads it, the other writes it, Cut ends it

  void AcceptLoop() {
    while (!stop_.triggered()) {
      auto stage = listener_.Accept(transport::DeadlineIn(std::chrono::milliseconds(50)), stop_);
      if (!stage.ok()) continue;
      auto head = transport::Socket::Connect({"127.0.0.1", to_}, transport::DeadlineIn(std::chrono::seconds(1)), stop_);
      if (!head.ok()) continue;  // the stage sees its connection end and dials again
      ++connections_;
      auto a = std::make_shared<transport::Socket>(std::move(stage).value());
      auto b = std::make_shared<transport::Socket>(std::move(head).value());
      std::lock_guard<std::mutex> lock(mutex_);
      sockets_.push_back(a);
      sockets_.push_back(b);
      pumps_.emplace_back([this, a, b] { Pump(a, b, damage_to_head_); });
      pumps_.emplace_back([this, a, b] { Pump(b, a, damage_to_stage_); });
    }
  }
  void Pump(const SharedSocket& from, const SharedSocket& to, std::atomic<bool>& damage) {
    std::vector<std::byte> buffer(65536);
    for (;;) {
      auto count = from->ReadSome(buffer, transport::kNoDeadline, stop_);
      while (frozen_ && !stop_.triggered()) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      if (!count.ok()) break;
      if (damage.exchange(false)) buffer[*count - 1] ^= std::byte{0x20};
      if (!to->WriteAll(std::span(buffer).first(*count), transport::kNoDeadline, stop_).ok()) break;
    }
    from->Shutdown();
    to->Shutdown();
  }

  const uint16_t to_;
  transport::Interrupt stop_;
  transport::Listener listener_;
  std::atomic<bool> frozen_{false}, damage_to_head_{false}, damage_to_stage_{false};
  std::atomic<int> connections_{0};
  std::mutex mutex_;
  std::vector<SharedSocket> sockets_;  // guarded by mutex_
  std::vector<std::thread> pumps_;     // accept thread, then the destructor
  std::thread acceptor_;
};

}  // namespace qwen::test
