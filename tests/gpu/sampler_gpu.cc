#include "tests/gpu/sampler_gpu.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "stage/base/check.h"
#include "stage/contract/model_shape.h"
#include "stage/model/stage_model.h"
#include "stage/ops/row_sampler.h"
#include "stage/sampling/sampler.h"
#include "stage/weights/loader.h"

extern "C" const qwen::model::StageBackendFactory* qwen_fused_backend();
extern "C" const qwen::ops::RowSamplerFactory* qwen_fused_sampler();

namespace qwen {
namespace {

constexpr int32_t kVocab = 151936, kBlockTokens = 16;
const at::Device kGpu(at::kCUDA, 0);

void Row(const std::string& name, const char* unit, double value) {
  std::printf("{\"suite\":\"sampler\",\"case\":\"%s\",\"unit\":\"%s\",\"ours\":%.6g}\n", name.c_str(), unit, value);
  std::fflush(stdout);
}

std::unique_ptr<ops::RowSampler> Device(int64_t vocab, int32_t slots) {
  auto made = (*qwen_fused_sampler())({.vocab = vocab, .max_slots = slots});
  QP_CHECK(made.ok()) << made.status().ToString();
  return std::move(made).value();
}

// The i-th of a list that goes through everything: each truncation alone and together, penalties, lists, logprobs, what the host keeps.
step::SamplingParams ParamsOf(int i, std::mt19937_64& random) {
  step::SamplingParams p{.temperature = 1.0f, .seed = random()};
  switch (i % 12) {
    case 0: p.temperature = 0; break;
    case 1: break;
    case 2: p.temperature = 0.7f, p.top_k = 20, p.top_p = 0.8f; break;
    case 3: p.top_p = 0.95f; break;
    case 4: p.min_p = 0.05f; break;
    case 5: p.temperature = 1e-6f; break;
    case 6: p.temperature = 0.6f, p.top_k = 40, p.top_p = 0.9f, p.min_p = 0.02f; break;
    case 7: p.top_k = 1; break;
    case 8: p.top_p = 1e-6f; break;
    case 9: p.temperature = 1.5f, p.top_k = kVocab; break;
    case 10: p.no_repeat_ngram_size = 2; break;
    case 11: p.temperature = 3, p.top_p = 0.5f; break;
  }
  if (i % 3 == 0) p.repetition_penalty = 1.3f;
  if (i % 4 == 1) p.presence_penalty = 0.8f;
  if (i % 5 == 2) p.frequency_penalty = 0.3f;
  if (i % 6 == 3) p.logprobs = i % 21;
  if (i % 7 == 4) p.token_limit = 151669;
  if (i % 8 == 5) {
    for (int32_t n = 0; n < 100; ++n) p.logit_bias.emplace_back(n * 1000 + i, static_cast<float>(n % 13) - 6);
  }
  if (i % 9 == 6) {
    p.min_tokens = 5;
    p.stop_tokens = {151643, 151645, 7};
  }
  return p;
}

at::Tensor Logits(int64_t rows, int step) {
  const auto options = at::TensorOptions().device(kGpu).dtype(at::kFloat);
  at::Tensor logits = at::randn({rows, kVocab}, options) * (step % 2 == 0 ? 2.0 : 4.0);
  if (step % 3 == 1) logits = (logits * 4).round() / 4;                                // ties
  if (step % 4 == 2) logits.narrow(1, 5000, 40) += 16;                                 // as a language model's
  return logits.to(at::kBFloat16);
}

// How many tokens, orders of likely tokens or log-probabilities differ.
int Differences(const step::StepResult& got, const step::StepResult& want, const std::string& where) {
  int wrong = 0;
  QP_CHECK_EQ(got.samples.size(), want.samples.size());
  for (size_t i = 0; i < want.samples.size(); ++i) {
    const step::SampledToken &g = got.samples[i], &w = want.samples[i];
    bool same = g.token == w.token && g.top.size() == w.top.size() && std::abs(g.logprob - w.logprob) <= 1e-5f;
    for (size_t n = 0; same && n < w.top.size(); ++n) same = g.top[n].token == w.top[n].token && std::abs(g.top[n].logprob - w.top[n].logprob) <= 1e-5f;
    if (same) continue;
    if (++wrong <= 3) std::fprintf(stderr, "sampler: %s, row %zu: token %d (%.7f), the host's %d (%.7f)\n", where.c_str(), i, g.token, g.logprob, w.token, w.logprob);
  }
  return wrong;
}

int CheckRows() {
  constexpr int kRows = 72, kSteps = 14;
  at::manual_seed(5);
  std::mt19937_64 random(5);
  const auto device = Device(kVocab, kRows);
  sampling::Sampler host({.max_slots = kRows}), fast({.max_slots = kRows, .device = device.get()});
  int wrong = 0, compared = 0;
  for (int step = 0; step < kSteps; ++step) {
    step::StepPlan plan{.step = static_cast<uint64_t>(step)};
    for (int32_t i = 0; i < kRows; ++i) {
      const auto id = static_cast<step::SequenceId>(i + 1);
      if (step == 0) {
        step::SequenceStart start{.sequence = id, .slot = i, .params = ParamsOf(i, random)};
        for (int n = 0; n < 200; ++n) start.tokens.push_back(static_cast<int32_t>(random() % kVocab));
        start.prompt_tokens = 150;
        plan.starts.push_back(start);
      }
      if ((i + step) % 5 == 4) continue;  // another batch in each step
      step::SequenceSpan span{.sequence = id, .slot = i, .sample = true};
      span.tokens = {1};
      if (i % 10 == 9 && step % 2 == 0) {
        span.allowed.resize(kVocab / 32);
        for (uint32_t& word : span.allowed) word = static_cast<uint32_t>(random() & random() & random());
      }
      plan.spans.push_back(span);
    }
    const at::Tensor logits = Logits(static_cast<int64_t>(plan.spans.size()), step);
    const bool ahead = step > 0 && step % 3 == 0;  // sampling begins before the plan is there; some rows then have a mask after all
    if (ahead) fast.BeginAhead(plan, logits);
    auto want = host.Step(plan, logits), got = fast.Step(plan, logits, ahead);
    QP_CHECK(want.ok() && got.ok()) << want.status().ToString() << " " << got.status().ToString();
    const int differ = Differences(*got, *want, "step " + std::to_string(step));
    wrong += differ;
    compared += static_cast<int>(plan.spans.size());
    if (differ > 0) break;  // histories have parted
  }
  std::fprintf(stderr, "sampler: %d of %d rows of logits sampled otherwise than on the host\n", wrong, compared);
  Row("check.sampler.rows_equal", ("of " + std::to_string(compared)).c_str(), compared - wrong);
  return wrong;
}

// A model that samples on the device and runs ahead, and beside it the host's sampler on the logits that it sampled from.
int CheckModel() {
  constexpr int kSequences = 12, kPrompt = 20, kSteps = 60;
  auto shape = contract::NamedModelShape("Qwen3-VL-30B-A3B");
  QP_CHECK(shape.ok()) << shape.status().ToString();
  shape->vision.reset();
  shape->layers = 3;
  shape->hidden = 512;
  shape->heads = 8;
  shape->kv_heads = 2;
  shape->vocab = 4096;
  shape->moe->experts = 32;
  shape->moe->experts_per_token = 4;
  shape->moe->intermediate = 128;
  const weights::StageSpec spec{.layers = {0, shape->layers}};
  auto tensors = weights::RandomTensors(*shape, {.spec = spec, .device = kGpu}, 1);
  QP_CHECK(tensors.ok()) << tensors.status().ToString();
  constexpr int32_t kBlocks = (kPrompt + kSteps + 1 + kBlockTokens - 1) / kBlockTokens;
  model::StageModelOptions options{.layers = spec.layers, .device = kGpu, .dtype = at::kBFloat16, .block_tokens = kBlockTokens, .block_count = kSequences * kBlocks,
                                   .grouping = model::RowGrouping::kWholeBatch};
  options.backend = *qwen_fused_backend();
  options.max_sequence_tokens = kPrompt + kSteps + 1;
  auto stage = model::StageModel::Create(*shape, options, *tensors);
  QP_CHECK(stage.ok() && (*stage)->fused()) << stage.status().ToString();
  const auto device = Device(shape->vocab, kSequences);
  sampling::Sampler host({.max_slots = kSequences}), fast({.max_slots = kSequences, .device = device.get()});
  std::mt19937_64 random(6);
  std::vector<std::vector<int32_t>> tokens(kSequences);
  int wrong = 0, compared = 0, begun = 0;
  int running = kSequences;  // the last one leaves now and then: its row of a step begun ahead is not taken
  for (int step = 0; step < kSteps && wrong == 0; ++step) {
    step::StepPlan plan{.step = static_cast<uint64_t>(step)};
    if (step % 12 == 11) --running;
    for (int32_t s = 0; s < running; ++s) {
      std::vector<int32_t>& text = tokens[static_cast<size_t>(s)];
      step::SequenceSpan span{.sequence = static_cast<step::SequenceId>(s + 1), .slot = s, .sample = true};
      if (step == 0) {
        for (int i = 0; i < kPrompt; ++i) text.push_back(static_cast<int32_t>(random() % static_cast<uint64_t>(shape->vocab)));
        step::SamplingParams params = ParamsOf(s, random);
        params.logit_bias.clear();  // of ids beyond this vocabulary
        params.stop_tokens.clear();
        params.token_limit = 0;
        plan.starts.push_back({.sequence = span.sequence, .slot = s, .params = params, .tokens = text, .prompt_tokens = kPrompt});
        span.tokens = text;
      } else {
        span.tokens = {text.back()};
      }
      const auto length = static_cast<int32_t>(text.size());
      span.begin = length - static_cast<int32_t>(span.tokens.size());
      for (int32_t i = span.begin; i < length; ++i) span.positions.push_back({i, i, i});
      for (int32_t b = 0; b * kBlockTokens <= length; ++b) span.blocks.push_back(s * kBlocks + b);  // with room for the token after
      plan.spans.push_back(span);
    }
    auto output = (*stage)->Forward(plan, {});
    QP_CHECK(output.ok()) << output.status().ToString();
    begun += output->begun;
    const at::Tensor logits = output->logits.clone();
    auto got = fast.Step(plan, output->logits, output->begun);
    QP_CHECK(got.ok()) << got.status().ToString();
    if (const model::StageModel::Ahead* ahead = (*stage)->RunAhead(plan, got->samples)) fast.BeginAhead(ahead->plan, ahead->logits);
    auto want = host.Step(plan, logits);
    QP_CHECK(want.ok()) << want.status().ToString();
    wrong += Differences(*got, *want, "model, step " + std::to_string(step));
    compared += running;
    for (int32_t s = 0; s < running; ++s) tokens[static_cast<size_t>(s)].push_back(want->samples[static_cast<size_t>(s)].token);
  }
  if (begun < kSteps / 2) {
    std::fprintf(stderr, "sampler: only %d of %d steps were begun ahead\n", begun, kSteps);
    ++wrong;
  }
  std::fprintf(stderr, "sampler: %d of %d tokens of a model differ, %d steps begun ahead\n", wrong, compared, begun);
  return wrong;
}

double Seconds(sampling::Sampler& sampler, const std::vector<at::Tensor>& logits, const step::SamplingParams& params, int rows, int steps) {
  std::vector<double> times;
  for (int step = 0; step < steps; ++step) {
    step::StepPlan plan;
    for (int32_t i = 0; i < rows; ++i) {
      const auto id = static_cast<step::SequenceId>(i + 1);
      if (step == 0) plan.starts.push_back({.sequence = id, .slot = i, .params = params, .tokens = {1, 2}, .prompt_tokens = 2});
      step::SequenceSpan span{.sequence = id, .slot = i, .sample = true};
      span.tokens = {1};
      plan.spans.push_back(span);
    }
    c10::cuda::getCurrentCUDAStream().synchronize();
    const auto start = std::chrono::steady_clock::now();
    auto result = sampler.Step(plan, logits[static_cast<size_t>(step) % logits.size()].narrow(0, 0, rows));
    QP_CHECK(result.ok()) << result.status().ToString();
    if (step > 0) times.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

}  // namespace

int CheckSampler() { return CheckRows() + CheckModel(); }

void BenchSampler() {
  constexpr int kRows = 256;
  at::manual_seed(7);
  const std::vector<at::Tensor> logits = {Logits(kRows, 2), Logits(kRows, 6)};
  const auto device = Device(kVocab, kRows);
  const std::pair<const char*, step::SamplingParams> cases[] = {{"greedy", {}},
                                                                {"temperature", {.temperature = 1.0f, .seed = 1}},
                                                                {"top_k20_p0.8", {.temperature = 0.7f, .top_k = 20, .top_p = 0.8f, .seed = 1}},
                                                                {"top_p0.95", {.temperature = 1.0f, .top_p = 0.95f, .seed = 1}},
                                                                {"penalties", {.temperature = 0.7f, .top_k = 20, .top_p = 0.8f, .presence_penalty = 1.0f, .seed = 1}}};
  for (const auto& [name, params] : cases) {
    for (int rows : {1, 32, kRows}) {
      sampling::Sampler host({.max_slots = kRows}), fast({.max_slots = kRows, .device = device.get()});
      const std::string key = std::string("sampler.step.") + name + ".B" + std::to_string(rows);
      Row(key, "ms", 1e3 * Seconds(fast, logits, params, rows, 30));
      Row(key + ".host", "ms", 1e3 * Seconds(host, logits, params, rows, rows == kRows ? 4 : 10));
    }
  }
}

}  // namespace qwen
