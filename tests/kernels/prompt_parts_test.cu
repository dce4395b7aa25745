// Goal: the kernels around a prompt's products equal plain loops: rows by index, norms, angles, rotation with KV write, the
// permutation of a MoE block and its way back.
#include <algorithm>
#include <numeric>
#include <set>

#include "stage/kernels/embedding.h"
#include "stage/kernels/moe_prefill.h"
#include "stage/kernels/rms_norm.h"
#include "stage/kernels/rope.h"
#include "tests/kernels/harness.h"

namespace qwen::kernels::testing {
namespace {

TEST(GatherRows, CopiesEachRowByItsIndex) {
  for (const int width : {8, 264, 2048, 4096}) {
    const int rows = 37, count = 101;
    const auto table = RandomBf16(size_t(rows) * width, 1.0, 1);
    std::vector<int32_t> ids(count);
    for (int i = 0; i < count; ++i) ids[i] = (i * 29) % rows;
    DeviceBuffer dt(table);
    DeviceBuffer di(ids);
    DeviceBuffer<__nv_bfloat16> out(size_t(count) * width);
    out.Poison();
    CUDA_OK(GatherRows(dt.get(), di.get(), out.get(), count, width, nullptr));
    const auto got = out.Download();
    for (int i = 0; i < count; ++i) {
      for (int c = 0; c < width; ++c) ASSERT_EQ(ToFloat(got[size_t(i) * width + c]), ToFloat(table[size_t(ids[i]) * width + c])) << i << " " << c;
    }
  }
}

// weight * bf16(x / rms), of each row.
std::vector<double> NormOracle(const std::vector<__nv_bfloat16>& x, const std::vector<__nv_bfloat16>& weight) {
  const size_t hidden = weight.size();
  std::vector<double> want(x.size());
  for (size_t row = 0; row < x.size(); row += hidden) {
    double squares = 0;
    for (size_t i = 0; i < hidden; ++i) squares += double(ToFloat(x[row + i])) * ToFloat(x[row + i]);
    for (size_t i = 0; i < hidden; ++i) want[row + i] = RoundToBf16(RoundToBf16(ToFloat(x[row + i]) / std::sqrt(squares / hidden + 1e-6)) * ToFloat(weight[i]));
  }
  return want;
}

TEST(RmsNorm, EqualsTheOracleAtEveryWidth) {
  for (const int hidden : {8, 256, 2048, 2056, 4096, 8192, 16384}) {
    const int tokens = 5;
    const auto x = RandomBf16(size_t(tokens) * hidden, 3.0, 1), weight = RandomBf16(hidden, 1.0, 2);
    DeviceBuffer dx(x), dw(weight);
    DeviceBuffer<__nv_bfloat16> y(size_t(tokens) * hidden);
    y.Poison();
    CUDA_OK(RmsNorm({.x = dx.get(), .weight = dw.get(), .y = y.get(), .eps = 1e-6f, .tokens = tokens, .hidden = hidden}, nullptr));
    const std::vector<double> want = NormOracle(x, weight);
    const Difference d = Compare(y.Download(), want);
    EXPECT_EQ(d.nan, 0u);
    EXPECT_LT(d.relative(), 1e-3) << hidden;  // a rounding may fall the other way in a few of a thousand values
  }
}

TEST(RmsNorm, AddsToTheResidualStreamFirst) {
  for (const int hidden : {8, 2048, 4104, 16384}) {
    const int tokens = 5;
    const auto x = RandomBf16(size_t(tokens) * hidden, 3.0, 1), weight = RandomBf16(hidden, 1.0, 2), add = RandomBf16(size_t(tokens) * hidden, 3.0, 3);
    DeviceBuffer dx(x), dw(weight), da(add);
    DeviceBuffer<__nv_bfloat16> y(size_t(tokens) * hidden);
    y.Poison();
    CUDA_OK(RmsNorm({.x = dx.get(), .weight = dw.get(), .y = y.get(), .add = da.get(), .sum = dx.get(), .tokens = tokens, .hidden = hidden}, nullptr));
    const auto sum = dx.Download();
    for (size_t i = 0; i < sum.size(); ++i) ASSERT_EQ(ToFloat(sum[i]), RoundToBf16(double(ToFloat(x[i])) + ToFloat(add[i]))) << hidden << " " << i;
    const Difference d = Compare(y.Download(), NormOracle(sum, weight));
    EXPECT_EQ(d.nan, 0u);
    EXPECT_LT(d.relative(), 1e-3) << hidden;
  }
  DeviceBuffer<__nv_bfloat16> x(8);
  EXPECT_EQ(cudaErrorInvalidValue, RmsNorm({.x = x.get(), .weight = x.get(), .y = x.get(), .add = x.get(), .tokens = 1, .hidden = 8}, nullptr)) << "add without sum";
}

TEST(RotaryTable, TakesEachFrequencyFromItsAxis) {
  const int tokens = 70;
  std::vector<int32_t> positions(3 * tokens), axis(64);
  for (int t = 0; t < tokens; ++t) {
    positions[t] = t * 900;
    positions[tokens + t] = t * 3;
    positions[2 * tokens + t] = 65000 - t;
  }
  std::vector<float> inverse(64);
  for (int i = 0; i < 64; ++i) {
    axis[i] = i < 60 ? i % 3 : 0;
    inverse[i] = static_cast<float>(std::pow(5e6, -i / 64.0));
  }
  DeviceBuffer dp(positions), da(axis);
  DeviceBuffer di(inverse);
  DeviceBuffer<__nv_bfloat16> out(size_t(tokens) * 128);
  out.Poison();
  CUDA_OK(RotaryTable({.positions = dp.get(), .inverse = di.get(), .axis = da.get(), .cos_sin = out.get(), .scaling = 1.25f, .tokens = tokens}, nullptr));
  const auto got = out.Download();
  for (int t = 0; t < tokens; ++t) {
    for (int i = 0; i < 64; ++i) {
      // The angle is a float32 product, as in the reference; its cosine is exact to bf16.
      const double angle = static_cast<float>(positions[axis[i] * tokens + t]) * inverse[i];
      EXPECT_NEAR(ToFloat(got[size_t(t) * 128 + i]), 1.25 * std::cos(angle), 0.006) << t << " " << i;
      EXPECT_NEAR(ToFloat(got[size_t(t) * 128 + 64 + i]), 1.25 * std::sin(angle), 0.006) << t << " " << i;
    }
  }
}

TEST(RopeKvWrite, RotatesInPlaceAndFillsTheCache) {
  for (const auto& [heads, kv_heads] : {std::pair{32, 4}, {64, 4}, {3, 1}}) {
    const int tokens = 9, width = (heads + 2 * kv_heads) * 128, rows = 40;
    const auto qkv = RandomBf16(size_t(tokens) * width, 1.0, 1), qn = RandomBf16(128, 1.0, 2), kn = RandomBf16(128, 1.0, 3);
    std::vector<__nv_bfloat16> cs(size_t(tokens) * 128);
    for (int t = 0; t < tokens; ++t) {
      for (int i = 0; i < 64; ++i) {
        cs[size_t(t) * 128 + i] = __float2bfloat16_rn(std::cos(t * 0.1 * i));
        cs[size_t(t) * 128 + 64 + i] = __float2bfloat16_rn(std::sin(t * 0.1 * i));
      }
    }
    std::vector<int64_t> slot(tokens);
    for (int t = 0; t < tokens; ++t) slot[t] = (t * 7 + 3) % rows;
    DeviceBuffer dq(qkv), dqn(qn), dkn(kn), dcs(cs);
    DeviceBuffer ds(slot);
    DeviceBuffer<__nv_bfloat16> k(size_t(rows) * kv_heads * 128), v(size_t(rows) * kv_heads * 128);
    k.Poison();
    v.Poison();
    CUDA_OK(RopeKvWrite({.qkv = dq.get(), .q_norm = dqn.get(), .k_norm = dkn.get(), .cos_sin = dcs.get(), .slot = ds.get(), .k_cache = k.get(), .v_cache = v.get(),
                         .tokens = tokens, .heads = heads, .kv_heads = kv_heads}, nullptr));
    const auto got = dq.Download(), gk = k.Download(), gv = v.Download();
    double worst = 0;
    for (int t = 0; t < tokens; ++t) {
      for (int h = 0; h < heads + 2 * kv_heads; ++h) {
        const size_t at = size_t(t) * width + h * 128;
        std::vector<double> want(128);
        if (h < heads + kv_heads) {
          const auto& weight = h < heads ? qn : kn;
          double squares = 0;
          for (int i = 0; i < 128; ++i) squares += double(ToFloat(qkv[at + i])) * ToFloat(qkv[at + i]);
          std::vector<double> n(128);
          for (int i = 0; i < 128; ++i) n[i] = RoundToBf16(RoundToBf16(ToFloat(qkv[at + i]) / std::sqrt(squares / 128 + 1e-6)) * ToFloat(weight[i]));
          for (int i = 0; i < 128; ++i) {
            const double c = ToFloat(cs[size_t(t) * 128 + i % 64]), s = ToFloat(cs[size_t(t) * 128 + 64 + i % 64]);
            want[i] = n[i] * c + (i < 64 ? -n[i + 64] : n[i - 64]) * s;
          }
        } else {
          for (int i = 0; i < 128; ++i) want[i] = ToFloat(qkv[at + i]);
        }
        for (int i = 0; i < 128; ++i) {
          worst = std::max(worst, std::abs(want[i] - ToFloat(got[at + i])));
          if (h < heads) continue;
          const int kv = (h - heads) % kv_heads;
          const auto& cache = h < heads + kv_heads ? gk : gv;
          ASSERT_EQ(ToFloat(cache[(size_t(slot[t]) * kv_heads + kv) * 128 + i]), ToFloat(got[at + i])) << "cache " << t << " " << h << " " << i;
        }
      }
    }
    EXPECT_LT(worst, 0.08);  // values up to 8 in bf16: three roundings of 2^-6 at most
    EXPECT_GT(worst, 0.0);
  }
}

// Everything between the two products, with identity in place of them.
TEST(MoePrefill, PermutesByExpertAndComesBack) {
  for (const int tokens : {1, 31, 700, 5000}) {
    const MoeShapeArgs shape{.tokens = tokens, .hidden = 64, .inter = 32, .experts = 128, .top_k = 8};
    const int assignments = tokens * shape.top_k;
    const auto logits = RandomBf16(size_t(tokens) * shape.experts, 1.0, tokens), x = RandomBf16(size_t(tokens) * shape.hidden, 1.0, 2),
               residual = RandomBf16(size_t(tokens) * shape.hidden, 1.0, 3);
    DeviceBuffer dl(logits), dx(x), dr(residual);
    DeviceBuffer<int32_t> expert_of(assignments), count(shape.experts), end(shape.experts), source(assignments), row_of(assignments);
    DeviceBuffer<__nv_bfloat16> weight_of(assignments), rows(size_t(assignments) * shape.hidden), y(size_t(tokens) * shape.hidden);
    const MoePermutation permutation{expert_of.get(), weight_of.get(), count.get(), end.get(), source.get(), row_of.get()};
    CUDA_OK(MoePermute(shape, dl.get(), permutation, true, nullptr));
    CUDA_OK(GatherRows(dx.get(), source.get(), rows.get(), assignments, shape.hidden, nullptr));
    CUDA_OK(MoePrefillCombine(shape, rows.get(), permutation, dr.get(), y.get(), nullptr));
    const auto experts = expert_of.Download(), ends = end.Download(), sources = source.Download(), at = row_of.Download();
    const auto weights = weight_of.Download();
    const auto got = y.Download();
    std::vector<int> per_expert(shape.experts, 0);
    for (int t = 0; t < tokens; ++t) {
      // The k largest logits, lowest id first among equals; their softmax among themselves (the normalised weights).
      std::vector<int> order(shape.experts);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return ToFloat(logits[size_t(t) * 128 + a]) > ToFloat(logits[size_t(t) * 128 + b]); });
      double total = 0;
      for (int r = 0; r < 8; ++r) total += std::exp(double(ToFloat(logits[size_t(t) * 128 + order[r]])));
      std::vector<double> sum(shape.hidden, 0.0);
      for (int r = 0; r < 8; ++r) {
        const int a = t * 8 + r;
        ASSERT_EQ(experts[a], order[r]) << t << " " << r;
        EXPECT_NEAR(ToFloat(weights[a]), std::exp(double(ToFloat(logits[size_t(t) * 128 + order[r]]))) / total, 0.004);
        ++per_expert[order[r]];
        ASSERT_EQ(sources[at[a]], t);
        for (int i = 0; i < shape.hidden; ++i) sum[i] += RoundToBf16(double(ToFloat(x[size_t(t) * 64 + i])) * ToFloat(weights[a]));
      }
      for (int i = 0; i < shape.hidden; ++i) {
        ASSERT_NEAR(ToFloat(got[size_t(t) * 64 + i]), ToFloat(residual[size_t(t) * 64 + i]) + RoundToBf16(sum[i]), 0.03) << t << " " << i;
      }
    }
    int sum = 0;
    for (int e = 0; e < shape.experts; ++e) {
      EXPECT_EQ(ends[e], sum + per_expert[e]);
      for (int row = sum + 1; row < ends[e]; ++row) ASSERT_LT(sources[row - 1], sources[row]) << "rows of an expert are in order";
      sum += per_expert[e];
    }
    EXPECT_EQ(std::set<int>(at.begin(), at.end()).size(), size_t(assignments));
  }
}

TEST(MoePrefill, LeavesTheNextLayersNormToo) {
  for (const int hidden : {64, 2048, 2056, 4096, 16384}) {
    const MoeShapeArgs shape{.tokens = 9, .hidden = hidden, .inter = 32, .experts = 32, .top_k = 4};
    const int assignments = shape.tokens * shape.top_k;
    const auto logits = RandomBf16(size_t(shape.tokens) * shape.experts, 1.0, 1), weight = RandomBf16(hidden, 1.0, 4);
    DeviceBuffer dl(logits), dr(RandomBf16(size_t(shape.tokens) * hidden, 1.0, 3)), rows(RandomBf16(size_t(assignments) * hidden, 1.0, 2)), dw(weight);
    DeviceBuffer<int32_t> expert_of(assignments), count(shape.experts), end(shape.experts), source(assignments), row_of(assignments);
    DeviceBuffer<__nv_bfloat16> weight_of(assignments), y(size_t(shape.tokens) * hidden), alone(y.count()), normed(y.count());
    const MoePermutation permutation{expert_of.get(), weight_of.get(), count.get(), end.get(), source.get(), row_of.get()};
    CUDA_OK(MoePermute(shape, dl.get(), permutation, true, nullptr));
    y.Poison();
    normed.Poison();
    CUDA_OK(MoePrefillCombine(shape, rows.get(), permutation, dr.get(), alone.get(), nullptr));
    CUDA_OK(MoePrefillCombine(shape, rows.get(), permutation, dr.get(), y.get(), nullptr, {.weight = dw.get(), .y = normed.get()}));
    const auto sum = y.Download(), want = alone.Download();
    ASSERT_EQ(0, std::memcmp(sum.data(), want.data(), sum.size() * 2)) << hidden;
    const Difference d = Compare(normed.Download(), NormOracle(sum, weight));
    EXPECT_EQ(d.nan, 0u);
    EXPECT_LT(d.relative(), 1e-3) << hidden;
  }
}

TEST(SiluMul, EqualsTheOracle) {
  const int rows = 33, inter = 768;
  const auto gate_up = RandomBf16(size_t(rows) * 2 * inter, 2.0, 1);
  DeviceBuffer dg(gate_up);
  DeviceBuffer<__nv_bfloat16> h(size_t(rows) * inter);
  h.Poison();
  CUDA_OK(SiluMul(dg.get(), h.get(), rows, inter, nullptr));
  std::vector<double> want(size_t(rows) * inter);
  for (int r = 0; r < rows; ++r) {
    for (int i = 0; i < inter; ++i) {
      const double g = ToFloat(gate_up[size_t(r) * 2 * inter + i]), u = ToFloat(gate_up[size_t(r) * 2 * inter + inter + i]);
      want[size_t(r) * inter + i] = RoundToBf16(RoundToBf16(g / (1 + std::exp(-g))) * u);
    }
  }
  const Difference d = Compare(h.Download(), want);
  EXPECT_EQ(d.nan, 0u);
  EXPECT_LT(d.relative(), 1e-3);
}

TEST(PromptParts, Speed) {
  const int tokens = 16384, hidden = 2048, heads = 32, kv_heads = 4;
  const MoeShapeArgs shape{.tokens = tokens, .hidden = hidden, .inter = 768, .experts = 128, .top_k = 8};
  const size_t assignments = size_t(tokens) * 8;
  auto noise = [](size_t count) {
    DeviceBuffer<__nv_bfloat16> b(count);
    FillNoise(b.get(), count, 1.0f, 1, nullptr);
    return b;
  };
  auto x = noise(size_t(tokens) * hidden), y = noise(size_t(tokens) * hidden), weight = noise(hidden), rows = noise(assignments * hidden);
  auto qkv = noise(size_t(tokens) * (heads + 2 * kv_heads) * 128), norm = noise(128), cs = noise(size_t(tokens) * 128), logits = noise(size_t(tokens) * 128);
  auto k = noise(size_t(tokens) * kv_heads * 128), v = noise(size_t(tokens) * kv_heads * 128), gate_up = noise(assignments * 1536), h = noise(assignments * 768);
  std::vector<int64_t> slots(tokens);
  std::iota(slots.begin(), slots.end(), 0);
  DeviceBuffer ds(slots);
  DeviceBuffer<int32_t> expert_of(assignments), count(128), end(128), source(assignments), row_of(assignments);
  DeviceBuffer<__nv_bfloat16> weight_of(assignments);
  const MoePermutation permutation{expert_of.get(), weight_of.get(), count.get(), end.get(), source.get(), row_of.get()};
  auto time = [&](const char* name, double bytes, const std::function<void(cudaStream_t)>& run) {
    PrintRow(std::string(name) + ".30b.tokens16384", TimeGraph([&](int, cudaStream_t s) { run(s); }, 4), bytes);
  };
  time("rms_norm", 4.0 * tokens * hidden, [&](cudaStream_t s) { CUDA_MUST(RmsNorm({.x = x.get(), .weight = weight.get(), .y = y.get(), .tokens = tokens, .hidden = hidden}, s)); });
  time("rope_kv_write", 4.0 * tokens * (heads + kv_heads) * 128 + 6.0 * tokens * kv_heads * 128, [&](cudaStream_t s) {
    CUDA_MUST(RopeKvWrite({.qkv = qkv.get(), .q_norm = norm.get(), .k_norm = norm.get(), .cos_sin = cs.get(), .slot = ds.get(), .k_cache = k.get(), .v_cache = v.get(),
                           .tokens = tokens, .heads = heads, .kv_heads = kv_heads}, s));
  });
  time("moe_permute", 2.0 * tokens * 128 + 14.0 * assignments, [&](cudaStream_t s) { CUDA_MUST(MoePermute(shape, logits.get(), permutation, true, s)); });
  time("gather_rows", 4.0 * assignments * hidden, [&](cudaStream_t s) { CUDA_MUST(GatherRows(x.get(), source.get(), rows.get(), int(assignments), hidden, s)); });
  time("silu_mul", 6.0 * assignments * 768, [&](cudaStream_t s) { CUDA_MUST(SiluMul(gate_up.get(), h.get(), int(assignments), 768, s)); });
  time("moe_prefill_combine", 2.0 * assignments * hidden + 4.0 * tokens * hidden, [&](cudaStream_t s) {
    CUDA_MUST(MoePrefillCombine(shape, rows.get(), permutation, x.get(), y.get(), s));
  });
}

}  // namespace
}  // namespace qwen::kernels::testing
