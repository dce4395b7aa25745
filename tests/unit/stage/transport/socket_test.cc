// Sockets: addresses in all three forms, deadlines that hold, and an interrupt that ends every wait.
#include "stage/transport/socket.h"

#include <gtest/gtest.h>

#include <thread>

#include "tests/unit/stage/transport/loopback.h"

namespace qwen::transport {
namespace {

using std::chrono::milliseconds;

TEST(Socket, AddressesAreReadInAllTheirForms) {
  EXPECT_EQ(ParseEndpoint("10.0.0.7:7000")->host, "10.0.0.7");
  EXPECT_EQ(ParseEndpoint("10.0.0.7:7000")->port, 7000);
  EXPECT_EQ(ParseEndpoint("[fd00::1]:80")->host, "fd00::1");
  EXPECT_EQ(ParseEndpoint("head.default.svc:1")->host, "head.default.svc");
  EXPECT_EQ(ParseEndpoint(":0")->host, "");
  for (const char* bad : {"", "host", "host:", "host:65536", "host:-1", "host:1x", "fd00::1:80", "[fd00::1:80"}) {
    EXPECT_EQ(ParseEndpoint(bad).status().code(), StatusCode::kInvalidArgument) << bad;
  }
  EXPECT_EQ(ToString(Endpoint{"fd00::1", 80}), "[fd00::1]:80");
  EXPECT_EQ(ToString(Endpoint{"a.b", 80}), "a.b:80");
}

TEST(Socket, NamesAndBothFamiliesReachAListenerOnAnyAddress) {
  const Interrupt never;
  auto listener = Listener::Listen({"", 0});
  ASSERT_TRUE(listener.ok()) << listener.status().ToString();
  for (const char* host : {"127.0.0.1", "localhost"}) {
    auto dialled = Socket::Connect({host, listener->port()}, DeadlineIn(milliseconds(2000)), never);
    ASSERT_TRUE(dialled.ok()) << host << ": " << dialled.status().ToString();
    auto accepted = listener->Accept(DeadlineIn(milliseconds(2000)), never);
    ASSERT_TRUE(accepted.ok());
    EXPECT_TRUE(dialled->loopback());
    EXPECT_TRUE(accepted->loopback());
  }
}

TEST(Socket, AnUnreachablePeerIsUnavailableAndATakenPortToo) {
  const Interrupt never;
  auto listener = Listener::Listen({"127.0.0.1", 0});
  ASSERT_TRUE(listener.ok());
  const uint16_t port = listener->port();
  EXPECT_EQ(Listener::Listen({"127.0.0.1", port}).status().code(), StatusCode::kUnavailable);
  { const Listener closed = std::move(listener).value(); }
  EXPECT_EQ(Socket::Connect({"127.0.0.1", port}, DeadlineIn(milliseconds(500)), never).status().code(), StatusCode::kUnavailable);
}

TEST(Socket, EveryWaitEndsAtItsDeadlineOrWhenInterrupted) {
  SocketPair pair = ConnectedSockets();
  std::vector<std::byte> bytes(size_t{64} << 20);
  const Interrupt never;
  EXPECT_EQ(pair.dialled.ReadSome(bytes, DeadlineIn(milliseconds(20)), never).status().code(), StatusCode::kDeadlineExceeded);
  EXPECT_EQ(pair.dialled.WriteAll(bytes, DeadlineIn(milliseconds(20)), never).code(), StatusCode::kDeadlineExceeded);
  Interrupt interrupt;
  std::thread later([&] {
    std::this_thread::sleep_for(milliseconds(20));
    interrupt.Trigger();
  });
  EXPECT_EQ(pair.dialled.ReadSome(bytes, kNoDeadline, interrupt).status().code(), StatusCode::kCancelled);
  later.join();
  EXPECT_EQ(SleepUntil(kNoDeadline, interrupt).code(), StatusCode::kCancelled);
}

}  // namespace
}  // namespace qwen::transport
