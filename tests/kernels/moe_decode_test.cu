// Goal: MoeRoute, MoeGateUp, MoeDown and MoeCombine together equal a plain MoE block in double precision with the reference's
// roundings; ties go to the lowest expert; lists by expert are complete; touched experts are read at memory speed.
#include "stage/kernels/moe_decode.h"

#include <numeric>
#include <set>

#include "tests/kernels/harness.h"

namespace qwen::kernels::testing {
namespace {

struct Block {
  MoeShapeArgs shape;
  DeviceBuffer<int32_t> expert_of, order;
  DeviceBuffer<int4> group;
  DeviceBuffer<__nv_bfloat16> weight_of, h, partial;
  explicit Block(const MoeShapeArgs& s)
      : shape(s), expert_of(size_t(s.tokens) * s.top_k), order(size_t(s.tokens) * s.top_k), group(s.experts),
        weight_of(size_t(s.tokens) * s.top_k), h(size_t(s.tokens) * s.top_k * s.inter), partial(size_t(s.tokens) * s.top_k * s.hidden) {
    h.Poison();
    partial.Poison();
  }
  MoeRouting routing() const { return {expert_of.get(), weight_of.get(), group.get(), order.get()}; }
};

// Top-k by sorting (value descending, id ascending), softmax in double.
void RouteOracle(const MoeShapeArgs& s, const std::vector<__nv_bfloat16>& logits, int token, std::vector<int>& ids, std::vector<double>& weights) {
  std::vector<double> p(s.experts);
  double sum = 0;
  for (int e = 0; e < s.experts; ++e) sum += p[e] = std::exp(double(ToFloat(logits[size_t(token) * s.experts + e])));
  ids.resize(s.experts);
  std::iota(ids.begin(), ids.end(), 0);
  std::stable_sort(ids.begin(), ids.end(), [&](int a, int b) { return p[a] > p[b]; });
  ids.resize(s.top_k);
  double picked = 0;
  for (int id : ids) picked += p[id] / sum;
  weights.clear();
  for (int id : ids) weights.push_back(RoundToBf16(p[id] / sum / picked));
}

TEST(MoeRoute, PicksTheLargestAndListsEveryAssignmentOnce) {
  for (int tokens : {1, 2, 17, 64, 256}) {
    const MoeShapeArgs s{.tokens = tokens, .hidden = 512, .inter = 128, .experts = 128, .top_k = 8};
    auto logits = RandomBf16(size_t(tokens) * s.experts, 1.0, 7 + tokens);
    for (int e = 0; e < s.experts; ++e) logits[e] = __float2bfloat16_rn(e % 3 == 0 ? 1.0f : 0.0f);  // token 0: ties everywhere
    DeviceBuffer dl(logits);
    Block b(s);
    CUDA_OK(MoeRoute(s, dl.get(), b.routing(), true, nullptr));
    CUDA_OK(cudaDeviceSynchronize());
    const auto experts = b.expert_of.Download(), order = b.order.Download();
    const auto groups = b.group.Download();
    const auto weights = b.weight_of.Download();
    std::set<int> used;
    for (int t = 0; t < tokens; ++t) {
      std::vector<int> ids;
      std::vector<double> w;
      RouteOracle(s, logits, t, ids, w);
      for (int r = 0; r < s.top_k; ++r) {
        EXPECT_EQ(experts[t * s.top_k + r], ids[r]) << "token " << t << " rank " << r;
        EXPECT_NEAR(ToFloat(weights[t * s.top_k + r]), w[r], w[r] / 128) << "token " << t << " rank " << r;
        used.insert(ids[r]);
      }
    }
    std::set<int> grouped, seen;
    int at = 0;
    for (size_t i = 0; i < groups.size(); ++i) {
      if (i >= used.size()) {
        EXPECT_EQ(groups[i].x, -1) << "group " << i;
        continue;
      }
      grouped.insert(groups[i].x);
      EXPECT_EQ(groups[i].y, at);
      EXPECT_GT(groups[i].z, groups[i].y);
      for (at = groups[i].y; at < groups[i].z; ++at) {
        EXPECT_EQ(experts[order[at]], groups[i].x);
        EXPECT_TRUE(seen.insert(order[at]).second) << "assignment " << order[at] << " twice";
      }
    }
    EXPECT_EQ(grouped, used);
    EXPECT_EQ(at, tokens * s.top_k);
  }
}

TEST(MoeBlock, EqualsTheOracle) {
  for (const MoeShapeArgs s : {MoeShapeArgs{1, 512, 128, 32, 4}, {5, 1024, 256, 32, 4}, {24, 512, 384, 64, 8}, {64, 512, 128, 32, 8}, {200, 512, 128, 32, 2}}) {
    SCOPED_TRACE(::testing::Message() << "tokens " << s.tokens << " hidden " << s.hidden << " inter " << s.inter << " experts " << s.experts << " top " << s.top_k);
    const auto x = RandomBf16(size_t(s.tokens) * s.hidden, 1.0, 1), residual = RandomBf16(size_t(s.tokens) * s.hidden, 1.0, 2),
               gate_up = RandomBf16(size_t(s.experts) * 2 * s.inter * s.hidden, 0.05, 3), down = RandomBf16(size_t(s.experts) * s.hidden * s.inter, 0.05, 4),
               logits = RandomBf16(size_t(s.tokens) * s.experts, 1.0, 5);
    DeviceBuffer dx(x), dr(residual), dg(gate_up), dd(down), dl(logits);
    DeviceBuffer<__nv_bfloat16> y(size_t(s.tokens) * s.hidden);
    y.Poison();
    Block b(s);
    CUDA_OK(MoeRoute(s, dl.get(), b.routing(), true, nullptr));
    CUDA_OK(MoeGateUp(s, dx.get(), dg.get(), b.routing(), b.h.get(), nullptr));
    CUDA_OK(MoeDown(s, b.h.get(), dd.get(), b.routing(), b.partial.get(), nullptr));
    CUDA_OK(MoeCombine(s, b.partial.get(), dr.get(), y.get(), nullptr));
    CUDA_OK(cudaDeviceSynchronize());
    std::vector<double> want(size_t(s.tokens) * s.hidden);
    for (int t = 0; t < s.tokens; ++t) {
      std::vector<int> ids;
      std::vector<double> weights, h(s.inter), sum(s.hidden, 0.0);
      RouteOracle(s, logits, t, ids, weights);
      for (int r = 0; r < s.top_k; ++r) {
        for (int i = 0; i < s.inter; ++i) {
          double g = 0, u = 0;
          const size_t gate_row = (size_t(ids[r]) * 2 * s.inter + i) * s.hidden, up_row = gate_row + size_t(s.inter) * s.hidden;
          for (int k = 0; k < s.hidden; ++k) {
            const double v = ToFloat(x[size_t(t) * s.hidden + k]);
            g += v * ToFloat(gate_up[gate_row + k]);
            u += v * ToFloat(gate_up[up_row + k]);
          }
          g = RoundToBf16(g);
          h[i] = RoundToBf16(RoundToBf16(g / (1 + std::exp(-g))) * RoundToBf16(u));
        }
        for (int n = 0; n < s.hidden; ++n) {
          double o = 0;
          for (int i = 0; i < s.inter; ++i) o += h[i] * ToFloat(down[(size_t(ids[r]) * s.hidden + n) * s.inter + i]);
          sum[n] += RoundToBf16(RoundToBf16(o) * weights[r]);
        }
      }
      for (int n = 0; n < s.hidden; ++n) want[size_t(t) * s.hidden + n] = ToFloat(residual[size_t(t) * s.hidden + n]) + RoundToBf16(sum[n]);
    }
    const Difference d = Compare(y.Download(), want);
    EXPECT_EQ(d.nan, 0u);
    EXPECT_LT(d.relative(), 4e-3) << "max " << d.max_abs;
  }
}

TEST(MoeBlock, Speed) {
  struct Model {
    const char* name;
    int hidden, inter;
  };
  for (const Model& m : {Model{"30b", 2048, 768}, {"235b", 4096, 1536}}) {
    const int experts = 128, layers = m.hidden == 2048 ? 4 : 2;
    const size_t gate_each = size_t(experts) * 2 * m.inter * m.hidden, down_each = gate_each / 2;
    DeviceBuffer<__nv_bfloat16> gate(gate_each * layers), down(down_each * layers), x(size_t{256} * m.hidden), y(size_t{256} * m.hidden);
    FillNoise(gate.get(), gate.count(), 0.02f, 1, nullptr);
    FillNoise(down.get(), down.count(), 0.02f, 2, nullptr);
    FillNoise(x.get(), x.count(), 1.0f, 3, nullptr);
    for (int tokens : {1, 2, 4, 8, 16, 32, 64, 128, 256}) {
      const MoeShapeArgs s{tokens, m.hidden, m.inter, experts, 8};
      // Several routings, so that repeated calls touch different experts (uniform random logits).
      constexpr int kRoutings = 8;
      std::vector<Block> blocks;
      double distinct = 0;
      DeviceBuffer<__nv_bfloat16> logits(size_t(tokens) * experts);
      for (int i = 0; i < kRoutings; ++i) {
        blocks.emplace_back(s);
        FillNoise(logits.get(), logits.count(), 1.0f, 100 + i, nullptr);
        CUDA_OK(MoeRoute(s, logits.get(), blocks.back().routing(), true, nullptr));
        CUDA_OK(cudaDeviceSynchronize());
        for (const int4& g : blocks.back().group.Download()) distinct += (g.x >= 0) / double(kRoutings);
      }
      auto at = [&](int i) -> Block& { return blocks[(i / layers) % kRoutings]; };
      const double up = TimeGraph([&](int i, cudaStream_t st) { CUDA_MUST(MoeGateUp(s, x.get(), gate.get() + gate_each * (i % layers), at(i).routing(), at(i).h.get(), st)); }, 32);
      const double dn = TimeGraph([&](int i, cudaStream_t st) { CUDA_MUST(MoeDown(s, at(i).h.get(), down.get() + down_each * (i % layers), at(i).routing(), at(i).partial.get(), st)); }, 32);
      const double route = TimeGraph([&](int i, cudaStream_t st) { CUDA_MUST(MoeRoute(s, logits.get(), at(i).routing(), true, st)); }, 32);
      const double combine = TimeGraph([&](int i, cudaStream_t st) { CUDA_MUST(MoeCombine(s, at(i).partial.get(), x.get(), y.get(), st)); }, 32);
      const std::string tag = std::string(m.name) + ".tokens" + std::to_string(tokens);
      PrintRow("moe_gate_up." + tag, up, 4.0 * m.inter * m.hidden * distinct);
      PrintRow("moe_down." + tag, dn, 2.0 * m.inter * m.hidden * distinct);
      PrintRow("moe_route." + tag, route, 2.0 * tokens * experts);
      PrintRow("moe_combine." + tag, combine, 2.0 * tokens * 10 * m.hidden);
    }
  }
}

}  // namespace
}  // namespace qwen::kernels::testing
