// stage_gpu: a stage on a GPU, in one process, with generated weights. Five jobs:
//   stage_gpu check [fp8] [NAME]  the fused backend against the reference backend on the same GPU: logits of prompts, chunks and mixed
//                          plans, and greedy continuations; exit code 1 when a difference is no near-tie. With fp8: weights that
//                          stay block FP8 against the reference on the same weights multiplied out
//   stage_gpu profile SHAPE  one step of two layers for each of a few batches, between cudaProfilerStart and Stop (for ncu)
//   stage_gpu bench SHAPE  prefill and decode of a whole model of that shape on one GPU, or of layers A:B of it; a SHAPE that ends in
//                          -FP8 keeps its weights in FP8 (profile takes such shapes too)
//   stage_gpu sampler [check|bench] sampling on the device against the host's pipeline (a part of `check` too), then the time of both
//   stage_gpu vision [check|bench]  the fused vision tower against the reference, then the time of both (vision_gpu.h); both without a word
// JSON rows on stdout ({suite, case, unit, ours}), words on stderr.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/core/InferenceMode.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "stage/base/check.h"
#include "stage/contract/model_shape.h"
#include "stage/model/stage_model.h"
#include "stage/ops/row_sampler.h"
#include "stage/sampling/sampler.h"
#include "stage/weights/fp8.h"
#include "stage/weights/loader.h"
#include "tests/gpu/sampler_gpu.h"
#include "tests/gpu/vision_gpu.h"

extern "C" cudaError_t cudaProfilerStart();  // of libcudart; the wheels have no cuda_profiler_api.h
extern "C" cudaError_t cudaProfilerStop();
extern "C" const qwen::model::StageBackendFactory* qwen_fused_backend();
extern "C" const qwen::ops::RowSamplerFactory* qwen_fused_sampler();

namespace qwen {
namespace {

constexpr int32_t kBlockTokens = 16;

struct Sequence {
  std::vector<int32_t> tokens;
  std::vector<step::BlockId> blocks;
  int32_t done = 0;  // tokens in the KV cache
};

step::SequenceSpan Span(const Sequence& sequence, step::SequenceId id, int32_t count, bool sample) {
  step::SequenceSpan span{.sequence = id, .slot = static_cast<int32_t>(id), .begin = sequence.done, .sample = sample};
  for (int32_t i = sequence.done; i < sequence.done + count; ++i) {
    span.tokens.push_back(sequence.tokens[static_cast<size_t>(i)]);
    span.positions.push_back({i, i, i});
  }
  const int32_t blocks = (sequence.done + count + kBlockTokens - 1) / kBlockTokens;
  span.blocks.assign(sequence.blocks.begin(), sequence.blocks.begin() + blocks);
  return span;
}

std::vector<Sequence> MakeSequences(int count, int32_t prompt, int32_t room, int32_t vocab, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<Sequence> sequences(static_cast<size_t>(count));
  const int32_t blocks = (prompt + room + kBlockTokens - 1) / kBlockTokens;
  std::vector<step::BlockId> ids(static_cast<size_t>(blocks * count));
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<step::BlockId>(i);
  std::shuffle(ids.begin(), ids.end(), random);
  for (size_t s = 0; s < sequences.size(); ++s) {
    for (int32_t i = 0; i < prompt; ++i) sequences[s].tokens.push_back(static_cast<int32_t>(random() % static_cast<uint32_t>(vocab)));
    sequences[s].blocks.assign(ids.begin() + static_cast<ptrdiff_t>(s) * blocks, ids.begin() + static_cast<ptrdiff_t>(s + 1) * blocks);
  }
  return sequences;
}

struct Model {
  std::unique_ptr<model::StageModel> stage;
  at::Tensor Forward(const step::StepPlan& plan, const model::StageActivations& input = {}) {
    Result<model::StageOutput> output = stage->Forward(plan, input);
    QP_CHECK(output.ok()) << output.status().ToString();
    last = std::move(output).value();
    return last.logits;
  }
  model::StageOutput last;
};

Model MakeModel(const contract::ModelShape& shape, contract::LayerRange layers, const weights::TensorMap& tensors, int32_t blocks, int32_t length, bool fused) {
  model::StageModelOptions options{.layers = layers,
                                   .stage = layers.begin == 0 ? 0 : 1,
                                   .stages = (layers.begin == 0 ? 1 : 2) + (layers.end == shape.layers ? 0 : 1),
                                   .device = at::Device(at::kCUDA, 0),
                                   .dtype = at::kBFloat16,
                                   .block_tokens = kBlockTokens,
                                   .block_count = blocks,
                                   .grouping = model::RowGrouping::kWholeBatch};
  if (fused) options.backend = *qwen_fused_backend();
  options.max_sequence_tokens = length;
  auto created = model::StageModel::Create(shape, options, tensors);
  QP_CHECK(created.ok()) << created.status().ToString();
  QP_CHECK_EQ((*created)->fused(), fused);
  return {.stage = std::move(created).value()};
}

void Row(const std::string& name, const char* unit, double value) {
  std::printf("{\"suite\":\"stage\",\"case\":\"%s\",\"unit\":\"%s\",\"ours\":%.6g}\n", name.c_str(), unit, value);
  std::fflush(stdout);
}

double Relative(const at::Tensor& got, const at::Tensor& want) {
  const at::Tensor g = got.to(at::kFloat), w = want.to(at::kFloat);
  return ((g - w).norm() / w.norm()).item<double>();
}

// Makes the choice of experts and of the next token clear. Noise puts the k-th and the next expert within a rounding of each other every few
// tokens, in any arithmetic, so plain noise compares ties and little else. Here each token belongs to a class whose code
// dominates its embedding, and each class has its own k experts, four logits ahead of all others.
void ClearChoices(const contract::ModelShape& shape, weights::TensorMap& tensors) {
  const auto options = at::TensorOptions().device(at::kCUDA).dtype(at::kFloat);
  at::manual_seed(1);
  at::Tensor& head = tensors.at("lm_head.weight");  // rows of different length: the best token leads by more than a rounding
  head = (head.to(at::kFloat) * at::randn({shape.vocab, 1}, options).exp_()).to(at::kBFloat16);
  if (!shape.moe) return;
  const int64_t classes = shape.moe->experts / shape.moe->experts_per_token, k = shape.moe->experts_per_token;
  const at::Tensor codes = at::randint(0, 2, {classes, shape.hidden}, options).mul_(2).sub_(1);
  at::Tensor& embedding = tensors.at("embed_tokens.weight");
  const at::Tensor class_of = at::arange(shape.vocab, options.dtype(at::kLong)).remainder(classes);
  embedding = (embedding + codes.index_select(0, class_of) * 4).to(at::kBFloat16);
  for (int32_t layer = 0; layer < shape.layers; ++layer) {
    at::Tensor& router = tensors.at("layers." + std::to_string(layer) + ".mlp.gate.weight");
    const at::Tensor noise = router.to(at::kFloat) * 0.05;
    router = (codes.repeat_interleave(k, 0) * (4.0 / shape.hidden) + noise).to(at::kBFloat16);
  }
}

// The weights that the reference computes with.
weights::TensorMap MultipliedOut(const contract::ModelShape& shape, const weights::TensorMap& tensors) {
  weights::TensorMap wide;
  for (const auto& [name, tensor] : tensors) {
    if (name.ends_with("_scale_inv")) continue;
    const bool fp8 = tensor.scalar_type() == at::kFloat8_e4m3fn;
    wide[name] = fp8 ? weights::MultiplyOut(tensor, tensors.at(name + "_scale_inv"), *shape.quantization).to(at::kBFloat16) : tensor;
  }
  return wide;
}

// The same plans through both; prompts whole and in chunks, then decodes alone and beside a prompt.
int Check(const std::string& name, const contract::ModelShape& shape) {
  const weights::StageSpec spec{.layers = {0, shape.layers}};
  auto tensors = weights::RandomTensors(shape, {.spec = spec, .device = at::Device(at::kCUDA, 0), .keep_fp8 = shape.quantization.has_value()}, 1);
  QP_CHECK(tensors.ok()) << tensors.status().ToString();
  ClearChoices(shape, *tensors);
  const weights::TensorMap wide = MultipliedOut(shape, *tensors);  // before the backend puts FP8 codes into its own order
  constexpr int kSequences = 160, kLong = 40, kPrompt = 300, kShort = 17, kSteps = 64;  // more than 128 tokens take other kernels
  std::vector<Sequence> fused_sequences = MakeSequences(kSequences, kPrompt, kSteps + 1, shape.vocab, 7);
  for (int s = kLong; s < kSequences; ++s) fused_sequences[static_cast<size_t>(s)].tokens.resize(kShort);
  std::vector<Sequence> reference_sequences = fused_sequences;
  const int32_t blocks = kSequences * ((kPrompt + kSteps + 1 + kBlockTokens - 1) / kBlockTokens);
  Model reference = MakeModel(shape, spec.layers, wide, blocks, kPrompt + kSteps + 1, false);
  Model fused = MakeModel(shape, spec.layers, *tensors, blocks, kPrompt + kSteps + 1, true);
  double worst = 0;
  int failures = 0;
  const auto compare = [&](const at::Tensor& got, const at::Tensor& want, const char* what) {
    const double relative = Relative(got, want);
    worst = std::max(worst, relative);
    if (!(relative < 0.03)) {
      std::fprintf(stderr, "%s: %s: logits differ by %.4f\n", name.c_str(), what, relative);
      ++failures;
    }
  };
  struct Near {
    int same = 0, ties = 0, wrong = 0;
  } greedy;
  std::vector<bool> apart(kSequences, false);
  const auto take = [&](Model& model, std::vector<Sequence>& sequences, const std::vector<std::pair<int, int32_t>>& spans) {
    step::StepPlan plan;
    for (const auto& [s, count] : spans) {
      const Sequence& sequence = sequences[static_cast<size_t>(s)];
      plan.spans.push_back(Span(sequence, static_cast<step::SequenceId>(s), count, sequence.done + count == static_cast<int32_t>(sequence.tokens.size())));
    }
    at::Tensor logits = model.Forward(plan);
    if (logits.defined()) logits = logits.clone();
    for (const auto& [s, count] : spans) sequences[static_cast<size_t>(s)].done += count;
    return logits;
  };
  const auto both = [&](const std::vector<std::pair<int, int32_t>>& spans, const char* what) {
    const at::Tensor want = take(reference, reference_sequences, spans), got = take(fused, fused_sequences, spans);
    QP_CHECK_EQ(want.defined(), got.defined());
    if (!want.defined()) return;
    // Rows of sequences whose texts have parted are not comparable any more.
    std::vector<int64_t> rows;
    int64_t row = 0;
    for (const auto& [s, count] : spans) {
      Sequence &r = reference_sequences[static_cast<size_t>(s)], &f = fused_sequences[static_cast<size_t>(s)];
      if (r.done != static_cast<int32_t>(r.tokens.size())) continue;
      if (!apart[static_cast<size_t>(s)]) {
        rows.push_back(row);
        const at::Tensor top = std::get<0>(want[row].to(at::kFloat).topk(2));
        const auto a = want[row].argmax().item<int64_t>(), b = got[row].argmax().item<int64_t>();
        const double margin = (top[0] - top[1]).item<double>();
        // A near-tie: two roundings of the bf16 logits themselves (8 bits of significand), and what the rows before lm_head differ by: both
        // backends' rows are 0.4 to 0.5 % apart, so a logit of two to three times its row's length is off by 0.2 %, a difference of two by
        // 0.3 to 0.5 % of the best, and 2 % is four times that.
        const double best = std::abs(top[0].item<double>()), tie = 2 * std::exp2(std::floor(std::log2(best)) - 7) + 0.02 * best;
        if (a != b) {
          apart[static_cast<size_t>(s)] = true;
          if (margin <= tie) {
            ++greedy.ties;
          } else {
            ++greedy.wrong;
            std::fprintf(stderr, "%s: %s: sequence %d parts at %d with a margin of %.3f of %.1f (a near-tie: %.3f); the row differs by %.4f\n", name.c_str(), what, s, r.done, margin,
                         top[0].item<double>(), tie, Relative(got[row], want[row]));
          }
        }
        // Both go on with the reference's token as long as they agree; afterwards neither is compared.
        r.tokens.push_back(static_cast<int32_t>(a));
        f.tokens.push_back(static_cast<int32_t>(a));
      } else {
        r.tokens.push_back(0);
        f.tokens.push_back(0);
      }
      ++row;
    }
    if (rows.empty()) return;
    const at::Tensor index = at::tensor(rows).to(want.device());
    compare(got.index_select(0, index), want.index_select(0, index), what);
  };
  both({{0, kPrompt}}, "one prompt");
  both({{1, 100}}, "first chunk");
  both({{1, 200}}, "second chunk");
  both({{2, kPrompt}, {3, kPrompt}, {4, 17}}, "several prompts");
  both({{0, 1}, {1, 1}, {4, 283}}, "decodes beside the rest of a prompt");
  both({{0, 1}}, "one decode");
  both({{2, 1}, {3, 1}}, "two decodes");
  for (int s = 5; s < kLong; ++s) both({{s, kPrompt}}, "prompt");
  std::vector<std::pair<int, int32_t>> rest;
  for (int s = kLong; s < kSequences; ++s) rest.emplace_back(s, kShort);
  both(rest, "many short prompts");
  for (int i = 0; i < kSteps - 4; ++i) {
    std::vector<std::pair<int, int32_t>> spans;
    // batch sizes on both sides of every change of kernel, each for a while
    const int sizes[] = {1, 2, 3, 8, 17, 33, 32, kLong, 129, kSequences};
    for (int s = 0; s < sizes[i % 10]; ++s) spans.emplace_back(s, 1);
    both(spans, "decodes");
  }
  for (int s = 0; s < kSequences; ++s) greedy.same += !apart[static_cast<size_t>(s)];
  Row("check." + name + ".worst_relative_difference", "1", worst);
  Row("check." + name + ".greedy_same", ("of " + std::to_string(kSequences)).c_str(), greedy.same);
  std::fprintf(stderr, "%s: %d of %d continuations the same, %d part at a near-tie, %d elsewhere; logits within %.4f\n", name.c_str(), greedy.same, kSequences,
               greedy.ties, greedy.wrong, worst);
  return failures + greedy.wrong;
}

double Seconds(std::chrono::steady_clock::time_point since) { return std::chrono::duration<double>(std::chrono::steady_clock::now() - since).count(); }

// A model, or some of its layers with made-up activations in front, the way a worker drives it: plan, forward, sample.
class Bench {
 public:
  Bench(std::string name, const contract::ModelShape& shape, contract::LayerRange layers, int32_t kv_tokens)
      : name_(std::move(name)), shape_(shape), blocks_(kv_tokens / kBlockTokens) {
    const bool last = layers.end == shape.layers;
    const weights::StageSpec spec{.layers = layers, .index = layers.begin == 0 ? 0 : 1, .stages = (layers.begin == 0 ? 1 : 2) + (last ? 0 : 1)};
    const auto start = std::chrono::steady_clock::now();
    auto tensors = weights::RandomTensors(shape, {.spec = spec, .device = at::Device(at::kCUDA, 0), .keep_fp8 = shape.quantization.has_value()}, 1);
    QP_CHECK(tensors.ok()) << tensors.status().ToString();
    model_ = MakeModel(shape, layers, *tensors, blocks_, 32768, true);
    std::fprintf(stderr, "%s: weights made in %.1f s\n", name_.c_str(), Seconds(start));
    first_ = layers.begin == 0;
    last_ = last;
  }

  void Prefill(int count, int32_t prompt) {
    for (int repeat = 0; repeat < 3; ++repeat) {  // the first warms up
      std::vector<Sequence> sequences = MakeSequences(count, prompt, 0, shape_.vocab, 3);
      step::StepPlan plan;
      for (int s = 0; s < count; ++s) plan.spans.push_back(Span(sequences[static_cast<size_t>(s)], static_cast<step::SequenceId>(s), prompt, true));
      const model::StageActivations input = Input(plan);
      const auto start = std::chrono::steady_clock::now();
      model_.Forward(plan, input);
      c10::cuda::getCurrentCUDAStream().synchronize();
      if (repeat == 2) Row(name_ + ".prefill." + std::to_string(count) + "x" + std::to_string(prompt), "tok/s", count * prompt / Seconds(start));
    }
  }

  // Under a profiler that starts on demand: one prompt plan and one decode step of each size.
  void Profile() {
    for (const auto& [count, prompt] : {std::pair{1, 2048}, std::pair{8, 2048}}) {
      std::vector<Sequence> sequences = MakeSequences(count, prompt, 0, shape_.vocab, 3);
      step::StepPlan plan;
      for (int s = 0; s < count; ++s) plan.spans.push_back(Span(sequences[static_cast<size_t>(s)], static_cast<step::SequenceId>(s), prompt, true));
      model_.Forward(plan, Input(plan));
      Mark("prefill", plan.token_count());
      cudaProfilerStart();
      model_.Forward(plan, Input(plan));
      c10::cuda::getCurrentCUDAStream().synchronize();
      cudaProfilerStop();
    }
    profile_ = true;
    Decode(1, 2048);
    Decode(8, 2048);
    Decode(32, 1024);
    Decode(256, 512);
  }

  void Decode(int batch, int32_t context) {
    constexpr int kWarm = 4;
    const int kSteps = profile_ ? 1 : 40;
    std::vector<Sequence> sequences = MakeSequences(batch, context, kWarm + kSteps + 1, shape_.vocab, 5);
    QP_CHECK_LE(batch * ((context + kWarm + kSteps + 1 + kBlockTokens - 1) / kBlockTokens), blocks_);
    for (int s = 0; s < batch;) {  // prompts in plans of about 8,192 tokens
      step::StepPlan plan;
      for (int32_t tokens = 0; s < batch && tokens < 8192; ++s, tokens += context) {
        plan.spans.push_back(Span(sequences[static_cast<size_t>(s)], static_cast<step::SequenceId>(s), context, false));
        sequences[static_cast<size_t>(s)].done = context;
      }
      model_.Forward(plan, Input(plan));
    }
    auto device = (*qwen_fused_sampler())({.vocab = shape_.vocab, .max_slots = batch});
    QP_CHECK(device.ok()) << device.status().ToString();
    sampling::Sampler sampler({.max_slots = batch, .device = device->get()});
    std::vector<int32_t> next(static_cast<size_t>(batch), 1);
    std::vector<double> times;
    for (int i = 0; i < kWarm + kSteps; ++i) {
      step::StepPlan plan;
      for (int s = 0; s < batch; ++s) {
        Sequence& sequence = sequences[static_cast<size_t>(s)];
        sequence.tokens.push_back(next[static_cast<size_t>(s)]);
        plan.spans.push_back(Span(sequence, static_cast<step::SequenceId>(s), 1, true));
        ++sequence.done;
        if (i == 0) plan.starts.push_back({.sequence = static_cast<step::SequenceId>(s), .slot = s, .params = {.temperature = 0.0f}});
      }
      const model::StageActivations input = Input(plan);
      c10::cuda::getCurrentCUDAStream().synchronize();
      if (profile_ && i == kWarm) {
        Mark("decode", batch);
        cudaProfilerStart();
      }
      const auto start = std::chrono::steady_clock::now();
      const at::Tensor logits = model_.Forward(plan, input);
      if (last_) {
        Result<step::StepResult> result = sampler.Step(plan, logits);
        QP_CHECK(result.ok()) << result.status().ToString();
        for (int s = 0; s < batch; ++s) next[static_cast<size_t>(s)] = result->samples[static_cast<size_t>(s)].token;
      } else {
        c10::cuda::getCurrentCUDAStream().synchronize();
      }
      if (profile_ && i == kWarm) cudaProfilerStop();
      if (i >= kWarm) times.push_back(Seconds(start));
    }
    std::sort(times.begin(), times.end());
    const std::string key = name_ + ".decode.B" + std::to_string(batch) + ".context" + std::to_string(context);
    Row(key, "tok/s", batch / times[times.size() / 2]);
    Row(key + ".step", "ms", times[times.size() / 2] * 1e3);
  }

 private:
  static void Mark(const char* what, int64_t tokens) {
    std::printf("# %s %lld\n", what, static_cast<long long>(tokens));
    std::fflush(stdout);
  }
  model::StageActivations Input(const step::StepPlan& plan) const {
    if (first_) return {};
    return {.hidden = at::randn({plan.token_count(), shape_.hidden}, at::TensorOptions().device(at::kCUDA).dtype(at::kBFloat16))};
  }
  const std::string name_;
  const contract::ModelShape shape_;
  const int32_t blocks_;
  Model model_;
  bool first_ = true, last_ = true, profile_ = false;
};

contract::ModelShape Text(const std::string& name) {
  auto shape = contract::NamedModelShape(name);
  QP_CHECK(shape.ok()) << shape.status().ToString();
  shape->vision.reset();  // text alone: the tower has a job of its own
  return *shape;
}

int Main(int argc, char** argv) {
  const std::string job = argc > 1 ? argv[1] : "";
  c10::InferenceMode inference;
  if (job == "check") {
    const std::vector<std::string> words(argv + 2, argv + argc);
    const bool fp8 = std::find(words.begin(), words.end(), "fp8") != words.end();
    const std::string format = fp8 ? "-FP8" : "", suffix = fp8 ? "-fp8" : "", only = words.empty() || words.back() == "fp8" ? "" : words.back();
    int failures = 0;
    const auto check = [&](const std::string& name, const contract::ModelShape& shape) {
      if (only.empty() || only == name) failures += Check(name + suffix, shape);
    };
    contract::ModelShape moe = Text("Qwen3-VL-30B-A3B" + format);
    moe.layers = 4;
    check("30b-4-layers", moe);
    moe = Text("Qwen3-VL-235B-A22B" + format);
    moe.layers = 2;
    check("235b-2-layers", moe);
    contract::ModelShape dense = Text("Qwen3-VL-4B" + format);
    dense.layers = 4;
    check("4b-4-layers", dense);
    contract::ModelShape tiny = Text("Qwen3-VL-30B-A3B" + format);
    tiny.layers = 3;
    tiny.hidden = 512;
    tiny.heads = 8;
    tiny.kv_heads = 2;
    tiny.vocab = 4096;
    tiny.moe->experts = 32;
    tiny.moe->experts_per_token = 4;
    tiny.moe->intermediate = format.empty() ? 128 : 256;
    check("tiny", tiny);
    if (!fp8 && (only.empty() || only == "sampler")) failures += CheckSampler();
    return failures == 0 ? 0 : 1;
  }
  if (job == "bench" && argc > 2) {
    const std::string name = argv[2];
    const contract::ModelShape shape = Text(name);
    contract::LayerRange layers{0, shape.layers};
    if (argc > 3) layers = contract::ParseLayerRange(argv[3]).value();
    Bench bench(name + (argc > 3 ? std::string(".layers") + argv[3] : ""), shape, layers, 256 * 1024);
    bench.Prefill(1, 2048);
    bench.Prefill(8, 2048);
    for (int batch : {1, 8}) bench.Decode(batch, 2048);
    bench.Decode(32, 1024);
    for (int batch : {64, 128, 256}) bench.Decode(batch, 512);
    return 0;
  }
  if (job == "profile" && argc > 2) {
    contract::ModelShape shape = Text(argv[2]);
    shape.layers = 2;
    Bench("profile", shape, {0, shape.layers}, 256 * 1024).Profile();
    return 0;
  }
  if (job == "vision") {
    const std::string what = argc > 2 ? argv[2] : "";
    const int failures = what == "bench" ? 0 : CheckVision();
    if (what != "check") BenchVision();
    return failures == 0 ? 0 : 1;
  }
  if (job == "sampler") {
    const std::string what = argc > 2 ? argv[2] : "";
    const int failures = what == "bench" ? 0 : CheckSampler();
    if (what != "check") BenchSampler();
    return failures == 0 ? 0 : 1;
  }
  std::fprintf(stderr, "usage: stage_gpu check [fp8] [30b-4-layers|235b-2-layers|4b-4-layers|tiny|sampler] | stage_gpu profile SHAPE | stage_gpu bench SHAPE [BEGIN:END] | stage_gpu vision [check|bench] | stage_gpu sampler [check|bench]\n");
  return 64;
}

}  // namespace
}  // namespace qwen

int main(int argc, char** argv) { return qwen::Main(argc, argv); }
