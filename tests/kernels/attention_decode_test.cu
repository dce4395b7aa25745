// Goal: AttentionDecode equals softmax(q k^T / sqrt(128)) v in double precision over the cached keys and the new one, after
// QK-norm and RoPE of halves; the new key and value land in the cache; any number of splits gives the same within rounding.
#include "stage/kernels/attention_decode.h"

#include <numeric>

#include "tests/kernels/harness.h"

namespace qwen::kernels::testing {
namespace {

constexpr int kDim = 128;

struct Problem {
  int tokens, heads, kv_heads, block_tokens;
  std::vector<int32_t> context;
  int table_stride = 0, blocks = 0;
  std::vector<int32_t> table;
  std::vector<__nv_bfloat16> qkv, q_norm, k_norm, cos_sin, k, v;

  void Fill() {
    const int longest = *std::max_element(context.begin(), context.end()) + 1;
    table_stride = (longest + block_tokens - 1) / block_tokens;
    blocks = tokens * table_stride + 3;
    std::vector<int32_t> ids(blocks);
    std::iota(ids.begin(), ids.end(), 0);
    std::shuffle(ids.begin(), ids.end(), std::mt19937(9));
    table.assign(ids.begin(), ids.begin() + tokens * table_stride);
    qkv = RandomBf16(size_t(tokens) * (heads + 2 * kv_heads) * kDim, 1.0, 1);
    q_norm = RandomBf16(kDim, 1.0, 2);
    k_norm = RandomBf16(kDim, 1.0, 3);
    cos_sin.resize(size_t(tokens) * kDim);
    for (int t = 0; t < tokens; ++t) {
      for (int i = 0; i < 64; ++i) {
        const double angle = context[t] * std::pow(5e6, -i / 64.0);
        cos_sin[size_t(t) * kDim + i] = __float2bfloat16_rn(std::cos(angle));
        cos_sin[size_t(t) * kDim + 64 + i] = __float2bfloat16_rn(std::sin(angle));
      }
    }
    k = RandomBf16(size_t(blocks) * block_tokens * kv_heads * kDim, 1.0, 4);
    v = RandomBf16(size_t(blocks) * block_tokens * kv_heads * kDim, 1.0, 5);
  }
  size_t Row(int token, int position, int kv_head) const {
    return ((size_t(table[token * table_stride + position / block_tokens]) * block_tokens + position % block_tokens) * kv_heads + kv_head) * kDim;
  }
};

std::vector<double> NormRopeOracle(const __nv_bfloat16* head, const std::vector<__nv_bfloat16>& weight, const __nv_bfloat16* cos_sin) {
  double squares = 0;
  for (int i = 0; i < kDim; ++i) squares += double(ToFloat(head[i])) * ToFloat(head[i]);
  std::vector<double> n(kDim), r(kDim);
  for (int i = 0; i < kDim; ++i) n[i] = RoundToBf16(RoundToBf16(ToFloat(head[i]) / std::sqrt(squares / kDim + 1e-6)) * ToFloat(weight[i]));
  for (int i = 0; i < kDim; ++i) {
    const double rotated = i < 64 ? -n[i + 64] : n[i - 64];
    r[i] = RoundToBf16(RoundToBf16(n[i] * ToFloat(cos_sin[i % 64])) + RoundToBf16(rotated * ToFloat(cos_sin[64 + i % 64])));
  }
  return r;
}

TEST(AttentionDecode, EqualsTheOracleForEverySplit) {
  for (Problem p : {Problem{.tokens = 1, .heads = 8, .kv_heads = 1, .block_tokens = 16, .context = {0}},
                    Problem{.tokens = 3, .heads = 16, .kv_heads = 2, .block_tokens = 16, .context = {15, 16, 300}},
                    Problem{.tokens = 2, .heads = 32, .kv_heads = 2, .block_tokens = 64, .context = {1, 1023}},
                    Problem{.tokens = 2, .heads = 4, .kv_heads = 4, .block_tokens = 32, .context = {77, 500}}}) {
    p.Fill();
    const int group = p.heads / p.kv_heads;
    std::vector<double> want;
    std::vector<std::vector<double>> new_keys;
    for (int t = 0; t < p.tokens; ++t) {
      const __nv_bfloat16* row = p.qkv.data() + size_t(t) * (p.heads + 2 * p.kv_heads) * kDim;
      for (int h = 0; h < p.heads; ++h) {
        const int kv = h / group;
        const auto q = NormRopeOracle(row + h * kDim, p.q_norm, p.cos_sin.data() + size_t(t) * kDim);
        const auto new_key = NormRopeOracle(row + (p.heads + kv) * kDim, p.k_norm, p.cos_sin.data() + size_t(t) * kDim);
        if (h % group == 0) new_keys.push_back(new_key);
        std::vector<double> score(p.context[t] + 1);
        for (int s = 0; s <= p.context[t]; ++s) {
          double dot = 0;
          for (int i = 0; i < kDim; ++i) dot += q[i] * (s == p.context[t] ? new_key[i] : ToFloat(p.k[p.Row(t, s, kv) + i]));
          score[s] = dot / std::sqrt(double(kDim));
        }
        const double top = *std::max_element(score.begin(), score.end());
        double sum = 0;
        for (double& s : score) sum += s = std::exp(s - top);
        for (int i = 0; i < kDim; ++i) {
          double o = 0;
          for (int s = 0; s <= p.context[t]; ++s) {
            o += score[s] / sum * (s == p.context[t] ? ToFloat(row[(p.heads + p.kv_heads + kv) * kDim + i]) : ToFloat(p.v[p.Row(t, s, kv) + i]));
          }
          want.push_back(o);
        }
      }
    }
    DeviceBuffer qkv(p.qkv), qn(p.q_norm), kn(p.k_norm), cs(p.cos_sin);
    DeviceBuffer table(p.table), context(p.context);
    for (int splits : {1, 2, 4, 8, 16}) {
      SCOPED_TRACE(::testing::Message() << "tokens " << p.tokens << " heads " << p.heads << "/" << p.kv_heads << " splits " << splits);
      DeviceBuffer k(p.k), v(p.v);
      DeviceBuffer<__nv_bfloat16> out(size_t(p.tokens) * p.heads * kDim);
      out.Poison();
      CUDA_OK(AttentionDecode({.qkv = qkv.get(), .q_norm = qn.get(), .k_norm = kn.get(), .cos_sin = cs.get(), .k_cache = k.get(), .v_cache = v.get(),
                               .block_table = table.get(), .context = context.get(), .out = out.get(), .tokens = p.tokens, .heads = p.heads,
                               .kv_heads = p.kv_heads, .block_tokens = p.block_tokens, .table_stride = p.table_stride, .splits = splits}, nullptr));
      CUDA_OK(cudaDeviceSynchronize());
      const Difference d = Compare(out.Download(), want);
      EXPECT_EQ(d.nan, 0u);
      EXPECT_LT(d.relative(), 6e-3) << "max " << d.max_abs;  // probabilities and output are rounded to bf16
      const auto cached_k = k.Download(), cached_v = v.Download();
      for (int t = 0; t < p.tokens; ++t) {
        for (int kv = 0; kv < p.kv_heads; ++kv) {
          const size_t at = p.Row(t, p.context[t], kv);
          for (int i = 0; i < kDim; ++i) {
            EXPECT_NEAR(ToFloat(cached_k[at + i]), new_keys[t * p.kv_heads + kv][i], std::abs(new_keys[t * p.kv_heads + kv][i]) / 100 + 1e-2);
            EXPECT_EQ(ToFloat(cached_v[at + i]), ToFloat(p.qkv[(size_t(t) * (p.heads + 2 * p.kv_heads) + p.heads + p.kv_heads + kv) * kDim + i]));
          }
        }
      }
    }
  }
}

TEST(AttentionDecode, Speed) {
  struct Shape {
    int tokens, context;
  };
  for (int heads : {32, 64}) {
    for (const Shape& s : {Shape{1, 2048}, {8, 2048}, {32, 1024}, {128, 512}, {256, 512}, {1, 32768}, {8, 32768}}) {
      const int kv_heads = 4, block_tokens = 64, stride = (s.context + block_tokens) / block_tokens;
      const int sets = std::max(1, static_cast<int>((size_t{256} << 20) / (size_t(s.tokens) * stride * block_tokens * kv_heads * kDim * 4)));
      const size_t cache = size_t(s.tokens) * stride * block_tokens * kv_heads * kDim;
      DeviceBuffer<__nv_bfloat16> k(cache * sets), v(cache * sets), qkv(size_t(s.tokens) * (heads + 2 * kv_heads) * kDim), norm(kDim), cs(size_t(s.tokens) * kDim),
          out(size_t(s.tokens) * heads * kDim);
      for (auto* b : {&k, &v, &qkv, &norm, &cs}) FillNoise(b->get(), b->count(), 1.0f, 5, nullptr);
      std::vector<int32_t> ids(size_t(s.tokens) * stride), context(s.tokens, s.context);
      std::iota(ids.begin(), ids.end(), 0);
      std::shuffle(ids.begin(), ids.end(), std::mt19937(1));
      DeviceBuffer table(ids), dc(context);
      for (int splits : {1, 2, 4, 8, 16}) {
        if (s.tokens * kv_heads * splits > 2048 || s.tokens * kv_heads * splits < 16) continue;
        const double seconds = TimeGraph([&](int i, cudaStream_t stream) {
          CUDA_MUST(AttentionDecode({.qkv = qkv.get(), .q_norm = norm.get(), .k_norm = norm.get(), .cos_sin = cs.get(), .k_cache = k.get() + cache * (i % sets),
                                     .v_cache = v.get() + cache * (i % sets), .block_table = table.get(), .context = dc.get(), .out = out.get(), .tokens = s.tokens,
                                     .heads = heads, .kv_heads = kv_heads, .block_tokens = block_tokens, .table_stride = stride, .splits = splits}, stream));
        }, 24);
        PrintRow("attention_decode.heads" + std::to_string(heads) + ".tokens" + std::to_string(s.tokens) + ".context" + std::to_string(s.context) + ".splits" + std::to_string(splits),
                 seconds, 4.0 * s.tokens * s.context * kv_heads * kDim);
      }
    }
  }
}

}  // namespace
}  // namespace qwen::kernels::testing
