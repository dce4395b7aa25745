// Goal: DecodeLinear equals x W^T in double precision (with the reference's roundings of norm and residual), for every token
// count and for shapes of both models; a token's result does not depend on its company; and W is read at memory speed.
#include "stage/kernels/decode_linear.h"

#include "tests/kernels/harness.h"

namespace qwen::kernels::testing {
namespace {

struct Case {
  int tokens, n, k;
  bool norm, residual;
};

std::vector<double> Oracle(const Case& c, const std::vector<__nv_bfloat16>& x, const std::vector<__nv_bfloat16>& w, const std::vector<__nv_bfloat16>& norm,
                           const std::vector<__nv_bfloat16>& residual) {
  std::vector<double> y(size_t(c.tokens) * c.n), row(c.k);
  for (int m = 0; m < c.tokens; ++m) {
    double squares = 0;
    for (int i = 0; i < c.k; ++i) {
      row[i] = ToFloat(x[size_t(m) * c.k + i]);
      squares += row[i] * row[i];
    }
    if (c.norm) {
      for (int i = 0; i < c.k; ++i) row[i] = RoundToBf16(RoundToBf16(row[i] / std::sqrt(squares / c.k + 1e-6)) * ToFloat(norm[i]));
    }
    for (int n = 0; n < c.n; ++n) {
      double sum = 0;
      for (int i = 0; i < c.k; ++i) sum += row[i] * ToFloat(w[size_t(n) * c.k + i]);
      if (c.residual) sum = RoundToBf16(sum) + ToFloat(residual[size_t(m) * c.n + n]);
      y[size_t(m) * c.n + n] = sum;
    }
  }
  return y;
}

TEST(DecodeLinear, EqualsTheOracle) {
  for (const Case c : {Case{1, 48, 256, false, false}, Case{1, 128, 2048, true, false}, Case{3, 512, 1024, true, true}, Case{8, 256, 4096, false, true},
                       Case{9, 64, 2048, true, true}, Case{16, 80, 512, false, false}, Case{31, 160, 2048, true, true}, Case{1, 32, 8192, false, true}}) {
    SCOPED_TRACE(::testing::Message() << "tokens " << c.tokens << " n " << c.n << " k " << c.k << " norm " << c.norm << " residual " << c.residual);
    const auto x = RandomBf16(size_t(c.tokens) * c.k, 1.0, 1), w = RandomBf16(size_t(c.n) * c.k, 0.05, 2), norm = RandomBf16(c.k, 1.0, 3),
               residual = RandomBf16(size_t(c.tokens) * c.n, 1.0, 4);
    DeviceBuffer dx(x), dw(w), dn(norm), dr(residual);
    DeviceBuffer<__nv_bfloat16> y(size_t(c.tokens) * c.n);
    y.Poison();
    CUDA_OK(DecodeLinear({.x = dx.get(), .w = dw.get(), .y = y.get(), .norm_weight = c.norm ? dn.get() : nullptr, .residual = c.residual ? dr.get() : nullptr,
                          .tokens = c.tokens, .n = c.n, .k = c.k}, nullptr));
    CUDA_OK(cudaDeviceSynchronize());
    const auto want = Oracle(c, x, w, norm, residual);
    const Difference d = Compare(y.Download(), want);
    EXPECT_EQ(d.nan, 0u);
    EXPECT_LT(d.relative(), 4e-3) << "max " << d.max_abs;  // one bf16 rounding: 2^-9 relative
  }
}

TEST(DecodeLinear, ATokenDoesNotDependOnItsCompany) {
  const int n = 256, k = 2048, tokens = 32;
  const auto x = RandomBf16(size_t(tokens) * k, 1.0, 5), w = RandomBf16(size_t(n) * k, 0.05, 6);
  DeviceBuffer dx(x), dw(w);
  DeviceBuffer<__nv_bfloat16> together(size_t(tokens) * n), alone(n);
  CUDA_OK(DecodeLinear({.x = dx.get(), .w = dw.get(), .y = together.get(), .tokens = tokens, .n = n, .k = k}, nullptr));
  CUDA_OK(cudaDeviceSynchronize());
  const auto all = together.Download();
  for (int m : {0, 7, 8, 19, 31}) {
    CUDA_OK(DecodeLinear({.x = dx.get() + size_t(m) * k, .w = dw.get(), .y = alone.get(), .tokens = 1, .n = n, .k = k}, nullptr));
    CUDA_OK(cudaDeviceSynchronize());
    const auto one = alone.Download();
    EXPECT_EQ(0, std::memcmp(one.data(), all.data() + size_t(m) * n, n * 2)) << "token " << m;
  }
}

TEST(DecodeLinear, RefusesWhatItCannotDo) {
  EXPECT_EQ(DecodeLinear({.tokens = 0, .n = 16, .k = 256}, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(DecodeLinear({.tokens = 33, .n = 16, .k = 256}, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(DecodeLinear({.tokens = 1, .n = 20, .k = 256}, nullptr), cudaErrorInvalidValue);
  const __nv_bfloat16 weight{};
  EXPECT_EQ(DecodeLinear({.norm_weight = &weight, .tokens = 16, .n = 16, .k = 8192}, nullptr), cudaErrorInvalidConfiguration);
}

TEST(DecodeLinear, Speed) {
  struct Shape {
    const char* name;
    int n, k;
  };
  for (const Shape& s : {Shape{"30b.qkv", 5120, 2048}, {"30b.o", 2048, 4096}, {"30b.router", 128, 2048}, {"30b.lm_head", 151936, 2048},
                         {"235b.qkv", 9216, 4096}, {"235b.o", 4096, 8192}, {"235b.lm_head", 151936, 4096}}) {
    const size_t each = size_t(s.n) * s.k;
    const int sets = static_cast<int>(std::clamp<size_t>((size_t{512} << 20) / (each * 2), 1, 48));
    DeviceBuffer<__nv_bfloat16> w(each * sets), x(size_t{32} * s.k), y(size_t{32} * s.n), norm(s.k);
    FillNoise(w.get(), w.count(), 0.02f, 1, nullptr);
    FillNoise(x.get(), x.count(), 1.0f, 2, nullptr);
    FillNoise(norm.get(), norm.count(), 1.0f, 3, nullptr);
    for (int tokens : {1, 8, 16, 32}) {
      const __nv_bfloat16* norm_weight = tokens <= 2 ? norm.get() : nullptr;
      const double seconds = TimeGraph([&](int i, cudaStream_t stream) {
        CUDA_MUST(DecodeLinear({.x = x.get(), .w = w.get() + each * (i % sets), .y = y.get(), .norm_weight = norm_weight, .tokens = tokens, .n = s.n, .k = s.k}, stream));
      }, std::max(sets, 8));
      PrintRow(std::string("decode_linear.") + s.name + ".tokens" + std::to_string(tokens), seconds, 2.0 * each + 2.0 * tokens * (s.n + s.k));
    }
  }
}

}  // namespace
}  // namespace qwen::kernels::testing
