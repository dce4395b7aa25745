// Goal: the base room's promises, each against something that shares no code with it.
#include <gtest/gtest.h>
#include <sys/socket.h>

#include <boost/asio.hpp>
#include <thread>

#include "stage/base/bounded_queue.h"
#include "stage/base/bytes.h"
#include "stage/base/clock.h"
#include "stage/base/http_listener.h"
#include "stage/base/log.h"
#include "stage/base/status.h"

namespace qwen {
namespace {

TEST(Bytes, Crc32cMatchesThePublishedCheckValues) {
  EXPECT_EQ(Crc32c(std::string("123456789")), 0xE3069283u);      // the CRC catalogue's check value
  EXPECT_EQ(Crc32c(std::string(32, '\0')), 0x8A9136AAu);         // RFC 3720 B.4
  EXPECT_EQ(Crc32c(std::string(32, '\xff')), 0x62A8AB43u);       // RFC 3720 B.4
  const std::string text = "The quick brown fox jumps over the lazy dog";
  EXPECT_EQ(Crc32c(text.substr(7), Crc32c(text.substr(0, 7))), Crc32c(text));
}

TEST(Bytes, ReaderStopsAtTheEnd) {
  std::string buffer;
  AppendBytes<uint32_t>(buffer, 0x01020304);
  AppendBytes<uint8_t>(buffer, 9);
  ByteReader reader(std::as_bytes(std::span(buffer.data(), buffer.size())));
  EXPECT_EQ(reader.Read<uint32_t>(), 0x01020304u);
  EXPECT_EQ(reader.Read<uint32_t>(), std::nullopt);
  EXPECT_EQ(reader.Read<uint8_t>(), 9);
  EXPECT_EQ(reader.remaining(), 0u);
}

TEST(Status, CarriesCodeContextAndValue) {
  const Status status = NotFoundError("x.json").WithContext("loading");
  EXPECT_EQ(status.ToString(), "NotFound: loading: x.json");
  auto half = [](int n) -> Result<int> {
    if (n % 2) return InvalidArgumentError("odd");
    return n / 2;
  };
  auto quarter = [&](int n) -> Result<int> {
    ASSIGN_OR_RETURN(const int h, half(n));
    return half(h);
  };
  EXPECT_EQ(*quarter(8), 2);
  EXPECT_EQ(quarter(6).status().code(), StatusCode::kInvalidArgument);
}

TEST(CheckDeathTest, PrintsBothSides) { EXPECT_DEATH(QP_CHECK_EQ(1 + 1, 3) << "sum", "1 \\+ 1 == 3.*2 vs 3.*sum"); }

TEST(BoundedQueue, FullIsAValueAndCloseDrains) {
  BoundedQueue<int> queue(2);
  EXPECT_TRUE(queue.TryPush(1));
  EXPECT_TRUE(queue.TryPush(2));
  EXPECT_FALSE(queue.TryPush(3));
  std::thread producer([&] { EXPECT_TRUE(queue.Push(4)); });
  EXPECT_EQ(queue.Pop(), 1);
  producer.join();
  queue.Close();
  EXPECT_FALSE(queue.TryPush(5));
  EXPECT_EQ(queue.Pop(), 2);
  EXPECT_EQ(queue.Pop(), 4);
  EXPECT_EQ(queue.Pop(), std::nullopt);
  EXPECT_EQ(queue.PopFor(std::chrono::microseconds(1)), std::nullopt);
}

std::string Fetch(uint16_t port, const std::string& request) {
  boost::asio::io_context context;
  boost::asio::ip::tcp::socket socket(context);
  socket.connect({boost::asio::ip::make_address("127.0.0.1"), port});
  boost::asio::write(socket, boost::asio::buffer(request));
  std::string reply;
  boost::system::error_code error;
  boost::asio::read(socket, boost::asio::dynamic_buffer(reply), error);
  return reply;
}

TEST(HttpListener, ServesRoutesAndRefusesTheRest) {
  auto listener = HttpListener::Start({.address = "127.0.0.1"}, {{"/healthz", [] { return HttpReply{.body = "ok\n"}; }}});
  ASSERT_TRUE(listener.ok()) << listener.status().ToString();
  const uint16_t port = (*listener)->port();
  EXPECT_NE(Fetch(port, "GET /healthz?x=1 HTTP/1.1\r\nHost: a\r\n\r\n").find("\r\n\r\nok\n"), std::string::npos);
  EXPECT_EQ(Fetch(port, "GET /nothing HTTP/1.1\r\nHost: a\r\n\r\n").substr(9, 3), "404");
  EXPECT_EQ(Fetch(port, "POST /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n").substr(9, 3), "405");
  auto second = HttpListener::Start({.address = "127.0.0.1", .port = port}, {});
  EXPECT_EQ(second.status().code(), StatusCode::kUnavailable);
}

TEST(Log, AClientsTextCannotForgeALine) {
  testing::internal::CaptureStderr();
  log::Init({.process = "test"});
  log::Info("request done", {{"id", "a b\nERROR forged"}, {"tokens", 3}});
  const std::string line = testing::internal::GetCapturedStderr();
  EXPECT_NE(line.find("request done id=\"a b\\u000aERROR forged\" tokens=3\n"), std::string::npos) << line;
}

}  // namespace
}  // namespace qwen
