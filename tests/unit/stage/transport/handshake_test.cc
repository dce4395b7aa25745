// The handshake over real sockets: both sides prove the secret, every wrong claim is refused by name, and only a proved
// refusal counts as the head's.
#include "stage/transport/handshake.h"

#include <gtest/gtest.h>

#include <fstream>
#include <thread>

#include "stage/transport/codec.h"
#include "tests/unit/stage/transport/loopback.h"

namespace qwen::transport {
namespace {

const Secret kSecret = Secret::FromBytes("0123456789abcdef").value();
const Secret kOther = Secret::FromBytes("0123456789abcdeF").value();
const GroupIdentity kGroup{.pipeline_uid = "uid", .config_hash = "hash", .stages = 2};

Hello GoodHello() {
  Hello hello{.pipeline_uid = "uid", .stage = 1, .stages = 2, .layer_begin = 2, .layer_end = 4, .config_hash = "hash", .data_address = "a:1"};
  hello.loading = true;
  hello.instance = "me";
  return hello;
}

struct Outcome {
  JoinResult stage;
  Result<Hello> head = Status(StatusCode::kInternal, "not run");
};
Outcome Shake(const Secret& stage_secret, const Secret& head_secret, const Hello& hello, const Admit& admit) {
  SocketPair pair = ConnectedSockets();
  MessageStream stage(std::move(pair.dialled)), head(std::move(pair.accepted));
  const Interrupt never;
  const auto deadline = DeadlineIn(std::chrono::seconds(5));
  Outcome outcome;
  std::thread head_side([&] {
    outcome.head = AcceptStage(head, head_secret, kGroup, admit, deadline, never);
    if (outcome.head.ok()) {
      EXPECT_TRUE(SendWelcome(head, head_secret, *outcome.head, 17, deadline, never).ok());
    }
  });
  outcome.stage = JoinAsStage(stage, stage_secret, hello, deadline, never);
  head_side.join();
  return outcome;
}
const Admit kAll = [](const Hello&) { return Refusal{}; };

TEST(Handshake, ASharedSecretLetsTheStageIn) {
  const Outcome outcome = Shake(kSecret, kSecret, GoodHello(), kAll);
  EXPECT_TRUE(outcome.stage.status.ok()) << outcome.stage.status.ToString();
  EXPECT_EQ(outcome.stage.welcome.epoch, 17u);
  ASSERT_TRUE(outcome.head.ok()) << outcome.head.status().ToString();
  EXPECT_EQ(outcome.head->instance, "me");
}

TEST(Handshake, AWrongSecretIsRefusedAndItsRefusalProvesNothing) {
  const Outcome outcome = Shake(kOther, kSecret, GoodHello(), kAll);
  EXPECT_EQ(outcome.stage.status.code(), StatusCode::kUnauthenticated);
  EXPECT_FALSE(outcome.stage.refused_by_head);
  EXPECT_EQ(outcome.head.status().code(), StatusCode::kUnauthenticated);
}

TEST(Handshake, EveryWrongClaimIsRefusedByName) {
  const auto refusal = [](const std::function<void(Hello&)>& spoil) {
    Hello hello = GoodHello();
    spoil(hello);
    const Outcome outcome = Shake(kSecret, kSecret, hello, kAll);
    EXPECT_TRUE(outcome.stage.refused_by_head);
    EXPECT_EQ(outcome.stage.status.code(), StatusCode::kInvalidArgument);
    return outcome.head.status().message();
  };
  EXPECT_EQ(refusal([](Hello& h) { h.protocol_version = 2; }), "protocol error: protocol version 2, the head speaks 1");
  EXPECT_EQ(refusal([](Hello& h) { h.pipeline_uid = "x"; }), "configuration differs: pipeline uid differs");
  EXPECT_EQ(refusal([](Hello& h) { h.config_hash = "x"; }), "configuration differs: config hash x, the head has hash: not the same model");
  EXPECT_EQ(refusal([](Hello& h) { h.stages = 3; }), "configuration differs: stage count 3, the head has 2");
  EXPECT_EQ(refusal([](Hello& h) { h.stage = 2; }), "configuration differs: stage index 2 out of [0, 2)");
}

TEST(Handshake, AdmissionDecidesAndItsKindsAreTold) {
  const auto with = [](FailureCode code) { return Shake(kSecret, kSecret, GoodHello(), [code](const Hello&) { return Refusal{code, "why"}; }); };
  EXPECT_EQ(with(FailureCode::kStale).stage.status.code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(with(FailureCode::kBusy).stage.status.code(), StatusCode::kUnavailable);  // try again
  EXPECT_TRUE(with(FailureCode::kStale).stage.refused_by_head);
}

// A head without the secret: it lets everybody in, but its Welcome and its refusals are not believed.
TEST(Handshake, AHeadThatCannotProveTheSecretIsNotBelieved) {
  for (const bool refuse : {false, true}) {
    SocketPair pair = ConnectedSockets();
    MessageStream stage(std::move(pair.dialled)), head(std::move(pair.accepted));
    const Interrupt never;
    const auto deadline = DeadlineIn(std::chrono::seconds(5));
    std::thread impostor([&] {
      EXPECT_TRUE(head.Write(Message(Challenge{.nonce = std::string(kNonceBytes, 'n')}), deadline, never).ok());
      auto hello = head.Read(deadline, never);
      ASSERT_TRUE(hello.ok());
      const Message answer = refuse ? Message(Failure{.epoch = 0, .code = FailureCode::kConfig, .reason = "go", .fatal = true, .hmac = std::string(32, 'x')})
                                    : Message(Welcome{.epoch = 1, .hmac = std::string(32, 'x')});
      EXPECT_TRUE(head.Write(answer, deadline, never).ok());
    });
    const JoinResult join = JoinAsStage(stage, kSecret, GoodHello(), deadline, never);
    impostor.join();
    EXPECT_FALSE(join.status.ok());
    EXPECT_FALSE(join.refused_by_head);
  }
}

TEST(Handshake, AHelloThatWasReplayedOrChangedOnTheWayIsRefused) {
  // Recorded with one challenge, replayed to another; and with one field changed after it was signed.
  for (const bool change : {false, true}) {
    SocketPair pair = ConnectedSockets();
    MessageStream stage(std::move(pair.dialled)), middle(std::move(pair.accepted));
    const Interrupt never;
    const auto deadline = DeadlineIn(std::chrono::seconds(5));
    SocketPair real = ConnectedSockets();
    MessageStream to_head(std::move(real.dialled)), head(std::move(real.accepted));
    Result<Hello> accepted = Status(StatusCode::kInternal, "not run");
    std::thread head_side([&] { accepted = AcceptStage(head, kSecret, kGroup, kAll, deadline, never); });
    std::thread man_in_the_middle([&] {
      auto challenge = to_head.Read(deadline, never);
      ASSERT_TRUE(challenge.ok());
      if (!change) std::get<Challenge>(*challenge).nonce = std::string(kNonceBytes, 'o');
      EXPECT_TRUE(middle.Write(*challenge, deadline, never).ok());
      auto hello = middle.Read(deadline, never);
      ASSERT_TRUE(hello.ok());
      if (change) std::get<Hello>(*hello).data_address = "evil:1";
      EXPECT_TRUE(to_head.Write(*hello, deadline, never).ok());
      auto answer = to_head.Read(deadline, never);
      ASSERT_TRUE(answer.ok());
      EXPECT_TRUE(middle.Write(*answer, deadline, never).ok());
    });
    const JoinResult join = JoinAsStage(stage, kSecret, GoodHello(), deadline, never);
    man_in_the_middle.join();
    head_side.join();
    EXPECT_EQ(accepted.status().code(), StatusCode::kUnauthenticated);
    EXPECT_EQ(join.status.code(), StatusCode::kUnauthenticated);
  }
}

TEST(Handshake, AStrangerCannotMakeTheHeadHoldALargeFrame) {
  SocketPair pair = ConnectedSockets();
  MessageStream stranger(std::move(pair.dialled)), head(std::move(pair.accepted));
  const Interrupt never;
  const auto deadline = DeadlineIn(std::chrono::seconds(5));
  Hello large = GoodHello();
  large.config_hash = std::string(200'000, 'x');
  EXPECT_TRUE(stranger.Write(Message(large), deadline, never).ok());
  auto accepted = AcceptStage(head, kSecret, kGroup, kAll, deadline, never);
  EXPECT_EQ(accepted.status().code(), StatusCode::kDataLoss);
}

TEST(Handshake, SecretsComeFromFilesWithoutTheirLineEndAndNotTooShort) {
  const std::string path = testing::TempDir() + "/secret";
  std::ofstream(path) << "0123456789abcdef\r\n";
  auto secret = Secret::FromFile(path);
  ASSERT_TRUE(secret.ok()) << secret.status().ToString();
  EXPECT_EQ(secret->Mac("c", {"a"}), kSecret.Mac("c", {"a"}));
  EXPECT_NE(secret->Mac("c", {"ab", "c"}), kSecret.Mac("c", {"a", "bc"}));  // parts do not run into each other
  std::ofstream(path) << "short\n";
  EXPECT_EQ(Secret::FromFile(path).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(Secret::FromFile(path + "-none").status().code(), StatusCode::kNotFound);
  EXPECT_TRUE(Secret::InsecureLoopback().CheckSocket(ConnectedSockets().dialled).ok());
}

// Computed with Python's hmac module: HMAC-SHA256(secret, length-prefixed parts).
TEST(Handshake, TheMacIsHmacSha256OfTheDocumentedBytes) {
  // python3: hmac.new(b"0123456789abcdef", b"".join(len(p).to_bytes(8,"little")+p for p in (b"qwen-pipeline-1", b"head", b"ab")), "sha256")
  const std::string mac = kSecret.Mac("head", {"ab"});
  std::string hex;
  for (const unsigned char c : mac) {
    char digits[3];
    snprintf(digits, sizeof digits, "%02x", c);
    hex += digits;
  }
  EXPECT_EQ(hex, "738f5f71f2e86c4b302c814202cb709de5aafac301ec9f7b1b3034f95d67622e");
}

}  // namespace
}  // namespace qwen::transport
