// Goal: what a reader hands on is what lies in the files, byte by byte, however requests are cut, however they are read, and
// wherever in a file a tensor happens to lie; what goes wrong is said with file, tensor and offset, and nothing hangs.
#include "stage/weights/reader.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <set>
#include <thread>

#include "stage/weights/checkpoint.h"
#include "stage/weights/read_queue.h"

namespace qwen::weights {
namespace {

namespace fs = std::filesystem;
using Cache = ReadPartsOptions::Cache;
using Io = ReadPartsOptions::Io;

// A dense model of one layer whose tensors are some hundred KB of odd sizes.
contract::ModelShape OddShape() {
  contract::ModelShape s;
  s.model_type = "qwen3";
  s.layers = 1, s.hidden = 37, s.heads = 3, s.kv_heads = 1, s.head_dim = 14, s.intermediate = 1013, s.vocab = 4999;
  return s;
}
std::map<std::string, std::vector<int64_t>> OddTensors() {
  const std::string p = "model.layers.0.";
  return {{"model.embed_tokens.weight", {4999, 37}}, {"lm_head.weight", {4999, 37}}, {"model.norm.weight", {37}},
          {p + "input_layernorm.weight", {37}}, {p + "post_attention_layernorm.weight", {37}}, {p + "self_attn.q_proj.weight", {42, 37}},
          {p + "self_attn.k_proj.weight", {14, 37}}, {p + "self_attn.v_proj.weight", {14, 37}}, {p + "self_attn.o_proj.weight", {37, 42}},
          {p + "self_attn.q_norm.weight", {14}}, {p + "self_attn.k_norm.weight", {14}}, {p + "mlp.gate_proj.weight", {1013, 37}},
          {p + "mlp.up_proj.weight", {1013, 37}}, {p + "mlp.down_proj.weight", {37, 1013}}};
}

class ReaderTest : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = ::testing::TempDir() + "/reader_" + ::testing::UnitTest::GetInstance()->current_test_info()->name();
    fs::remove_all(dir_);
    fs::create_directories(dir_);
  }
  void TearDown() override { fs::remove_all(dir_); }

  // Writes the tensors in random order into `files` files, the data behind headers of random, odd lengths.
  void Write(std::mt19937& chance, int files) {
    std::vector<std::string> keys;
    for (const auto& [key, shape] : OddTensors()) keys.push_back(key);
    std::shuffle(keys.begin(), keys.end(), chance);
    std::string index;
    for (int f = 0; f < files; ++f) {
      const std::string name = "model-" + std::to_string(f) + ".safetensors";
      std::string header = "{", data;
      for (size_t k = static_cast<size_t>(f); k < keys.size(); k += static_cast<size_t>(files)) {
        const std::vector<int64_t> shape = OddTensors()[keys[k]];
        int64_t bytes = 2;
        for (const int64_t size : shape) bytes *= size;
        std::string content(static_cast<size_t>(bytes), '\0');
        for (char& c : content) c = static_cast<char>(chance());
        header += (header.size() > 1 ? ",\"" : "\"") + keys[k] + "\":{\"dtype\":\"BF16\",\"shape\":" + ShapeToString(shape) + ",\"data_offsets\":[" +
                  std::to_string(data.size()) + "," + std::to_string(data.size() + content.size()) + "]}";
        data += content;
        content_[keys[k]] = content;
        index += (index.empty() ? "\"" : ",\"") + keys[k] + "\":\"" + name + "\"";
      }
      header += "}" + std::string(chance() % 4099, ' ');
      std::string length(8, '\0');
      for (int i = 0; i < 8; ++i) length[static_cast<size_t>(i)] = static_cast<char>((header.size() >> (8 * i)) & 0xff);
      std::ofstream(dir_ + "/" + name, std::ios::binary) << length << header << data;
    }
    std::ofstream(dir_ + "/model.safetensors.index.json") << "{\"weight_map\":{" << index << "}}";
    auto opened = Checkpoint::Open(dir_);
    ASSERT_TRUE(opened.ok()) << opened.status().ToString();
    checkpoint_.emplace(std::move(opened).value());
    auto found = checkpoint_->ResolveStage(OddShape(), {.layers = {0, 1}});
    ASSERT_TRUE(found.ok() && found->report.ok()) << found.status().ToString() << found->report.ToStatus().ToString();
    tensors_ = std::move(found).value();
  }

  std::string dir_;
  std::map<std::string, std::string> content_;  // by key, as written
  std::optional<Checkpoint> checkpoint_;
  StageTensors tensors_;
};

// Keeps every byte, and counts how often each came.
class Keeper final : public ReadSink {
 public:
  // `straight`: which entries have memory of their own.
  Keeper(const StageTensors& tensors, std::vector<bool> straight) : straight_(std::move(straight)) {
    for (const Entry& entry : tensors.entries) {
      bytes.emplace_back(static_cast<size_t>(entry.bytes), '\x5a');
      taken.push_back(std::make_unique<std::atomic<int64_t>>(0));
    }
  }
  std::byte* Destination(const ReadPart& part) override {
    const auto e = static_cast<size_t>(part.entry);
    return straight_[e] ? reinterpret_cast<std::byte*>(bytes[e].data()) + part.entry_offset : nullptr;
  }
  Status Take(const ReadPart& part, std::span<const std::byte> got, int32_t buffer) override {
    EXPECT_EQ(static_cast<int64_t>(got.size()), part.bytes);
    std::memcpy(bytes[static_cast<size_t>(part.entry)].data() + part.entry_offset, got.data(), got.size());
    *taken[static_cast<size_t>(part.entry)] += part.bytes;
    std::lock_guard<std::mutex> lock(mutex_);
    busy_.insert(buffer);
    return refuse;
  }
  Status Settle(int32_t buffer) override {
    std::lock_guard<std::mutex> lock(mutex_);
    busy_.erase(buffer);
    return OkStatus();
  }
  Result<std::byte*> Ring(size_t size) override {
    if (!ring_status.ok()) return ring_status;
    ring_.reset(static_cast<std::byte*>(std::aligned_alloc(kRingAlignment, size)));
    return ring_.get();
  }
  std::vector<std::string> bytes;  // by entry
  std::vector<std::unique_ptr<std::atomic<int64_t>>> taken;
  Status refuse, ring_status;

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  const std::vector<bool> straight_;
  std::unique_ptr<std::byte, Free> ring_;
  std::mutex mutex_;
  std::set<int32_t> busy_;
};

// Whether the file system of `path` reads with O_DIRECT: asked of the kernel, not of the code under test.
bool ReadsDirect(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_DIRECT);
  if (fd < 0) return false;
  void* memory = std::aligned_alloc(4096, 4096);
  const bool works = ::pread(fd, memory, 4096, 0) > 0;
  std::free(memory);
  ::close(fd);
  return works;
}

TEST_F(ReaderTest, APlanCoversEveryByteOnceInFileOrderAndCutsAtWholeRows) {
  std::mt19937 chance(1);
  Write(chance, 3);
  for (const int64_t size : {1, 100, 5000, 70'000, 1 << 20}) {
    const auto row_bytes = [](const Entry& entry) { return entry.slot == "norm.weight" ? 0 : entry.stored_shape.back() * 2; };
    const ReadPlan plan = PlanReads(tensors_, {.request_bytes = size, .row_bytes = row_bytes});
    std::vector<std::string> seen;
    for (const Entry& entry : tensors_.entries) seen.emplace_back(static_cast<size_t>(entry.bytes), '\0');
    int64_t total = 0;
    for (size_t r = 0; r < plan.requests.size(); ++r) {
      const ReadRequest& request = plan.requests[r];
      if (r > 0 && plan.requests[r - 1].file == request.file) {
        EXPECT_LE(plan.requests[r - 1].offset + plan.requests[r - 1].bytes, request.offset);
      } else if (r > 0) {
        EXPECT_LT(plan.requests[r - 1].file, request.file);
      }
      int64_t at = request.offset;
      for (const ReadPart& part : request.parts) {
        const Entry& entry = tensors_.entries[static_cast<size_t>(part.entry)];
        const Piece& piece = entry.pieces[static_cast<size_t>(part.piece)];
        EXPECT_EQ(piece.file, plan.files[static_cast<size_t>(request.file)]);
        EXPECT_EQ(piece.offset + part.entry_offset, at);  // one piece an entry here
        EXPECT_EQ(part.entry_offset % row_bytes(entry), 0);
        EXPECT_EQ(part.bytes % row_bytes(entry), 0);
        for (int64_t b = 0; b < part.bytes; ++b) ++seen[static_cast<size_t>(part.entry)][static_cast<size_t>(part.entry_offset + b)];
        at += part.bytes;
      }
      EXPECT_EQ(at, request.offset + request.bytes);
      EXPECT_TRUE(request.bytes <= size || request.parts.size() == 1u);
      total += request.bytes;
    }
    EXPECT_EQ(total, plan.bytes);
    for (size_t e = 0; e < seen.size(); ++e) {
      const char times = tensors_.entries[e].slot == "norm.weight" ? 0 : 1;
      EXPECT_EQ(seen[e], std::string(seen[e].size(), times)) << tensors_.entries[e].slot << " at " << size;
    }
  }
  // In large requests neighbours share one.
  EXPECT_EQ(PlanReads(tensors_, {.request_bytes = 1 << 20}).requests.size(), 3u);
}

TEST_F(ReaderTest, BytesEqualThoseOfTheFilesForRandomPlansAndEveryWayOfReading) {
  const uint32_t seed = std::random_device()();
  RecordProperty("seed", std::to_string(seed));
  std::mt19937 chance(seed);
  for (int round = 0; round < 60; ++round) {
    SCOPED_TRACE("seed " + std::to_string(seed) + " round " + std::to_string(round));
    if (round % 10 == 0) Write(chance, 1 + static_cast<int>(chance() % 3));
    const ReadPlan plan = PlanReads(tensors_, {.request_bytes = 1 + static_cast<int64_t>(chance() % 200'000)});
    std::vector<bool> straight;
    for (size_t e = 0; e < tensors_.entries.size(); ++e) straight.push_back(round % 3 == 0 || (round % 3 == 1 && chance() % 2 == 0));
    Keeper keeper(tensors_, straight);
    int64_t last = 0;
    ReadPartsOptions options{.lanes = 1 + static_cast<int32_t>(chance() % 5), .depth = 1 + static_cast<int32_t>(chance() % 6)};
    options.cache = std::array{Cache::kAuto, Cache::kBuffered, Cache::kDirect}[chance() % 3];
    options.io = std::array{Io::kAuto, Io::kThreads, Io::kUring}[chance() % 3];
    options.progress = [&](int64_t done) {
      EXPECT_GT(done, last);
      last = done;
      return OkStatus();
    };
    const Result<ReadStats> stats = ReadAllParts(*checkpoint_, tensors_, plan, keeper, options);
    ASSERT_TRUE(stats.ok()) << stats.status().ToString();
    EXPECT_EQ(stats->bytes, plan.bytes);
    EXPECT_EQ(last, plan.bytes);
    EXPECT_LE(stats->ring_bytes, ReadRingBytes(plan, options));
    EXPECT_EQ(stats->direct_bytes, options.cache == Cache::kDirect && ReadsDirect(dir_ + "/model-0.safetensors") ? plan.bytes : 0);
    for (size_t e = 0; e < tensors_.entries.size(); ++e) {
      const Entry& entry = tensors_.entries[e];
      EXPECT_TRUE(keeper.bytes[e] == content_[entry.pieces[0].key]) << entry.slot;
      EXPECT_EQ(*keeper.taken[e], straight[e] ? 0 : entry.bytes) << entry.slot;
    }
  }
}

TEST_F(ReaderTest, AKernelThatRefusesIoUringIsReadWithThreads) {
  std::mt19937 chance(2);
  Write(chance, 1);
  const ReadPlan plan = PlanReads(tensors_, {.request_bytes = 10'000});
  Keeper keeper(tensors_, std::vector<bool>(tensors_.entries.size(), false));
  // A filter as containers have it, for one thread and those that it starts.
  std::thread([&] {
    sock_filter filter[] = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_io_uring_setup, 0, 1),
                            BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
    sock_fprog program{.len = 4, .filter = filter};
    ASSERT_EQ(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
    ASSERT_EQ(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program), 0);
    EXPECT_EQ(MakeUringQueue(4), nullptr);
    const auto stats = ReadAllParts(*checkpoint_, tensors_, plan, keeper, {.io = Io::kUring});
    ASSERT_TRUE(stats.ok()) << stats.status().ToString();
    EXPECT_EQ(stats->uring_lanes, 0);
  }).join();
  for (size_t e = 0; e < tensors_.entries.size(); ++e) EXPECT_TRUE(keeper.bytes[e] == content_[tensors_.entries[e].pieces[0].key]);
}

TEST_F(ReaderTest, AFileThatBecameShorterIsNamedWithTensorAndOffset) {
  std::mt19937 chance(3);
  for (const Cache cache : {Cache::kBuffered, Cache::kDirect}) {
    for (const Io io : {Io::kThreads, Io::kUring}) {
      Write(chance, 1);
      const std::string path = dir_ + "/model-0.safetensors";
      const Entry* last = nullptr;  // in the file
      for (const Entry& entry : tensors_.entries)
        if (last == nullptr || entry.pieces[0].offset > last->pieces[0].offset) last = &entry;
      const ReadPlan plan = PlanReads(tensors_, {.request_bytes = 10'000});
      Keeper keeper(tensors_, std::vector<bool>(tensors_.entries.size(), false));
      ReadPartsOptions options{.lanes = 1, .cache = cache, .io = io};
      // Cut while it is being read: what was there at the start is not there at the end.
      const int64_t end = last->pieces[0].offset + last->bytes / 2;
      bool cut = false;
      options.progress = [&](int64_t) {
        if (!std::exchange(cut, true)) fs::resize_file(path, static_cast<uintmax_t>(end));
        return OkStatus();
      };
      const auto stats = ReadAllParts(*checkpoint_, tensors_, plan, keeper, options);
      ASSERT_FALSE(stats.ok());
      EXPECT_EQ(stats.status().code(), StatusCode::kDataLoss);
      const std::string message = stats.status().message();
      EXPECT_NE(message.find(path), std::string::npos) << message;
      EXPECT_NE(message.find(last->pieces[0].key + " at offset "), std::string::npos) << message;
      EXPECT_NE(message.find("ends at byte " + std::to_string(end)), std::string::npos) << message;
      // Cut before the first read: seen before any.
      const auto again = ReadAllParts(*checkpoint_, tensors_, plan, keeper, {.cache = cache, .io = io});
      EXPECT_EQ(again.status().code(), StatusCode::kDataLoss);
      EXPECT_NE(again.status().message().find("changed"), std::string::npos) << again.status().ToString();
    }
  }
}

TEST_F(ReaderTest, AFileThatWasWrittenToWhileItWasReadIsRefused) {
  std::mt19937 chance(4);
  Write(chance, 2);
  const ReadPlan plan = PlanReads(tensors_, {});
  Keeper keeper(tensors_, std::vector<bool>(tensors_.entries.size(), true));
  ReadPartsOptions options;
  options.progress = [&](int64_t) {
    std::fstream file(dir_ + "/model-1.safetensors", std::ios::binary | std::ios::in | std::ios::out);
    file.seekp(-1, std::ios::end);
    file.put('x');
    return OkStatus();
  };
  const auto stats = ReadAllParts(*checkpoint_, tensors_, plan, keeper, options);
  EXPECT_EQ(stats.status().code(), StatusCode::kDataLoss);
  EXPECT_NE(stats.status().message().find("model-1.safetensors: changed while it was read"), std::string::npos) << stats.status().ToString();
}

TEST_F(ReaderTest, AnErrorOfTheDiskIsNamedWithFileTensorAndOffset) {
  std::mt19937 chance(5);
  Write(chance, 2);
  const ReadPlan plan = PlanReads(tensors_, {.request_bytes = 4000});
  const ReadRequest& bad = plan.requests[plan.requests.size() / 2];
  const std::string path = dir_ + "/" + plan.files[static_cast<size_t>(bad.file)];
  for (const Cache cache : {Cache::kBuffered, Cache::kDirect}) {
    for (const Io io : {Io::kThreads, Io::kUring}) {
      for (const bool straight : {false, true}) {
        Keeper keeper(tensors_, std::vector<bool>(tensors_.entries.size(), straight));
        ReadPartsOptions options{.cache = cache, .io = io};
        options.fault = [&](const std::string& file, int64_t offset) { return file == path && offset == bad.offset ? EIO : 0; };
        const auto stats = ReadAllParts(*checkpoint_, tensors_, plan, keeper, options);
        ASSERT_FALSE(stats.ok());
        EXPECT_EQ(stats.status().code(), StatusCode::kUnavailable);
        const std::string key = tensors_.entries[static_cast<size_t>(bad.parts[0].entry)].pieces[0].key;
        EXPECT_EQ(stats.status().message(), path + ": tensor " + key + " at offset " + std::to_string(bad.offset) + ": Input/output error");
      }
    }
  }
}

TEST_F(ReaderTest, ADirectReadThatTheFileSystemRefusesGoesThroughTheCache) {
  std::mt19937 chance(6);
  Write(chance, 1);
  if (!ReadsDirect(dir_ + "/model-0.safetensors")) return;  // nothing to refuse: BytesEqual... has gone that way already
  const ReadPlan plan = PlanReads(tensors_, {.request_bytes = 30'000});
  for (const Io io : {Io::kThreads, Io::kUring}) {
    Keeper keeper(tensors_, std::vector<bool>(tensors_.entries.size(), false));
    ReadPartsOptions options{.cache = Cache::kDirect, .io = io};
    std::atomic<int> refused{0};
    options.fault = [&](const std::string&, int64_t offset) { return offset == plan.requests[2].offset && refused++ == 0 ? EINVAL : 0; };
    const auto stats = ReadAllParts(*checkpoint_, tensors_, plan, keeper, options);
    ASSERT_TRUE(stats.ok()) << stats.status().ToString();
    EXPECT_LT(stats->direct_bytes, plan.bytes);
    for (size_t e = 0; e < tensors_.entries.size(); ++e) EXPECT_TRUE(keeper.bytes[e] == content_[tensors_.entries[e].pieces[0].key]);
  }
}

TEST_F(ReaderTest, ErrorsOfTheSinkAndOfProgressEndTheReadingAtOnce) {
  std::mt19937 chance(7);
  Write(chance, 1);
  const ReadPlan plan = PlanReads(tensors_, {.request_bytes = 1000});
  const std::vector<bool> none(tensors_.entries.size(), false);
  for (const Io io : {Io::kThreads, Io::kUring}) {
    Keeper refusing(tensors_, none);
    refusing.refuse = ResourceExhaustedError("no memory on the device");
    EXPECT_EQ(ReadAllParts(*checkpoint_, tensors_, plan, refusing, {.io = io}).status().message(), "no memory on the device");
    Keeper no_ring(tensors_, none);
    no_ring.ring_status = ResourceExhaustedError("no pinned memory");
    EXPECT_EQ(ReadAllParts(*checkpoint_, tensors_, plan, no_ring, {.io = io}).status().message(), "no pinned memory");

    Keeper keeper(tensors_, none);
    int64_t calls = 0, done_at_stop = 0;
    ReadPartsOptions options{.lanes = 2, .depth = 3, .io = io};
    options.progress = [&](int64_t done) {
      if (++calls < 5) return OkStatus();
      done_at_stop = done;
      return CancelledError("told to stop");
    };
    EXPECT_EQ(ReadAllParts(*checkpoint_, tensors_, plan, keeper, options).status().code(), StatusCode::kCancelled);
    EXPECT_EQ(calls, 5);
    int64_t taken = 0;
    for (const auto& count : keeper.taken) taken += *count;
    EXPECT_LE(taken - done_at_stop, 2 * 1000 + 2 * 37 * 2);  // what the other lane had in its hands
  }
}

}  // namespace
}  // namespace qwen::weights
