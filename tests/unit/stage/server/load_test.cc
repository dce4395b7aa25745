// Goal: many clients at once, of which some go away at any moment, leave nothing behind: no running or waiting sequence, no
// KV block, no connection. Method: the whole head in memory, 64 clients on threads, a fixed seed per client.
#include <gtest/gtest.h>

#include <random>
#include <thread>

#include "tests/unit/stage/server/server_fixture.h"

namespace qwen::server {
namespace {

TEST(Load, SixtyFourClientsOfWhichHalfGoAwayLeaveNothingBehind) {
  TestHead head;
  head.stages.SetPace(std::chrono::microseconds(200));
  std::atomic<int> right{0}, cancelled{0};
  std::vector<std::thread> clients;
  for (int i = 0; i < 64; ++i) {
    clients.emplace_back([&, i] {
      std::mt19937 random(i);
      auto client = head.Connect();
      for (int round = 0; round < 3; ++round) {
        const std::string say = "client " + std::to_string(i) + " round " + std::to_string(round) + std::string(random() % 40, '!');
        const bool stream = random() % 2;
        if (i % 2 == 0) {
          const auto response = client.Post("/v1/chat/completions", Chat("SAY:" + say, {{"stream", stream}}));
          ASSERT_EQ(response.status, 200) << response.body;
          std::string text;
          if (stream) {
            for (const auto& chunk : response.Chunks()) text += chunk["choices"][0]["delta"].value("content", "");
          } else {
            text = response.Json()["choices"][0]["message"]["content"];
          }
          right += text == say;
        } else {
          auto leaver = head.Connect();
          leaver.Send(Client::Request("POST", "/v1/chat/completions", Chat("for ever", {{"stream", stream}, {"max_tokens", 3000}, {"n", 1 + random() % 3}}).dump()));
          if (stream && random() % 2) leaver.ReadSome();
          std::this_thread::sleep_for(std::chrono::milliseconds(random() % 30));
          leaver.Close();
          ++cancelled;
        }
      }
    });
  }
  for (auto& client : clients) client.join();
  EXPECT_EQ(right, 32 * 3);
  EXPECT_EQ(cancelled, 32 * 3);
  EXPECT_TRUE(head.BecomesIdle());
  const auto stats = head.engine.stats();
  EXPECT_EQ(stats.running, 0);
  EXPECT_EQ(stats.waiting, 0);
  EXPECT_EQ(stats.kv_blocks_used, 0);
  for (int i = 0; i < 2000 && head.http->connections() > 0; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_EQ(head.http->connections(), 0);
}

TEST(Load, ADisconnectFreesItsSlotAlthoughNothingCanBeWritten) {
  TestHead head;
  head.stages.Pause(true);  // no token comes, so nothing is written
  auto client = head.Connect();
  client.Send(Client::Request("POST", "/v1/chat/completions", Chat("x", {{"stream", true}}).dump()));
  for (int i = 0; i < 2000 && head.engine.stats().running == 0; ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_EQ(head.engine.stats().running, 1);
  client.Close();
  for (int i = 0; i < 2000 && !head.engine.idle(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_TRUE(head.engine.idle()) << "cancelled while a plan was in flight";
  head.stages.Pause(false);
  EXPECT_TRUE(head.BecomesIdle());
}

TEST(Load, ASlowReaderIsCancelledAtItsBufferLimit) {
  TestHead head({.http = {.send_buffer_bytes_max = 32 << 10, .socket_send_bytes = 8 << 10}});
  Client client(head.port(), 4096);
  client.Send(Client::Request("POST", "/v1/chat/completions", Chat("x", {{"stream", true}, {"max_tokens", 4000}, {"logprobs", true}, {"top_logprobs", 20}}).dump()));
  EXPECT_TRUE(head.BecomesIdle());
  EXPECT_LT(head.engine.stats().generated_tokens_total, 3900u) << "it was not generated to its end for nobody";
}

TEST(Load, TheHeadStopsWhileRequestsRun) {
  for (int i = 0; i < 3; ++i) {
    auto head = std::make_unique<TestHead>();
    head->stages.SetPace(std::chrono::milliseconds(2));
    std::vector<std::unique_ptr<Client>> clients;
    for (int k = 0; k < 8; ++k) {
      clients.push_back(std::make_unique<Client>(head->port()));
      clients.back()->Send(Client::Request("POST", "/v1/chat/completions", Chat("x", {{"stream", k % 2 == 0}, {"max_tokens", 3000}}).dump()));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(10 * i));
    head = nullptr;  // sanitizers judge
    for (auto& client : clients) EXPECT_EQ(client->Read().status, 0);
  }
}

}  // namespace
}  // namespace qwen::server
