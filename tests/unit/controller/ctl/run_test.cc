// Goal: `qwenctl run` as its user meets it: ready line, merged logs, reason and exit code of a failure, drain, and never an orphan.
// Method: qwenctl's Run in a process of its own, with small scripts in the place of qwen-head and qwen-stage. The scripts note
// their pids in the test's folder; a pid that is still alive after the run is an orphan.
#include "controller/ctl/run_command.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <functional>
#include <sstream>
#include <thread>

namespace qwen::ctl {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

// Serves /ready once the file "go" is there, answers one chat with a stream, and on SIGTERM tells the stages by a file.
const char kHead[] = R"(#!/usr/bin/env python3
import http.server, json, os, signal, sys
d = os.path.dirname(os.path.abspath(__file__))
open(d + "/head.pid", "w").write(str(os.getpid()))
open(d + "/head.args", "w").write("\n".join(sys.argv[1:]))
flag = lambda name: sys.argv[sys.argv.index(name) + 1]
def leave(*_):
    open(d + "/bye", "w").close()
    print("head leaves", flush=True)
    os._exit(int(open(d + "/head.code").read()) if os.path.exists(d + "/head.code") else 0)
signal.signal(signal.SIGTERM, leave)
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_GET(self):
        self.send_response(200 if os.path.exists(d + "/go") else 503)
        self.end_headers()
    def do_POST(self):
        open(d + "/question.json", "wb").write(self.rfile.read(int(self.headers["Content-Length"])))
        open(d + "/question.key", "w").write(self.headers.get("Authorization", ""))
        if os.path.exists(d + "/refuse"):
            body = json.dumps({"error": {"message": "messages: too long"}}).encode()
            self.send_response(400); self.end_headers(); self.wfile.write(body); return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for text in ["It is ", "a six", "."]:
            self.wfile.write(("data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}) + "\n\n").encode())
            self.wfile.flush()
        self.wfile.write(("data: " + json.dumps({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}) + "\n\n").encode())
        self.wfile.write(("data: " + json.dumps({"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 3}}) + "\n\ndata: [DONE]\n\n").encode())
host, port = flag("--listen").rsplit(":", 1)
print("head up", file=sys.stderr, flush=True)
http.server.ThreadingHTTPServer((host, int(port)), Handler).serve_forever()
)";
// Lives until the head leaves. `%BODY%` is the case's own.
const char kStage[] = R"(#!/bin/sh
d=$(dirname "$0")
while [ $# -gt 1 ]; do
  case "$1" in --index) i=$2 ;; --metrics-port) p=$2 ;; --layers) l=$2 ;; esac
  shift 2
done
echo $$ > "$d/stage$i.pid"
trap 'exit 0' TERM
echo "stage $i up with layers $l"
%BODY%
while [ ! -e "$d/bye" ]; do sleep 0.05; done
)";
const char kManifest[] = R"(apiVersion: qwenpipeline.dev/v1alpha1
kind: QwenPipeline
metadata: {name: t}
spec:
  model: {id: t-model, source: {path: model}}
  stages: {count: 2}
  engine: {device: Cpu}
  server: {port: 0, drainTimeoutSeconds: 5}
)";

class RunTest : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = (fs::path(::testing::TempDir()) / "run_").string() + ::testing::UnitTest::GetInstance()->current_test_info()->name();
    fs::remove_all(dir_);
    fs::create_directories(dir_ + "/model");
    Write("model/config.json", R"({"model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
      "head_dim": 16, "intermediate_size": 96, "vocab_size": 256})");
    Write("manifest.yaml", kManifest);
    Script("qwen-head", kHead);
    Stage("");
    Write("go", "");
  }
  void TearDown() override {
    if (qwenctl_ > 0) {
      ::kill(qwenctl_, SIGKILL);
      ::waitpid(qwenctl_, nullptr, 0);
    }
    fs::remove_all(dir_);
  }

  void Write(const std::string& name, const std::string& text) { std::ofstream(dir_ + "/" + name, std::ios::trunc) << text; }
  void Script(const std::string& name, const std::string& text) {
    Write(name, text);
    ::chmod((dir_ + "/" + name).c_str(), 0755);
  }
  void Stage(const std::string& body) {
    std::string text = kStage;
    Script("qwen-stage", text.replace(text.find("%BODY%"), 6, body));
  }
  std::string Read(const std::string& name) {
    std::ifstream file(dir_ + "/" + name);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
  }
  // Starts Run in a process of its own, with stdout and stderr in files.
  void Start(RunFlags flags = {}) {
    flags.manifest = dir_ + "/manifest.yaml";
    flags.bin_dir = dir_;
    qwenctl_ = ::fork();
    ASSERT_GE(qwenctl_, 0);
    if (qwenctl_ > 0) return;
    for (const auto& [fd, name] : {std::pair{1, "out"}, {2, "err"}}) ::dup2(::open((dir_ + "/" + name).c_str(), O_CREAT | O_WRONLY | O_TRUNC, 0600), fd);
    const int code = qwen::ctl::Run(flags);
    std::fflush(nullptr);
    ::_exit(code);
  }
  int Wait() {
    int status = 0;
    if (!Eventually([&] { return ::waitpid(qwenctl_, &status, WNOHANG) == qwenctl_; }, 40)) return -1;
    qwenctl_ = 0;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
  }
  static bool Eventually(const std::function<bool()>& condition, int seconds = 20) {
    const auto deadline = Clock::now() + std::chrono::seconds(seconds);
    while (!condition()) {
      if (Clock::now() > deadline) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    return true;
  }
  bool Ready() {
    return Eventually([&] { return Read("out").find("ready http://127.0.0.1:") != std::string::npos; });
  }
  // Alive: there, and not a zombie that only waits for its new parent.
  bool Alive(const std::string& name) {
    const std::string pid = Read(name);
    if (pid.empty()) return false;
    std::ifstream stat("/proc/" + pid.substr(0, pid.find('\n')) + "/stat");
    std::string text;
    std::getline(stat, text);
    const size_t at = text.rfind(") ");
    return at != std::string::npos && text[at + 2] != 'Z' && text[at + 2] != 'X';
  }
  void ExpectNoOrphans() {
    for (const char* name : {"head.pid", "stage0.pid", "stage1.pid", "grandchild.pid"}) EXPECT_TRUE(Eventually([&] { return !Alive(name); }, 5)) << name;
  }

  std::string dir_;
  pid_t qwenctl_ = 0;
};

TEST_F(RunTest, ASignalDrainsAndTheExitIsClean) {
  Start();
  ASSERT_TRUE(Ready()) << Read("err");
  EXPECT_TRUE(Alive("head.pid"));
  ::kill(qwenctl_, SIGTERM);
  EXPECT_EQ(Wait(), 0) << Read("err");
  const std::string log = Read("err");
  EXPECT_NE(log.find("head    | head leaves"), std::string::npos) << log;
  EXPECT_NE(log.find("stage-0 | stage 0 up with layers 0:2"), std::string::npos) << log;
  EXPECT_NE(log.find("stage-1 | stage 1 up with layers 2:4"), std::string::npos) << log;
  EXPECT_EQ(log.find('\x1b'), std::string::npos) << "colour only on a terminal";
  ExpectNoOrphans();
}

TEST_F(RunTest, StagesThatTheHeadForgetsAreToldByUs) {
  std::string head = kHead;
  head.replace(head.find("open(d + \"/bye\", \"w\").close()"), 29, "pass");
  Script("qwen-head", head);
  Start();
  ASSERT_TRUE(Ready()) << Read("err");
  ::kill(qwenctl_, SIGINT);
  EXPECT_EQ(Wait(), 0) << Read("err");
  ExpectNoOrphans();
}

TEST_F(RunTest, ASignalBeforeItServesEndsItCleanlyToo) {
  fs::remove(dir_ + "/go");
  Start();
  ASSERT_TRUE(Eventually([&] { return Alive("head.pid") && Alive("stage1.pid") && Read("err").find("head up") != std::string::npos; })) << Read("err");
  ::kill(qwenctl_, SIGTERM);
  EXPECT_EQ(Wait(), 0) << Read("err");
  EXPECT_EQ(Read("out"), "");
  ExpectNoOrphans();
}

TEST_F(RunTest, AStageThatRefusesItsCheckpointIsTheReasonAndTheExitCode) {
  Stage("[ $i = 1 ] && { echo 'ERROR tensor X: expected [8, 6], found [6, 6]' >&2; echo 'some last line'; exit 65; }");
  fs::remove(dir_ + "/go");
  Start();
  EXPECT_EQ(Wait(), 65);
  const std::string log = Read("err");
  EXPECT_NE(log.find("error: stage-1 exited with code 65 (bad checkpoint): ERROR tensor X: expected [8, 6], found [6, 6]"), std::string::npos) << log;
  ExpectNoOrphans();
}

TEST_F(RunTest, AStageThatIsKilledWhileServingIsStartedAgainAsAYoungerOne) {
  Stage("echo \"${QWEN_EPOCH:-0}\" >> \"$d/epochs$i\"");
  Start();
  ASSERT_TRUE(Ready()) << Read("err");
  const std::string first = Read("stage0.pid"), other = Read("stage1.pid");
  ::kill(std::stoi(first), SIGKILL);
  ASSERT_TRUE(Eventually([&] { return Read("epochs0") == "0\n1\n"; })) << Read("err");
  EXPECT_NE(Read("stage0.pid"), first);
  EXPECT_EQ(Read("stage1.pid"), other);
  EXPECT_NE(Read("err").find("stage-0 was killed by signal 9 (Killed): stage 0 up with layers 0:2; it is started again at once"), std::string::npos) << Read("err");
  ::kill(qwenctl_, SIGTERM);
  EXPECT_EQ(Wait(), 0) << Read("err");
  ExpectNoOrphans();
}

TEST_F(RunTest, AStageWhoseEndWouldBeTheSameAgainEndsTheRun) {
  Stage("[ $i = 1 ] && { while [ ! -e \"$d/end\" ]; do sleep 0.05; done; exit 65; }");
  Start();
  ASSERT_TRUE(Ready()) << Read("err");
  Write("end", "");
  EXPECT_EQ(Wait(), 65) << Read("err");
  ExpectNoOrphans();
}

TEST_F(RunTest, AStageThatIsKilledBeyondTheBudgetEndsTheRunWithTheSignalsName) {
  Write("manifest.yaml", std::string(kManifest) + "  restart: {budget: 0}\n");
  Start();
  ASSERT_TRUE(Ready()) << Read("err");
  ::kill(std::stoi(Read("stage0.pid")), SIGKILL);
  EXPECT_EQ(Wait(), 1);
  EXPECT_NE(Read("err").find("error: stage-0 was killed by signal 9 (Killed)"), std::string::npos) << Read("err");
  ExpectNoOrphans();
}

TEST_F(RunTest, AProcessThatEndsUnaskedIsAFailureEvenWithCode0) {
  Stage("[ $i = 0 ] && exit 0");
  fs::remove(dir_ + "/go");
  Start();
  EXPECT_EQ(Wait(), 1);
  EXPECT_NE(Read("err").find("stage-0 exited with code 0 (finished) although it was not asked to"), std::string::npos) << Read("err");
}

TEST_F(RunTest, AHeadThatCutsRequestsOffIsReported) {
  Write("head.code", "73");
  Start();
  ASSERT_TRUE(Ready()) << Read("err");
  ::kill(qwenctl_, SIGTERM);
  EXPECT_EQ(Wait(), 73);
  EXPECT_NE(Read("err").find("requests still running at the end of the drain"), std::string::npos) << Read("err");
}

TEST_F(RunTest, AChildThatIgnoresEverythingIsKilledBySecondSignal) {
  Stage("trap '' TERM INT; rm -f \"$d/never\"; while :; do sleep 0.05; done");
  Start();
  ASSERT_TRUE(Ready()) << Read("err");
  ::kill(qwenctl_, SIGINT);
  ASSERT_TRUE(Eventually([&] { return Read("err").find("draining") != std::string::npos; }));
  ::kill(qwenctl_, SIGINT);
  EXPECT_EQ(Wait(), 73) << Read("err");
  ExpectNoOrphans();
}

TEST_F(RunTest, WhatAChildLeavesBehindEndsWithIt) {
  Stage("[ $i = 0 ] && { sleep 300 & echo $! > \"$d/grandchild.pid\"; }");
  Start();
  ASSERT_TRUE(Ready()) << Read("err");
  ASSERT_TRUE(Alive("grandchild.pid"));
  ::kill(qwenctl_, SIGTERM);
  EXPECT_EQ(Wait(), 0) << Read("err");
  ExpectNoOrphans();
}

TEST_F(RunTest, KillingQwenctlItselfLeavesNobody) {
  Start();
  ASSERT_TRUE(Ready()) << Read("err");
  ASSERT_TRUE(Alive("stage0.pid") && Alive("stage1.pid"));
  ::kill(qwenctl_, SIGKILL);
  EXPECT_EQ(Wait(), 1000 + SIGKILL);
  ExpectNoOrphans();
}

TEST_F(RunTest, NotReadyInTimeIsAFailure) {
  fs::remove(dir_ + "/go");
  Start({.ready_timeout_seconds = 1});
  EXPECT_EQ(Wait(), 1);
  EXPECT_NE(Read("err").find("error: not ready after 1 s"), std::string::npos) << Read("err");
  ExpectNoOrphans();
}

TEST_F(RunTest, AskPrintsTheAnswerAndATableAndEnds) {
  Stage("python3 -c 'import http.server,sys\nclass H(http.server.BaseHTTPRequestHandler):\n"
        "  def log_message(self,*_): pass\n"
        "  def do_GET(self):\n"
        "    self.send_response(200); self.end_headers()\n"
        "    self.wfile.write(b\"qwen_stage_layers{stage=\\\"0\\\",begin=\\\"0\\\",end=\\\"2\\\"} 1\\n"
        "qwen_stage_weight_bytes{stage=\\\"0\\\"} 3440000\\nqwen_stage_step_seconds_sum{phase=\\\"prefill\\\"} 0.25\\nqwen_stage_step_seconds_sum{phase=\\\"decode\\\"} 0.5\\n\")\n"
        "server=http.server.HTTPServer((\"127.0.0.1\",int(sys.argv[1])),H)\nopen(sys.argv[2],\"w\").close()\nserver.serve_forever()' $p \"$d/up$i\" &");
  fs::remove(dir_ + "/go");  // until the stages can be asked
  Write("picture.png", "\x89PNG\r\n\x1a\nrest");
  Start({.ask = "Which digit is this?", .image = dir_ + "/picture.png", .max_tokens = 9});
  ASSERT_TRUE(Eventually([&] { return fs::exists(dir_ + "/up0") && fs::exists(dir_ + "/up1"); })) << Read("err");
  Write("go", "");
  EXPECT_EQ(Wait(), 0) << Read("err");
  const std::string out = Read("out");
  EXPECT_NE(out.find("ready http://127.0.0.1:"), std::string::npos) << out;
  EXPECT_NE(out.find("> Which digit is this? ["), std::string::npos) << out;
  EXPECT_NE(out.find("It is a six.\n"), std::string::npos) << out;
  EXPECT_NE(out.find("stage-0     0:2  3.44 MB  750.0 ms"), std::string::npos) << out;
  EXPECT_NE(out.find("stage-1"), std::string::npos) << out;
  EXPECT_NE(out.find("12 prompt tokens, 3 generated"), std::string::npos) << out;
  const std::string question = Read("question.json");
  for (const char* part : {"\"model\":\"t-model\"", "data:image/png;base64,iVBORw0KGgpyZXN0", "\"Which digit is this?\"", "\"stream\":true", "\"max_tokens\":9", "\"temperature\":0"})
    EXPECT_NE(question.find(part), std::string::npos) << part << " in " << question;
  ExpectNoOrphans();
}

TEST_F(RunTest, ARefusedQuestionIsTheReason) {
  Write("refuse", "");
  Write("keys", "# first line is a remark\nsecret-1\nsecret-2\n");
  std::string manifest = kManifest;
  Write("manifest.yaml", manifest.replace(manifest.find("{port: 0,"), 9, "{port: 0, apiKeys: {file: keys},"));
  Start({.ask = "?"});
  EXPECT_EQ(Wait(), 1);
  EXPECT_NE(Read("err").find("error: the question failed: the server answered 400: messages: too long"), std::string::npos) << Read("err");
  EXPECT_EQ(Read("question.key"), "Bearer secret-1");
  EXPECT_NE(Read("head.args").find("--api-keys-file\n" + dir_ + "/keys"), std::string::npos) << Read("head.args");
  EXPECT_EQ(Read("err").find("secret-1"), std::string::npos);
  ExpectNoOrphans();
}

TEST_F(RunTest, WhatCannotStartIsSaidBeforeAnythingIsStarted) {
  struct Case {
    std::function<void()> prepare;
    int code;
    std::string message;
  };
  const Case cases[] = {
      {[&] { fs::remove(dir_ + "/qwen-stage"); }, 1, "qwen-stage: not there or not executable"},
      {[&] { Stage(""), fs::remove_all(dir_ + "/model"); }, 1, "holds neither config.json nor hf_config.json"},
      {[&] { Write("manifest.yaml", "a: 1\n"); }, 64, "manifest.yaml: apiVersion: must be qwenpipeline.dev/v1alpha1"},
  };
  for (const Case& c : cases) {
    c.prepare();
    Start();
    EXPECT_EQ(Wait(), c.code) << c.message;
    EXPECT_NE(Read("err").find(c.message), std::string::npos) << Read("err");
    EXPECT_FALSE(fs::exists(dir_ + "/head.pid"));
  }
}

TEST_F(RunTest, FlagsOverrideTheManifest) {
  fs::remove(dir_ + "/go");
  Stage("echo $l > \"$d/layers$i\"");
  Start({.stages = 1});
  ASSERT_TRUE(Eventually([&] { return !Read("layers0").empty() && !Read("head.args").empty(); })) << Read("err");
  EXPECT_EQ(Read("layers0"), "0:4\n");
  EXPECT_NE(Read("head.args").find("--stages\n1\n"), std::string::npos);
  ::kill(qwenctl_, SIGTERM);
  EXPECT_EQ(Wait(), 0) << Read("err");
  EXPECT_FALSE(fs::exists(dir_ + "/stage1.pid"));
}

}  // namespace
}  // namespace qwen::ctl
