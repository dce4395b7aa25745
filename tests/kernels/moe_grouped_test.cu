// Goal: the grouped products of a prompt's MoE block equal plain loops for every number of tokens an expert can have (none,
// one, a tile's end, several tiles), for small shapes on the host and for released shapes against one thread a value.
#include "stage/kernels/moe_grouped.h"

#include <numeric>

#include "tests/kernels/harness.h"

namespace qwen::kernels::testing {
namespace {

// Sorted rows by hand: expert e gets counts[e] rows, whose tokens are spread over all.
struct Rows {
  std::vector<int32_t> end, source;
  explicit Rows(const std::vector<int>& counts, int tokens) {
    for (int count : counts) {
      const int begin = static_cast<int>(source.size());
      for (int i = 0; i < count; ++i) source.push_back(static_cast<int32_t>((int64_t{begin + i} * 7919 + i) % tokens));
      end.push_back(static_cast<int32_t>(source.size()));
    }
  }
  int count() const { return static_cast<int>(source.size()); }
};

// One thread a value, float32 sums in the plain order: shares nothing with the kernel but the layout's statement.
__global__ void GateUpOracle(const __nv_bfloat16* x, const __nv_bfloat16* gate_up, const int32_t* end, const int32_t* source, __nv_bfloat16* out, int hidden, int inter) {
  const int row = blockIdx.x, column = blockIdx.y * blockDim.x + threadIdx.x;
  if (column >= inter) return;
  int expert = 0;
  while (row >= end[expert]) ++expert;
  const __nv_bfloat16* token = x + static_cast<size_t>(source[row]) * hidden;
  const __nv_bfloat16* g = gate_up + (static_cast<size_t>(expert) * 2 * inter + column) * hidden;
  const __nv_bfloat16* u = g + static_cast<size_t>(inter) * hidden;
  float gate = 0, up = 0;
  for (int k = 0; k < hidden; ++k) {
    gate += __bfloat162float(token[k]) * __bfloat162float(g[k]);
    up += __bfloat162float(token[k]) * __bfloat162float(u[k]);
  }
  gate = __bfloat162float(__float2bfloat16_rn(gate));
  const float silu = __bfloat162float(__float2bfloat16_rn(gate / (1.0f + expf(-gate))));
  out[static_cast<size_t>(row) * inter + column] = __float2bfloat16_rn(silu * __bfloat162float(__float2bfloat16_rn(up)));
}
__global__ void DownOracle(const __nv_bfloat16* active, const __nv_bfloat16* down, const int32_t* end, __nv_bfloat16* out, int hidden, int inter) {
  const int row = blockIdx.x, column = blockIdx.y * blockDim.x + threadIdx.x;
  if (column >= hidden) return;
  int expert = 0;
  while (row >= end[expert]) ++expert;
  float sum = 0;
  for (int k = 0; k < inter; ++k) {
    sum += __bfloat162float(active[static_cast<size_t>(row) * inter + k]) * __bfloat162float(down[(static_cast<size_t>(expert) * hidden + column) * inter + k]);
  }
  out[static_cast<size_t>(row) * hidden + column] = __float2bfloat16_rn(sum);
}

DeviceBuffer<__nv_bfloat16> Noise(size_t count, float scale, uint64_t seed) {
  DeviceBuffer<__nv_bfloat16> buffer(count);
  FillNoise(buffer.get(), count, scale, seed, nullptr);
  return buffer;
}

std::vector<double> Doubles(const std::vector<__nv_bfloat16>& values) {
  std::vector<double> out;
  for (const auto v : values) out.push_back(ToFloat(v));
  return out;
}

void CheckShape(int hidden, int inter, int tokens, const std::vector<int>& counts) {
  SCOPED_TRACE(::testing::Message() << "hidden " << hidden << " inter " << inter << " experts " << counts.size() << " tokens " << tokens);
  const Rows rows(counts, tokens);
  const int experts = static_cast<int>(counts.size());
  const MoeShapeArgs shape{.tokens = tokens, .hidden = hidden, .inter = inter, .experts = experts, .top_k = (rows.count() + tokens - 1) / tokens};
  auto x = Noise(size_t(tokens) * hidden, 1.0f, 1), gate_up = Noise(size_t(experts) * 2 * inter * hidden, 0.05f, 2), down = Noise(size_t(experts) * hidden * inter, 0.05f, 3);
  DeviceBuffer<int32_t> end(rows.end), source(rows.source);
  const MoePermutation permutation{.end = end.get(), .source = source.get()};
  MoeGroupedWeights weights;
  CUDA_OK(MakeMoeGroupedWeights(shape, gate_up.get(), down.get(), &weights));
  DeviceBuffer<__nv_bfloat16> active(size_t(rows.count()) * inter), want_active(size_t(rows.count()) * inter);
  DeviceBuffer<__nv_bfloat16> sorted(size_t(rows.count()) * hidden), want_sorted(size_t(rows.count()) * hidden), again(size_t(rows.count()) * hidden);
  active.Poison();
  sorted.Poison();
  CUDA_OK(MoeGroupedGateUp(shape, x.get(), weights, permutation, active.get(), nullptr));
  GateUpOracle<<<dim3(rows.count(), (inter + 127) / 128), 128>>>(x.get(), gate_up.get(), end.get(), source.get(), want_active.get(), hidden, inter);
  CUDA_OK(cudaDeviceSynchronize());
  const Difference first = Compare(active.Download(), Doubles(want_active.Download()));
  EXPECT_EQ(first.nan, 0u);
  EXPECT_LT(first.relative(), 2e-3) << "gate-up, max " << first.max_abs;
  CUDA_OK(MoeGroupedDown(shape, want_active.get(), weights, permutation, sorted.get(), nullptr));
  CUDA_OK(MoeGroupedDown(shape, want_active.get(), weights, permutation, again.get(), nullptr));
  DownOracle<<<dim3(rows.count(), (hidden + 127) / 128), 128>>>(want_active.get(), down.get(), end.get(), want_sorted.get(), hidden, inter);
  CUDA_OK(cudaDeviceSynchronize());
  const auto got = sorted.Download();
  const Difference second = Compare(got, Doubles(want_sorted.Download()));
  EXPECT_EQ(second.nan, 0u);
  EXPECT_LT(second.relative(), 2e-3) << "down, max " << second.max_abs;
  EXPECT_EQ(Compare(again.Download(), Doubles(got)).max_abs, 0.0) << "a second run gives other bits";
}

TEST(MoeGrouped, EqualsTheOracleForEveryNumberOfTokens) {
  CheckShape(256, 128, 8, {1, 0, 0, 7});
  std::vector<int> counts;
  for (int i = 0; i < 32; ++i) counts.push_back(i * 13 + 1);  // 1 ... 404: every width, one tile, two and three
  CheckShape(512, 256, 700, counts);
  CheckShape(256, 384, 600, {0, 0, 600, 0, 192, 193, 384, 385, 16, 17, 0, 15});
  CheckShape(256, 128, 3000, {3000});
  std::vector<int> wide(256, 5);  // as many experts as there may be
  wide[255] = 40;
  CheckShape(256, 128, 300, wide);
}

TEST(MoeGrouped, EqualsTheOracleForReleasedShapes) {
  std::vector<int> counts(128);
  for (int e = 0; e < 128; ++e) counts[e] = e % 5 == 0 ? 0 : 20 + (e * 37) % 190;
  CheckShape(2048, 768, 2048, counts);
  CheckShape(4096, 1536, 2048, counts);
}

TEST(MoeGrouped, RefusesWhatItIsNotMadeFor) {
  MoeGroupedWeights weights{};
  const MoePermutation none{};
  for (const MoeShapeArgs& shape : {MoeShapeArgs{8, 384, 128, 32, 4}, {8, 256, 64, 32, 4}, {8, 256, 128, 512, 4}, {0, 256, 128, 32, 4}}) {
    EXPECT_EQ(MoeGroupedGateUp(shape, nullptr, weights, none, nullptr, nullptr), cudaErrorInvalidValue);
    EXPECT_EQ(MoeGroupedDown(shape, nullptr, weights, none, nullptr, nullptr), cudaErrorInvalidValue);
  }
}

TEST(MoeGrouped, Speed) {
  struct Model {
    const char* name;
    int hidden, inter;
  };
  for (const Model& model : {Model{"30b", 2048, 768}, {"235b", 4096, 1536}}) {
    const MoeShapeArgs base{.tokens = 1, .hidden = model.hidden, .inter = model.inter, .experts = 128, .top_k = 8};
    auto gate_up = Noise(size_t(128) * 2 * base.inter * base.hidden, 0.02f, 1), down = Noise(size_t(128) * base.hidden * base.inter, 0.02f, 2);
    MoeGroupedWeights weights;
    CUDA_OK(MakeMoeGroupedWeights(base, gate_up.get(), down.get(), &weights));
    for (const int tokens : {128, 256, 2048, 8192, 16384}) {
      MoeShapeArgs shape = base;
      shape.tokens = tokens;
      const size_t assignments = size_t(tokens) * 8;
      auto x = Noise(size_t(tokens) * base.hidden, 1.0f, 3), logits = Noise(size_t(tokens) * 128, 1.0f, 4);
      DeviceBuffer<int32_t> expert_of(assignments), count(128), end(128), source(assignments), row_of(assignments);
      DeviceBuffer<__nv_bfloat16> weight_of(assignments), active(assignments * base.inter), sorted(assignments * base.hidden);
      const MoePermutation permutation{expert_of.get(), weight_of.get(), count.get(), end.get(), source.get(), row_of.get()};
      CUDA_OK(MoePermute(shape, logits.get(), permutation, true, nullptr));
      CUDA_OK(cudaDeviceSynchronize());  // TimeGraph's stream does not wait for this one
      const double weight_bytes = 2.0 * 128 * base.inter * base.hidden;
      const double products = 2.0 * assignments * base.inter * base.hidden;
      const std::string name = std::string(".") + model.name + ".tokens" + std::to_string(tokens);
      const auto up = TimeGraph([&](int, cudaStream_t s) { CUDA_MUST(MoeGroupedGateUp(shape, x.get(), weights, permutation, active.get(), s)); }, 4);
      PrintProductRow("moe_grouped_gate_up" + name, up, 2 * weight_bytes + 2.0 * tokens * base.hidden + 2.0 * assignments * base.inter, 2 * products);
      const auto dn = TimeGraph([&](int, cudaStream_t s) { CUDA_MUST(MoeGroupedDown(shape, active.get(), weights, permutation, sorted.get(), s)); }, 4);
      PrintProductRow("moe_grouped_down" + name, dn, weight_bytes + 2.0 * assignments * (base.inter + base.hidden), products);
      if (tokens > 256) continue;
      PrintRow("moe_permute" + name, TimeGraph([&](int, cudaStream_t s) { CUDA_MUST(MoePermute(shape, logits.get(), permutation, true, s)); }, 4), 2.0 * tokens * 128);
    }
  }
}

}  // namespace
}  // namespace qwen::kernels::testing
