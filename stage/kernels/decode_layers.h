// stage/kernels/decode_layers.h — all layers of a stage for up to 4 new tokens, in one kernel.
//
// For few tokens a step is bound by reading weights once, and launches and drains of eight kernels a layer cost more than that.
// Here 128 blocks, one a multiprocessor, stay for the whole step. In each a warp does nothing but ask for weights (bulk copies
// into a ring in shared memory); it runs ahead of the arithmetic as far as the ring goes, because weights depend on no
// activation; only the experts' wait for the routing. The other 16 warps compute, and pass activations between blocks as words
// of 8 bytes that carry 4 bytes of value and the number of the layer: a reader polls the very words that it wants, so there
// is no grid barrier and no fence (stage/kernels/README.md).
//
//   hidden 2048, heads 32, kv 4, inter 768 (tokens <= 4) and hidden 4096, heads 64, kv 4, inter 1536 (one token) are compiled;
//   experts <= 128, a multiple of 32; top_k 2..8. Everything else: the kernels of one product each.
//   layouts of weights: qkv ((heads + 2 kv) * 128, hidden); o (hidden, heads * 128); router (experts, hidden); gate_up, down as in
//   moe_decode.h; caches, block_table, context and cos_sin as in attention_decode.h. block_tokens a power of two from 16 on.
//   rows: (tokens, hidden) bf16, or with `ids` a table of rows, one taken a token       out: (tokens, hidden) bf16
// Rounding is that of decode_linear.h, attention_decode.h and moe_decode.h; sums run in one fixed order,
// which depends on the number of tokens in one place, how a context is split.
// bytes moved: the weights of each layer once (of touched experts only; FP8: half of them), 4 * 128 * kv * context a token and layer.
// Enqueues two kernels, allocates nothing, never synchronises, may be captured. The second is a cooperative launch: it runs
// when 128 blocks fit at once, so none waits for one that has not started. A word that does not come for about ten seconds
// traps. One stream at a time may use a workspace.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace qwen::kernels {

struct DecodeLayersShape {
  int hidden = 0, heads = 0, kv_heads = 0, inter = 0, experts = 0, top_k = 0;
};
struct DecodeLayerWeights {
  const __nv_bfloat16 *input_norm, *qkv, *q_norm, *k_norm, *o, *post_norm, *router, *gate_up, *down;
  __nv_bfloat16 *k_cache, *v_cache;
};
// Block FP8 (common/fp8.h): qkv, o, gate_up and down are codes, and these are their scales.
struct DecodeLayerFp8 : DecodeLayerWeights {
  const float *qkv_scales, *o_scales, *gate_up_scales, *down_scales;
};
struct DecodeLayersArgs {
  DecodeLayersShape shape;
  const DecodeLayerWeights* layers = nullptr;  // on the device, (layer_count)
  int layer_count = 0;                         // <= kDecodeLayersMax
  const __nv_bfloat16* rows = nullptr;
  const int32_t* ids = nullptr;
  __nv_bfloat16* out = nullptr;
  const __nv_bfloat16* cos_sin = nullptr;
  const int32_t* block_table = nullptr;
  const int32_t* context = nullptr;
  void* workspace = nullptr;  // DecodeLayersWorkspace bytes, zero before the first step
  float norm_eps = 1e-6f;
  int tokens = 0, block_tokens = 0, table_stride = 0;
  bool normalise = true;
};
constexpr int kDecodeLayersMax = 120;

// Tokens a step may have on the current device; 0 when shape or device do not fit.
int DecodeLayersTokens(const DecodeLayersShape& shape);
size_t DecodeLayersWorkspace(const DecodeLayersShape& shape);
// `fp8`: DecodeLayersArgs::layers is an array of DecodeLayerFp8.
cudaError_t DecodeLayers(const DecodeLayersArgs& args, cudaStream_t stream, bool fp8 = false);

}  // namespace qwen::kernels
