// Two connected sockets on 127.0.0.1, for the tests of everything that talks over one.
#pragma once
#include <gtest/gtest.h>

#include <utility>

#include "stage/transport/socket.h"

namespace qwen::transport {

struct SocketPair {
  Socket dialled, accepted;
};
inline SocketPair ConnectedSockets() {
  static const Interrupt never;
  auto listener = Listener::Listen({"127.0.0.1", 0});
  EXPECT_TRUE(listener.ok()) << listener.status().ToString();
  auto dialled = Socket::Connect({"127.0.0.1", listener->port()}, DeadlineIn(std::chrono::seconds(5)), never);
  EXPECT_TRUE(dialled.ok()) << dialled.status().ToString();
  auto accepted = listener->Accept(DeadlineIn(std::chrono::seconds(5)), never);
  EXPECT_TRUE(accepted.ok()) << accepted.status().ToString();
  return {std::move(dialled).value(), std::move(accepted).value()};
}

}  // namespace qwen::transport
