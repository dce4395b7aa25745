// Goal: which cut of the decode MoE kernels is fastest at which batch: the launch table of moe_decode.cu is read off these rows.
// Includes the source itself, because only there the variants can be named.
#include "stage/kernels/moe_decode.cu"

#include <span>

#include "tests/kernels/fp8_weights.h"
#include "tests/kernels/harness.h"

namespace qwen::kernels::testing {
namespace {

struct Variant {
  const char* name;
  void (*kernel)(MoeShapeArgs, const __nv_bfloat16*, const __nv_bfloat16*, MoeRouting, __nv_bfloat16*);
  int rows;  // of the weight matrix a block takes (gate rows for gate-up)
};

// Tokens that are routed, and room for what becomes of them.
struct RoutedNoise {
  explicit RoutedNoise(const MoeShapeArgs& shape)
      : x(size_t(shape.tokens) * shape.hidden), logits(size_t(shape.tokens) * shape.experts), h(size_t(shape.tokens) * shape.top_k * shape.inter),
        out(size_t(shape.tokens) * shape.top_k * shape.hidden), weight(size_t(shape.tokens) * shape.top_k), expert(weight.count()), order(weight.count()),
        group(shape.experts) {
    FillNoise(x.get(), x.count(), 1.0f, 3, nullptr);
    FillNoise(h.get(), h.count(), 1.0f, 4, nullptr);
    FillNoise(logits.get(), logits.count(), 1.0f, 5, nullptr);
    CUDA_MUST(MoeRoute(shape, logits.get(), routing, true, nullptr));
    CUDA_MUST(cudaDeviceSynchronize());
    for (const int4& g : group.Download()) active += g.x >= 0;
  }

  DeviceBuffer<__nv_bfloat16> x, logits, h, out, weight;
  DeviceBuffer<int32_t> expert, order;
  DeviceBuffer<int4> group;
  MoeRouting routing{expert.get(), weight.get(), group.get(), order.get()};
  int active = 0;  // experts
};

TEST(MoeVariants, Speed) {
  const Variant gate_up[] = {{"1,4,1,2", MoeGateUpKernel<1, 4, 1, 2>, 16}, {"1,8,1,2", MoeGateUpKernel<1, 8, 1, 2>, 16}, {"1,4,1,3", MoeGateUpKernel<1, 4, 1, 3>, 16},
                             {"1,4,2,2", MoeGateUpKernel<1, 4, 2, 2>, 32}, {"2,4,1,2", MoeGateUpKernel<2, 4, 1, 2>, 16}, {"2,2,2,2", MoeGateUpKernel<2, 2, 2, 2>, 32},
                             {"2,2,1,3", MoeGateUpKernel<2, 2, 1, 3>, 16}, {"4,2,1,2", MoeGateUpKernel<4, 2, 1, 2>, 16}, {"4,1,2,2", MoeGateUpKernel<4, 1, 2, 2>, 32},
                             {"4,2,2,1", MoeGateUpKernel<4, 2, 2, 1>, 32}, {"4,1,1,3", MoeGateUpKernel<4, 1, 1, 3>, 16}, {"2,1,2,3", MoeGateUpKernel<2, 1, 2, 3>, 32}};
  const Variant down[] = {{"1,6,1,3", MoeDownKernel<1, 6, 1, 3>, 32}, {"1,6,1,4", MoeDownKernel<1, 6, 1, 4>, 32}, {"1,6,2,2", MoeDownKernel<1, 6, 2, 2>, 64},
                          {"1,3,2,3", MoeDownKernel<1, 3, 2, 3>, 64}, {"2,6,1,2", MoeDownKernel<2, 6, 1, 2>, 32}, {"2,3,1,3", MoeDownKernel<2, 3, 1, 3>, 32},
                          {"2,3,2,2", MoeDownKernel<2, 3, 2, 2>, 64}, {"4,3,1,2", MoeDownKernel<4, 3, 1, 2>, 32}, {"4,3,2,2", MoeDownKernel<4, 3, 2, 2>, 64},
                          {"4,2,1,3", MoeDownKernel<4, 2, 1, 3>, 32}, {"4,2,2,2", MoeDownKernel<4, 2, 2, 2>, 64}};
  for (const auto& [model, hidden, inter] : {std::tuple{"30b", 2048, 768}, std::tuple{"235b", 4096, 1536}}) {
    constexpr int layers = 2;
    DeviceBuffer<__nv_bfloat16> wg(size_t(layers) * 128 * 2 * inter * hidden), wd(size_t(layers) * 128 * inter * hidden);
    FillNoise(wg.get(), wg.count(), 0.02f, 1, nullptr);
    FillNoise(wd.get(), wd.count(), 0.02f, 2, nullptr);
    for (const int tokens : {1, 8, 16, 32, 64, 128, 256}) {
      const MoeShapeArgs shape{tokens, hidden, inter, 128, 8};
      const RoutedNoise noise(shape);
      for (const bool up : {true, false}) {
        const double bytes = double(noise.active) * (up ? 4.0 : 2.0) * hidden * inter;
        const Variant* list = up ? gate_up : down;
        for (size_t i = 0; i < (up ? std::size(gate_up) : std::size(down)); ++i) {
          const Variant& v = list[i];
          const int rows = up ? inter : hidden;
          if (rows % v.rows != 0) continue;
          const LaunchShape launch = {.grid = dim3(rows / v.rows, ActiveMax(shape)), .block = dim3(kWarps * 32)};
          const double seconds = TimeGraph([&](int call, cudaStream_t s) {
            const __nv_bfloat16* w = up ? wg.get() + size_t(call % layers) * 128 * 2 * inter * hidden : wd.get() + size_t(call % layers) * 128 * inter * hidden;
            CUDA_MUST(Launch(v.kernel, launch, s, shape, up ? noise.x.get() : noise.h.get(), w, noise.routing, up ? noise.h.get() : noise.out.get()));
          }, 8);
          PrintRow(std::string(up ? "gate_up." : "down.") + model + ".tokens" + std::to_string(tokens) + "." + v.name, seconds, bytes);
        }
      }
    }
  }
}

// The same in block FP8; the numbers are kTiles, kUnroll, kRows, kBlocks.
TEST(MoeVariants, SpeedFp8) {
  struct Fp8Variant {
    const char* name;
    void (*kernel)(MoeShapeArgs, const __nv_bfloat16*, Fp8Matrix, MoeRouting, __nv_bfloat16*);
    int rows;
  };
  const Fp8Variant gate_up[] = {{"1,4,1,2", MoeGateUpKernel<1, 4, 1, 2, Fp8>, 16}, {"1,2,1,3", MoeGateUpKernel<1, 2, 1, 3, Fp8>, 16}, {"1,2,2,2", MoeGateUpKernel<1, 2, 2, 2, Fp8>, 32},
                                {"2,2,1,2", MoeGateUpKernel<2, 2, 1, 2, Fp8>, 16}, {"2,1,1,3", MoeGateUpKernel<2, 1, 1, 3, Fp8>, 16}, {"4,1,1,2", MoeGateUpKernel<4, 1, 1, 2, Fp8>, 16}};
  const Fp8Variant down[] = {{"1,3,1,3", MoeDownKernel<1, 3, 1, 3, Fp8>, 32}, {"1,3,2,2", MoeDownKernel<1, 3, 2, 2, Fp8>, 64}, {"2,3,1,2", MoeDownKernel<2, 3, 1, 2, Fp8>, 32},
                             {"2,1,1,3", MoeDownKernel<2, 1, 1, 3, Fp8>, 32}, {"2,1,2,3", MoeDownKernel<2, 1, 2, 3, Fp8>, 64}, {"4,1,1,2", MoeDownKernel<4, 1, 1, 2, Fp8>, 32}};
  for (const auto& [model, hidden, inter] : {std::tuple{"30b", 2048, 768}, std::tuple{"235b", 4096, 1536}}) {
    constexpr int layers = 4;
    const size_t rows_up = size_t(128) * 2 * inter, rows_down = size_t(128) * hidden;
    const Fp8Weights wg = NoiseFp8(rows_up * layers, hidden, 0.02f, 1), wd = NoiseFp8(rows_down * layers, inter, 0.02f, 2);
    for (const int tokens : {1, 8, 16, 32, 64, 128, 256}) {
      const MoeShapeArgs shape{tokens, hidden, inter, 128, 8};
      const RoutedNoise noise(shape);
      for (const bool up : {true, false}) {
        const size_t rows = up ? rows_up : rows_down, columns = up ? hidden : inter;
        const Fp8Weights& w = up ? wg : wd;
        for (const Fp8Variant& v : up ? std::span<const Fp8Variant>(gate_up) : std::span<const Fp8Variant>(down)) {
          const LaunchShape launch = {.grid = dim3((up ? inter : hidden) / v.rows, ActiveMax(shape)), .block = dim3(kWarps * 32)};
          const double seconds = TimeGraph([&](int call, cudaStream_t s) {
            const size_t at = size_t(call % layers) * rows;
            const Fp8Matrix matrix{w.codes.get() + at * columns, w.scales.get() + at / kFp8Block * Fp8ScaleStride(static_cast<int>(columns))};
            CUDA_MUST(Launch(v.kernel, launch, s, shape, up ? noise.x.get() : noise.h.get(), matrix, noise.routing, up ? noise.h.get() : noise.out.get()));
          }, 8);
          PrintRow(std::string(up ? "fp8.gate_up." : "fp8.down.") + model + ".tokens" + std::to_string(tokens) + "." + v.name, seconds, double(noise.active) * (up ? 2.0 : 1.0) * hidden * inter);
        }
      }
    }
  }
}

}  // namespace
}  // namespace qwen::kernels::testing
