// Goal: the time of one decode step of a stage of the 30B shape (48 layers on one GPU) or of the 235B shape (24 layers, a
// quarter of the model) made of the decode kernels in one CUDA graph: the floor under the fused backend's decode at small B.
// Weights are noise made on the GPU; routing is uniform because the router's weights are noise. Prints one JSON row a case.
#include "stage/kernels/attention_decode.h"
#include "stage/kernels/decode_linear.h"
#include "stage/kernels/moe_decode.h"
#include "stage/kernels/rms_norm.h"
#include "tests/kernels/harness.h"

namespace qwen::kernels::testing {
namespace {

struct Model {
  const char* name;
  int layers, hidden, heads, kv_heads, inter, experts, top_k, vocab;
  bool head;  // norm + lm_head at the end
};

struct Layer {
  DeviceBuffer<__nv_bfloat16> qkv, o, router, gate_up, down, k, v;
};

double Bytes(const Model& m, int tokens, int context) {
  const double distinct = m.experts * (1 - std::pow(1 - double(m.top_k) / m.experts, tokens));
  const double attention = 2.0 * m.hidden * 128 * (2 * m.heads + 2 * m.kv_heads), moe = 6.0 * m.hidden * m.inter * distinct + 2.0 * m.hidden * m.experts;
  const double kv = 4.0 * tokens * context * m.kv_heads * 128;
  return m.layers * (attention + moe + kv) + (m.head ? 2.0 * m.vocab * m.hidden : 0);
}

// `distinct` layers of weights, used in turn: fewer of them touch less memory and do the same work.
void TimeStep(const Model& m, int tokens, int context, int distinct = 0) {
  const int block_tokens = 64, stride = (context + block_tokens) / block_tokens;
  std::vector<Layer> layers(distinct > 0 ? distinct : m.layers);
  auto make = [&](DeviceBuffer<__nv_bfloat16>& b, size_t count, float scale) {
    static uint64_t seed = 1;
    b = DeviceBuffer<__nv_bfloat16>(count);
    FillNoise(b.get(), count, scale, ++seed, nullptr);
  };
  const float in = 1.0f / std::sqrt(float(m.hidden)), mid = 1.0f / std::sqrt(float(m.inter));
  for (Layer& l : layers) {
    make(l.qkv, size_t(m.heads + 2 * m.kv_heads) * 128 * m.hidden, in);
    make(l.o, size_t(m.hidden) * m.heads * 128, in);
    make(l.router, size_t(m.experts) * m.hidden, in);
    make(l.gate_up, size_t(m.experts) * 2 * m.inter * m.hidden, in);
    make(l.down, size_t(m.experts) * m.inter * m.hidden, mid);
    make(l.k, size_t(tokens) * stride * block_tokens * m.kv_heads * 128, 1.0f);
    make(l.v, size_t(tokens) * stride * block_tokens * m.kv_heads * 128, 1.0f);
  }
  DeviceBuffer<__nv_bfloat16> x, normed, qkv, attention, norm, cs, logits, lm_head, out;
  make(x, size_t(tokens) * m.hidden, 1.0f);
  make(normed, size_t(tokens) * m.hidden, 1.0f);
  make(norm, m.hidden, 1.0f);
  make(cs, size_t(tokens) * 128, 0.7f);
  make(qkv, size_t(tokens) * (m.heads + 2 * m.kv_heads) * 128, 1.0f);
  make(attention, size_t(tokens) * m.heads * 128, 1.0f);
  make(logits, size_t(tokens) * m.experts, 1.0f);
  make(lm_head, m.head ? size_t(m.vocab) * m.hidden : 1, in);
  make(out, m.head ? size_t(m.vocab) * tokens : 1, 1.0f);
  std::vector<int32_t> ids(size_t(tokens) * stride), contexts(tokens, context);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i);
  DeviceBuffer table(ids), dc(contexts);
  const MoeShapeArgs shape{tokens, m.hidden, m.inter, m.experts, m.top_k};
  DeviceBuffer<int32_t> expert_of(size_t(tokens) * m.top_k), order(size_t(tokens) * m.top_k);
  DeviceBuffer<int4> group(m.experts);
  DeviceBuffer<__nv_bfloat16> weight_of(size_t(tokens) * m.top_k), h(size_t(tokens) * m.top_k * m.inter), partial(size_t(tokens) * m.top_k * m.hidden);
  const MoeRouting routing{expert_of.get(), weight_of.get(), group.get(), order.get()};

  const double seconds = TimeGraph([&](int, cudaStream_t s) {
    for (int index = 0; index < m.layers; ++index) {
      Layer& l = layers[index % layers.size()];
      const int qkv_rows = (m.heads + 2 * m.kv_heads) * 128;
      if (tokens <= 2) {
        CUDA_MUST(DecodeLinear({.x = x.get(), .w = l.qkv.get(), .y = qkv.get(), .norm_weight = norm.get(), .tokens = tokens, .n = qkv_rows, .k = m.hidden}, s));
      } else {
        CUDA_MUST(RmsNorm({.x = x.get(), .weight = norm.get(), .y = normed.get(), .tokens = tokens, .hidden = m.hidden}, s));
        CUDA_MUST(DecodeLinear({.x = normed.get(), .w = l.qkv.get(), .y = qkv.get(), .tokens = tokens, .n = qkv_rows, .k = m.hidden}, s));
      }
      CUDA_MUST(AttentionDecode({.qkv = qkv.get(), .q_norm = norm.get(), .k_norm = norm.get(), .cos_sin = cs.get(), .k_cache = l.k.get(), .v_cache = l.v.get(),
                                 .block_table = table.get(), .context = dc.get(), .out = attention.get(), .tokens = tokens, .heads = m.heads, .kv_heads = m.kv_heads,
                                 .block_tokens = block_tokens, .table_stride = stride}, s));
      CUDA_MUST(DecodeLinear({.x = attention.get(), .w = l.o.get(), .y = x.get(), .residual = x.get(), .tokens = tokens, .n = m.hidden, .k = m.heads * 128}, s));
      if (tokens <= 2) {
        CUDA_MUST(DecodeLinear({.x = x.get(), .w = l.router.get(), .y = logits.get(), .norm_weight = norm.get(), .normed = normed.get(), .tokens = tokens, .n = m.experts, .k = m.hidden}, s));
      } else {
        CUDA_MUST(RmsNorm({.x = x.get(), .weight = norm.get(), .y = normed.get(), .tokens = tokens, .hidden = m.hidden}, s));
        CUDA_MUST(DecodeLinear({.x = normed.get(), .w = l.router.get(), .y = logits.get(), .tokens = tokens, .n = m.experts, .k = m.hidden}, s));
      }
      CUDA_MUST(MoeRoute(shape, logits.get(), routing, true, s));
      CUDA_MUST(MoeGateUp(shape, normed.get(), l.gate_up.get(), routing, h.get(), s));
      CUDA_MUST(MoeDown(shape, h.get(), l.down.get(), routing, partial.get(), s));
      CUDA_MUST(MoeCombine(shape, partial.get(), x.get(), x.get(), s));
    }
    if (m.head) CUDA_MUST(RmsNorm({.x = x.get(), .weight = norm.get(), .y = normed.get(), .tokens = tokens, .hidden = m.hidden}, s));
    if (m.head) CUDA_MUST(DecodeLinear({.x = normed.get(), .w = lm_head.get(), .y = out.get(), .tokens = tokens, .n = m.vocab, .k = m.hidden}, s));
  }, 1, 15);
  const double bytes = Bytes(m, tokens, context);
  std::printf("{\"suite\":\"decode_step\",\"case\":\"%s.tokens%d.context%d.distinct%d\",\"ms\":%.4f,\"tok_s\":%.1f,\"GBps\":%.0f,\"share\":%.3f,\"us_per_layer\":%.2f}\n", m.name, tokens, context, distinct,
              seconds * 1e3, tokens / seconds, bytes / seconds / 1e9, bytes / seconds / CopyBandwidth(), seconds * 1e6 / m.layers);
  std::fflush(stdout);
}

TEST(DecodeStep, Speed) {
  const Model small{"30b", 48, 2048, 32, 4, 768, 128, 8, 151936, true}, stage{"235b.24of94", 24, 4096, 64, 4, 1536, 128, 8, 151936, false};
  for (int tokens : {1, 2, 4, 8, 32}) TimeStep(small, tokens, tokens == 32 ? 1024 : 2048);
  for (int distinct : {2, 8, 24}) TimeStep(small, 32, 1024, distinct);
  for (int tokens : {1, 2, 4, 8}) TimeStep(stage, tokens, 2048);
}

}  // namespace
}  // namespace qwen::kernels::testing
