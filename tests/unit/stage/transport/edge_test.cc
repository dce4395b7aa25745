// Edges over loopback: bytes arrive as they left, two sends are under way at once, and everything that is not exactly the
// expected message of the expected epoch ends the edge with its name.
#include "stage/transport/edge.h"

#include <gtest/gtest.h>

#include <random>
#include <thread>

#include "stage/base/bytes.h"
#include "tests/unit/stage/transport/loopback.h"

namespace qwen::transport {
namespace {

using std::chrono::milliseconds;

const Secret kSecret = Secret::FromBytes("0123456789abcdef").value();
EdgeIdentity Identity(uint64_t epoch) { return {.pipeline_uid = "uid", .epoch = epoch, .from = 0, .to = 1}; }

struct Edge {
  std::unique_ptr<EdgeListener> listener = EdgeListener::Listen({"127.0.0.1", 0}, kSecret).value();
  std::unique_ptr<EdgeSender> sender;
  std::unique_ptr<EdgeReceiver> receiver;
  Interrupt interrupt;

  explicit Edge(uint64_t epoch = 5, OnTransfer sent = nullptr, OnTransfer received = nullptr) {
    std::thread dial([&] {
      auto made = DialEdge({"127.0.0.1", listener->port()}, kSecret, Identity(epoch), sent, DeadlineIn(std::chrono::seconds(5)), interrupt);
      ASSERT_TRUE(made.ok()) << made.status().ToString();
      sender = std::move(made).value();
    });
    auto made = listener->Accept(Identity(epoch), received, DeadlineIn(std::chrono::seconds(5)), interrupt);
    dial.join();
    EXPECT_TRUE(made.ok()) << made.status().ToString();
    receiver = std::move(made).value();
  }
};

std::vector<std::byte> Random(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<std::byte> bytes(count);
  for (std::byte& b : bytes) b = static_cast<std::byte>(random());
  return bytes;
}

TEST(Edge, BytesArriveAsTheyLeftForEverySize) {
  std::atomic<size_t> sent{0}, received{0};
  Edge edge(5, [&](size_t bytes, auto) { sent += bytes; }, [&](size_t bytes, auto) { received += bytes; });
  const std::vector<size_t> sizes = {1, 7, 4096, 262'144, 262'145, 5'000'001};
  std::thread sending([&] {
    for (size_t i = 0; i < sizes.size(); ++i) {
      std::vector<std::byte> data = Random(sizes[i], static_cast<uint32_t>(i));
      EXPECT_TRUE(edge.sender->Send(i, data).ok());
      std::fill(data.begin(), data.end(), std::byte{0});  // may be overwritten at once
    }
  });
  size_t total = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    std::vector<std::byte> data(sizes[i]);
    ASSERT_TRUE(edge.receiver->Receive(i, data).ok());
    EXPECT_EQ(data, Random(sizes[i], static_cast<uint32_t>(i))) << sizes[i];
    total += sizes[i];
  }
  sending.join();
  EXPECT_EQ(received.load(), total);
}

TEST(Edge, TwoSendsAreUnderWayWhileTheThirdWaits) {
  Edge edge;
  const std::vector<std::byte> data = Random(64 << 20, 1);  // far more than the kernel buffers
  ASSERT_TRUE(edge.sender->Send(0, data).ok());
  ASSERT_TRUE(edge.sender->Send(1, data).ok());
  std::atomic<bool> third_done{false};
  std::thread third([&] {
    (void)edge.sender->Send(2, data);
    third_done = true;
  });
  std::this_thread::sleep_for(milliseconds(50));
  EXPECT_FALSE(third_done);
  std::vector<std::byte> in(data.size());
  EXPECT_TRUE(edge.receiver->Receive(0, in).ok());
  third.join();
}

TEST(Edge, AbortEndsAWaitingReceiveAndAWaitingSendAtOnce) {
  Edge edge;
  const std::vector<std::byte> data = Random(64 << 20, 1);
  std::thread receive([&] {
    std::vector<std::byte> in(16);
    Edge other;
    std::thread abort([&] {
      std::this_thread::sleep_for(milliseconds(30));
      other.receiver->Abort(CancelledError("epoch over"));
    });
    EXPECT_EQ(other.receiver->Receive(0, in).message(), "epoch over");
    EXPECT_EQ(other.receiver->Receive(1, in).message(), "epoch over");
    abort.join();
  });
  std::thread abort([&] {
    std::this_thread::sleep_for(milliseconds(30));
    edge.sender->Abort(CancelledError("epoch over"));
  });
  Status status;
  for (uint64_t step = 0; step < 3 && status.ok(); ++step) status = edge.sender->Send(step, data);
  EXPECT_EQ(status.message(), "epoch over");
  abort.join();
  receive.join();
}

TEST(Edge, AnotherStepOrSizeThanThePlansIsDataLoss) {
  std::vector<std::byte> in(100);
  {
    Edge edge;
    ASSERT_TRUE(edge.sender->Send(3, Random(100, 1)).ok());
    EXPECT_EQ(edge.receiver->Receive(2, in).message(), "edge receive: edge: step 3, expected 2");
  }
  {
    Edge edge;
    ASSERT_TRUE(edge.sender->Send(3, Random(101, 1)).ok());
    EXPECT_EQ(edge.receiver->Receive(3, in).message(), "edge receive: edge: bytes 101, expected 100");
  }
  {
    Edge edge;
    edge.sender.reset();
    EXPECT_EQ(edge.receiver->Receive(0, in).code(), StatusCode::kUnavailable);
  }
}

TEST(Edge, TheHeaderNamesWhatIsWrong) {
  const auto good = EncodeEdgeHeader(5, 6, 7);
  EXPECT_TRUE(CheckEdgeHeader(good, 5, 6, 7).ok());
  EXPECT_EQ(CheckEdgeHeader(good, 4, 6, 7).message(), "edge: epoch 5, expected 4");
  for (size_t byte = 0; byte < good.size(); ++byte) {
    auto bad = good;
    bad[byte] ^= std::byte{1};
    EXPECT_EQ(CheckEdgeHeader(bad, 5, 6, 7).code(), StatusCode::kDataLoss) << byte;
  }
}

// A stage of an epoch that is over dials, then one with another secret, then the real one: only the last gets in.
TEST(Edge, StaleEpochsAndWrongSecretsAreTurnedAwayAndTheRealOneGetsIn) {
  auto listener = EdgeListener::Listen({"127.0.0.1", 0}, kSecret).value();
  const Endpoint at{"127.0.0.1", listener->port()};
  Interrupt interrupt;
  const auto soon = [] { return DeadlineIn(std::chrono::seconds(5)); };
  std::thread dials([&] {
    EXPECT_EQ(DialEdge(at, kSecret, Identity(4), nullptr, soon(), interrupt).status().code(), StatusCode::kFailedPrecondition);
    const Secret wrong = Secret::FromBytes("0123456789abcdeF").value();
    EXPECT_EQ(DialEdge(at, wrong, Identity(5), nullptr, soon(), interrupt).status().code(), StatusCode::kUnauthenticated);
    EdgeIdentity other = Identity(5);
    other.from = 7;
    EXPECT_EQ(DialEdge(at, kSecret, other, nullptr, soon(), interrupt).status().code(), StatusCode::kInvalidArgument);
    // Too early: the listener is still in epoch 5. It tries again until its deadline, and then says what it was told, also when
    // the deadline falls into an attempt.
    EXPECT_EQ(DialEdge(at, kSecret, Identity(6), nullptr, DeadlineIn(milliseconds(500)), interrupt).status().code(), StatusCode::kUnavailable);
    EXPECT_TRUE(DialEdge(at, kSecret, Identity(5), nullptr, soon(), interrupt).ok());
  });
  EXPECT_TRUE(listener->Accept(Identity(5), nullptr, soon(), interrupt).ok());
  dials.join();
}

TEST(Edge, AnInterruptEndsAcceptAndDial) {
  auto listener = EdgeListener::Listen({"127.0.0.1", 0}, kSecret).value();
  Interrupt interrupt;
  std::thread later([&] {
    std::this_thread::sleep_for(milliseconds(50));
    interrupt.Trigger();
  });
  // Nobody accepts at the listener: the dial connects and waits for the challenge.
  EXPECT_EQ(DialEdge({"127.0.0.1", listener->port()}, kSecret, Identity(1), nullptr, kNoDeadline, interrupt).status().code(), StatusCode::kCancelled);
  EXPECT_EQ(listener->Accept(Identity(1), nullptr, kNoDeadline, interrupt).status().code(), StatusCode::kCancelled);
  later.join();
}

}  // namespace
}  // namespace qwen::transport
