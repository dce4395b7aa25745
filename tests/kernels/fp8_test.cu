// Goal: kernels on block-FP8 weights give what the same kernels (which have oracles of their own) give on the bf16 weights that the
// reference makes of them, up to the order of a sum; the conversion itself is right for every code; packing is undone by multiplying
// out; and half the bytes take about half the time.
#include "tests/kernels/fp8_weights.h"

#include <cstring>

#include "stage/kernels/decode_linear.h"
#include "stage/kernels/fp8_weights.h"
#include "stage/kernels/moe_decode.h"
#include "stage/kernels/moe_grouped.h"

namespace qwen::kernels::testing {
namespace {

// One rounding to bf16 flips now and then when a sum runs in another order; a wrong column or scale is off by the whole value.
constexpr double kOtherOrder = 2e-3;

std::vector<double> Doubles(const std::vector<__nv_bfloat16>& values) {
  std::vector<double> out;
  for (const auto v : values) out.push_back(ToFloat(v));
  return out;
}
DeviceBuffer<__nv_bfloat16> Noise(size_t count, float scale, uint64_t seed) {
  DeviceBuffer<__nv_bfloat16> buffer(count);
  FillNoise(buffer.get(), count, scale, seed, nullptr);
  return buffer;
}
void ExpectNear(const DeviceBuffer<__nv_bfloat16>& got, const DeviceBuffer<__nv_bfloat16>& want, double allowed, const char* what) {
  const Difference d = Compare(got.Download(), Doubles(want.Download()));
  EXPECT_EQ(d.nan, 0u) << what;
  EXPECT_GT(d.reference_rms, 0.01) << what << ": the oracle is nothing";
  EXPECT_LT(d.relative(), allowed) << what << ", max " << d.max_abs;
}

TEST(Fp8Weights, EveryCodeIsMultipliedOutAsTheReferenceDoes) {
  constexpr int kColumns = 256;  // two blocks; each row holds every code once
  std::vector<Fp8> packed(128 * kColumns);
  std::vector<float> scales(Fp8ScaleStride(kColumns), NAN);
  scales[0] = 0.0123f;
  scales[1] = 7.25e-4f;
  std::vector<uint8_t> plain(packed.size());
  for (size_t i = 0; i < packed.size(); ++i) {
    plain[i] = static_cast<uint8_t>(i % kColumns * 37 + i / kColumns);
    packed[i / 16 * 16 + Fp8PlaceOf(static_cast<int>(i % 16))] = {plain[i]};
  }
  DeviceBuffer codes(packed);
  DeviceBuffer device_scales(scales);
  DeviceBuffer<__nv_bfloat16> out(packed.size());
  out.Poison();
  CUDA_OK(MultiplyOutFp8({codes.get(), device_scales.get()}, out.get(), 128, kColumns, nullptr));
  CUDA_OK(cudaDeviceSynchronize());
  const auto got = out.Download();
  size_t wrong = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const __nv_bfloat16 want = __float2bfloat16_rn(static_cast<float>(CodeValue(plain[i])) * scales[i % kColumns / 128]);
    const bool nan = (plain[i] & 0x7F) == 0x7F;
    wrong += nan ? !std::isnan(ToFloat(got[i])) : std::memcmp(&got[i], &want, 2) != 0;
  }
  EXPECT_EQ(wrong, 0u);
}

TEST(Fp8Weights, PackingIsItsStatement) {
  const Fp8Weights w = RandomFp8(256, 384, 1.0, 1);
  CUDA_OK(PackFp8Weights(w.plain.get(), w.plain.get(), w.plain.count(), nullptr));  // in place
  CUDA_OK(cudaDeviceSynchronize());
  const auto got = w.plain.Download(), want = w.codes.Download();
  EXPECT_EQ(0, std::memcmp(got.data(), want.data(), got.size()));
}

TEST(Fp8Linear, EqualsTheSameProductOnWeightsMultipliedOut) {
  struct Case {
    int tokens, n, k;
    bool norm, residual;
  };
  for (const Case c : {Case{1, 128, 512, false, false}, Case{1, 384, 2048, true, false}, Case{2, 256, 1024, true, true}, Case{8, 256, 4096, false, true},
                       Case{9, 128, 2048, false, true}, Case{16, 256, 1536, false, false}, Case{31, 256, 2048, true, true}, Case{32, 128, 8192, false, true}}) {
    SCOPED_TRACE(::testing::Message() << "tokens " << c.tokens << " n " << c.n << " k " << c.k << " norm " << c.norm << " residual " << c.residual);
    const Fp8Weights w = RandomFp8(c.n, c.k, 0.05, 7 + c.k);
    DeviceBuffer x(RandomBf16(size_t(c.tokens) * c.k, 1.0, 1)), norm(RandomBf16(c.k, 1.0, 3)), residual(RandomBf16(size_t(c.tokens) * c.n, 1.0, 4));
    DeviceBuffer<__nv_bfloat16> y(size_t(c.tokens) * c.n), want(size_t(c.tokens) * c.n);
    y.Poison();
    DecodeLinearArgs args{.x = x.get(), .w = w.bf16.get(), .y = want.get(), .norm_weight = c.norm ? norm.get() : nullptr, .residual = c.residual ? residual.get() : nullptr,
                          .tokens = c.tokens, .n = c.n, .k = c.k};
    CUDA_OK(DecodeLinear(args, nullptr));
    args.w = nullptr;
    args.y = y.get();
    args.fp8 = w.matrix();
    CUDA_OK(DecodeLinear(args, nullptr));
    CUDA_OK(cudaDeviceSynchronize());
    ExpectNear(y, want, kOtherOrder, "y");
  }
}

struct Routed {
  DeviceBuffer<int32_t> expert_of, order;
  DeviceBuffer<int4> group;
  DeviceBuffer<__nv_bfloat16> weight_of;
  MoeRouting routing;
  explicit Routed(const MoeShapeArgs& s)
      : expert_of(size_t(s.tokens) * s.top_k), order(size_t(s.tokens) * s.top_k), group(s.experts), weight_of(size_t(s.tokens) * s.top_k),
        routing{expert_of.get(), weight_of.get(), group.get(), order.get()} {
    const auto logits = Noise(size_t(s.tokens) * s.experts, 1.0f, 5);
    CUDA_MUST(MoeRoute(s, logits.get(), routing, true, nullptr));
    CUDA_MUST(cudaDeviceSynchronize());
  }
};

TEST(Fp8MoeBlock, EqualsTheSameBlockOnWeightsMultipliedOut) {
  for (const MoeShapeArgs s : {MoeShapeArgs{1, 512, 256, 32, 4}, {5, 1024, 256, 32, 4}, {24, 512, 512, 64, 8}, {64, 512, 768, 32, 8}, {200, 512, 256, 32, 2}, {256, 1024, 256, 32, 8},
                               {1, 2048, 768, 32, 8}, {40, 2048, 768, 32, 8}, {160, 4096, 1536, 32, 2}}) {
    SCOPED_TRACE(::testing::Message() << "tokens " << s.tokens << " hidden " << s.hidden << " inter " << s.inter << " experts " << s.experts << " top " << s.top_k);
    const Fp8Weights gate_up = RandomFp8(size_t(s.experts) * 2 * s.inter, s.hidden, 0.05, 3), down = RandomFp8(size_t(s.experts) * s.hidden, s.inter, 0.05, 4);
    const auto x = Noise(size_t(s.tokens) * s.hidden, 1.0f, 9);
    const Routed routed(s);
    const size_t assignments = size_t(s.tokens) * s.top_k;
    DeviceBuffer<__nv_bfloat16> h(assignments * s.inter), want_h(assignments * s.inter), partial(assignments * s.hidden), want(assignments * s.hidden);
    CUDA_OK(MoeGateUp(s, x.get(), gate_up.bf16.get(), routed.routing, want_h.get(), nullptr));
    CUDA_OK(MoeDown(s, want_h.get(), down.bf16.get(), routed.routing, want.get(), nullptr));
    h.Poison();
    partial.Poison();
    CUDA_OK(MoeGateUp(s, x.get(), gate_up.matrix(), routed.routing, h.get(), nullptr));
    CUDA_OK(MoeDown(s, want_h.get(), down.matrix(), routed.routing, partial.get(), nullptr));
    CUDA_OK(cudaDeviceSynchronize());
    ExpectNear(h, want_h, kOtherOrder, "gate-up");
    ExpectNear(partial, want, kOtherOrder, "down");
  }
}

// Sorted rows by hand: expert e gets counts[e] rows.
void CheckGrouped(int hidden, int inter, int tokens, const std::vector<int>& counts) {
  SCOPED_TRACE(::testing::Message() << "hidden " << hidden << " inter " << inter << " experts " << counts.size() << " tokens " << tokens);
  std::vector<int32_t> end, source;
  for (const int count : counts) {
    for (int i = 0; i < count; ++i) source.push_back(static_cast<int32_t>(source.size() * 7919 % static_cast<size_t>(tokens)));
    end.push_back(static_cast<int32_t>(source.size()));
  }
  const int rows = static_cast<int>(source.size()), experts = static_cast<int>(counts.size());
  const MoeShapeArgs shape{.tokens = tokens, .hidden = hidden, .inter = inter, .experts = experts, .top_k = (rows + tokens - 1) / tokens};
  const Fp8Weights gate_up = RandomFp8(size_t(experts) * 2 * inter, hidden, 0.05, 3), down = RandomFp8(size_t(experts) * hidden, inter, 0.05, 4);
  const auto x = Noise(size_t(tokens) * hidden, 1.0f, 1);
  DeviceBuffer device_end(end), device_source(source);
  const MoePermutation permutation{.end = device_end.get(), .source = device_source.get()};
  MoeGroupedWeights weights, weights16;
  CUDA_OK(MakeMoeGroupedWeights(shape, gate_up.matrix(), down.matrix(), &weights));
  CUDA_OK(MakeMoeGroupedWeights(shape, gate_up.bf16.get(), down.bf16.get(), &weights16));
  DeviceBuffer<__nv_bfloat16> active(size_t(rows) * inter), want_active(size_t(rows) * inter), sorted(size_t(rows) * hidden), want(size_t(rows) * hidden);
  active.Poison();
  sorted.Poison();
  CUDA_OK(MoeGroupedGateUp(shape, x.get(), weights16, permutation, want_active.get(), nullptr));
  CUDA_OK(MoeGroupedDown(shape, want_active.get(), weights16, permutation, want.get(), nullptr));
  CUDA_OK(MoeGroupedGateUp(shape, x.get(), weights, permutation, active.get(), nullptr));
  CUDA_OK(MoeGroupedDown(shape, want_active.get(), weights, permutation, sorted.get(), nullptr));
  CUDA_OK(cudaDeviceSynchronize());
  ExpectNear(active, want_active, kOtherOrder / 10, "gate-up");
  ExpectNear(sorted, want, kOtherOrder / 10, "down");
}

TEST(Fp8MoeGrouped, EqualsTheSameProductsOnWeightsMultipliedOut) {
  CheckGrouped(256, 128, 8, {1, 0, 0, 7});
  CheckGrouped(256, 384, 600, {0, 0, 600, 0, 63, 64, 65, 127, 128, 129, 192, 193, 16, 0, 255, 257});
  CheckGrouped(512, 256, 3000, {3000});
  CheckGrouped(2048, 768, 700, {130, 0, 64, 20, 200, 1, 128, 90});
  CheckGrouped(4096, 1536, 300, {40, 0, 140, 64});
}

TEST(Fp8Weights, RefuseWhatTheKernelsAreNotMadeFor) {
  const Fp8Matrix some{reinterpret_cast<const Fp8*>(0x1000), reinterpret_cast<const float*>(0x1000)};
  EXPECT_EQ(DecodeLinear({.tokens = 1, .n = 144, .k = 512, .fp8 = some}, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(DecodeLinear({.tokens = 1, .n = 128, .k = 768, .fp8 = some}, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(MoeGateUp({1, 768, 256, 32, 4}, nullptr, some, {}, nullptr, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(MoeDown({1, 512, 128, 32, 4}, nullptr, some, {}, nullptr, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(MultiplyOutFp8(some, nullptr, 100, 128, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(PackFp8Weights(nullptr, nullptr, 24, nullptr), cudaErrorInvalidValue);
}

TEST(Fp8Linear, Speed) {
  struct Shape {
    const char* name;
    int n, k;
  };
  for (const Shape& s : {Shape{"30b.qkv", 5120, 2048}, {"30b.o", 2048, 4096}, {"235b.qkv", 9216, 4096}, {"235b.o", 4096, 8192}}) {
    const size_t each = size_t(s.n) * s.k;
    const int sets = 32, stride = Fp8ScaleStride(s.k);
    const Fp8Weights w = NoiseFp8(size_t(s.n) * sets, s.k, 0.02f, 1);
    const auto x = Noise(size_t{32} * s.k, 1.0f, 2), norm = Noise(s.k, 1.0f, 3);
    DeviceBuffer<__nv_bfloat16> y(size_t{32} * s.n), out(each);
    for (const int tokens : {1, 8, 16, 32}) {
      const double seconds = TimeGraph([&](int i, cudaStream_t stream) {
        const Fp8Matrix matrix{w.codes.get() + each * (i % sets), w.scales.get() + size_t(s.n) / kFp8Block * stride * (i % sets)};
        CUDA_MUST(DecodeLinear({.x = x.get(), .y = y.get(), .norm_weight = tokens <= 2 ? norm.get() : nullptr, .tokens = tokens, .n = s.n, .k = s.k, .fp8 = matrix}, stream));
      }, sets);
      PrintRow(std::string("fp8.decode_linear.") + s.name + ".tokens" + std::to_string(tokens), seconds, 1.0 * each + 2.0 * tokens * (s.n + s.k));
    }
    const double out_seconds = TimeGraph([&](int i, cudaStream_t stream) {
      const Fp8Matrix matrix{w.codes.get() + each * (i % sets), w.scales.get() + size_t(s.n) / kFp8Block * stride * (i % sets)};
      CUDA_MUST(MultiplyOutFp8(matrix, out.get(), s.n, s.k, stream));
    }, sets);
    PrintRow(std::string("fp8.multiply_out.") + s.name, out_seconds, 3.0 * each);
  }
}

TEST(Fp8MoeBlock, Speed) {
  struct Model {
    const char* name;
    int hidden, inter;
  };
  for (const Model& m : {Model{"30b", 2048, 768}, {"235b", 4096, 1536}}) {
    const int experts = 128, layers = m.hidden == 2048 ? 4 : 2;
    const size_t rows_up = size_t(experts) * 2 * m.inter, rows_down = size_t(experts) * m.hidden;
    const Fp8Weights gate_up = NoiseFp8(rows_up * layers, m.hidden, 0.02f, 1), down = NoiseFp8(rows_down * layers, m.inter, 0.02f, 2);
    const auto up_at = [&](int i) { return Fp8Matrix{gate_up.codes.get() + rows_up * m.hidden * i, gate_up.scales.get() + rows_up / kFp8Block * Fp8ScaleStride(m.hidden) * i}; };
    const auto down_at = [&](int i) { return Fp8Matrix{down.codes.get() + rows_down * m.inter * i, down.scales.get() + rows_down / kFp8Block * Fp8ScaleStride(m.inter) * i}; };
    const auto x = Noise(size_t{16384} * m.hidden, 1.0f, 3);
    for (const int tokens : {1, 4, 8, 16, 32, 64, 128, 256}) {
      const MoeShapeArgs s{tokens, m.hidden, m.inter, experts, 8};
      const Routed routed(s);
      double distinct = 0;
      for (const int4& g : routed.group.Download()) distinct += g.x >= 0;
      DeviceBuffer<__nv_bfloat16> h(size_t(tokens) * 8 * m.inter), partial(size_t(tokens) * 8 * m.hidden);
      const std::string tag = std::string(m.name) + ".tokens" + std::to_string(tokens);
      const double up_bytes = 2.0 * m.inter * m.hidden * distinct, down_bytes = 1.0 * m.inter * m.hidden * distinct;
      PrintRow("fp8.moe_gate_up." + tag, TimeGraph([&](int i, cudaStream_t st) { CUDA_MUST(MoeGateUp(s, x.get(), up_at(i % layers), routed.routing, h.get(), st)); }, 32), up_bytes);
      PrintRow("fp8.moe_down." + tag, TimeGraph([&](int i, cudaStream_t st) { CUDA_MUST(MoeDown(s, h.get(), down_at(i % layers), routed.routing, partial.get(), st)); }, 32), down_bytes);
    }
    MoeGroupedWeights weights;
    CUDA_OK(MakeMoeGroupedWeights({1, m.hidden, m.inter, experts, 8}, up_at(0), down_at(0), &weights));
    for (const int tokens : {128, 256, 2048, 8192, 16384}) {
      const MoeShapeArgs shape{tokens, m.hidden, m.inter, experts, 8};
      const size_t assignments = size_t(tokens) * 8;
      const auto logits = Noise(size_t(tokens) * experts, 1.0f, 4);
      DeviceBuffer<int32_t> expert_of(assignments), count(experts), end(experts), source(assignments), row_of(assignments);
      DeviceBuffer<__nv_bfloat16> weight_of(assignments), active(assignments * m.inter), sorted(assignments * m.hidden);
      const MoePermutation permutation{expert_of.get(), weight_of.get(), count.get(), end.get(), source.get(), row_of.get()};
      CUDA_OK(MoePermute(shape, logits.get(), permutation, true, nullptr));
      CUDA_OK(cudaDeviceSynchronize());
      const double weight_bytes = 1.0 * experts * m.inter * m.hidden, products = 2.0 * assignments * m.inter * m.hidden;
      const std::string name = std::string(".") + m.name + ".tokens" + std::to_string(tokens);
      PrintProductRow("fp8.moe_grouped_gate_up" + name, TimeGraph([&](int, cudaStream_t s) { CUDA_MUST(MoeGroupedGateUp(shape, x.get(), weights, permutation, active.get(), s)); }, 4),
                      2 * weight_bytes + 2.0 * tokens * m.hidden + 2.0 * assignments * m.inter, 2 * products);
      PrintProductRow("fp8.moe_grouped_down" + name, TimeGraph([&](int, cudaStream_t s) { CUDA_MUST(MoeGroupedDown(shape, active.get(), weights, permutation, sorted.get(), s)); }, 4),
                      weight_bytes + 2.0 * assignments * (m.inter + m.hidden), products);
    }
  }
}

}  // namespace
}  // namespace qwen::kernels::testing
