// Who we are: kubeconfigs of every form that tools write, plugins that are real programs, tokens that change.
#include "controller/kube/kubeconfig.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "controller/kube/time_text.h"

namespace qwen::kube {
namespace {
class KubeconfigTest : public testing::Test {
 protected:
  void SetUp() override {
    folder = std::filesystem::temp_directory_path() / ("kubeconfig_test." + std::to_string(getpid()));
    std::filesystem::create_directories(folder);
  }
  void TearDown() override { std::filesystem::remove_all(folder); }
  std::string Write(const std::string& name, const std::string& text, bool executable = false) {
    const auto path = folder / name;
    std::ofstream(path) << text;
    if (executable) std::filesystem::permissions(path, std::filesystem::perms::owner_all);
    return path.string();
  }
  static std::string Config(const std::string& user, const std::string& cluster = "{server: 'https://h:6443'}") {
    return "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{name: c, context: {cluster: k, user: u, namespace: team}},"
           " {name: other, context: {cluster: k, user: u}}]\nclusters: [{name: k, cluster: " + cluster + "}]\nusers: [{name: u, user: " + user + "}]\n";
  }
  Result<ClusterAccess> Parse(const std::string& yaml, const std::string& context = "") { return ParseKubeconfig(yaml, folder.string(), context, clock); }

  std::filesystem::path folder;
  FakeClock clock;
};

TEST_F(KubeconfigTest, ReadsInlineCertificates) {
  const auto access = Parse(Config("{client-certificate-data: Y2VydA==, client-key-data: a2V5}",
                                   "{server: 'https://h:6443', certificate-authority-data: Y2EtcGVt}"));
  ASSERT_TRUE(access.ok()) << access.status().ToString();
  EXPECT_EQ(access->server, "https://h:6443");
  EXPECT_EQ(access->ca_pem, "ca-pem");
  EXPECT_EQ(access->namespace_name, "team");
  const auto identity = access->credentials->Get();
  ASSERT_TRUE(identity.ok());
  EXPECT_EQ(identity->certificate_pem, "cert");
  EXPECT_EQ(identity->key_pem, "key");
}

TEST_F(KubeconfigTest, ReadsFilesRelativeToTheKubeconfigAndAnotherContext) {
  Write("c.crt", "cert");
  Write("c.key", "key");
  const auto access = Parse(Config("{client-certificate: c.crt, client-key: c.key}", "{server: 'https://h', certificate-authority: ca.crt}"), "other");
  ASSERT_TRUE(access.ok()) << access.status().ToString();
  EXPECT_EQ(access->ca_file, (folder / "ca.crt").string());
  EXPECT_EQ(access->namespace_name, "default");
  EXPECT_EQ(access->credentials->Get()->key_pem, "key");
}

TEST_F(KubeconfigTest, SaysWhatIsWrong) {
  const auto says = [&](const std::string& yaml, const std::string& words, const std::string& context = "") {
    const auto access = Parse(yaml, context);
    ASSERT_FALSE(access.ok()) << yaml;
    EXPECT_NE(access.status().message().find(words), std::string::npos) << access.status().ToString();
  };
  says(Config("{token: t}"), "no context 'nope'", "nope");
  says("a: [", "kubeconfig:");
  says("just text", "not a mapping");
  says("contexts: []", "current-context");
  says(Config("{client-certificate-data: Y2VydA==}"), "needs its key");
  says(Config("{client-certificate-data: '!!!!', client-key-data: a2V5}"), "not base64");
  says(Config("{client-certificate: missing, client-key-data: a2V5}"), "cannot be read");
  says(Config("{token: t}", "{insecure-skip-tls-verify: true}"), "no server");
  says(Config("{auth-provider: {name: oidc}}"), "not supported");
  says(Config("{exec: {apiVersion: v1}}"), "no command");
}

TEST_F(KubeconfigTest, RunsAPluginWithItsArgumentsAndRunsItAgainWhenItsTokenExpires) {
  Write("plugin", "#!/bin/sh\necho run >>\"$LOG\"\n"
                  "[ \"$1\" = --for ] || exit 3\ncase $KUBERNETES_EXEC_INFO in *ExecCredential*) ;; *) exit 4 ;; esac\n"
                  "echo '{\"apiVersion\":\"client.authentication.k8s.io/v1\",\"kind\":\"ExecCredential\",\"status\":{\"token\":\"'$TOKEN'\","
                  "\"expirationTimestamp\":\"2000-01-01T00:00:00Z\"}}'\n", true);
  const std::string log = (folder / "log").string();
  const auto access = Parse(Config("{exec: {apiVersion: client.authentication.k8s.io/v1, command: ./plugin, args: [--for, me],"
                                   " env: [{name: TOKEN, value: abc}, {name: LOG, value: " + log + "}]}}"));
  ASSERT_TRUE(access.ok()) << access.status().ToString();
  for (int i = 0; i < 2; ++i) {
    const auto identity = access->credentials->Get();
    ASSERT_TRUE(identity.ok()) << identity.status().ToString();
    EXPECT_EQ(identity->bearer_token, "abc");
  }
  EXPECT_EQ(std::filesystem::file_size(log), 8u) << "an expired token is asked for each time";
}

TEST_F(KubeconfigTest, APluginThatFailsIsMissingOrHangsIsAnErrorInTime) {
  Write("bad", "#!/bin/sh\nexit 1\n", true);
  Write("hangs", "#!/bin/sh\nexec sleep 60\n", true);
  Write("closes", "#!/bin/sh\nexec >/dev/null\nexec sleep 60\n", true);
  for (const char* name : {"bad", "missing", "hangs", "closes"}) {
    Credentials credentials(RunPlugin({.api_version = "v1", .command = (folder / name).string(), .args = {}, .env = {}, .timeout_seconds = 1}), clock);
    const auto start = std::chrono::steady_clock::now();
    EXPECT_FALSE(credentials.Get().ok()) << name;
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10)) << name;
  }
}

TEST(ExecCredential, NeedsATokenOrACertificateAndCountsItsLifeFromNow) {
  const auto parse = [](const std::string& status) { return ParseExecCredential(R"({"kind":"ExecCredential","status":)" + status + "}", 1'000'000); };
  const auto token = parse(R"({"token":"t","expirationTimestamp":"1970-01-01T00:01:00Z"})");
  ASSERT_TRUE(token.ok());
  EXPECT_EQ(token->valid_micros, 59'000'000);
  EXPECT_EQ(parse(R"({"token":"t"})")->valid_micros, Credentials::kForever);
  EXPECT_FALSE(parse("{}").ok());
  EXPECT_FALSE(parse(R"({"token":"t","expirationTimestamp":"soon"})").ok());
  EXPECT_FALSE(ParseExecCredential("not json", 0).ok());
}

TEST_F(KubeconfigTest, ARotatedTokenFileIsSeenWithinAMinuteAndAtOnceAfter401) {
  const std::string path = Write("token", "one\n");
  Credentials credentials(TokenFile(path), clock);
  EXPECT_EQ(credentials.Get()->bearer_token, "one");
  Write("token", "two");
  clock.AdvanceMicros(59'000'000);
  EXPECT_EQ(credentials.Get()->bearer_token, "one");
  clock.AdvanceMicros(1'000'000);
  EXPECT_EQ(credentials.Get()->bearer_token, "two");
  Write("token", "three");
  credentials.Invalidate();
  EXPECT_EQ(credentials.Get()->bearer_token, "three");
  std::filesystem::remove(path);
  clock.AdvanceMicros(61'000'000);
  EXPECT_EQ(credentials.Get()->bearer_token, "three") << "the last one is used while the file is away";
}

TEST_F(KubeconfigTest, APodFindsItsServiceAccount) {
  Write("token", "tok");
  Write("namespace", "team");
  Write("ca.crt", "pem");
  unsetenv("KUBERNETES_SERVICE_HOST");
  EXPECT_EQ(InCluster(clock, folder.string()).status().code(), StatusCode::kNotFound);
  setenv("KUBERNETES_SERVICE_HOST", "fd00::1", 1);
  setenv("KUBERNETES_SERVICE_PORT", "443", 1);
  const auto access = InCluster(clock, folder.string());
  unsetenv("KUBERNETES_SERVICE_HOST");
  ASSERT_TRUE(access.ok()) << access.status().ToString();
  EXPECT_EQ(access->server, "https://kubernetes.default.svc:443");
  EXPECT_EQ(access->namespace_name, "team");
  EXPECT_EQ(access->credentials->Get()->bearer_token, "tok");
}

TEST(TimeText, ReadsWhatItWritesAndRefusesTheRest) {
  EXPECT_EQ(MicroTimeText(1'700'000'000'000'042), "2023-11-14T22:13:20.000042Z");
  EXPECT_EQ(TimeText(1'700'000'000'000'042), "2023-11-14T22:13:20Z");
  EXPECT_EQ(*ParseTime("2023-11-14T22:13:20.000042Z"), 1'700'000'000'000'042);
  EXPECT_EQ(*ParseTime("2023-11-15T00:13:20+02:00"), 1'700'000'000'000'000);
  EXPECT_EQ(*ParseTime("2023-11-14T22:13:20.5Z"), 1'700'000'000'500'000);
  for (const char* bad : {"", "2023-11-14", "2023-11-14T22:13:20", "2023-11-14T22:13:20.Z", "2023-11-14T22:13:20Zx", "2023-11-14T22:13:20+2:00"}) {
    EXPECT_FALSE(ParseTime(bad).ok()) << bad;
  }
}
}  // namespace
}  // namespace qwen::kube
