// Goal: the small parts that strangers reach: base64 and data: URLs, API keys, request ids, URLs and the allow-list.
#include <gtest/gtest.h>

#include "stage/server/admission.h"
#include "stage/server/api_keys.h"
#include "stage/server/data_url.h"
#include "stage/server/request_id.h"
#include "stage/server/url_fetcher.h"

namespace qwen::server {
namespace {

TEST(Base64, DecodesTheVectorsOfRfc4648) {
  const std::vector<std::pair<std::string, std::string>> vectors = {{"", ""}, {"Zg==", "f"}, {"Zm8=", "fo"}, {"Zm9v", "foo"}, {"Zm9vYg==", "foob"},
                                                                    {"Zm9vYmE=", "fooba"}, {"Zm9vYmFy", "foobar"}};
  for (const auto& [text, bytes] : vectors) EXPECT_EQ(DecodeBase64(text), bytes) << text;
  EXPECT_EQ(DecodeBase64("Zm8"), "fo");
  EXPECT_EQ(DecodeBase64("Zm\n9v"), "foo");
  EXPECT_EQ(DecodeBase64("-_-_"), DecodeBase64("+/+/"));
  for (const char* bad : {"Z", "Zm9vY", "Zm9v!", "Zg===", "Zg==Zg==", "Zm9v="}) EXPECT_FALSE(DecodeBase64(bad)) << bad;
}

TEST(DataUrl, TakesBase64Only) {
  const auto url = DecodeDataUrl("data:image/png;charset=x;base64,Zm9v");
  ASSERT_TRUE(url.ok());
  EXPECT_EQ(url->media_type, "image/png");
  EXPECT_EQ(url->bytes, "foo");
  EXPECT_EQ(DecodeDataUrl("DATA:;BASE64,Zm9v")->bytes, "foo");
  for (const char* bad : {"data:image/png,abc", "data:image/png;base64", "http://x", "data:;base64,%%%"}) EXPECT_FALSE(DecodeDataUrl(bad).ok()) << bad;
}

TEST(ApiKeys, AllowsOnlyTheKeysOfTheFile) {
  const auto keys = ApiKeys::Parse("# comment\n\n  alpha \r\nbeta\n");
  ASSERT_TRUE(keys.ok());
  EXPECT_TRUE(keys->required());
  EXPECT_TRUE(keys->Allows("Bearer alpha"));
  EXPECT_TRUE(keys->Allows("bearer beta"));
  for (const char* bad : {"", "Bearer", "Bearer ", "alpha", "Basic alpha", "Bearer alph", "Bearer alphaa", "Bearer # comment", "Bearer Alpha"}) {
    EXPECT_FALSE(keys->Allows(bad)) << bad;
  }
  EXPECT_FALSE(ApiKeys::Parse("# nothing\n").ok());
  EXPECT_TRUE(ApiKeys().Allows(""));
}

TEST(RequestId, KeepsOnlyWhatIsHarmlessInHeadersAndLogs) {
  EXPECT_EQ(SaneRequestId("abc-1.2_3"), "abc-1.2_3");
  for (const char* bad : {"", "a b", "a\r\nX: y", "ä", "a/b"}) EXPECT_EQ(SaneRequestId(bad), "") << bad;
  EXPECT_EQ(SaneRequestId(std::string(129, 'a')), "");
  EXPECT_EQ(NewRequestId().size(), 32u);
  EXPECT_NE(NewRequestId(), NewRequestId());
}

TEST(ParseUrl, SplitsAndRefuses) {
  const auto url = ParseUrl("HTTPS://Example.COM:8443/a/b?c=d#frag");
  ASSERT_TRUE(url.ok());
  EXPECT_TRUE(url->https);
  EXPECT_EQ(url->host, "example.com");
  EXPECT_EQ(url->port, "8443");
  EXPECT_EQ(url->target, "/a/b?c=d");
  EXPECT_EQ(ParseUrl("http://h")->target, "/");
  EXPECT_EQ(ParseUrl("http://h?q")->target, "/?q");
  for (const char* bad : {"file:///etc/passwd", "ftp://h/", "http://", "http://user@h/", "http://h:99999999/", "http://h:x/", "http://[::1]/",
                          "http://h/a b", "http://h/\r\nHost: x", "h/x", "gopher://h"}) {
    EXPECT_FALSE(ParseUrl(bad).ok()) << bad;
  }
}

TEST(UrlFetcher, FetchesOnlyFromAllowedHosts) {
  const UrlFetcher fetcher({.allowed_hosts = {"images.example"}});
  EXPECT_EQ(*fetcher.Fetch("data:;base64,Zm9v"), "foo");
  for (const char* bad : {"http://127.0.0.1/x", "http://169.254.169.254/latest", "https://evil.example/x", "http://images.example.evil/x", "file:///x"}) {
    EXPECT_EQ(fetcher.Fetch(bad).status().code(), StatusCode::kInvalidArgument) << bad;
  }
}

TEST(Admission, GivesBytesBack) {
  Admission admission(100);
  ByteReservation a, b;
  EXPECT_TRUE(admission.Reserve(150, a)) << "one request alone always fits";
  EXPECT_FALSE(admission.Reserve(1, b));
  a = ByteReservation();
  EXPECT_EQ(admission.vision_bytes(), 0);
  {
    ByteReservation c;
    EXPECT_TRUE(admission.Reserve(60, c));
    EXPECT_TRUE(admission.Reserve(40, b));
  }
  EXPECT_EQ(admission.vision_bytes(), 40);
}

}  // namespace
}  // namespace qwen::server
