// Goal: the HTTP layer keeps its bounds and its promises whatever a client does. Method: a handler of a few lines behind
// the real server, and clients that write bytes by hand.
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "tests/unit/stage/server/server_fixture.h"

namespace qwen::server {
namespace {

using std::chrono::milliseconds;

class Served {
 public:
  explicit Served(HttpServer::Options options = {}, HttpServer::Handler handler = nullptr) {
    if (!handler) {
      handler = [](HttpRequest request, std::shared_ptr<ResponseWriter> writer) {
        writer->Reply({.body = request.method + " " + request.path + " " + request.body, .content_type = "text/plain"});
      };
    }
    options.address = "127.0.0.1";
    server = std::move(HttpServer::Start(
                           options,
                           [](const HttpRequest& r) -> std::optional<HttpResponse> {
                             if (r.path == "/refused") return HttpResponse{.status = 403, .body = "no"};
                             return std::nullopt;
                           },
                           std::move(handler), [this](int status) { last_status = status; }))
                 .value();
  }
  Client Connect() const { return Client(server->port()); }
  std::atomic<int> last_status{0};
  std::unique_ptr<HttpServer> server;
};

template <typename Condition>
bool Eventually(Condition condition) {
  for (int i = 0; i < 5000 && !condition(); ++i) std::this_thread::sleep_for(milliseconds(1));
  return condition();
}

TEST(Http, KeepsAConnectionAndAnswersPipelinedRequestsInOrder) {
  Served served;
  auto client = served.Connect();
  client.Send(Client::Request("POST", "/1", "a") + Client::Request("GET", "/2", "") + Client::Request("POST", "/3", "c"));
  EXPECT_EQ(client.Read().body, "POST /1 a");
  EXPECT_EQ(client.Read().body, "GET /2 ");
  EXPECT_EQ(client.Read().body, "POST /3 c");
  client.Send("GET /query?x=1 HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n");
  const auto last = client.Read();
  EXPECT_EQ(last.body, "GET /query ");
  EXPECT_EQ(last.headers.at("connection"), "close");
  EXPECT_EQ(client.Read().status, 0) << "closed";
}

TEST(Http, AnswersPipelinedRequestsWhileTheFirstStreams) {
  std::shared_ptr<ResponseWriter> held;
  std::mutex mutex;
  Served served({}, [&](HttpRequest request, std::shared_ptr<ResponseWriter> writer) {
    if (request.path != "/slow") return writer->Reply({.body = request.path});
    writer->StartStream("text/event-stream");
    writer->Send("data: 1\n\n");
    std::lock_guard<std::mutex> lock(mutex);
    held = std::move(writer);
  });
  auto client = served.Connect();
  client.Send("GET /slow HTTP/1.1\r\nHost: t\r\n\r\n");
  ASSERT_TRUE(Eventually([&] {
    std::lock_guard<std::mutex> lock(mutex);
    return held != nullptr;
  }));
  client.Send("GET /next HTTP/1.1\r\nHost: t\r\n\r\n");  // read by the watch, kept for later
  std::this_thread::sleep_for(milliseconds(20));
  {
    std::lock_guard<std::mutex> lock(mutex);
    held->Send("data: 2\n\n");
    held->Finish();
    held.reset();
  }
  EXPECT_EQ(client.Read().body, "data: 1\n\ndata: 2\n\n");
  EXPECT_EQ(client.Read().body, "/next");
}

TEST(Http, EchoesRequestIdsAndMakesThem) {
  Served served;
  auto client = served.Connect();
  EXPECT_EQ(client.Get("/", "X-Request-Id: abc\r\n").headers.at("x-request-id"), "abc");
  EXPECT_EQ(client.Get("/").headers.at("x-request-id").size(), 32u);
  EXPECT_EQ(client.Get("/", "X-Request-Id: a b\r\n").headers.at("x-request-id").size(), 32u);
  client.Send("NOT HTTP\r\n\r\n");
  EXPECT_EQ(client.Read().headers.at("x-request-id").size(), 32u) << "even when the request cannot be read";
}

TEST(Http, ServesOldClientsAndHead) {
  Served served({}, [](HttpRequest, std::shared_ptr<ResponseWriter> writer) {
    writer->StartStream("text/plain");
    writer->Send("streamed");
    writer->Finish();
  });
  auto old = served.Connect();
  old.Send("GET / HTTP/1.0\r\n\r\n");
  const auto response = old.Read();
  EXPECT_EQ(response.body, "streamed");
  EXPECT_FALSE(response.headers.contains("transfer-encoding"));
  Served plain;
  auto client = plain.Connect();
  client.Send("HEAD /x HTTP/1.1\r\nHost: t\r\n\r\n");
  const auto head = client.Read(/*head=*/true);
  EXPECT_EQ(head.status, 200);
  EXPECT_EQ(head.headers.at("content-length"), std::to_string(std::string("HEAD /x ").size()));
  EXPECT_EQ(client.Get("/y").body, "GET /y ") << "no body bytes were left in between";
}

TEST(Http, RefusesBodiesThatAreTooLarge) {
  Served served({.body_bytes_max = 100});
  auto client = served.Connect();
  client.Send("POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 101\r\n\r\n");  // the body need not be sent
  const auto response = client.Read();
  EXPECT_EQ(response.status, 413);
  EXPECT_EQ(response.Json()["error"]["code"], "request_too_large");
  auto chunked = served.Connect();
  chunked.Send("POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n80\r\n" + std::string(128, 'x') + "\r\n0\r\n\r\n");
  EXPECT_EQ(chunked.Read().status, 413);
  auto fits = served.Connect();
  fits.Send("POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n");
  EXPECT_EQ(fits.Read().body, "POST / abcde");
  auto big = served.Connect();
  big.Send("POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 10000000\r\n\r\n" + std::string(1 << 20, 'x'));
  EXPECT_EQ(big.Read().status, 413) << "readable although the client still sends";
}

TEST(Http, RefusesByHeaderAloneBeforeTheBodyCame) {
  Served served;
  auto client = served.Connect();
  client.Send("POST /refused HTTP/1.1\r\nHost: t\r\nContent-Length: 1000000\r\n\r\n");
  const auto response = client.Read();
  EXPECT_EQ(response.status, 403);
  EXPECT_EQ(response.headers.at("connection"), "close");
  auto without_body = served.Connect();
  EXPECT_EQ(without_body.Get("/refused").status, 403);
  EXPECT_EQ(without_body.Get("/fine").status, 200) << "the connection lives on";
}

TEST(Http, RefusesMalformedAndOversizedHeaders) {
  Served served({.header_bytes_max = 1024});
  for (const auto& [bytes, status] : std::vector<std::pair<std::string, int>>{
           {"GARBAGE\r\n\r\n", 400},
           {"GET / HTTP/9.9\r\n\r\n", 400},
           {"GET / HTTP/1.1\r\nBad Header: x\r\n\r\n", 400},
           {"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400},
           {"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400},
           {"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n", 400},
           {"GET / HTTP/1.1\r\nX: " + std::string(2000, 'x') + "\r\n\r\n", 431},
       }) {
    auto client = served.Connect();
    client.Send(bytes);
    const auto response = client.Read();
    EXPECT_EQ(response.status, status) << bytes.substr(0, 60);
    EXPECT_EQ(client.Read().status, 0) << "closed after";
  }
}

TEST(Http, TimesOutSlowHeadersAndBodies) {
  Served served({.header_timeout = milliseconds(100), .body_timeout = milliseconds(100)});
  auto header = served.Connect();
  header.Send("GET / HT");
  EXPECT_EQ(header.Read().status, 408);
  auto body = served.Connect();
  body.Send("POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 10\r\n\r\nabc");
  const auto response = body.Read();
  EXPECT_EQ(response.status, 408);
  EXPECT_EQ(response.Json()["error"]["code"], "request_timeout");
  EXPECT_EQ(served.last_status, 408);
}

TEST(Http, ClosesIdleConnectionsSilently) {
  Served served({.idle_timeout = milliseconds(50)});
  auto client = served.Connect();
  EXPECT_EQ(client.Get("/").status, 200);
  EXPECT_EQ(client.ReadSome(), "");
  EXPECT_EQ(client.last_error(), asio::error::eof);
  EXPECT_TRUE(Eventually([&] { return served.server->connections() == 0; }));
}

TEST(Http, LetsAClientAskBeforeItSendsTheBody) {
  Served served;
  auto client = served.Connect();
  client.Send("POST /e HTTP/1.1\r\nHost: t\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n");
  EXPECT_EQ(client.ReadSome(), "HTTP/1.1 100 Continue\r\n\r\n");
  client.Send("ok");
  EXPECT_EQ(client.Read().body, "POST /e ok");
}

TEST(Http, BoundsConnectionsAndBodiesInFlight) {
  Served few({.connections_max = 2});
  auto a = few.Connect(), b = few.Connect();
  EXPECT_EQ(a.Get("/").status, 200);
  EXPECT_EQ(b.Get("/").status, 200);
  auto c = few.Connect();
  EXPECT_EQ(c.Read().status, 503);
  a.Close();
  EXPECT_TRUE(Eventually([&] { return few.server->connections() == 1; }));
  auto d = few.Connect();
  EXPECT_EQ(d.Get("/").status, 200);

  Served small({.body_bytes_in_flight_max = 1000});
  auto first = small.Connect();
  first.Send("POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 900\r\n\r\n");
  EXPECT_TRUE(Eventually([&] { return small.Connect().Post("/", std::string(200, 'x')).status == 503; }));
  first.Send(std::string(900, 'y'));
  EXPECT_EQ(first.Read().status, 200);
  auto third = small.Connect();
  EXPECT_EQ(third.Post("/", std::string(200, 'x')).status, 200) << "the bytes were given back";
}

// What a streaming handler and its observer share.
struct Stream {
  std::mutex mutex;
  std::shared_ptr<ResponseWriter> writer;
  std::atomic<int> closed{0};
  HttpServer::Handler Handler() {
    return [this](HttpRequest, std::shared_ptr<ResponseWriter> w) {
      w->OnClosed([this] { ++closed; });
      w->StartStream("text/event-stream");
      std::lock_guard<std::mutex> lock(mutex);
      writer = std::move(w);
    };
  }
  std::shared_ptr<ResponseWriter> Take() {
    std::lock_guard<std::mutex> lock(mutex);
    return writer;
  }
};

TEST(Http, NoticesAClientThatGoesAlthoughNothingIsWritten) {
  for (const bool reset : {false, true}) {
    Stream stream;
    Served served({}, stream.Handler());
    auto client = served.Connect();
    client.Send("GET / HTTP/1.1\r\nHost: t\r\n\r\n");
    EXPECT_TRUE(Eventually([&] { return stream.Take() != nullptr; }));
    client.ReadSome();
    EXPECT_EQ(stream.closed, 0);
    if (reset) client.socket().set_option(asio::socket_base::linger(true, 0));
    client.Close();
    EXPECT_TRUE(Eventually([&] { return stream.closed == 1; }));
    EXPECT_TRUE(Eventually([&] { return stream.Take().use_count() <= 2 && served.server->connections() <= 1; }));
    stream.Take()->Send("late");  // harmless
    stream.Take()->Finish();
    served.server = nullptr;
    EXPECT_EQ(stream.closed, 1);
  }
}

TEST(Http, DropsAReaderThatIsTooSlowAtItsBufferLimit) {
  Stream stream;
  Served served({.send_buffer_bytes_max = 64 << 10, .socket_send_bytes = 16 << 10}, stream.Handler());
  Client client(served.server->port(), /*receive_bytes=*/4096);
  client.Send("GET / HTTP/1.1\r\nHost: t\r\n\r\n");
  EXPECT_TRUE(Eventually([&] { return stream.Take() != nullptr; }));
  auto writer = stream.Take();
  int sent = 0;
  for (; sent < 10'000 && stream.closed == 0; ++sent) {  // 10 MB against a limit of 64 KiB
    writer->Send(std::string(1000, 'x'));
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  EXPECT_EQ(stream.closed, 1);
  EXPECT_LT(sent, 5000);
}

TEST(Http, DropsAReaderThatStandsStillWithinTheWriteTimeout) {
  Stream stream;
  Served served({.send_buffer_bytes_max = 64 << 20, .socket_send_bytes = 16 << 10, .write_timeout = milliseconds(100)}, stream.Handler());
  Client client(served.server->port(), 4096);
  client.Send("GET / HTTP/1.1\r\nHost: t\r\n\r\n");
  EXPECT_TRUE(Eventually([&] { return stream.Take() != nullptr; }));
  stream.Take()->Send(std::string(8 << 20, 'x'));
  EXPECT_TRUE(Eventually([&] { return stream.closed == 1; }));
}

TEST(Http, BreaksAStreamWhoseHandlerGivesUp) {
  Served served({}, [](HttpRequest request, std::shared_ptr<ResponseWriter> writer) {
    if (request.path == "/abort") {
      writer->StartStream("text/plain");
      writer->Send("part");
      writer->Abort();
    }  // else the writer is simply lost
  });
  auto aborted = served.Connect();
  aborted.Send("GET /abort HTTP/1.1\r\nHost: t\r\n\r\n");
  EXPECT_EQ(aborted.Read().status, 0) << "no end of the chunked body, so no whole answer";
  auto lost = served.Connect();
  lost.Send("GET /lost HTTP/1.1\r\nHost: t\r\n\r\n");
  EXPECT_EQ(lost.ReadSome(), "");
}

TEST(Http, StopsAcceptingButFinishesWhatRuns) {
  Stream stream;
  Served served({}, stream.Handler());
  auto idle = served.Connect(), busy = served.Connect();
  busy.Send("GET / HTTP/1.1\r\nHost: t\r\n\r\n");
  EXPECT_TRUE(Eventually([&] { return stream.Take() != nullptr; }));
  served.server->StopAccepting();
  EXPECT_EQ(idle.ReadSome(), "") << "idle connections are closed";
  stream.Take()->Send("end");
  stream.Take()->Finish();
  EXPECT_EQ(busy.Read().body, "end");
  EXPECT_EQ(busy.ReadSome(), "");
  EXPECT_TRUE(Eventually([&] {
    try {
      served.Connect();
      return false;
    } catch (const std::exception&) {
      return true;
    }
  })) << "the listening socket is closed by a thread of the server's own";
}

}  // namespace
}  // namespace qwen::server
