// Each op against plain loops in double; roundings against bf16 arithmetic written out by hand.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <complex>
#include <numeric>
#include <random>

#include "stage/ops/attention.h"
#include "stage/ops/linear.h"
#include "stage/ops/moe.h"
#include "stage/ops/norm.h"
#include "stage/ops/rotary.h"

namespace qwen::ops {
namespace {

at::Tensor Random(at::IntArrayRef sizes, uint64_t seed) {
  at::manual_seed(seed);
  return at::randn(sizes);
}
double At(const at::Tensor& t, at::IntArrayRef index) {
  at::Tensor x = t;
  for (int64_t i : index) x = x[i];
  return x.item<double>();
}
// Round to nearest, ties to even, on the upper 16 bits of a float32.
float ToBf16(float x) {
  uint32_t bits = std::bit_cast<uint32_t>(x);
  bits += 0x7fff + ((bits >> 16) & 1);
  return std::bit_cast<float>(bits & 0xffff0000u);
}

TEST(Linear, GroupedRowsHaveTheBitsThatTheyHaveAlone) {
  for (at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const at::Tensor x = Random({11, 64}, 1).to(dtype), weight = Random({48, 64}, 2).to(dtype), bias = Random({48}, 3).to(dtype);
    const RowGroups groups = {{0, 1}, {1, 7}, {8, 1}, {9, 2}};
    for (const at::Tensor& b : {at::Tensor(), bias}) {
      const at::Tensor together = Linear(x, weight, b, groups);
      for (const RowGroup& group : groups) {
        const at::Tensor alone = Linear(x.narrow(0, group.begin, group.count), weight, b, {{0, group.count}});
        EXPECT_TRUE(together.narrow(0, group.begin, group.count).equal(alone));
      }
    }
  }
}

TEST(Linear, IsTheProductWithTheTransposedWeightPlusBias) {
  const at::Tensor x = Random({3, 5}, 1), weight = Random({4, 5}, 2), bias = Random({4}, 3);
  const at::Tensor y = Linear(x, weight, bias, {{0, 3}});
  for (int r = 0; r < 3; ++r) {
    for (int o = 0; o < 4; ++o) {
      double sum = At(bias, {o});
      for (int i = 0; i < 5; ++i) sum += At(x, {r, i}) * At(weight, {o, i});
      EXPECT_NEAR(At(y, {r, o}), sum, 1e-5);
    }
  }
}

TEST(Silu, GroupedRowsHaveTheBitsThatTheyHaveAlone) {
  const at::Tensor x = Random({9, 21}, 4);  // 21: no multiple of any vector length
  const RowGroups groups = {{0, 1}, {1, 5}, {6, 3}};
  const at::Tensor together = Silu(x, groups);
  for (const RowGroup& group : groups) {
    const at::Tensor rows = x.narrow(0, group.begin, group.count);
    EXPECT_TRUE(together.narrow(0, group.begin, group.count).equal(Silu(rows, {{0, group.count}})));
  }
  for (int i = 0; i < 21; ++i) EXPECT_NEAR(At(together, {7, i}), At(x, {7, i}) / (1 + std::exp(-At(x, {7, i}))), 1e-6);
}

TEST(RmsNorm, DividesByTheRootMeanSquareInFloat32) {
  const at::Tensor x = Random({3, 64}, 4) * 5, weight = Random({64}, 5);
  const at::Tensor y = RmsNorm(x, weight, 1e-6);
  for (int r = 0; r < 3; ++r) {
    double square = 0;
    for (int i = 0; i < 64; ++i) square += At(x, {r, i}) * At(x, {r, i});
    for (int i = 0; i < 64; ++i) {
      EXPECT_NEAR(At(y, {r, i}), At(weight, {i}) * At(x, {r, i}) / std::sqrt(square / 64 + 1e-6), 1e-5);
    }
  }
}

TEST(RmsNorm, RoundsToBf16BeforeAndAfterTheWeight) {
  const at::Tensor x = Random({4, 32}, 6).to(at::kBFloat16), weight = Random({32}, 7).to(at::kBFloat16);
  const at::Tensor y = RmsNorm(x, weight, 1e-6);
  int one_rounding_differs = 0;
  for (int r = 0; r < 4; ++r) {
    double square = 0;
    for (int i = 0; i < 32; ++i) square += At(x, {r, i}) * At(x, {r, i});
    const float scale = static_cast<float>(1.0 / std::sqrt(square / 32 + 1e-6));
    for (int i = 0; i < 32; ++i) {
      const float normalised = static_cast<float>(At(x, {r, i})) * scale, w = static_cast<float>(At(weight, {i}));
      EXPECT_EQ(At(y, {r, i}), ToBf16(w * ToBf16(normalised))) << r << " " << i;
      one_rounding_differs += ToBf16(w * normalised) != ToBf16(w * ToBf16(normalised));
    }
  }
  EXPECT_GT(one_rounding_differs, 0);  // else this test could not tell
}

TEST(Rotary, InterleavedSectionsOfTheReleasedModelsAre24TAnd20HAnd20W) {
  const auto frequencies = MakeRotaryFrequencies({.head_dim = 128, .theta = 5e6, .mrope_section = {24, 20, 20}}, at::kCPU);
  std::array<int, 3> count{};
  for (int i = 0; i < 64; ++i) {
    const int axis = static_cast<int>(At(frequencies.axis, {i}));
    ++count[axis];
    const int expected = i >= 60 ? 0 : i % 3;  // T 0,3,..,57 and 60..63; H 1,4,..,58; W 2,5,..,59
    EXPECT_EQ(axis, expected) << i;
  }
  EXPECT_EQ(count, (std::array<int, 3>{24, 20, 20}));
}

TEST(Rotary, TurnsTheHalvesOfAHeadTogetherByPositionTimesFrequency) {
  const int d = 32, heads = 3;
  const RotaryOptions options{.head_dim = d, .theta = 10000.0, .mrope_section = {8, 4, 4}};
  const auto frequencies = MakeRotaryFrequencies(options, at::kCPU);
  const std::vector<std::array<float, 3>> positions = {{0, 0, 0}, {5, 5, 5}, {7, 9, 12}, {300, 2, 41}};
  at::Tensor position = at::empty({3, 4});
  for (int t = 0; t < 4; ++t) {
    for (int axis = 0; axis < 3; ++axis) position[axis][t] = positions[t][axis];
  }
  const at::Tensor x = Random({4, heads, d}, 8);
  const at::Tensor y = ApplyRotary(x, MakeRotaryTable(frequencies, position, at::kFloat, {{0, 4}}));
  for (int t = 0; t < 4; ++t) {
    for (int i = 0; i < d / 2; ++i) {
      const int axis = i < 12 ? i % 3 : 0;  // sections of 4 reach up to 3 * 4
      const double angle = positions[t][axis] * std::pow(10000.0, -2.0 * i / d);
      for (int h = 0; h < heads; ++h) {
        const std::complex<double> turned =
            std::complex<double>(At(x, {t, h, i}), At(x, {t, h, i + d / 2})) * std::polar(1.0, angle);
        EXPECT_NEAR(At(y, {t, h, i}), turned.real(), 2e-4);
        EXPECT_NEAR(At(y, {t, h, i + d / 2}), turned.imag(), 2e-4);
      }
    }
  }
}

TEST(Rotary, InBf16EveryProductAndTheSumAreRounded) {
  const auto frequencies = MakeRotaryFrequencies({.head_dim = 8, .theta = 100.0}, at::kCPU);
  const at::Tensor position = at::full({3, 1}, 3.0);
  const at::Tensor x = Random({1, 1, 8}, 9).to(at::kBFloat16);
  const at::Tensor y = ApplyRotary(x, MakeRotaryTable(frequencies, position, at::kBFloat16, {{0, 1}}));
  for (int i = 0; i < 4; ++i) {
    const double angle = 3.0 * std::pow(100.0, -i / 4.0);
    const float c = ToBf16(static_cast<float>(std::cos(angle))), s = ToBf16(static_cast<float>(std::sin(angle)));
    const float a = static_cast<float>(At(x, {0, 0, i})), b = static_cast<float>(At(x, {0, 0, i + 4}));
    EXPECT_EQ(At(y, {0, 0, i}), ToBf16(ToBf16(a * c) + ToBf16(-b * s)));
    EXPECT_EQ(At(y, {0, 0, i + 4}), ToBf16(ToBf16(b * c) + ToBf16(a * s)));
  }
}

TEST(Rotary, YarnKeepsFastFrequenciesSlowsSlowOnesAndScales) {
  const double factor = 4.0, theta = 1e6, original = 32768;
  const int d = 128;
  const auto f = MakeRotaryFrequencies({.head_dim = d, .theta = theta, .yarn = {.factor = factor, .original_max_positions = 32768}}, at::kCPU);
  EXPECT_DOUBLE_EQ(f.scaling, 0.1 * std::log(4.0) + 1.0);
  const auto dimension = [&](double rotations) { return d * std::log(original / (rotations * 2 * M_PI)) / (2 * std::log(theta)); };
  const double low = std::floor(dimension(32)), high = std::ceil(dimension(1));
  int kept = 0, slowed = 0;
  for (int i = 0; i < d / 2; ++i) {
    const double plain = std::pow(theta, -2.0 * i / d);
    const double ramp = std::clamp((i - low) / (high - low), 0.0, 1.0);
    EXPECT_NEAR(At(f.inverse, {i}) / (plain * (1 - ramp) + plain / factor * ramp), 1.0, 1e-5) << i;
    kept += ramp == 0.0;
    slowed += ramp == 1.0;
  }
  EXPECT_GT(kept, 10);
  EXPECT_GT(slowed, 10);
  const at::Tensor position = at::ones({3, 1});
  EXPECT_NEAR(At(MakeRotaryTable(f, position, at::kFloat, {{0, 1}}).cos, {0, 0}), std::cos(1.0) * f.scaling, 1e-6);
}

// One sequence of the attention test: what its whole history of k and v is.
struct Sequence {
  int64_t kv_begin, rows;
  std::vector<int64_t> blocks;
  at::Tensor q, k, v;  // (kv_begin + rows, heads, d): all positions; the batch computes the last `rows`
};

void WriteHistory(const PagedKv& cache, const Sequence& sequence, int64_t block_tokens) {
  for (int64_t i = 0; i < sequence.kv_begin; ++i) {
    cache.keys[sequence.blocks[i / block_tokens]][i % block_tokens].copy_(sequence.k[i]);
    cache.values[sequence.blocks[i / block_tokens]][i % block_tokens].copy_(sequence.v[i]);
  }
}

TEST(PagedAttention, AMixedBatchOverScatteredBlocksEqualsPlainLoops) {
  const int64_t heads = 4, kv_heads = 2, d = 8, block_tokens = 4;
  const PagedKv cache{at::full({16, block_tokens, kv_heads, d}, NAN), at::full({16, block_tokens, kv_heads, d}, NAN)};
  std::vector<Sequence> sequences;
  const auto add = [&](int64_t kv_begin, int64_t rows, std::vector<int64_t> blocks, uint64_t seed) {
    const int64_t n = kv_begin + rows;
    sequences.push_back({kv_begin, rows, std::move(blocks), Random({n, heads, d}, seed), Random({n, kv_heads, d}, seed + 1),
                         Random({n, kv_heads, d}, seed + 2)});
  };
  add(9, 1, {15, 0, 7}, 10);  // decode
  add(0, 6, {3, 2}, 20);      // a whole prompt
  add(5, 7, {9, 1, 12}, 30);  // a chunk behind a prefix
  add(0, 1, {5}, 40);         // a prompt of one token

  std::vector<at::Tensor> q, k, v;
  std::vector<int64_t> slots;
  std::vector<AttentionSpan> spans;
  int64_t row = 0;
  for (const Sequence& s : sequences) {
    WriteHistory(cache, s, block_tokens);
    q.push_back(s.q.narrow(0, s.kv_begin, s.rows));
    k.push_back(s.k.narrow(0, s.kv_begin, s.rows));
    v.push_back(s.v.narrow(0, s.kv_begin, s.rows));
    for (int64_t i = s.kv_begin; i < s.kv_begin + s.rows; ++i) {
      slots.push_back(s.blocks[i / block_tokens] * block_tokens + i % block_tokens);
    }
    spans.push_back({row, s.rows, s.kv_begin, at::tensor(s.blocks), CausalMask(s.kv_begin, s.rows, at::kCPU)});
    row += s.rows;
  }
  const double scale = 0.3;
  const at::Tensor out = PagedAttention(at::cat(q), at::cat(k), at::cat(v), cache, at::tensor(slots), spans, scale);
  ASSERT_EQ(out.sizes(), (std::vector<int64_t>{row, heads * d}));

  row = 0;
  for (const Sequence& s : sequences) {
    for (int64_t i = s.kv_begin; i < s.kv_begin + s.rows; ++i, ++row) {
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t g = h / (heads / kv_heads);
        std::vector<double> weight(i + 1);
        double total = 0;
        for (int64_t j = 0; j <= i; ++j) {
          double dot = 0;
          for (int64_t c = 0; c < d; ++c) dot += At(s.q, {i, h, c}) * At(s.k, {j, g, c});
          total += weight[j] = std::exp(dot * scale);
        }
        for (int64_t c = 0; c < d; ++c) {
          double expected = 0;
          for (int64_t j = 0; j <= i; ++j) expected += weight[j] / total * At(s.v, {j, g, c});
          ASSERT_NEAR(At(out, {row, h * d + c}), expected, 1e-5) << "row " << row << " head " << h;
        }
      }
    }
    // The new tokens are in the cache now.
    for (int64_t i = s.kv_begin; i < s.kv_begin + s.rows; ++i) {
      EXPECT_TRUE(cache.keys[s.blocks[i / block_tokens]][i % block_tokens].equal(s.k[i]));
      EXPECT_TRUE(cache.values[s.blocks[i / block_tokens]][i % block_tokens].equal(s.v[i]));
    }
  }
  EXPECT_TRUE(cache.keys[4].isnan().all().item<bool>());  // a block of nobody is untouched
}

TEST(Route, TakesTheMostLikelyAndTheLowerIdAtATie) {
  const at::Tensor logits = at::tensor({1.0f, 3.0f, 2.0f, 3.0f, 2.0f}).unsqueeze(0);
  const Routing routing = Route(logits, 3, RouterWeights::kNormalised, RouterTies::kLowestExpert);
  EXPECT_EQ(At(routing.experts, {0, 0}), 1);
  EXPECT_EQ(At(routing.experts, {0, 1}), 3);
  EXPECT_EQ(At(routing.experts, {0, 2}), 2);
  const double total = 2 * std::exp(3.0) + std::exp(2.0);
  EXPECT_NEAR(At(routing.weights, {0, 0}), std::exp(3.0) / total, 1e-6);
  EXPECT_NEAR(At(routing.weights, {0, 2}), std::exp(2.0) / total, 1e-6);
}

TEST(Route, WithoutNormalisationTheWeightsAreTheSoftmaxOverAllExperts) {
  const at::Tensor logits = at::tensor({0.0f, 1.0f, 2.0f}).unsqueeze(0);
  for (RouterTies ties : {RouterTies::kLowestExpert, RouterTies::kTopk}) {
    const Routing routing = Route(logits, 1, RouterWeights::kAsIs, ties);
    EXPECT_NEAR(At(routing.weights, {0, 0}), std::exp(2.0) / (1 + std::exp(1.0) + std::exp(2.0)), 1e-6);
  }
}

TEST(Route, Bf16LogitsGiveWeightsOfFloat32RoundedOnce) {
  const at::Tensor logits = (Random({5, 16}, 50) * 2).to(at::kBFloat16);
  const Routing routing = Route(logits, 4, RouterWeights::kNormalised, RouterTies::kLowestExpert);
  EXPECT_EQ(routing.weights.scalar_type(), at::kBFloat16);
  for (int t = 0; t < 5; ++t) {
    double total = 0;
    for (int k = 0; k < 4; ++k) total += std::exp(At(logits, {t, routing.experts[t][k].item<int64_t>()}));
    for (int k = 0; k < 4; ++k) {
      const double exact = std::exp(At(logits, {t, routing.experts[t][k].item<int64_t>()})) / total;
      EXPECT_NEAR(At(routing.weights, {t, k}), exact, exact * (1.0 / 256 + 1e-5));
    }
  }
}

class ExpertsTest : public ::testing::Test {
 protected:
  static constexpr int64_t kTokens = 7, kHidden = 12, kIntermediate = 10, kExperts = 5, kTop = 2;
  at::Tensor x = Random({kTokens, kHidden}, 60);
  ExpertWeights weights = MakeExpertWeights(Random({kExperts, 2 * kIntermediate, kHidden}, 61), Random({kExperts, kHidden, kIntermediate}, 62));
  Routing routing = Route(Random({kTokens, kExperts}, 63), kTop, RouterWeights::kNormalised, RouterTies::kLowestExpert);
};

TEST_F(ExpertsTest, EqualTheSumOverTheChosenExpertsInPlainLoops) {
  const at::Tensor y = Experts(x, routing, weights, {{0, kTokens}});
  for (int64_t t = 0; t < kTokens; ++t) {
    std::vector<double> expected(kHidden, 0.0);
    for (int64_t k = 0; k < kTop; ++k) {
      const int64_t e = routing.experts[t][k].item<int64_t>();
      std::vector<double> inner(kIntermediate);
      for (int64_t i = 0; i < kIntermediate; ++i) {
        double gate = 0, up = 0;
        for (int64_t c = 0; c < kHidden; ++c) {
          gate += At(x, {t, c}) * At(weights.gate_up, {e, i, c});
          up += At(x, {t, c}) * At(weights.gate_up, {e, kIntermediate + i, c});
        }
        inner[i] = gate / (1 + std::exp(-gate)) * up;
      }
      for (int64_t o = 0; o < kHidden; ++o) {
        double sum = 0;
        for (int64_t i = 0; i < kIntermediate; ++i) sum += inner[i] * At(weights.down, {e, o, i});
        expected[o] += sum * At(routing.weights, {t, k});
      }
    }
    for (int64_t o = 0; o < kHidden; ++o) EXPECT_NEAR(At(y, {t, o}), expected[o], 2e-4);
  }
}

TEST_F(ExpertsTest, RowsOfAGroupHaveTheBitsThatTheyHaveAlone) {
  const RowGroups groups = {{0, 1}, {1, 4}, {5, 2}};
  const at::Tensor together = Experts(x, routing, weights, groups);
  for (const RowGroup& group : groups) {
    const Routing part{routing.experts.narrow(0, group.begin, group.count), routing.weights.narrow(0, group.begin, group.count)};
    const at::Tensor alone = Experts(x.narrow(0, group.begin, group.count), part, weights, {{0, group.count}});
    EXPECT_TRUE(together.narrow(0, group.begin, group.count).equal(alone));
  }
}

}  // namespace
}  // namespace qwen::ops
