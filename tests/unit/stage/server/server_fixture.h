// tests/unit/stage/server/server_fixture.h — a whole head in one process: HttpServer, Api and the real Engine over stages in
// memory, with a tiny vision-language model whose tokens are bytes. A prompt that holds "SAY:text" is answered with
// `text`; any other with letters that depend on the seed alone.
#pragma once
#include <unistd.h>

#include <boost/asio.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <nlohmann/json.hpp>
#include <prometheus/registry.h>

#include <condition_variable>
#include <deque>
#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>
#include <thread>

#include <gtest/gtest.h>

#include "stage/server/api.h"
#include "stage/server/engine_thread.h"
#include "stage/server/http_server.h"

namespace qwen::server {

using nlohmann::json;

// ---- The model: byte b is token b, added tokens follow.
inline constexpr int kEndOfText = 256, kImStart = 257, kImEnd = 258, kImagePad = 261, kVideoPad = 262;
inline constexpr int kToolOpen = 263, kToolClose = 264, kThinkOpen = 265, kThinkClose = 266;

inline std::string Utf8Of(int code) {
  std::string out;
  if (code < 0x80) return std::string(1, static_cast<char>(code));
  out.push_back(static_cast<char>(0xc0 | code >> 6));
  out.push_back(static_cast<char>(0x80 | (code & 63)));
  return out;
}

inline std::string TinyTokenizerJson() {
  json vocab = json::object();
  int next = 256;
  for (int b = 0; b < 256; ++b) {  // GPT-2's byte alphabet
    const bool printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    vocab[Utf8Of(printable ? b : next++)] = b;
  }
  json added = json::array();
  const char* names[] = {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
                         "<|video_pad|>", "<tool_call>", "</tool_call>", "<think>", "</think>"};
  for (int i = 0; i < 11; ++i) {
    added.push_back({{"id", 256 + i}, {"content", names[i]}, {"single_word", false}, {"lstrip", false}, {"rstrip", false}, {"normalized", false}, {"special", i < 7}});
  }
  return json{{"version", "1.0"},
              {"added_tokens", added},
              {"normalizer", {{"type", "NFC"}}},
              {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", false}, {"use_regex", false}}},
              {"decoder", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", false}, {"use_regex", false}}},
              {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", json::array()}}}}
      .dump();
}

inline constexpr char kTinyConfig[] = R"({"model_type": "qwen3_vl", "image_token_id": 261, "video_token_id": 262,
  "vision_start_token_id": 259, "vision_end_token_id": 260, "tie_word_embeddings": false,
  "text_config": {"model_type": "qwen3_vl_text", "dtype": "float32", "head_dim": 32, "hidden_act": "silu", "hidden_size": 64,
    "intermediate_size": 96, "max_position_embeddings": 4096, "num_attention_heads": 4, "num_hidden_layers": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "vocab_size": 320, "rope_theta": 10000,
    "rope_scaling": {"mrope_interleaved": true, "mrope_section": [6, 5, 5], "rope_type": "default"}},
  "vision_config": {"deepstack_visual_indexes": [0], "depth": 2, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 32, "in_channels": 3,
    "intermediate_size": 64, "model_type": "qwen3_vl", "num_heads": 2, "num_position_embeddings": 64, "out_hidden_size": 64,
    "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2}})";

inline constexpr char kTinyTemplate[] =
    "{%- if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{%- else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking %}<think>\n{% endif %}{% endif %}";

// A folder with the files above, removed with the object.
class TinyModel {
 public:
  TinyModel() {
    std::string pattern = std::filesystem::temp_directory_path() / "qwen-server-test-XXXXXX";
    dir_ = mkdtemp(pattern.data());
    Write("tokenizer.json", TinyTokenizerJson());
    Write("config.json", kTinyConfig);
    Write("chat_template.jinja", kTinyTemplate);
    Write("generation_config.json", R"({"eos_token_id": [258, 256], "temperature": 0.7, "top_p": 0.8, "top_k": 20})");
    const char processor[] = R"({"size": {"shortest_edge": 1024, "longest_edge": 1048576}, "patch_size": 16, "temporal_patch_size": 2,
      "merge_size": 2, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "image_processor_type": "Qwen2VLImageProcessorFast"})";
    Write("preprocessor_config.json", processor);
    Write("video_preprocessor_config.json", processor);
  }
  ~TinyModel() { std::filesystem::remove_all(dir_); }
  const std::string& dir() const { return dir_; }
  void Write(const std::string& name, const std::string& text) const { std::ofstream(dir_ + "/" + name) << text; }

 private:
  std::string dir_;
};

// ---- The stages: deterministic, in memory.
class FakeStages final : public step::Executor {
 public:
  explicit FakeStages(int32_t blocks = 512) : blocks_(blocks) { Announce(); }

  Status SubmitVision(std::shared_ptr<const step::VisionInput> input) override {
    std::lock_guard<std::mutex> lock(mutex_);
    vision_.push_back(std::move(input));
    return OkStatus();
  }
  Status Submit(const step::StepPlan& plan) override {
    std::unique_lock<std::mutex> lock(mutex_);
    if (plan.epoch != epoch_) return UnavailableError("no group");
    for (const auto& start : plan.starts) slots_[start.slot] = start;
    step::StepResult result{.epoch = plan.epoch, .step = plan.step};
    for (const auto& span : plan.spans) {
      if (!span.sample) continue;
      auto& slot = slots_.at(span.slot);
      EXPECT_EQ(slot.sequence, span.sequence);
      const step::SampledToken token = Sample(slot, span);
      slot.tokens.push_back(token.token);
      result.samples.push_back(token);
    }
    events_.push_back(std::move(result));
    changed_.notify_all();
    return OkStatus();
  }
  step::ExecutorEvent Poll(std::chrono::microseconds timeout) override {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_for(lock, timeout, [&] { return woken_ || (!events_.empty() && !paused_); });
    woken_ = false;
    if (events_.empty() || paused_) return std::monostate();
    const auto pace = pace_;
    step::ExecutorEvent event = std::move(events_.front());
    events_.pop_front();
    lock.unlock();
    if (pace.count() > 0) std::this_thread::sleep_for(pace);
    return event;
  }
  void Wake() override {
    std::lock_guard<std::mutex> lock(mutex_);
    woken_ = true;
    changed_.notify_all();
  }

  void SetPace(std::chrono::microseconds pace) {
    std::lock_guard<std::mutex> lock(mutex_);
    pace_ = pace;
  }
  // Paused stages compute but their results are not delivered.
  void Pause(bool paused) {
    std::lock_guard<std::mutex> lock(mutex_);
    paused_ = paused;
    changed_.notify_all();
  }
  void LoseGroup() {
    std::lock_guard<std::mutex> lock(mutex_);
    events_.clear();
    slots_.clear();
    events_.push_back(step::GroupLost{.epoch = epoch_++, .reason = "stage 1 was lost"});
    changed_.notify_all();
  }
  void Announce() {
    std::lock_guard<std::mutex> lock(mutex_);
    events_.push_back(step::GroupReady{.epoch = epoch_,
                                       .limits = {.block_tokens = 16, .block_count = blocks_, .max_slots = 64, .max_batch_tokens = 512, .max_sequence_tokens = 4096, .vocab_size = 320},
                                       .stages = 2});
    changed_.notify_all();
  }
  std::vector<std::shared_ptr<const step::VisionInput>> vision() {
    std::lock_guard<std::mutex> lock(mutex_);
    return vision_;
  }
  std::map<int32_t, step::SequenceStart> slots() {
    std::lock_guard<std::mutex> lock(mutex_);
    return slots_;
  }

 private:
  static step::SampledToken Sample(const step::SequenceStart& slot, const step::SequenceSpan& span) {
    const std::vector<int32_t> prompt(slot.tokens.begin(), slot.tokens.begin() + slot.prompt_tokens);
    const size_t index = slot.tokens.size() - prompt.size();
    const std::vector<int32_t> mark = {'S', 'A', 'Y', ':'};
    int32_t token = 0;
    if (auto at = std::find_end(prompt.begin(), prompt.end(), mark.begin(), mark.end()); at != prompt.end()) {
      at += 4;
      const auto end = std::find_if(at, prompt.end(), [](int32_t t) { return t == kImEnd; });
      token = index < static_cast<size_t>(end - at) ? at[index] : kImEnd;
    } else if (slot.params.temperature == 0) {
      token = 'x';
    } else {
      uint64_t z = slot.params.seed * 0x9e3779b97f4a7c15ull + index * 0xbf58476d1ce4e5b9ull;
      z ^= z >> 29;
      token = static_cast<int32_t>('a' + (z * 0x94d049bb133111ebull >> 33) % 26);
    }
    const auto& stops = slot.params.stop_tokens;
    if (static_cast<int32_t>(index) < slot.params.min_tokens && std::count(stops.begin(), stops.end(), token)) token = '.';
    if (!span.allowed.empty()) {
      const auto allowed = [&](int32_t t) { return (span.allowed[t / 32] >> (t % 32)) & 1; };
      for (int32_t t = 0; !allowed(token) && t < 320; ++t) {
        if (allowed(t)) token = t;
      }
    }
    step::SampledToken sampled{.sequence = span.sequence, .token = token, .logprob = -0.5f};
    for (int32_t i = 0; i < slot.params.logprobs; ++i) sampled.top.push_back({(token + i) % 256, -0.5f - static_cast<float>(i)});
    return sampled;
  }

  const int32_t blocks_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<step::ExecutorEvent> events_;
  std::map<int32_t, step::SequenceStart> slots_;
  std::vector<std::shared_ptr<const step::VisionInput>> vision_;
  std::chrono::microseconds pace_{0};
  bool woken_ = false, paused_ = false;
  uint64_t epoch_ = 1;
};

// ---- A client that speaks HTTP/1.1 through Beast's parser, which shares nothing with how the server writes.
namespace asio = boost::asio;
namespace beast = boost::beast;

struct ClientResponse {
  int status = 0;
  std::string body;
  std::map<std::string, std::string> headers;  // lower case
  json Json() const { return json::parse(body); }
  std::vector<std::string> Events() const {  // payloads of "data: …"
    std::vector<std::string> events;
    std::istringstream lines(body);
    for (std::string line; std::getline(lines, line);) {
      if (line.starts_with("data: ")) events.push_back(line.substr(6));
    }
    return events;
  }
  // Chunks as JSON, without [DONE], which must be last.
  std::vector<json> Chunks() const {
    auto events = Events();
    EXPECT_FALSE(events.empty());
    if (events.empty()) return {};
    EXPECT_EQ(events.back(), "[DONE]");
    events.pop_back();
    std::vector<json> chunks;
    for (const auto& event : events) chunks.push_back(json::parse(event));
    return chunks;
  }
};

class Client {
 public:
  explicit Client(uint16_t port, int receive_bytes = 0) {
    socket_.open(asio::ip::tcp::v4());
    if (receive_bytes > 0) socket_.set_option(asio::socket_base::receive_buffer_size(receive_bytes));
    socket_.connect({asio::ip::make_address("127.0.0.1"), port});
    const timeval timeout{20, 0};  // a hang is a failure, not a hang
    setsockopt(socket_.native_handle(), SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
  }
  void Send(const std::string& bytes) { asio::write(socket_, asio::buffer(bytes)); }
  // Throws nothing: a connection that was closed gives status 0.
  ClientResponse Read(bool head = false) {
    ClientResponse response;
    beast::http::response_parser<beast::http::string_body> parser;
    parser.body_limit(std::numeric_limits<uint64_t>::max());
    parser.skip(head);
    beast::error_code error;
    beast::http::read(socket_, buffer_, parser, error);
    last_error_ = error;
    if (error) return response;
    response.status = static_cast<int>(parser.get().result_int());
    response.body = parser.get().body();
    for (const auto& field : parser.get()) {
      std::string name(field.name_string());
      for (char& c : name) c = static_cast<char>(std::tolower(c));
      response.headers[name] = std::string(field.value());
    }
    return response;
  }
  std::string ReadSome() {
    char bytes[4096];
    beast::error_code error;
    const size_t count = socket_.read_some(asio::buffer(bytes), error);
    last_error_ = error;
    return std::string(bytes, count);
  }
  static std::string Request(const std::string& method, const std::string& path, const std::string& body, const std::string& headers = "") {
    std::string text = method + " " + path + " HTTP/1.1\r\nHost: test\r\n" + headers;
    if (method == "POST") text += "Content-Type: application/json\r\nContent-Length: " + std::to_string(body.size()) + "\r\n";
    return text + "\r\n" + body;
  }
  ClientResponse Post(const std::string& path, const json& body, const std::string& headers = "") {
    Send(Request("POST", path, body.dump(), headers));
    return Read();
  }
  ClientResponse Get(const std::string& path, const std::string& headers = "") {
    Send(Request("GET", path, "", headers));
    return Read();
  }
  void Close() { socket_.close(); }
  beast::error_code last_error() const { return last_error_; }
  asio::ip::tcp::socket& socket() { return socket_; }

 private:
  asio::io_context context_;
  asio::ip::tcp::socket socket_{context_};
  beast::flat_buffer buffer_;
  beast::error_code last_error_;
};

// ---- The head.
struct HeadOptions {
  HttpServer::Options http;
  Api::Options api{.workers = 2, .version = "test"};
  Api::Probes probes;
  engine::Engine::Options engine{.queue_capacity = 256};
  std::string api_keys;
  std::set<std::string> image_hosts;
};

class TestHead {
 public:
  explicit TestHead(HeadOptions options = {}, bool group = true)
      : assets(std::move(ModelAssets::Load(model.dir(), "tiny", 0)).value()),
        engine(options.engine, stages),
        fetcher({.allowed_hosts = options.image_hosts, .timeout = std::chrono::milliseconds(500)}),
        keys(options.api_keys.empty() ? ApiKeys() : std::move(ApiKeys::Parse(options.api_keys)).value()),
        metrics(registry, "tiny"),
        api(options.api, {.assets = *assets, .engine = engine, .metrics = metrics, .clock = clock, .fetcher = fetcher, .keys = keys}) {
    api.set_probes(std::move(options.probes));
    if (!group) stages.Pause(true);
    thread.emplace(engine, clock);
    options.http.address = "127.0.0.1";
    http = std::move(HttpServer::Start(
                         options.http, [this](const HttpRequest& r) { return api.Precheck(r); },
                         [this](HttpRequest r, std::shared_ptr<ResponseWriter> w) { api.Handle(std::move(r), std::move(w)); },
                         [this](int status) { metrics.CountResponse(status); }))
               .value();
    while (group && !engine.stats().group_ready) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  ~TestHead() {
    http = nullptr;
    thread.reset();
  }
  uint16_t port() const { return http->port(); }
  Client Connect() const { return Client(port()); }
  // Waits until nothing runs and nothing is held; false after five seconds.
  bool BecomesIdle() {
    for (int i = 0; i < 5000; ++i) {
      const auto stats = engine.stats();
      if (api.idle() && engine.idle() && stats.running == 0 && stats.waiting == 0 && stats.kv_blocks_used == 0) return true;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return false;
  }

  const SteadyClock clock;
  TinyModel model;
  std::unique_ptr<ModelAssets> assets;
  FakeStages stages;
  engine::Engine engine;
  UrlFetcher fetcher;
  ApiKeys keys;
  prometheus::Registry registry;
  Metrics metrics;
  Api api;
  std::optional<EngineThread> thread;
  std::unique_ptr<HttpServer> http;
};

inline json Chat(const std::string& text, json more = json::object()) {
  json body{{"model", "tiny"}, {"messages", {{{"role", "user"}, {"content", text}}}}};
  body.update(more);
  return body;
}

}  // namespace qwen::server
