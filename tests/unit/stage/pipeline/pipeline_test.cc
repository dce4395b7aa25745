// The head's executor and real workers over loopback, with a model of integers: tokens must equal those of an oracle that
// knows neither stages nor blocks, before and after every kind of fault; and survivors must never load again.
#include "stage/pipeline/pipeline_executor.h"

#include <gtest/gtest.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <optional>
#include <map>
#include <thread>

#include "stage/worker/worker.h"
#include "tests/unit/stage/pipeline/fake_model.h"
#include "tests/unit/stage/pipeline/proxy.h"

namespace qwen::pipeline {
namespace {

using contract::ExitCode;
using std::chrono::milliseconds;
using std::chrono::seconds;
using test::FakeControl;
using test::FakeModel;
using test::Proxy;

// Generous because machines that run tests are shared; nothing waits for it unless it fails.
constexpr auto kPatience = seconds(30);
const char* const kSecretText = "a secret of sixteen";

transport::Secret MakeSecret(const std::string& text = kSecretText) { return transport::Secret::FromBytes(text).value(); }

// One qwen-stage in a thread.
class StageThread {
 public:
  StageThread(worker::WorkerOptions options, std::shared_ptr<FakeControl> control, std::optional<Status> load_error = std::nullopt)
      : control_(std::move(control)), metrics_(registry_, options.stage, options.layers) {
    const auto loader = [control = control_, layers = options.layers, load_error](const worker::LoadProgress& progress)
        -> Result<std::unique_ptr<worker::StageCompute>> {
      if (load_error) return *load_error;
      ++control->loads;
      RETURN_IF_ERROR(progress(50, 100));
      while (control->loads_for_ever) {  // only progress can end it
        RETURN_IF_ERROR(progress(50, 100));
        std::this_thread::sleep_for(milliseconds(1));
      }
      return std::unique_ptr<worker::StageCompute>(new FakeModel(layers, 64, control));
    };
    worker_ = std::make_unique<worker::Worker>(std::move(options), loader, metrics_);
    thread_ = std::thread([this] { exit_ = worker_->Run(); });
  }
  ~StageThread() {
    control_->block = false;
    Stop();
  }
  void Stop() {
    if (!thread_.joinable()) return;
    worker_->Stop();
    thread_.join();
  }
  worker::WorkerExit Join() {
    thread_.join();
    return exit_;
  }
  worker::Worker& worker() { return *worker_; }
  std::string metrics() const { return prometheus::TextSerializer().Serialize(registry_.Collect()); }

 private:
  const std::shared_ptr<FakeControl> control_;
  prometheus::Registry registry_;
  worker::WorkerMetrics metrics_;
  std::unique_ptr<worker::Worker> worker_;
  std::thread thread_;
  worker::WorkerExit exit_;
};

class Cluster {
 public:
  explicit Cluster(int32_t stages) : stages_(stages) {
    StartHead(0);
    for (int32_t i = 0; i < stages; ++i) controls_.push_back(std::make_shared<FakeControl>());
    threads_.resize(static_cast<size_t>(stages));
  }
  ~Cluster() {
    for (auto& control : controls_) control->block = false;
    threads_.clear();
  }
  void StartHead(uint16_t port) {
    PipelineOptions options{.listen = {"127.0.0.1", port}, .secret = MakeSecret()};
    options.identity = {.pipeline_uid = "uid", .config_hash = "hash", .stages = stages_};
    options.layers = test::kLayers;
    options.limits.vocab_size = test::kVocab;
    options.heartbeat_interval = milliseconds(50);
    options.stall_timeout = stall_timeout_;
    options.plans_in_flight_max = 16;
    auto head = PipelineExecutor::Start(options);
    ASSERT_TRUE(head.ok()) << head.status().ToString();
    head_ = std::move(head).value();
  }
  worker::WorkerOptions StageOptions(int32_t stage) const {
    worker::WorkerOptions options;
    options.head = {"127.0.0.1", head_->port()};
    options.data_listen = {"127.0.0.1", 0};
    options.secret = MakeSecret();
    options.pipeline_uid = "uid";
    options.config_hash = "hash";
    options.stage = stage;
    options.stages = stages_;
    options.layers = {stage * test::kLayers / stages_, (stage + 1) * test::kLayers / stages_};
    options.heartbeat_interval = milliseconds(50);
    options.stall_timeout = stall_timeout_;
    options.step_timeout = seconds(20);
    return options;
  }
  void StartStage(int32_t stage) { StartStage(stage, StageOptions(stage)); }
  void StartStage(int32_t stage, worker::WorkerOptions options) {
    threads_[static_cast<size_t>(stage)] = std::make_unique<StageThread>(std::move(options), controls_[static_cast<size_t>(stage)]);
  }
  void StartAll() {
    for (int32_t stage = 0; stage < stages_; ++stage) StartStage(stage);
  }
  void StopStage(int32_t stage) { threads_[static_cast<size_t>(stage)].reset(); }
  void StopHead() { head_.reset(); }

  PipelineExecutor& head() { return *head_; }
  FakeControl& control(int32_t stage) { return *controls_[static_cast<size_t>(stage)]; }
  StageThread& stage(int32_t stage) { return *threads_[static_cast<size_t>(stage)]; }

  // The next event of kind T; others before it are not expected, apart from results of plans that were given up.
  template <typename T>
  std::optional<T> Next() {
    const auto deadline = std::chrono::steady_clock::now() + kPatience;
    while (std::chrono::steady_clock::now() < deadline) {
      step::ExecutorEvent event = head_->Poll(milliseconds(100));
      if (auto* found = std::get_if<T>(&event)) return *found;
      if (std::is_same_v<T, step::StepResult> && std::holds_alternative<step::GroupLost>(event)) {
        ADD_FAILURE() << "group lost: " << std::get<step::GroupLost>(event).reason;
        return std::nullopt;
      }
    }
    ADD_FAILURE() << "nothing came; waiting for " << head_->status().waiting_for;
    return std::nullopt;
  }

  const int32_t stages_;
  std::chrono::microseconds stall_timeout_ = seconds(10);

 private:
  std::unique_ptr<PipelineExecutor> head_;
  std::vector<std::shared_ptr<FakeControl>> controls_;
  std::vector<std::unique_ptr<StageThread>> threads_;
};

// A greedy generation, the way the engine drives an executor: chunks of the prompt, then a token at a time.
class Generation {
 public:
  Generation(int32_t slot, std::vector<int32_t> prompt, int32_t chunk) : slot_(slot), chunk_(chunk), tokens_(std::move(prompt)) {
    for (int32_t i = 0; i < 16; ++i) blocks_.push_back(slot * 16 + (i * 7) % 16);  // its own 16, not in order
  }
  void Image(std::shared_ptr<const step::VisionInput> image, int32_t at) {
    image_ = std::move(image);
    image_at_ = at;
  }
  void Restart() { done_ = 0; }  // a new epoch: everything again from the tokens

  void AddTo(step::StepPlan& plan) {
    if (done_ == 0) plan.starts.push_back({.sequence = id(), .slot = slot_, .params = {}, .tokens = tokens_, .prompt_tokens = 1});
    const auto count = std::min<int32_t>(chunk_, static_cast<int32_t>(tokens_.size()) - done_);
    step::SequenceSpan span{.sequence = id(), .slot = slot_, .begin = done_};
    for (int32_t i = 0; i < count; ++i) {
      span.tokens.push_back(tokens_[static_cast<size_t>(done_ + i)]);
      span.positions.push_back({done_ + i, done_ + i, done_ + i});
    }
    const int32_t end = done_ + count;
    span.blocks.assign(blocks_.begin(), blocks_.begin() + (end + test::kBlockTokens - 1) / test::kBlockTokens);
    if (image_) {
      const int32_t from = std::max(done_, image_at_), to = std::min<int32_t>(end, image_at_ + static_cast<int32_t>(image_->token_count()));
      if (from < to) span.vision.push_back({.id = image_->id, .feature_begin = from - image_at_, .span_offset = from - done_, .count = to - from});
    }
    span.sample = end == static_cast<int32_t>(tokens_.size());
    done_ = end;
    plan.spans.push_back(std::move(span));
  }
  void Take(int32_t token) {
    EXPECT_EQ(token, test::OracleNext(tokens_, image_.get(), image_at_)) << "after " << tokens_.size() << " tokens";
    tokens_.push_back(token);
  }
  step::SequenceId id() const { return static_cast<step::SequenceId>(slot_) + 100; }
  size_t size() const { return tokens_.size(); }

 private:
  const int32_t slot_;
  const int32_t chunk_;
  std::vector<int32_t> tokens_;
  std::vector<step::BlockId> blocks_;
  std::shared_ptr<const step::VisionInput> image_;
  int32_t image_at_ = 0;
  int32_t done_ = 0;  // tokens in the KV cache
};

std::vector<int32_t> Prompt(int32_t length, int32_t seed) {
  std::vector<int32_t> tokens;
  for (int32_t i = 0; i < length; ++i) tokens.push_back((i * 37 + seed * 101 + 5) % test::kVocab);
  return tokens;
}

// Each generation as its own microbatch, all in flight at once, until each has `length` tokens.
void Generate(Cluster& cluster, uint64_t epoch, uint64_t& step, std::vector<Generation*> generations, size_t length) {
  std::map<uint64_t, Generation*> in_flight;
  const auto submit = [&](Generation* generation) {
    step::StepPlan plan{.epoch = epoch, .step = step, .starts = {}, .vision_released = {}, .spans = {}};
    generation->AddTo(plan);
    const Status submitted = cluster.head().Submit(plan);
    ASSERT_TRUE(submitted.ok()) << submitted.ToString();
    in_flight[step++] = generation;
  };
  for (Generation* generation : generations) submit(generation);
  while (!in_flight.empty()) {
    const auto result = cluster.Next<step::StepResult>();
    ASSERT_TRUE(result.has_value());
    ASSERT_EQ(result->step, in_flight.begin()->first) << "results come in the order of the plans";
    Generation* generation = in_flight.begin()->second;
    in_flight.erase(in_flight.begin());
    for (const step::SampledToken& sample : result->samples) {
      EXPECT_EQ(sample.sequence, generation->id());
      generation->Take(sample.token);
    }
    if (generation->size() < length) submit(generation);
  }
}

// One plan with one span, as the next step, whichever number that is (the head refuses a wrong one without harm).
void SubmitNext(Cluster& cluster, Generation& generation) {
  step::StepPlan plan{.epoch = cluster.head().status().epoch, .step = 0, .starts = {}, .vision_released = {}, .spans = {}};
  generation.AddTo(plan);
  while (plan.step < 100 && cluster.head().Submit(plan).code() == StatusCode::kInvalidArgument) ++plan.step;
  ASSERT_LT(plan.step, 100u);
}

// A GroupReady of `epoch` or a later one, and a short generation that proves that the group works.
uint64_t ExpectServing(Cluster& cluster, uint64_t epoch_min) {
  const auto ready = cluster.Next<step::GroupReady>();
  if (!ready) return 0;
  EXPECT_GE(ready->epoch, epoch_min);
  uint64_t step = 0;
  Generation generation(0, Prompt(9, 3), 4);
  Generate(cluster, ready->epoch, step, {&generation}, 14);
  return ready->epoch;
}

class PipelineOfStages : public testing::TestWithParam<int32_t> {};
INSTANTIATE_TEST_SUITE_P(Splits, PipelineOfStages, testing::Values(1, 2, 3, 4));

TEST_P(PipelineOfStages, SaysWhatTheOracleSaysForManySequencesAtOnce) {
  Cluster cluster(GetParam());
  cluster.StartAll();
  const auto ready = cluster.Next<step::GroupReady>();
  ASSERT_TRUE(ready.has_value());
  EXPECT_EQ(ready->epoch, 1u);
  EXPECT_EQ(ready->stages, GetParam());
  EXPECT_EQ(ready->limits.block_count, 64);
  EXPECT_EQ(ready->limits.vocab_size, test::kVocab);
  Generation a(0, Prompt(17, 1), 5), b(1, Prompt(3, 2), 64), c(2, Prompt(30, 3), 64), d(3, Prompt(1, 4), 1);
  uint64_t step = 0;
  Generate(cluster, 1, step, {&a, &b, &c, &d}, 40);
  for (int32_t stage = 0; stage < GetParam(); ++stage) {
    EXPECT_EQ(static_cast<uint64_t>(cluster.control(stage).forwards.load()), step) << "every stage executes every plan";
  }
}

TEST_P(PipelineOfStages, CarriesImagesAndDeepStackAcrossEveryBoundary) {
  Cluster cluster(GetParam());
  cluster.StartAll();
  ASSERT_TRUE(cluster.Next<step::GroupReady>().has_value());
  auto image = std::make_shared<step::VisionInput>();
  image->id = 9;
  image->grid = {64, 6, 8};  // 4.7 MB: two chunks
  image->patches.resize(static_cast<size_t>(image->patch_count()) * 1536);
  for (size_t i = 0; i < image->patches.size(); ++i) image->patches[i] = static_cast<uint8_t>(i * 131 + i / 977);
  auto small = std::make_shared<step::VisionInput>();
  small->id = 10;
  small->grid = {1, 4, 6};  // 6 tokens
  small->patches.resize(static_cast<size_t>(small->patch_count()) * 1536, 200);
  ASSERT_TRUE(cluster.head().SubmitVision(image).ok());
  ASSERT_TRUE(cluster.head().SubmitVision(small).ok());
  Generation with_image(0, Prompt(20, 1), 7), text(1, Prompt(20, 2), 6);
  with_image.Image(small, 5);  // spans three chunks of the prompt
  uint64_t step = 0;
  Generate(cluster, 1, step, {&with_image, &text}, 28);
}

TEST(Pipeline, ImagesThatArriveDuringAStepAreEncodedTogetherUpToTheLimit) {
  Cluster cluster(1);
  cluster.StartAll();
  ASSERT_EQ(ExpectServing(cluster, 1), 1u);
  FakeControl& control = cluster.control(0);
  step::VisionId id = 100;
  Generation text(0, Prompt(12, 5), 64);
  // Nobody tells when all have arrived, so the step lasts longer from round to round; the model refuses more than its limit at once.
  int64_t calls = 0;
  for (int round = 0, wait_ms = 1; round < 12 && calls != 3; ++round, wait_ms *= 2) {
    control.vision_calls = 0;
    control.vision_inputs = 0;
    control.block = true;
    SubmitNext(cluster, text);
    while (!control.blocked) std::this_thread::sleep_for(milliseconds(1));
    for (int i = 0; i < 5; ++i) {
      auto image = std::make_shared<step::VisionInput>();
      image->id = id++;
      image->grid = {1, 4, 6};  // two of 24 patches fit into 64, three do not
      image->patches.resize(static_cast<size_t>(image->patch_count()) * 1536, 7);
      ASSERT_TRUE(cluster.head().SubmitVision(image).ok());
    }
    std::this_thread::sleep_for(milliseconds(wait_ms));
    control.block = false;
    const auto result = cluster.Next<step::StepResult>();
    ASSERT_TRUE(result.has_value());
    for (const step::SampledToken& sample : result->samples) text.Take(sample.token);
    for (int i = 0; i < 5000 && control.vision_inputs < 5; ++i) std::this_thread::sleep_for(milliseconds(1));
    ASSERT_EQ(control.vision_inputs, 5);
    calls = control.vision_calls;
  }
  EXPECT_EQ(calls, 3) << "2 + 2 + 1";
}

TEST(Pipeline, AStageThatDiesInTheMiddleOfAStepIsReplacedAndTheOthersKeepTheirWeights) {
  Cluster cluster(3);
  cluster.StartAll();
  ASSERT_EQ(ExpectServing(cluster, 1), 1u);
  cluster.control(1).block = true;
  Generation live(0, Prompt(12, 5), 64);
  SubmitNext(cluster, live);
  while (!cluster.control(1).blocked) std::this_thread::sleep_for(milliseconds(1));
  std::thread unblock([&] {  // the thread can only be joined once its compute returns; its connections go first
    std::this_thread::sleep_for(milliseconds(200));
    cluster.control(1).block = false;
  });
  cluster.stage(1).worker().Stop();
  const auto lost = cluster.Next<step::GroupLost>();
  ASSERT_TRUE(lost.has_value());
  EXPECT_EQ(lost->epoch, 1u);
  // Stage 1's own goodbye, or a neighbour's edge that saw it go a moment earlier.
  const std::string& reason = lost->reason;
  const bool told = reason.starts_with("stage 1 lost: ");
  const bool seen = (reason.starts_with("stage 0: ") || reason.starts_with("stage 2: ")) && reason.find("edge ") != std::string::npos;
  EXPECT_TRUE(told || seen) << reason;
  EXPECT_EQ(cluster.head().Submit({}).code(), StatusCode::kUnavailable);
  const auto waits = [&] { return cluster.head().status().waiting_for.find("stage 1 (not connected)") != std::string::npos; };
  for (int i = 0; i < 5000 && !waits(); ++i) std::this_thread::sleep_for(milliseconds(1));  // its own goodbye may come second
  EXPECT_TRUE(waits()) << cluster.head().status().waiting_for;
  unblock.join();
  cluster.StopStage(1);
  cluster.StartStage(1);
  EXPECT_EQ(ExpectServing(cluster, 2), 2u);
  EXPECT_EQ(cluster.control(0).loads, 1);
  EXPECT_EQ(cluster.control(1).loads, 2);
  EXPECT_EQ(cluster.control(2).loads, 1);
}

TEST(Pipeline, ACutControlConnectionCostsAnEpochAndNoWeights) {
  Cluster cluster(2);
  Proxy proxy(cluster.head().port());
  cluster.StartStage(0);
  auto options = cluster.StageOptions(1);
  options.head.port = proxy.port();
  cluster.StartStage(1, options);
  ASSERT_EQ(ExpectServing(cluster, 1), 1u);
  for (uint64_t round = 0; round < 3; ++round) {
    proxy.Cut();
    ASSERT_TRUE(cluster.Next<step::GroupLost>().has_value());
    EXPECT_EQ(ExpectServing(cluster, round + 2), round + 2);
  }
  EXPECT_EQ(cluster.control(0).loads, 1);
  EXPECT_EQ(cluster.control(1).loads, 1);
}

TEST(Pipeline, AHalfOpenConnectionIsNoticedByBothEnds) {
  Cluster cluster(2);
  cluster.StopHead();
  cluster.stall_timeout_ = milliseconds(600);
  cluster.StartHead(0);
  Proxy proxy(cluster.head().port());
  cluster.StartStage(0);
  auto options = cluster.StageOptions(1);
  options.head.port = proxy.port();
  cluster.StartStage(1, options);
  ASSERT_GE(ExpectServing(cluster, 1), 1u);
  const auto start = std::chrono::steady_clock::now();
  proxy.Freeze(true);
  const auto lost = cluster.Next<step::GroupLost>();
  ASSERT_TRUE(lost.has_value());
  EXPECT_NE(lost->reason.find("silent"), std::string::npos) << lost->reason;
  EXPECT_LT(std::chrono::steady_clock::now() - start, seconds(5));
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  while (cluster.stage(1).worker().health().connected && std::chrono::steady_clock::now() < deadline) std::this_thread::sleep_for(milliseconds(5));
  EXPECT_FALSE(cluster.stage(1).worker().health().connected);
  proxy.Freeze(false);
  EXPECT_GE(ExpectServing(cluster, 2), 2u);
  EXPECT_EQ(cluster.control(1).loads, 1);
}

TEST(Pipeline, ADamagedFrameInEitherDirectionClosesAndTheGroupComesBack) {
  Cluster cluster(2);
  Proxy proxy(cluster.head().port());
  cluster.StartStage(0);
  auto options = cluster.StageOptions(1);
  options.head.port = proxy.port();
  cluster.StartStage(1, options);
  uint64_t epoch = ExpectServing(cluster, 1);
  proxy.DamageNextToHead();
  auto lost = cluster.Next<step::GroupLost>();
  ASSERT_TRUE(lost.has_value());
  EXPECT_NE(lost->reason.find("frame: "), std::string::npos) << lost->reason;
  epoch = ExpectServing(cluster, epoch + 1);
  proxy.DamageNextToStage();
  ASSERT_TRUE(cluster.Next<step::GroupLost>().has_value());
  EXPECT_GE(ExpectServing(cluster, epoch + 1), epoch + 1);
  EXPECT_EQ(cluster.control(1).loads, 1);
}

TEST(Pipeline, ANewHeadFindsTheStagesWithTheirWeightsAndAHigherEpoch) {
  Cluster cluster(2);
  cluster.StartAll();
  ASSERT_EQ(ExpectServing(cluster, 1), 1u);
  const uint16_t port = cluster.head().port();
  cluster.StopHead();
  cluster.StartHead(port);
  EXPECT_EQ(ExpectServing(cluster, 2), 2u);
  EXPECT_EQ(cluster.control(0).loads, 1);
  EXPECT_EQ(cluster.control(1).loads, 1);
}

TEST(Pipeline, AComputeErrorCostsTheEpochOnly) {
  Cluster cluster(2);
  cluster.StartAll();
  ASSERT_EQ(ExpectServing(cluster, 1), 1u);
  cluster.control(0).fail_next = 1;
  Generation generation(0, Prompt(4, 1), 64);
  SubmitNext(cluster, generation);
  ASSERT_TRUE(cluster.Next<step::GroupLost>().has_value());
  EXPECT_EQ(ExpectServing(cluster, 2), 2u);
  EXPECT_EQ(cluster.head().status().stages[0].last_error, "InvalidArgument: step 7: told to fail");
  EXPECT_EQ(cluster.control(0).loads, 1);
}

TEST(Pipeline, ASlowStageHoldsTheOthersBackAndTheHeadSaysFull) {
  Cluster cluster(3);
  cluster.StartAll();
  const auto ready = cluster.Next<step::GroupReady>();
  ASSERT_TRUE(ready.has_value());
  cluster.control(2).delay_micros = 20'000;
  std::vector<Generation> generations;
  for (int32_t i = 0; i < 4; ++i) generations.emplace_back(i, Prompt(60, i), 60);
  uint64_t submitted = 0;
  Status last;
  while (last.ok()) {
    ASSERT_LT(submitted, 100u);
    Generation& generation = generations[submitted % generations.size()];
    generation.Restart();
    step::StepPlan plan{.epoch = 1, .step = submitted, .starts = {}, .vision_released = {}, .spans = {}};
    generation.AddTo(plan);
    last = cluster.head().Submit(plan);
    submitted += last.ok();
  }
  EXPECT_EQ(last.code(), StatusCode::kResourceExhausted);
  EXPECT_LE(cluster.head().status().plans_in_flight, 16);
  for (uint64_t i = 0; i < submitted; ++i) {
    const auto result = cluster.Next<step::StepResult>();
    ASSERT_TRUE(result.has_value());
    EXPECT_EQ(result->step, i);
    EXPECT_EQ(result->samples[0].token, test::OracleNext(Prompt(60, static_cast<int32_t>(i % 4))));
  }
}

TEST(Pipeline, AStageWhoseComputeHangsGivesItselfUp) {
  Cluster cluster(2);
  cluster.StartStage(0);
  auto options = cluster.StageOptions(1);
  options.step_timeout = milliseconds(300);
  std::atomic<bool> hung{false};
  options.on_hung = [&] { hung = true; };
  cluster.StartStage(1, options);
  ASSERT_EQ(ExpectServing(cluster, 1), 1u);
  cluster.control(1).block = true;
  Generation generation(0, Prompt(4, 1), 64);
  SubmitNext(cluster, generation);
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  while (!hung && std::chrono::steady_clock::now() < deadline) std::this_thread::sleep_for(milliseconds(5));
  EXPECT_TRUE(hung);
  EXPECT_TRUE(cluster.stage(1).worker().health().overdue);
}

TEST(Pipeline, AWaitForANeighbourThatHangsEndsTheEpochButNotTheStage) {
  Cluster cluster(2);
  cluster.StartStage(0);
  auto options = cluster.StageOptions(1);
  options.step_timeout = milliseconds(400);
  cluster.StartStage(1, options);
  ASSERT_EQ(ExpectServing(cluster, 1), 1u);
  cluster.control(0).block = true;  // stage 0 computes for ever; its own limit is 20 s here
  Generation generation(0, Prompt(4, 1), 64);
  SubmitNext(cluster, generation);
  const auto lost = cluster.Next<step::GroupLost>();
  ASSERT_TRUE(lost.has_value());
  EXPECT_NE(lost->reason.find("no progress while receiving"), std::string::npos) << lost->reason;
  cluster.control(0).block = false;
  EXPECT_GE(ExpectServing(cluster, 2), 2u);
  EXPECT_EQ(cluster.control(1).loads, 1);
}

TEST(Pipeline, AWrongSecretOrAnotherModelIsRefusedAndTheProcessEnds) {
  Cluster cluster(2);
  auto wrong_secret = cluster.StageOptions(0);
  wrong_secret.secret = MakeSecret("another secret of sixteen");
  cluster.StartStage(0, wrong_secret);
  EXPECT_EQ(cluster.stage(0).Join().code, ExitCode::kAuth);
  auto wrong_model = cluster.StageOptions(1);
  wrong_model.config_hash = "other";
  cluster.StartStage(1, wrong_model);
  const worker::WorkerExit exit = cluster.stage(1).Join();
  EXPECT_EQ(exit.code, ExitCode::kProtocol);
  EXPECT_NE(exit.status.message().find("not the same model"), std::string::npos) << exit.status.message();
  cluster.StartAll();  // the right ones are welcome
  EXPECT_EQ(ExpectServing(cluster, 1), 1u);
}

TEST(Pipeline, ASecondProcessOfTheSameIndexWaitsAndAnOlderPodIsSentAway) {
  Cluster cluster(1);
  auto options = cluster.StageOptions(0);
  options.pod_epoch = 5;
  cluster.StartStage(0, options);
  ASSERT_GE(ExpectServing(cluster, 6), 6u);
  StageThread twin(options, std::make_shared<FakeControl>());
  auto old = options;
  old.pod_epoch = 4;
  StageThread stale(old, std::make_shared<FakeControl>());
  EXPECT_EQ(stale.Join().code, ExitCode::kProtocol);
  EXPECT_FALSE(twin.worker().health().connected);
  EXPECT_TRUE(cluster.head().status().ready);
  cluster.StopStage(0);  // now the twin gets its turn
  ASSERT_TRUE(cluster.Next<step::GroupLost>().has_value());
  EXPECT_GE(ExpectServing(cluster, 7), 7u);
}

TEST(Pipeline, ACheckpointThatDoesNotLoadEndsTheProcessAndTheHeadIsTold) {
  Cluster cluster(1);
  StageThread broken(cluster.StageOptions(0), std::make_shared<FakeControl>(), DataLossError("tensor model.norm.weight: expected [8], found [7]"));
  const worker::WorkerExit exit = broken.Join();
  EXPECT_EQ(exit.code, ExitCode::kBadCheckpoint);
  EXPECT_EQ(exit.status.message(), "tensor model.norm.weight: expected [8], found [7]");
  StageThread large(cluster.StageOptions(0), std::make_shared<FakeControl>(), ResourceExhaustedError("too large"));
  EXPECT_EQ(large.Join().code, ExitCode::kDoesNotFit);
}

TEST(Pipeline, AStageToldToStopInTheMiddleOfLoadingStopsLoading) {
  Cluster cluster(1);
  const auto control = std::make_shared<FakeControl>();
  control->loads_for_ever = true;
  StageThread stage(cluster.StageOptions(0), control);
  while (control->loads == 0) std::this_thread::sleep_for(milliseconds(1));
  stage.worker().Stop();
  EXPECT_EQ(stage.Join().code, ExitCode::kOk);  // would not return otherwise
}

TEST(Pipeline, ShutdownEndsEveryStageWithZero) {
  Cluster cluster(3);
  cluster.StartAll();
  ASSERT_EQ(ExpectServing(cluster, 1), 1u);
  cluster.head().Shutdown(seconds(10));
  for (int32_t stage = 0; stage < 3; ++stage) EXPECT_EQ(cluster.stage(stage).Join().code, ExitCode::kOk);
  EXPECT_EQ(cluster.head().Submit({}).code(), StatusCode::kUnavailable);
}

TEST(Pipeline, AStageWithoutAHeadGivesUpWhenToldTo) {
  Cluster cluster(1);
  auto options = cluster.StageOptions(0);
  options.head_timeout = milliseconds(200);
  cluster.StopHead();
  cluster.StartStage(0, options);
  EXPECT_EQ(cluster.stage(0).Join().code, ExitCode::kHeadUnreachable);
}

TEST(Pipeline, StatusAndMetricsTellWhatHappened) {
  Cluster cluster(2);
  EXPECT_EQ(cluster.head().status().waiting_for, "stage 0 (not connected), stage 1 (not connected)");
  cluster.StartAll();
  ASSERT_EQ(ExpectServing(cluster, 1), 1u);
  const PipelineStatus status = cluster.head().status();
  EXPECT_TRUE(status.ready);
  EXPECT_EQ(status.waiting_for, "");
  ASSERT_EQ(status.stages.size(), 2u);
  EXPECT_EQ(status.stages[1].layer_begin, 2);
  EXPECT_EQ(status.stages[1].layer_end, 4);
  EXPECT_EQ(status.stages[1].weight_bytes, 1002);
  EXPECT_EQ(status.stages[1].kv_blocks, 64);
  EXPECT_TRUE(status.stages[1].loaded);
  EXPECT_LT(status.stages[1].seconds_since_heard, 30.0);
  const std::string metrics = cluster.stage(1).metrics();
  for (const char* line : {"qwen_stage_layers{begin=\"2\",end=\"4\",stage=\"1\"} 1", "qwen_stage_weight_bytes{stage=\"1\"} 1002",
                           "qwen_stage_load_progress{stage=\"1\"} 1", "qwen_stage_kv_blocks{stage=\"1\",state=\"total\"} 64",
                           "qwen_stage_epoch{stage=\"1\"} 1", "qwen_stage_steps_total{stage=\"1\"} 7",
                           "qwen_stage_step_seconds_count{phase=\"decode\",stage=\"1\"} 5",
                           "qwen_stage_step_seconds_count{phase=\"prefill\",stage=\"1\"} 2",
                           "qwen_stage_transfer_bytes_total{direction=\"receive\",stage=\"1\"} 104"}) {
    EXPECT_NE(metrics.find(line), std::string::npos) << line << "\n" << metrics;
  }
}

}  // namespace
}  // namespace qwen::pipeline
