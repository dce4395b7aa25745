// The control channel over loopback: order, heartbeats, bounds, and every way in which a peer can go away.
#include "stage/transport/control_channel.h"

#include <gtest/gtest.h>

#include <thread>

#include "stage/transport/codec.h"
#include "tests/unit/stage/transport/loopback.h"

namespace qwen::transport {
namespace {

using std::chrono::milliseconds;

ControlChannel::Options Fast() {
  ControlChannel::Options options;
  options.heartbeat_interval = milliseconds(20);
  options.stall_timeout = milliseconds(1000);
  return options;
}
std::unique_ptr<MessageStream> Stream(Socket& socket) { return std::make_unique<MessageStream>(std::move(socket)); }

TEST(ControlChannel, MessagesArriveInOrderFromFramesAndSources) {
  SocketPair pair = ConnectedSockets();
  ControlChannel a(Stream(pair.dialled), Fast()), b(Stream(pair.accepted), Fast());
  for (uint64_t i = 0; i < 500; ++i) {
    if (i % 100 == 50) {
      ASSERT_TRUE(a.SendSource([i](size_t index) -> std::optional<std::string> {
                     if (index == 3) return std::nullopt;
                     return *EncodeFramedMessage(Message(Loading{static_cast<int64_t>(i), static_cast<int64_t>(index)}));
                   }).ok());
    }
    ASSERT_TRUE(a.Send(Message(Assembled{i})).ok());
  }
  for (uint64_t i = 0; i < 500; ++i) {
    if (i % 100 == 50) {
      for (int64_t index = 0; index < 3; ++index) {
        auto piece = b.Receive();
        ASSERT_TRUE(piece.ok());
        EXPECT_EQ(std::get<Loading>(*piece).bytes_total, index);
      }
    }
    auto message = b.Receive();
    ASSERT_TRUE(message.ok()) << message.status().ToString();
    ASSERT_EQ(std::get<Assembled>(*message).epoch, i);
  }
}

TEST(ControlChannel, HeartbeatsCarryProgressAndKeepAQuietConnectionAlive) {
  SocketPair pair = ConnectedSockets();
  auto options = Fast();
  options.stall_timeout = milliseconds(300);
  auto counting = options;
  counting.steps_done = [] { return uint64_t{42}; };
  ControlChannel a(Stream(pair.dialled), counting), b(Stream(pair.accepted), options);
  std::thread later([&] {
    std::this_thread::sleep_for(milliseconds(900));  // three times the stall time-out without a message
    EXPECT_TRUE(a.Send(Message(Assembled{1})).ok());
  });
  auto message = b.Receive();
  later.join();
  ASSERT_TRUE(message.ok()) << message.status().ToString();
  EXPECT_EQ(b.peer_steps_done(), 42u);
}

TEST(ControlChannel, AHalfOpenPeerIsNoticedBySilence) {
  SocketPair pair = ConnectedSockets();  // the other end stays open and says nothing, like a host without power
  auto options = Fast();
  options.stall_timeout = milliseconds(200);
  ControlChannel channel(Stream(pair.dialled), options);
  const auto start = std::chrono::steady_clock::now();
  auto message = channel.Receive();
  const auto waited = std::chrono::steady_clock::now() - start;
  EXPECT_EQ(message.status().code(), StatusCode::kDeadlineExceeded);
  EXPECT_NE(message.status().message().find("was silent for 200 ms"), std::string::npos);
  EXPECT_GE(waited, milliseconds(100));
  EXPECT_LT(waited, std::chrono::seconds(5));
  EXPECT_EQ(channel.Send(Message(Assembled{1})).code(), StatusCode::kDeadlineExceeded);  // sticky
}

TEST(ControlChannel, AClosedPeerIsNoticedAtOnce) {
  SocketPair pair = ConnectedSockets();
  ControlChannel channel(Stream(pair.dialled), Fast());
  { const Socket gone = std::move(pair.accepted); }
  EXPECT_EQ(channel.Receive().status().code(), StatusCode::kUnavailable);
}

TEST(ControlChannel, ACorruptedFrameClosesWithItsName) {
  SocketPair pair = ConnectedSockets();
  ControlChannel channel(Stream(pair.dialled), Fast());
  std::string frame = *EncodeFramedMessage(Message(Assembled{5}));
  frame.back() = static_cast<char>(frame.back() ^ 1);
  const Interrupt never;
  ASSERT_TRUE(pair.accepted.WriteAll(std::as_bytes(std::span(frame.data(), frame.size())), DeadlineIn(milliseconds(1000)), never).ok());
  auto message = channel.Receive();
  EXPECT_EQ(message.status().code(), StatusCode::kDataLoss);
  EXPECT_EQ(message.status().message(), "frame: checksum mismatch");
}

TEST(ControlChannel, AFrameThatIsCutOffIsDataLoss) {
  SocketPair pair = ConnectedSockets();
  ControlChannel channel(Stream(pair.dialled), Fast());
  const std::string frame = *EncodeFramedMessage(Message(Assembled{5}));
  const Interrupt never;
  ASSERT_TRUE(pair.accepted.WriteAll(std::as_bytes(std::span(frame.data(), frame.size() - 1)), DeadlineIn(milliseconds(1000)), never).ok());
  { const Socket gone = std::move(pair.accepted); }
  EXPECT_EQ(channel.Receive().status().code(), StatusCode::kDataLoss);
}

TEST(ControlChannel, ASlowReaderFillsABoundedQueueAndNothingElse) {
  SocketPair pair = ConnectedSockets();
  auto options = Fast();
  options.stall_timeout = std::chrono::seconds(30);
  options.queue_frames_max = 8;
  ControlChannel channel(Stream(pair.dialled), options);
  const auto frame = std::make_shared<const std::string>(*EncodeFramedMessage(Message(Failure{.reason = std::string(4000, 'x')})));
  int queued = 0;
  Status last;
  while (last.ok() && queued < 100'000) {
    last = channel.SendFrame(frame);
    queued += last.ok();
    if (last.code() == StatusCode::kResourceExhausted && channel.Flush(milliseconds(100))) last = OkStatus();  // the kernel still takes more
  }
  EXPECT_EQ(last.code(), StatusCode::kResourceExhausted);
  channel.ClearQueue();
  EXPECT_TRUE(channel.SendFrame(frame).ok());  // room again
}

// Frames that the kernel takes at once, in part or not at all, from threads that do not wait for each other, with heartbeats
// between them: each thread's messages arrive whole and in its order.
TEST(ControlChannel, FramesOfManyThreadsArriveWholeAndInEachThreadsOrder) {
  SocketPair pair = ConnectedSockets();
  auto options = Fast();
  options.stall_timeout = std::chrono::seconds(30);
  options.heartbeat_interval = milliseconds(1);
  options.queue_frames_max = 100'000;
  ControlChannel a(Stream(pair.dialled), options), b(Stream(pair.accepted), options);
  constexpr int kThreads = 4, kEach = 2'000;
  std::vector<std::thread> senders;
  for (int thread = 0; thread < kThreads; ++thread) {
    senders.emplace_back([&, thread] {
      for (int i = 0; i < kEach; ++i) {
        const size_t size = i % 7 == 0 ? 4'000 : static_cast<size_t>(i % 50);
        const Failure message{.epoch = static_cast<uint64_t>(thread * kEach + i), .reason = std::string(size, static_cast<char>('a' + thread))};
        ASSERT_TRUE(a.Send(Message(message)).ok());
      }
    });
  }
  std::vector<int> next(kThreads, 0);
  for (int received = 0; received < kThreads * kEach; ++received) {
    if (received == 100) std::this_thread::sleep_for(milliseconds(200));  // the kernel's buffers fill
    auto message = b.Receive();
    ASSERT_TRUE(message.ok()) << message.status().ToString();
    const auto& failure = std::get<Failure>(*message);
    const int thread = static_cast<int>(failure.epoch) / kEach, i = static_cast<int>(failure.epoch) % kEach;
    ASSERT_EQ(i, next[static_cast<size_t>(thread)]++) << "thread " << thread;
    ASSERT_EQ(failure.reason, std::string(i % 7 == 0 ? 4'000 : static_cast<size_t>(i % 50), static_cast<char>('a' + thread)));
  }
  for (std::thread& sender : senders) sender.join();
  EXPECT_TRUE(a.Flush(std::chrono::seconds(5)));
}

TEST(ControlChannel, CloseEndsAReceiveThatWaits) {
  SocketPair pair = ConnectedSockets();
  ControlChannel channel(Stream(pair.dialled), Fast());
  std::thread closer([&] {
    std::this_thread::sleep_for(milliseconds(30));
    channel.Close(CancelledError("that is all"));
  });
  EXPECT_EQ(channel.Receive().status().message(), "that is all");
  closer.join();
}

}  // namespace
}  // namespace qwen::transport
