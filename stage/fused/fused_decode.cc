// Decode steps: their buffers, their graphs, and the kernels of one step.
#include "stage/fused/fused_stage.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <bit>

#include "stage/base/check.h"
#include "stage/fused/launch.h"
#include "stage/kernels/attention_decode.h"
#include "stage/kernels/decode_linear.h"
#include "stage/kernels/embedding.h"
#include "stage/kernels/fp8_weights.h"
#include "stage/kernels/moe_prefill.h"
#include "stage/kernels/rms_norm.h"
#include "stage/kernels/rope.h"

namespace qwen::fused {
namespace {

constexpr int64_t kSkinny = kernels::kDecodeTokensMax;  // up to here own products, beyond it cuBLAS
constexpr int64_t kFusedNorm = 2;                       // up to here every block of a product normalises for itself
constexpr int64_t kFewTokens = 128;                     // beyond it experts meet several tokens each: a prompt's grouped products

kernels::DecodeLayersShape DecodeShape(const contract::ModelShape& shape) {
  return {.hidden = shape.hidden,
          .heads = shape.heads,
          .kv_heads = shape.kv_heads,
          .inter = shape.moe->intermediate,
          .experts = shape.moe->experts,
          .top_k = shape.moe->experts_per_token};
}

}  // namespace

void FusedStage::AllocateDecode() {
  const auto bf16 = at::TensorOptions().dtype(at::kBFloat16).device(at::kCUDA);
  const auto int32 = bf16.dtype(at::kInt);
  const int64_t rows = kDecodeBatchMax, qkv = (shape_.heads + 2 * shape_.kv_heads) * kDim;
  decode_.input = at::empty({rows, shape_.hidden}, bf16);
  decode_.hidden = at::empty({rows, shape_.hidden}, bf16);
  decode_.normed = at::empty({rows, shape_.hidden}, bf16);
  decode_.product = at::empty({rows, shape_.hidden}, bf16);
  decode_.qkv = at::empty({rows, qkv}, bf16);
  decode_.attended = at::empty({rows, shape_.heads * kDim}, bf16);
  decode_.cos_sin = at::empty({rows, kDim}, bf16);
  if (last_) decode_.logits = at::empty({rows, shape_.vocab}, bf16);
  if (shape_.moe) {
    const int64_t assignments = rows * shape_.moe->experts_per_token;
    decode_.router_logits = at::empty({rows, shape_.moe->experts}, bf16);
    decode_.expert_of = at::empty({assignments}, int32);
    decode_.order = at::empty({assignments}, int32);
    decode_.weight_of = at::empty({assignments}, bf16);
    decode_.group = at::empty({shape_.moe->experts, 4}, int32);
    decode_.count = at::empty({shape_.moe->experts}, int32);
    decode_.end = at::empty({shape_.moe->experts}, int32);
    decode_.row_of = at::empty({assignments}, int32);
    decode_.active = at::empty({assignments, shape_.moe->intermediate}, bf16);
    decode_.partial = at::empty({assignments, shape_.hidden}, bf16);
  }
  if (shape_.intermediate > 0) {
    decode_.gate_up = at::empty({rows, 2 * shape_.intermediate}, bf16);
    decode_.dense = at::empty({rows, shape_.intermediate}, bf16);
  }
  const int64_t stride = std::bit_ceil(static_cast<uint64_t>(std::max(max_blocks_, kTableStrideMin)));
  const int64_t words = rows * (5 + stride);
  host_meta_ = at::empty({words}, at::TensorOptions().dtype(at::kInt).pinned_memory(true));
  device_meta_ = at::zeros({words}, int32);
}

// Everything that the one-kernel step keeps: where each layer's weights are, and the words its blocks exchange.
void FusedStage::PlanDecodeLayers() {
  const bool moe = std::all_of(layers_.begin(), layers_.end(), [](const Layer& layer) { return layer.router.defined(); });
  if (!moe || !shape_.moe || !std::has_single_bit(static_cast<uint64_t>(block_tokens_)) || layers_.empty() || layers_.size() > static_cast<size_t>(kernels::kDecodeLayersMax)) return;
  one_kernel_tokens_ = kernels::DecodeLayersTokens(DecodeShape(shape_));
  if (one_kernel_tokens_ == 0) return;
  std::vector<kernels::DecodeLayerWeights> pointers;
  std::vector<kernels::DecodeLayerFp8> fp8;
  for (const Layer& l : layers_) {
    pointers.push_back({Bf16(l.input_norm), Bf16(l.qkv.values), Bf16(l.q_norm), Bf16(l.k_norm), Bf16(l.o.values), Bf16(l.post_norm), Bf16(l.router), Bf16(l.gate_up.values), Bf16(l.down.values),
                        Bf16(l.k_cache), Bf16(l.v_cache)});
    if (!l.qkv.fp8()) continue;
    const auto scales = [](const Matrix& matrix) { return matrix.scales.const_data_ptr<float>(); };
    fp8.push_back({pointers.back(), scales(l.qkv), scales(l.o), scales(l.gate_up), scales(l.down)});
  }
  const auto bytes = at::TensorOptions().dtype(at::kByte).device(at::kCUDA);
  const bool kept = !fp8.empty();  // all layers or none (UnfitFp8)
  const size_t size = kept ? fp8.size() * sizeof(fp8[0]) : pointers.size() * sizeof(pointers[0]);
  const void* table = kept ? static_cast<const void*>(fp8.data()) : pointers.data();
  layer_pointers_ = at::empty({static_cast<int64_t>(size)}, bytes);
  // In the order of our stream: the memory may be what a temporary of the loading had, and work on that is perhaps still to come.
  Must(cudaMemcpyAsync(layer_pointers_.data_ptr(), table, size, cudaMemcpyHostToDevice, stream_), "layer pointers");
  Must(cudaStreamSynchronize(stream_), "layer pointers");  // `table` ends with this function
  layers_workspace_ = at::zeros({static_cast<int64_t>(kernels::DecodeLayersWorkspace(DecodeShape(shape_)))}, bytes);
}

// context | tokens | positions (t, h, w) | block table
FusedStage::Metadata FusedStage::At(int32_t* base) const {
  return {base, base + kDecodeBatchMax, base + 2 * kDecodeBatchMax, base + 5 * kDecodeBatchMax};
}

bool FusedStage::TakesDecode(const step::StepPlan& plan) const {
  if (static_cast<int64_t>(plan.spans.size()) > kDecodeBatchMax) return false;
  return std::all_of(plan.spans.begin(), plan.spans.end(),
                     [](const step::SequenceSpan& span) { return span.tokens.size() == 1 && span.sample && span.vision.empty(); });
}

Result<model::StageOutput> FusedStage::Decode(const step::StepPlan& plan, const model::StageActivations& input) {
  const auto tokens = static_cast<int64_t>(plan.spans.size());
  int64_t stride = kTableStrideMin;
  for (const step::SequenceSpan& span : plan.spans) stride = std::max(stride, static_cast<int64_t>(span.blocks.size()));
  stride = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(stride)));
  Must(cudaEventSynchronize(uploaded_), "plan upload");  // the copy before has read the host buffer
  const Metadata meta = At(host_meta_.mutable_data_ptr<int32_t>());
  for (int64_t i = 0; i < tokens; ++i) {
    const step::SequenceSpan& span = plan.spans[static_cast<size_t>(i)];
    meta.context[i] = span.begin;
    meta.tokens[i] = span.tokens[0];
    meta.positions[i] = span.positions[0].t;
    meta.positions[tokens + i] = span.positions[0].h;
    meta.positions[2 * tokens + i] = span.positions[0].w;
    std::copy(span.blocks.begin(), span.blocks.end(), meta.table + i * stride);
  }
  const size_t bytes = static_cast<size_t>(5 * kDecodeBatchMax + tokens * stride) * sizeof(int32_t);
  Must(cudaMemcpyAsync(device_meta_.data_ptr(), host_meta_.data_ptr(), bytes, cudaMemcpyHostToDevice, stream_), "plan upload");
  Must(cudaEventRecord(uploaded_, stream_), "plan upload");
  if (!first_) decode_.input.narrow(0, 0, tokens).copy_(input.hidden, /*non_blocking=*/true);

  RunDecode(tokens, stride);
  model::StageOutput output;
  if (last_) {
    output.logits = decode_.logits.narrow(0, 0, tokens);
  } else {
    output.activations.hidden = decode_.hidden.narrow(0, 0, tokens);
  }
  return output;
}

// A size that comes once, while a batch fills or empties, is not worth a graph: capturing costs as much as a few steps. The
// first step of a size runs as it is (libraries load and allocate meanwhile), the second makes the graph.
void FusedStage::RunDecode(int64_t tokens, int64_t table_stride) {
  DecodeGraph& graph = graphs_[{tokens, table_stride}];
  graph.last_use = ++decodes_;
  if (graph.exec == nullptr && !graph.seen) {
    graph.seen = true;
    EnqueueDecode(tokens, table_stride);
    return;
  }
  if (graph.exec == nullptr) {
    DropOldGraph();
    graph.exec = CaptureDecode(tokens, table_stride);
  }
  Must(cudaGraphLaunch(graph.exec, stream_), "decode graph");
}

// Makes room for one more: the graph that was not used for longest goes, once there are kGraphsMax.
void FusedStage::DropOldGraph() {
  DecodeGraph* oldest = nullptr;
  int64_t held = 0;
  for (auto& [size, graph] : graphs_) {
    if (graph.exec == nullptr) continue;
    ++held;
    if (oldest == nullptr || graph.last_use < oldest->last_use) oldest = &graph;
  }
  if (held < kGraphsMax) return;
  Must(cudaStreamSynchronize(stream_), "graph in use");
  Must(cudaGraphExecDestroy(oldest->exec), "graph");
  oldest->exec = nullptr;
}

cudaGraphExec_t FusedStage::CaptureDecode(int64_t tokens, int64_t table_stride) {
  Must(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture");  // other threads go on using CUDA
  cudaGraph_t captured = nullptr;
  try {
    EnqueueDecode(tokens, table_stride);
  } catch (...) {
    cudaStreamEndCapture(stream_, &captured);
    if (captured != nullptr) cudaGraphDestroy(captured);
    throw;
  }
  Must(cudaStreamEndCapture(stream_, &captured), "capture");
  cudaGraphExec_t graph = nullptr;
  const cudaError_t made = cudaGraphInstantiate(&graph, captured, 0);
  cudaGraphDestroy(captured);
  Must(made, "graph");
  return graph;
}

at::Tensor FusedStage::Bf16Weight(const Matrix& matrix) {
  if (!matrix.fp8()) return matrix.values;
  const int64_t rows = matrix.values.size(0), columns = matrix.values.size(1);
  at::Tensor out = multiplied_out_.narrow(0, 0, rows * columns).view({rows, columns});
  KERNEL(MultiplyOutFp8(Fp8Of(matrix.values, matrix.scales), Bf16(out), static_cast<int>(rows), static_cast<int>(columns), stream_));
  return out;
}

// y = x W^T (+ residual), by whichever product is faster at this many rows.
void FusedStage::DecodeLinear(const at::Tensor& x, const Matrix& weight, at::Tensor& y, int64_t tokens, const at::Tensor* residual) {
  // Own products win while a matrix is small or the rows few; lm_head at 32 rows took 238 us here and 150 us in cuBLAS.
  if (tokens <= kSkinny && (tokens <= kSkinny / 2 || weight.values.size(0) <= 16384)) {
    KERNEL(DecodeLinear({.x = Bf16(x),
                         .w = weight.fp8() ? nullptr : Bf16(weight.values),
                         .y = Bf16(y),
                         .residual = residual != nullptr ? Bf16(*residual) : nullptr,
                         .tokens = static_cast<int>(tokens),
                         .n = static_cast<int>(weight.values.size(0)),
                         .k = static_cast<int>(weight.values.size(1)),
                         .fp8 = weight.fp8() ? Fp8Of(weight.values, weight.scales) : kernels::Fp8Matrix{}},
                        stream_));
    return;
  }
  const at::Tensor values = Bf16Weight(weight);
  const at::Tensor rows = x.narrow(0, 0, tokens);
  at::Tensor out = y.narrow(0, 0, tokens);
  if (residual == nullptr) {
    at::mm_out(out, rows, values.t());
  } else {
    QP_CHECK(residual->data_ptr() == y.data_ptr());  // the residual stream is updated in place
    at::Tensor product = decode_.product.narrow(0, 0, tokens);
    at::mm_out(product, rows, values.t());
    out.add_(product);
  }
}

void FusedStage::EnqueueDecode(int64_t tokens, int64_t table_stride) {
  const Metadata meta = At(device_meta_.data_ptr<int32_t>());
  const int count = static_cast<int>(tokens);
  const float eps = shape_.rms_eps;
  DecodeBuffers& b = decode_;
  const bool one_kernel = tokens <= one_kernel_tokens_;  // it takes its rows itself
  bool begun = false;
  if (!one_kernel && first_) {
    KERNEL(GatherRows(Bf16(embedding_), meta.tokens, Bf16(b.hidden), count, shape_.hidden, stream_));
  } else if (!one_kernel) {
    b.hidden.narrow(0, 0, tokens).copy_(b.input.narrow(0, 0, tokens));
  }
  KERNEL(RotaryTable({.positions = meta.positions,
                      .inverse = inverse_.const_data_ptr<float>(),
                      .axis = axis_.const_data_ptr<int32_t>(),
                      .cos_sin = Bf16(b.cos_sin),
                      .scaling = static_cast<float>(rotary_scaling_),
                      .tokens = count},
                     stream_));
  if (one_kernel) {
    KERNEL(DecodeLayers({.shape = DecodeShape(shape_),
                         .layers = static_cast<const kernels::DecodeLayerWeights*>(layer_pointers_.data_ptr()),
                         .layer_count = static_cast<int>(layers_.size()),
                         .rows = Bf16(first_ ? embedding_ : b.input),
                         .ids = first_ ? meta.tokens : nullptr,
                         .out = Bf16(b.hidden),
                         .cos_sin = Bf16(b.cos_sin),
                         .block_table = meta.table,
                         .context = meta.context,
                         .workspace = layers_workspace_.data_ptr(),
                         .norm_eps = eps,
                         .tokens = count,
                         .block_tokens = static_cast<int>(block_tokens_),
                         .table_stride = static_cast<int>(table_stride),
                         .normalise = shape_.moe->norm_topk_prob},
                        stream_, layers_.front().qkv.fp8()));
  } else {
    for (size_t i = 0; i < layers_.size(); ++i) {
      const at::Tensor* next = i + 1 < layers_.size() ? &layers_[i + 1].input_norm : last_ ? &norm_ : nullptr;
      begun = EnqueueLayer(layers_[i], tokens, table_stride, begun, next);
    }
  }
  if (last_) {
    if (!begun) DecodeNorm(norm_, tokens);
    DecodeLinear(b.normed, {lm_head_, {}}, b.logits, tokens, nullptr);
  }
}

// normed = RMSNorm(hidden).
void FusedStage::DecodeNorm(const at::Tensor& weight, int64_t tokens) {
  DecodeBuffers& b = decode_;
  KERNEL(RmsNorm({.x = Bf16(b.hidden), .weight = Bf16(weight), .y = Bf16(b.normed), .eps = shape_.rms_eps, .tokens = static_cast<int>(tokens), .hidden = shape_.hidden}, stream_));
}

// One layer as a chain of kernels.
bool FusedStage::EnqueueLayer(const Layer& layer, int64_t tokens, int64_t table_stride, bool begun, const at::Tensor* next_norm) {
  const Metadata meta = At(device_meta_.data_ptr<int32_t>());
  const int count = static_cast<int>(tokens);
  const float eps = shape_.rms_eps;
  DecodeBuffers& b = decode_;
  if (tokens <= kFusedNorm) {
    KERNEL(DecodeLinear({.x = Bf16(b.hidden),
                         .w = layer.qkv.fp8() ? nullptr : Bf16(layer.qkv.values),
                         .y = Bf16(b.qkv),
                         .norm_weight = Bf16(layer.input_norm),
                         .norm_eps = eps,
                         .tokens = count,
                         .n = static_cast<int>(layer.qkv.values.size(0)),
                         .k = shape_.hidden,
                         .fp8 = layer.qkv.fp8() ? Fp8Of(layer.qkv.values, layer.qkv.scales) : kernels::Fp8Matrix{}},
                        stream_));
  } else {
    if (!begun) DecodeNorm(layer.input_norm, tokens);
    DecodeLinear(b.normed, layer.qkv, b.qkv, tokens, nullptr);
  }
  KERNEL(AttentionDecode({.qkv = Bf16(b.qkv),
                          .q_norm = Bf16(layer.q_norm),
                          .k_norm = Bf16(layer.k_norm),
                          .cos_sin = Bf16(b.cos_sin),
                          .k_cache = Bf16(layer.k_cache),
                          .v_cache = Bf16(layer.v_cache),
                          .block_table = meta.table,
                          .context = meta.context,
                          .out = Bf16(b.attended),
                          .norm_eps = eps,
                          .tokens = count,
                          .heads = shape_.heads,
                          .kv_heads = shape_.kv_heads,
                          .block_tokens = static_cast<int>(block_tokens_),
                          .table_stride = static_cast<int>(table_stride)},
                         stream_));
  if (tokens <= kSkinny) {
    DecodeLinear(b.attended, layer.o, b.hidden, tokens, &b.hidden);
  } else {
    DecodeLinear(b.attended, layer.o, b.product, tokens, nullptr);  // the norm of DecodeMlp adds it
  }
  return DecodeMlp(layer, tokens, next_norm);
}

bool FusedStage::DecodeMlp(const Layer& layer, int64_t tokens, const at::Tensor* next_norm) {
  DecodeBuffers& b = decode_;
  const int count = static_cast<int>(tokens);
  const float eps = shape_.rms_eps;
  kernels::RmsNormArgs norm{.x = Bf16(b.hidden), .weight = Bf16(layer.post_norm), .y = Bf16(b.normed), .eps = eps, .tokens = count, .hidden = shape_.hidden};
  if (tokens > kSkinny) {
    norm.add = Bf16(b.product);
    norm.sum = Bf16(b.hidden);
  }
  if (!layer.router.defined()) {
    KERNEL(RmsNorm(norm, stream_));
    DecodeLinear(b.normed, layer.gate_up, b.gate_up, tokens, nullptr);
    KERNEL(SiluMul(Bf16(b.gate_up), Bf16(b.dense), count, shape_.intermediate, stream_));
    DecodeLinear(b.dense, layer.down, b.hidden, tokens, &b.hidden);
    return false;
  }
  const kernels::MoeShapeArgs moe = MoeArgs(shape_, tokens);
  if (tokens <= kFusedNorm) {
    KERNEL(DecodeLinear({.x = Bf16(b.hidden),
                         .w = Bf16(layer.router),
                         .y = Bf16(b.router_logits),
                         .norm_weight = Bf16(layer.post_norm),
                         .normed = Bf16(b.normed),
                         .norm_eps = eps,
                         .tokens = count,
                         .n = moe.experts,
                         .k = shape_.hidden},
                        stream_));
  } else {
    KERNEL(RmsNorm(norm, stream_));
    DecodeLinear(b.normed, {layer.router, {}}, b.router_logits, tokens, nullptr);
  }
  if (tokens > kFewTokens) {
    const kernels::MoePermutation permutation{Int32(b.expert_of), Bf16(b.weight_of), Int32(b.count), Int32(b.end), Int32(b.order), Int32(b.row_of)};
    GroupedMlp(layer, moe, b.router_logits, permutation, b.normed, b.active, b.partial, b.hidden, next_norm);
    return next_norm != nullptr;
  }
  const kernels::MoeRouting routing{Int32(b.expert_of), Bf16(b.weight_of), reinterpret_cast<int4*>(b.group.data_ptr()), Int32(b.order)};
  KERNEL(MoeRoute(moe, Bf16(b.router_logits), routing, shape_.moe->norm_topk_prob, stream_));
  if (layer.gate_up.fp8()) {
    KERNEL(MoeGateUp(moe, Bf16(b.normed), Fp8Of(layer.gate_up.values, layer.gate_up.scales), routing, Bf16(b.active), stream_));
    KERNEL(MoeDown(moe, Bf16(b.active), Fp8Of(layer.down.values, layer.down.scales), routing, Bf16(b.partial), stream_));
  } else {
    KERNEL(MoeGateUp(moe, Bf16(b.normed), Bf16(layer.gate_up.values), routing, Bf16(b.active), stream_));
    KERNEL(MoeDown(moe, Bf16(b.active), Bf16(layer.down.values), routing, Bf16(b.partial), stream_));
  }
  KERNEL(MoeCombine(moe, Bf16(b.partial), Bf16(b.hidden), Bf16(b.hidden), stream_));
  return false;
}

}  // namespace qwen::fused
