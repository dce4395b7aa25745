// Kernel `sampler` against the pipeline of docs/numerics.md, section 3, written plainly: sorts, loops, weights out of the C library's long
// double exp. Tokens are equal, not near: a weight that another exp rounds the other way moves a boundary by one unit of 2^40 or more.
#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <set>

#include "stage/kernels/common/sampling_weight.h"
#include "stage/kernels/sampler.h"
#include "tests/kernels/harness.h"

namespace qwen::kernels::testing {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int kVocab = 151936;

struct Params {
  float temperature = 1, top_p = 1, min_p = 0;
  int top_k = 0;
  float repetition = 1, presence = 0, frequency = 0;
  int token_limit = 0, logprobs = -1;
  uint64_t draw = 0;
};

struct Case {
  std::vector<__nv_bfloat16> logits;
  Params params;
  std::vector<int32_t> prompt, output;         // with penalties
  std::vector<std::pair<int32_t, float>> bias;
  std::vector<int32_t> bans;
  std::vector<uint32_t> mask;
  bool masked = false;
  bool penalised() const { return params.repetition != 1 || params.presence != 0 || params.frequency != 0; }
};

struct Expected {
  int token = 0, status = kSamplerDone;
};

std::vector<float> Constrained(const Case& c) {
  std::vector<float> l(c.logits.size());
  for (size_t i = 0; i < l.size(); ++i) l[i] = ToFloat(c.logits[i]);
  for (const auto& [id, value] : c.bias) l[id] += value;
  std::set<int32_t> seen(c.prompt.begin(), c.prompt.end());
  std::map<int32_t, int> counts;
  for (int32_t id : c.output) {
    seen.insert(id);
    ++counts[id];
  }
  if (c.params.repetition != 1) {
    for (int32_t id : seen) l[id] = l[id] < 0 ? l[id] * c.params.repetition : l[id] / c.params.repetition;
  }
  for (const auto& [id, count] : counts) {
    const float scaled = c.params.frequency * static_cast<float>(count);
    const float sum = c.params.presence + scaled;
    l[id] -= sum;
  }
  for (size_t i = 0; i < l.size(); ++i) {
    if (c.params.token_limit > 0 && static_cast<int>(i) >= c.params.token_limit) l[i] = -kInf;
    if (c.masked && (i / 32 >= c.mask.size() || (c.mask[i / 32] >> (i % 32) & 1) == 0)) l[i] = -kInf;
  }
  for (int32_t id : c.bans) l[id] = -kInf;
  return l;
}

Expected Oracle(const Case& c) {
  const std::vector<float> l = Constrained(c);
  int best = -1;
  for (size_t i = 0; i < l.size(); ++i) {
    if (std::isnan(l[i])) return {0, kSamplerNan};
    if (best < 0 || l[i] > l[best]) best = static_cast<int>(i);
  }
  if (l[best] == -kInf) return {0, kSamplerNothingAllowed};
  const float temperature = c.params.temperature;
  if (temperature == 0 || std::isinf(l[best]) || std::isinf(l[best] / temperature)) return {best, kSamplerDone};
  struct Entry {
    int id;
    float value;
    uint64_t weight;
  };
  std::vector<Entry> entries;
  const float maximum = l[best] / temperature;
  for (size_t i = 0; i < l.size(); ++i) {
    const float value = l[i] / temperature;
    if (value == -kInf) continue;
    const long double weight = std::exp(static_cast<long double>(value) - static_cast<long double>(maximum)) * 0x1p40L;
    entries.push_back({static_cast<int>(i), value, static_cast<uint64_t>(std::llrint(weight))});
  }
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.value != b.value ? a.value > b.value : a.id < b.id; });
  const auto total = [&] { return std::accumulate(entries.begin(), entries.end(), uint64_t{0}, [](uint64_t sum, const Entry& e) { return sum + e.weight; }); };
  if (c.params.top_k > 0 && c.params.top_k < static_cast<int>(entries.size())) {
    const float threshold = entries[c.params.top_k - 1].value;
    while (entries.back().value < threshold) entries.pop_back();
  }
  if (c.params.top_p < 1) {
    const auto product = static_cast<unsigned __int128>(std::floor(std::ldexp(static_cast<double>(c.params.top_p), 53))) * total();
    uint64_t before = 0;
    size_t keep = 0;  // before < top_p * total, without a division
    while (keep < entries.size() && (keep == 0 || (static_cast<unsigned __int128>(before) << 53) < product)) before += entries[keep++].weight;
    entries.resize(keep);
  }
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.id < b.id; });
  std::vector<Entry> kept;
  for (const Entry& e : entries) {
    if (static_cast<double>(e.weight) >= static_cast<double>(c.params.min_p) * 0x1p40) kept.push_back(e);
  }
  entries = kept;
  const auto target = static_cast<unsigned __int128>(c.params.draw) * total();  // in units of 2^-53
  uint64_t sum = 0;
  for (const Entry& e : entries) {
    sum += e.weight;
    if ((static_cast<unsigned __int128>(sum) << 53) > target + ((static_cast<unsigned __int128>(1) << 53) - 1)) return {e.id, kSamplerDone};
    // sum > floor(target) is sum >= floor(target) + 1
    if ((static_cast<unsigned __int128>(sum) << 53) >= ((target >> 53) + 1) << 53) return {e.id, kSamplerDone};
  }
  return {-1, kSamplerDone};
}

// The cases of one vocabulary in one launch.
class Batch {
 public:
  explicit Batch(const std::vector<Case>& cases) : vocab_(static_cast<int>(cases[0].logits.size())) {
    std::vector<__nv_bfloat16> logits;
    std::vector<int32_t> extra;
    int states = 0;
    for (const Case& c : cases) {
      const Params& p = c.params;
      SamplerRow row{.draw = p.draw,
                     .top_p = TopPFraction(p.top_p),
                     .min_p = MinPWeight(p.min_p),
                     .temperature = p.temperature,
                     .top_k = p.top_k,
                     .repetition = p.repetition,
                     .presence = p.presence,
                     .frequency = p.frequency,
                     .state = c.penalised() ? states++ : -1,
                     .token_limit = p.token_limit,
                     .logits_row = static_cast<int32_t>(rows_.size()),
                     .logprobs = p.logprobs};
      row.bias_begin = static_cast<int32_t>(extra.size());
      row.bias_count = static_cast<int32_t>(c.bias.size());
      for (const auto& [id, value] : c.bias) {
        int32_t bits;
        std::memcpy(&bits, &value, 4);
        extra.insert(extra.end(), {id, bits});
      }
      row.ban_begin = static_cast<int32_t>(extra.size());
      row.ban_count = static_cast<int32_t>(c.bans.size());
      extra.insert(extra.end(), c.bans.begin(), c.bans.end());
      row.mask_begin = static_cast<int32_t>(extra.size());
      row.mask_words = c.masked ? static_cast<int32_t>(c.mask.size()) : -1;
      for (uint32_t word : c.mask) extra.push_back(static_cast<int32_t>(word));
      rows_.push_back(row);
      logits.insert(logits.end(), c.logits.begin(), c.logits.end());
    }
    logits_ = DeviceBuffer<__nv_bfloat16>(logits);
    extra_ = DeviceBuffer<int32_t>(extra);
    state_ = DeviceBuffer<uint16_t>(static_cast<size_t>(states) * vocab_);
    state_.Poison();
    for (size_t i = 0; i < cases.size(); ++i) {
      if (rows_[i].state < 0) continue;
      std::vector<int32_t> tokens = cases[i].prompt;
      tokens.insert(tokens.end(), cases[i].output.begin(), cases[i].output.end());
      const DeviceBuffer<int32_t> device(tokens);
      CUDA_MUST(FillSamplerState(state_.get() + static_cast<size_t>(rows_[i].state) * vocab_, device.get(), static_cast<int>(tokens.size()),
                                 static_cast<int>(cases[i].prompt.size()), vocab_, nullptr));
      CUDA_MUST(cudaDeviceSynchronize());
    }
  }

  std::vector<SamplerRow>& rows() { return rows_; }
  std::vector<SamplerResult> Run(int cluster = 0) {
    const DeviceBuffer<SamplerRow> rows(rows_);
    DeviceBuffer<SamplerResult> results(rows_.size());
    results.Poison();
    const SamplerArgs args{.logits = logits_.get(), .rows = rows.get(), .extra = extra_.get(), .state = state_.get(), .results = results.get(),
                           .count = static_cast<int>(rows_.size()), .vocab = vocab_};
    CUDA_MUST(Sample(args, nullptr, cluster));
    CUDA_MUST(cudaDeviceSynchronize());
    return results.Download();
  }

 private:
  const int vocab_;
  std::vector<SamplerRow> rows_;
  DeviceBuffer<__nv_bfloat16> logits_;
  DeviceBuffer<int32_t> extra_;
  DeviceBuffer<uint16_t> state_;
};

std::string Words(const Case& c) {
  char text[200];
  std::snprintf(text, sizeof text, "T %g k %d p %g min_p %g draw %llx limit %d rep %g pres %g freq %g", c.params.temperature, c.params.top_k, c.params.top_p, c.params.min_p,
                static_cast<unsigned long long>(c.params.draw), c.params.token_limit, c.params.repetition, c.params.presence, c.params.frequency);
  return text;
}

void ExpectTokens(const std::vector<Case>& cases, int cluster = 0) {
  const std::vector<SamplerResult> got = Batch(cases).Run(cluster);
  for (size_t i = 0; i < cases.size(); ++i) {
    const Expected want = Oracle(cases[i]);
    EXPECT_EQ(got[i].status, want.status) << i << ": " << Words(cases[i]);
    EXPECT_EQ(got[i].token, want.token) << i << ": " << Words(cases[i]);
  }
}

constexpr uint64_t kDrawMax = (uint64_t{1} << 53) - 1;

std::vector<Params> ParameterSets(int vocab) {
  return {{.temperature = 0},
          {.temperature = 1},
          {.temperature = 0.7f, .top_p = 0.8f, .top_k = 20},
          {.temperature = 1, .top_p = 0.95f},
          {.temperature = 1, .min_p = 0.05f},
          {.temperature = 1e-6f},
          {.temperature = 1e-38f},
          {.temperature = 1, .top_k = 1},
          {.temperature = 1, .top_k = vocab},
          {.temperature = 1.5f, .top_k = vocab - 1},
          {.temperature = 1, .top_p = 1e-6f},
          {.temperature = 1, .top_p = 0.999999f},
          {.temperature = 2, .top_p = 0.5f, .min_p = 0.01f, .top_k = 1000},
          {.temperature = 30, .top_p = 0.3f}};
}

std::vector<Case> Rows(const std::function<float(int)>& logit, int vocab, std::mt19937_64& random) {
  Case c;
  c.logits.resize(vocab);
  for (int i = 0; i < vocab; ++i) c.logits[i] = __float2bfloat16_rn(logit(i));
  std::vector<Case> cases;
  for (const Params& params : ParameterSets(vocab)) {
    c.params = params;
    c.params.draw = random() >> 11;
    cases.push_back(c);
  }
  return cases;
}

// Noise, narrow and wide, at every width class of the vocabulary and every size of a cluster.
TEST(Sampler, DrawsTheOraclesTokensFromNoise) {
  std::mt19937_64 random(1);
  for (int vocab : {8, 40, 1000, 4096, 32768, kVocab}) {
    for (float deviation : {0.3f, 2.0f, 8.0f}) {
      std::normal_distribution<float> normal(0, deviation);
      const std::vector<Case> cases = Rows([&](int) { return normal(random); }, vocab, random);
      for (int cluster : {1, 2, 4, 8}) {
        if (cluster <= 2 && vocab == kVocab) continue;
        ExpectTokens(cases, cluster);
      }
    }
  }
}

TEST(Sampler, DrawsTheOraclesTokensFromTiesAndFromFlatPeakedAndOneHotRows) {
  std::mt19937_64 random(2);
  std::normal_distribution<float> normal(0, 2);
  for (int vocab : {1000, kVocab}) {
    ExpectTokens(Rows([&](int) { return std::round(normal(random)); }, vocab, random));                          // a dozen values
    ExpectTokens(Rows([&](int) { return std::round(normal(random) * 64) / 64; }, vocab, random));
    ExpectTokens(Rows([&](int) { return 3.25f; }, vocab, random));                                               // all equal
    ExpectTokens(Rows([&](int i) { return i % 2 == 0 ? 0.0f : -0.0f; }, vocab, random));                         // both zeros are one value
    ExpectTokens(Rows([&](int i) { return i == vocab - 2 ? 50.0f : 0.0f; }, vocab, random));                     // one-hot
    ExpectTokens(Rows([&](int i) { return i == 7 ? 1.0f : -kInf; }, vocab, random));                             // all but one banned
    ExpectTokens(Rows([&](int i) { return i % 97 == 3 ? 20 + normal(random) / 2 : normal(random); }, vocab, random));  // as a language model's
    ExpectTokens(Rows([&](int i) { return i == 5 ? kInf : normal(random); }, vocab, random));
    ExpectTokens(Rows([&](int) { return 1e38f * normal(random); }, vocab, random));
    ExpectTokens(Rows([&](int i) { return 1e-39f * static_cast<float>(i % 11); }, vocab, random));               // subnormal
    ExpectTokens(Rows([&](int) { return -300 + normal(random); }, vocab, random));
  }
}

TEST(Sampler, TheFirstAndTheLastUnitOfMassAreTheFirstAndTheLastToken) {
  std::mt19937_64 random(3);
  std::normal_distribution<float> normal(0, 1);
  std::vector<Case> cases = Rows([&](int) { return normal(random); }, 5000, random), edges;
  for (Case& c : cases) {
    for (uint64_t draw : {uint64_t{0}, uint64_t{1}, kDrawMax / 2, kDrawMax - 1, kDrawMax}) {
      c.params.draw = draw;
      edges.push_back(c);
    }
  }
  ExpectTokens(edges);
}

// The kernel finishes up to 256 candidates in one block: rows on both sides of that, by ties (one bin) and by close neighbours (several keys in a bin).
TEST(Sampler, FewCandidatesAndOneMoreThanFewDrawTheOraclesTokens) {
  std::mt19937_64 random(10);
  for (int likely : {1, 2, 31, 255, 256, 257, 300, 1025}) {
    for (float step : {0.0f, 1.0f / 256, 0.125f}) {
      std::vector<Case> cases;
      Case c;
      c.logits.resize(6000);
      for (int i = 0; i < 6000; ++i) c.logits[i] = __float2bfloat16_rn(i % 5 == 2 && i / 5 < likely ? 1.5f + step * static_cast<float>(i % 13) : -26.0f);
      for (int k : {0, 1, 30, 255, 256, 257}) {
        for (float top_p : {0.3f, 0.95f, 1.0f}) {
          c.params = {.temperature = 1, .top_p = top_p, .min_p = k == 30 ? 0.3f : 0.0f, .top_k = k, .draw = random() >> 11};
          cases.push_back(c);
        }
      }
      ExpectTokens(cases);
      ExpectTokens(cases, 1);
    }
  }
}

// Below 29 temperatures under the maximum nothing weighs anything, and the kernel does not divide it: rows that lie across that line, where
// large logits make quotients coarse.
TEST(Sampler, LogitsAroundWhereWeightsEndDrawTheOraclesTokens) {
  std::mt19937_64 random(11);
  for (float centre : {0.0f, 3.0f, -250.0f, 3000.0f, 1e6f}) {
    for (float temperature : {1e-4f, 0.013f, 0.31f, 1.0f, 7.3f, 1000.0f}) {
      const float width = 29.5f * temperature;
      Case c;
      c.logits.resize(3000);
      for (int i = 0; i < 3000; ++i) c.logits[i] = __float2bfloat16_rn(centre - width * (0.9f + 0.2f * static_cast<float>(random() % 1024) / 1024));
      c.logits[1234] = __float2bfloat16_rn(centre);
      std::vector<Case> cases;
      for (uint64_t draw : {uint64_t{0}, kDrawMax / 3, kDrawMax - 1, kDrawMax}) {
        c.params = {.temperature = temperature, .draw = draw};
        cases.push_back(c);
        c.params.top_p = 0.9999999f;
        cases.push_back(c);
      }
      ExpectTokens(cases);
    }
  }
}

TEST(Sampler, ManyDrawsOfOneRowFollowItsWeights) {
  std::mt19937_64 random(4);
  Case c;
  c.logits = {__float2bfloat16_rn(0), __float2bfloat16_rn(1), __float2bfloat16_rn(2), __float2bfloat16_rn(-1), __float2bfloat16_rn(-kInf), __float2bfloat16_rn(0.5f),
              __float2bfloat16_rn(-30), __float2bfloat16_rn(1)};
  std::vector<Case> cases(4000, c);
  for (Case& one : cases) one.params.draw = random() >> 11;
  const std::vector<SamplerResult> got = Batch(cases).Run();
  std::vector<int> counts(8, 0);
  for (const SamplerResult& result : got) ++counts.at(result.token);
  double total = 0, chi2 = 0;
  for (const __nv_bfloat16 l : c.logits) total += std::exp(static_cast<double>(ToFloat(l)));
  for (int i : {0, 1, 2, 3, 5, 7}) {
    const double expected = 4000 * std::exp(static_cast<double>(ToFloat(c.logits[i]))) / total;
    chi2 += (counts[i] - expected) * (counts[i] - expected) / expected;
  }
  EXPECT_LT(chi2, 20.5);  // 5 degrees of freedom, p = 0.001
  EXPECT_EQ(counts[4] + counts[6], 0);
}

TEST(Sampler, ANanOrARowWithoutAnyTokenIsAStatusAndTheOtherRowsAreSampled) {
  std::mt19937_64 random(5);
  std::normal_distribution<float> normal(0, 1);
  for (float temperature : {0.0f, 1.0f}) {
    std::vector<Case> cases;
    for (int kind = 0; kind < 5; ++kind) {
      Case c = Rows([&](int i) { return kind == 1 && i == 17 ? NAN : kind == 2 ? -kInf : normal(random); }, 1000, random)[0];
      c.params.temperature = temperature;
      if (kind == 3) {
        c.logits[17] = __float2bfloat16_rn(NAN);
        c.bans = {17};  // a banned NaN is nobody's business
      }
      if (kind == 4) c.masked = true;  // of no words: nothing is allowed
      cases.push_back(c);
    }
    const std::vector<SamplerResult> got = Batch(cases).Run();
    const int want[] = {kSamplerDone, kSamplerNan, kSamplerNothingAllowed, kSamplerDone, kSamplerNothingAllowed};
    for (int i = 0; i < 5; ++i) EXPECT_EQ(got[i].status, want[i]) << i;
    ExpectTokens(cases);
  }
}

std::vector<int32_t> SomeTokens(int count, int vocab, std::mt19937_64& random) {
  std::vector<int32_t> tokens(count);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % 3 == 0 ? random() % 20 : random() % vocab);
  return tokens;
}

TEST(Sampler, PenaltiesBiasBansAndMasksChangeTheRowAsOnTheHost) {
  std::mt19937_64 random(6);
  std::normal_distribution<float> normal(0, 2);
  for (int vocab : {1000, kVocab}) {
    std::vector<Case> cases;
    for (int i = 0; i < 48; ++i) {
      Case c = Rows([&](int) { return normal(random); }, vocab, random)[i % 8 == 0 ? 0 : i % 8 < 4 ? 1 : i % 8 < 6 ? 2 : 12];
      if (i % 2 == 0) {
        c.prompt = SomeTokens(300, vocab, random);
        c.output = SomeTokens(i * 5, vocab, random);
        if (i % 4 == 0) c.params.repetition = i % 3 == 0 ? 1.3f : 0.9f;
        if (i % 6 != 0) c.params.presence = 0.7f;
        if (i % 6 != 2) c.params.frequency = i % 3 == 0 ? -0.33f : 0.1f;
      }
      if (i % 3 == 0) {
        std::set<int32_t> ids;
        while (ids.size() < std::min<size_t>(static_cast<size_t>(i) * 6 + 1, kSamplerBiasMax)) ids.insert(static_cast<int32_t>(random() % vocab));
        for (int32_t id : ids) c.bias.emplace_back(id, normal(random) * 3);
      }
      if (i % 5 == 0) c.bans = SomeTokens(i + 1, vocab, random);
      if (i % 5 == 1) c.params.token_limit = vocab - 267;
      if (i % 4 == 1) {
        c.masked = true;
        c.mask.resize((vocab + 31) / 32 - i % 3);
        for (uint32_t& word : c.mask) word = static_cast<uint32_t>(random() & random());
      }
      cases.push_back(c);
    }
    // All but one token banned, by a mask and by a bias that is in the other direction.
    Case c = cases[1];
    c.masked = true;
    c.mask.assign((vocab + 31) / 32, 0);
    c.mask[vocab / 64] = 4;
    cases.push_back(c);
    ExpectTokens(cases, 0);
    if (vocab < kVocab) ExpectTokens(cases, 1);
    ExpectTokens(cases, 4);
  }
}

TEST(Sampler, TokensAppendedStepByStepLeaveTheStateOfAFill) {
  std::mt19937_64 random(7);
  std::normal_distribution<float> normal(0, 1);
  Case c = Rows([&](int) { return normal(random); }, 4096, random)[1];
  c.params.repetition = 1.2f;
  c.params.frequency = 0.5f;
  c.prompt = SomeTokens(50, 4096, random);
  std::vector<Case> cases = {c, c, c};
  Batch batch(cases);
  for (int step = 0; step < 12; ++step) {
    for (size_t i = 0; i < cases.size(); ++i) batch.rows()[i].draw = cases[i].params.draw = random() >> 11;
    const std::vector<SamplerResult> got = batch.Run();
    for (size_t i = 0; i < cases.size(); ++i) {
      ASSERT_EQ(got[i].token, Oracle(cases[i]).token) << step << " " << i;
      cases[i].output.push_back(got[i].token);
      batch.rows()[i].append = got[i].token;
    }
  }
}

TEST(Sampler, LogprobsAreTheLogSoftmaxOfTheRawRow) {
  std::mt19937_64 random(8);
  std::normal_distribution<float> normal(0, 3);
  for (int vocab : {40, 1000, kVocab}) {
    std::vector<Case> cases = Rows([&](int) { return normal(random); }, vocab, random), peaked = Rows([&](int i) { return i == 3 ? 60.0f : std::round(normal(random)); }, vocab, random);
    cases.insert(cases.end(), peaked.begin(), peaked.end());
    for (size_t i = 0; i < cases.size(); ++i) {
      cases[i].params.logprobs = static_cast<int>(i * 3 % (kSamplerLogprobsMax + 1));
      if (i % 2 == 0) cases[i].bans = {3, 5};  // seen in the token, not in the probabilities
    }
    const std::vector<SamplerResult> got = Batch(cases).Run();
    for (size_t i = 0; i < cases.size(); ++i) {
      std::vector<double> l;
      for (const __nv_bfloat16 v : cases[i].logits) l.push_back(ToFloat(v));
      const double maximum = *std::max_element(l.begin(), l.end());
      double total = 0;
      for (double v : l) total += std::exp(v - maximum);
      const double normaliser = maximum + std::log(total);
      ASSERT_EQ(got[i].token, Oracle(cases[i]).token) << i;
      EXPECT_NEAR(got[i].logprob, l[got[i].token] - normaliser, 1e-6 + 1e-7 * std::abs(l[got[i].token] - normaliser)) << i;
      std::vector<int> order(l.size());
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return l[a] > l[b]; });
      for (int n = 0; n < cases[i].params.logprobs; ++n) {
        ASSERT_EQ(got[i].top_token[n], order[n]) << i << " " << n;
        EXPECT_NEAR(got[i].top_logprob[n], l[order[n]] - normaliser, 1e-6 + 1e-7 * std::abs(l[order[n]] - normaliser)) << i << " " << n;
      }
    }
  }
}

__global__ void WeighKernel(const float* scaled, const float* maximum, uint64_t* weights, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) weights[i] = SamplingWeight(scaled[i], maximum[i]);
}

TEST(Sampler, WeightsHaveTheHostsBits) {
  std::mt19937 random(9);
  std::uniform_real_distribution<float> place(-31, 0);
  std::vector<float> scaled(1 << 20), maximum(scaled.size());
  for (size_t i = 0; i < scaled.size(); ++i) {
    maximum[i] = place(random) + 10;
    scaled[i] = i % 1000 == 0 ? -kInf : maximum[i] + place(random);
  }
  DeviceBuffer<float> device_scaled(scaled), device_maximum(maximum);
  DeviceBuffer<uint64_t> weights(scaled.size());
  WeighKernel<<<static_cast<unsigned>(scaled.size() / 256), 256>>>(device_scaled.get(), device_maximum.get(), weights.get(), static_cast<int>(scaled.size()));
  CUDA_MUST(cudaGetLastError());
  CUDA_MUST(cudaDeviceSynchronize());
  const std::vector<uint64_t> got = weights.Download();
  for (size_t i = 0; i < scaled.size(); ++i) ASSERT_EQ(got[i], SamplingWeight(scaled[i], maximum[i])) << scaled[i] << " " << maximum[i];
}

TEST(Sampler, RefusesWhatItCannotTake) {
  EXPECT_FALSE(SamplerTakes(1001));
  EXPECT_FALSE(SamplerTakes(8 << 20));
  EXPECT_TRUE(SamplerTakes(kVocab));
  EXPECT_EQ(Sample({.count = 1, .vocab = 1001}, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(Sample({.count = 0, .vocab = kVocab}, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(Sample({.count = 1, .vocab = kVocab}, nullptr, 1), cudaErrorInvalidValue);
  EXPECT_EQ(Sample({.count = 1, .vocab = kVocab}, nullptr, 3), cudaErrorInvalidValue);
}

// us a step and the share of reading the rows once at copy speed. Logits as of a language model (a few likely tokens, noise below) and, as
// the worst case of the histograms, noise.
void Measure(const std::string& name, const Params& params, float peak, int rows, int cluster, bool penalties = false) {
  std::mt19937_64 random(1);
  DeviceBuffer<__nv_bfloat16> logits(static_cast<size_t>(rows) * kVocab * 2);
  FillNoise(logits.get(), logits.count(), 2.0f, 7, nullptr);
  std::vector<__nv_bfloat16> likely(64);
  for (int r = 0; r < 2 * rows && peak > 0; ++r) {
    for (size_t i = 0; i < likely.size(); ++i) likely[i] = __float2bfloat16_rn(peak - 0.1f * static_cast<float>(i));
    CUDA_MUST(cudaMemcpy(logits.get() + static_cast<size_t>(r) * kVocab + 1000 + random() % 100000, likely.data(), likely.size() * 2, cudaMemcpyHostToDevice));
  }
  DeviceBuffer<uint16_t> state(penalties ? static_cast<size_t>(rows) * kVocab : 0);
  if (penalties) CUDA_MUST(cudaMemset(state.get(), 0, state.count() * 2));
  std::vector<SamplerRow> host(rows);
  for (int r = 0; r < rows; ++r) {
    host[r] = {.draw = random() >> 11, .top_p = TopPFraction(params.top_p), .min_p = MinPWeight(params.min_p), .temperature = params.temperature, .top_k = params.top_k,
               .presence = params.presence, .state = penalties ? r : -1, .logits_row = r, .logprobs = params.logprobs};
  }
  const DeviceBuffer<SamplerRow> device(host);
  DeviceBuffer<SamplerResult> results(rows);
  const double seconds = TimeGraph(
      [&](int i, cudaStream_t stream) {
        CUDA_MUST(Sample({.logits = logits.get() + (i % 2) * static_cast<size_t>(rows) * kVocab, .rows = device.get(), .state = state.get(), .results = results.get(),
                          .count = rows, .vocab = kVocab}, stream, cluster));
      },
      10);
  const double passes = 1.0 + (penalties ? 1 : 0) + (params.logprobs >= 0 ? 1 : 0);
  PrintRow("sampler." + name + ".B" + std::to_string(rows), seconds, passes * 2.0 * rows * kVocab);
}

TEST(Sampler, Speed) {
  const Params usual{.temperature = 0.7f, .top_p = 0.8f, .top_k = 20};
  for (int rows : {1, 8, 32, 256}) {
    Measure("greedy", {.temperature = 0}, 25, rows, 0);
    Measure("temperature", {.temperature = 1}, 25, rows, 0);
    Measure("top_k20_p0.8", usual, 25, rows, 0);
    Measure("top_p0.95", {.temperature = 1, .top_p = 0.95f}, 25, rows, 0);
  }
  Measure("noise_temperature", {.temperature = 1}, 0, 256, 0);
  Measure("noise_top_p0.95", {.temperature = 1, .top_p = 0.95f}, 0, 256, 0);
  Measure("penalties", {.temperature = 0.7f, .top_p = 0.8f, .top_k = 20, .presence = 1.0f}, 25, 256, 0, true);
  Measure("logprobs5", {.temperature = 1, .logprobs = 5}, 25, 256, 0);
  Measure("logprobs20", {.temperature = 1, .logprobs = 20}, 25, 256, 0);
  for (int cluster : {4, 8}) Measure("cluster" + std::to_string(cluster), usual, 25, 16, cluster);
  for (int cluster : {4, 8}) Measure("cluster" + std::to_string(cluster), usual, 25, 256, cluster);
}

}  // namespace
}  // namespace qwen::kernels::testing
