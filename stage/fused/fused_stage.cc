#include "stage/fused/fused_stage.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "stage/base/check.h"
#include "stage/kernels/attention_decode.h"
#include "stage/kernels/common/limits.h"
#include "stage/kernels/decode_linear.h"
#include "stage/kernels/embedding.h"
#include "stage/kernels/moe_decode.h"
#include "stage/kernels/moe_grouped.h"
#include "stage/kernels/moe_prefill.h"
#include "stage/kernels/moe_stream.h"
#include "stage/kernels/rms_norm.h"
#include "stage/kernels/rope.h"

namespace qwen::fused {
namespace {

constexpr int64_t kDim = kernels::kHeadDim;
constexpr int64_t kSkinny = kernels::kDecodeTokensMax;  // up to here own products, beyond it cuBLAS
constexpr int64_t kFusedNorm = 2;                       // up to here every block of a product normalises for itself
constexpr int64_t kStreamTokens = 128;                  // beyond it experts meet several tokens each: the streaming kernels
constexpr int64_t kTableStrideMin = 16;
// cuDNN's attention takes half the time of LibTorch's flash attention for a prompt without a prefix (2,048 tokens, 32:4
// heads on an H200: 85 against 172 us), but makes a plan for every length, 60 ms each. So lengths are rounded up to these.
constexpr int64_t kCudnnStep = 512;

// A kernel's pointer to a tensor. The sizes were checked once (Unfit, and the shapes that Bind gives).
__nv_bfloat16* Bf16(const at::Tensor& tensor) { return static_cast<__nv_bfloat16*>(tensor.data_ptr()); }
int32_t* Int32(const at::Tensor& tensor) { return static_cast<int32_t*>(tensor.data_ptr()); }
void Must(cudaError_t error, const char* what) { TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error)); }
#define KERNEL(call) Must(kernels::call, #call)

const at::Tensor& Find(const weights::TensorMap& tensors, const std::string& slot) {
  const auto found = tensors.find(slot);
  QP_CHECK(found != tensors.end()) << slot;
  return found->second;
}

// The rows of several matrices as one; the map then holds views of it, so nothing is kept twice.
at::Tensor Merge(weights::TensorMap& tensors, const std::vector<std::string>& slots) {
  std::vector<at::Tensor> parts;
  for (const std::string& slot : slots) parts.push_back(Find(tensors, slot));
  const at::Tensor merged = at::cat(parts, 0);
  int64_t row = 0;
  for (size_t i = 0; i < slots.size(); ++i) {
    tensors[slots[i]] = merged.narrow(0, row, parts[i].size(0));
    row += parts[i].size(0);
  }
  return merged;
}

kernels::MoeShapeArgs MoeArgs(const contract::ModelShape& shape, int64_t tokens) {
  return {.tokens = static_cast<int>(tokens),
          .hidden = shape.hidden,
          .inter = shape.moe->intermediate,
          .experts = shape.moe->experts,
          .top_k = shape.moe->experts_per_token};
}

kernels::DecodeLayersShape DecodeShape(const contract::ModelShape& shape) {
  return {.hidden = shape.hidden,
          .heads = shape.heads,
          .kv_heads = shape.kv_heads,
          .inter = shape.moe->intermediate,
          .experts = shape.moe->experts,
          .top_k = shape.moe->experts_per_token};
}

// Where a token's k and v go.
int64_t CacheRow(const step::SequenceSpan& span, int64_t position, int64_t block_tokens) {
  return int64_t{span.blocks[position / block_tokens]} * block_tokens + position % block_tokens;
}

template <typename T>
at::Tensor Upload(const std::vector<T>& values, at::ScalarType type) {
  const at::Tensor host = at::empty({static_cast<int64_t>(values.size())}, at::TensorOptions().dtype(type).pinned_memory(true));
  std::copy(values.begin(), values.end(), host.mutable_data_ptr<T>());
  return host.to(at::kCUDA, /*non_blocking=*/true);
}

}  // namespace

std::string FusedStage::Unfit(const contract::ModelShape& shape, const model::StageModelOptions& options) {
  if (!options.device.is_cuda()) return "device";
  if (options.dtype != at::kBFloat16) return "dtype";
  int major = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, options.device.has_index() ? options.device.index() : 0) != cudaSuccess || major != 9) {
    return "GPU architecture";  // the kernels are sm_90a
  }
  if (shape.head_dim != kDim) return "head_dim";
  if (shape.attention_bias) return "attention_bias";
  if (shape.hidden % 256 != 0 || shape.hidden > 16384) return "hidden_size";
  if (shape.heads % shape.kv_heads != 0 || shape.heads / shape.kv_heads > 16 || shape.heads * kDim % 256 != 0) return "num_attention_heads";
  if (shape.vocab % 16 != 0) return "vocab_size";
  if (options.block_tokens % 16 != 0) return "block_tokens";
  bool dense = false;
  for (int32_t layer = options.layers.begin; layer < options.layers.end; ++layer) dense |= !shape.IsMoeLayer(layer);
  if (dense && shape.intermediate % 256 != 0) return "intermediate_size";
  if (shape.moe && (shape.moe->intermediate % 128 != 0 || shape.moe->experts % 32 != 0 || shape.moe->experts > kernels::kMaxExperts ||
                    shape.moe->experts_per_token > kernels::kMaxExpertsPerToken)) {
    return "experts";
  }
  return "";
}

Result<std::unique_ptr<model::StageBackend>> FusedStage::Create(const contract::ModelShape& shape, const model::StageModelOptions& options,
                                                                weights::TensorMap& tensors, const std::vector<ops::PagedKv>& cache,
                                                                const ops::RotaryFrequencies& rotary) {
  if (const std::string unfit = Unfit(shape, options); !unfit.empty()) return UnimplementedError("no kernels for this " + unfit);
  return std::unique_ptr<model::StageBackend>(new FusedStage(shape, options, tensors, cache, rotary));
}

FusedStage::FusedStage(const contract::ModelShape& shape, const model::StageModelOptions& options, weights::TensorMap& tensors,
                       const std::vector<ops::PagedKv>& cache, const ops::RotaryFrequencies& rotary)
    : shape_(shape),
      range_(options.layers),
      first_(options.stage == 0),
      last_(options.stage == options.stages - 1),
      block_tokens_(options.block_tokens),
      max_blocks_(((options.max_sequence_tokens > 0 ? options.max_sequence_tokens : shape.max_positions) + options.block_tokens - 1) / options.block_tokens),
      stream_(c10::cuda::getStreamFromPool(/*isHighPriority=*/true)),
      rotary_scaling_(rotary.scaling) {
  Must(cudaDeviceSynchronize(), "loading");  // the weights came over another stream
  c10::cuda::setCurrentCUDAStream(stream_);
  if (first_) embedding_ = Find(tensors, "embed_tokens.weight");
  if (last_) {
    norm_ = Find(tensors, "norm.weight");
    lm_head_ = Find(tensors, "lm_head.weight");
  }
  for (int32_t layer = range_.begin; layer < range_.end; ++layer) {
    const std::string p = "layers." + std::to_string(layer) + ".";
    Layer l;
    l.input_norm = Find(tensors, p + "input_layernorm.weight");
    l.post_norm = Find(tensors, p + "post_attention_layernorm.weight");
    l.q_norm = Find(tensors, p + "self_attn.q_norm.weight");
    l.k_norm = Find(tensors, p + "self_attn.k_norm.weight");
    l.qkv = Merge(tensors, {p + "self_attn.q_proj.weight", p + "self_attn.k_proj.weight", p + "self_attn.v_proj.weight"});
    l.o = Find(tensors, p + "self_attn.o_proj.weight").contiguous();
    if (shape.IsMoeLayer(layer)) {
      l.router = Find(tensors, p + "mlp.gate.weight").contiguous();
      l.gate_up = Find(tensors, p + "mlp.experts.gate_up_proj").contiguous();
      l.down = Find(tensors, p + "mlp.experts.down_proj").contiguous();
      KERNEL(MakeMoeStreamWeights(MoeArgs(shape, 1), Bf16(l.gate_up), Bf16(l.down), &l.stream));
      KERNEL(MakeMoeGroupedWeights(MoeArgs(shape, 1), Bf16(l.gate_up), Bf16(l.down), &l.grouped));
    } else {
      l.gate_up = Merge(tensors, {p + "mlp.gate_proj.weight", p + "mlp.up_proj.weight"});
      l.down = Find(tensors, p + "mlp.down_proj.weight").contiguous();
    }
    const ops::PagedKv& kv = cache[static_cast<size_t>(layer - range_.begin)];
    l.k_cache = kv.keys;
    l.v_cache = kv.values;
    layers_.push_back(std::move(l));
  }
  inverse_ = rotary.inverse.contiguous();
  axis_ = rotary.axis.to(at::kInt).contiguous();
  Must(cudaEventCreateWithFlags(&uploaded_, cudaEventDisableTiming), "event");
  AllocateDecode();
  PlanDecodeLayers();
  PlanCudnn(options.max_batch_tokens);
}

FusedStage::~FusedStage() {
  cudaStreamSynchronize(stream_);
  for (const auto& [size, graph] : graphs_) {
    if (graph.exec != nullptr) cudaGraphExecDestroy(graph.exec);
  }
  if (uploaded_ != nullptr) cudaEventDestroy(uploaded_);
}

// Rows past the sequence's end are other rows or zeros: the causal mask keeps them from every query that is read.
at::Tensor FusedStage::CudnnAttention(const at::Tensor& qkv, int64_t begin, int64_t length) const {
  const int64_t padded = (length + kCudnnStep - 1) / kCudnnStep * kCudnnStep;
  const at::Tensor rows = qkv.narrow(0, begin, padded).view({padded, shape_.heads + 2 * shape_.kv_heads, kDim});
  const auto part = [&](int64_t first, int64_t count) { return rows.narrow(1, first, count).transpose(0, 1).unsqueeze(0); };
  const at::Tensor out = std::get<0>(at::_scaled_dot_product_cudnn_attention(part(0, shape_.heads), part(shape_.heads, shape_.kv_heads),
                                                                             part(shape_.heads + shape_.kv_heads, shape_.kv_heads), std::nullopt,
                                                                             /*compute_log_sumexp=*/false, /*dropout_p=*/0.0, /*is_causal=*/true,
                                                                             /*return_debug_mask=*/false, 1.0 / std::sqrt(static_cast<double>(kDim))));
  return out.squeeze(0).transpose(0, 1).reshape({padded, shape_.heads * kDim}).narrow(0, 0, length);
}

void FusedStage::PlanCudnn(int64_t tokens_max) {
  try {
    const int64_t longest = std::min<int64_t>((tokens_max + kCudnnStep - 1) / kCudnnStep * kCudnnStep, kCudnnMax);
    const at::Tensor qkv = at::zeros({longest, (shape_.heads + 2 * shape_.kv_heads) * kDim}, at::TensorOptions().dtype(at::kBFloat16).device(at::kCUDA));
    for (int64_t length = kCudnnStep; length <= longest; length += kCudnnStep) CudnnAttention(qkv, 0, length);
    cudnn_ = true;
  } catch (const c10::Error&) {
    cudnn_ = false;  // no cuDNN, or none that can: flash attention does it
  }
}

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
  for (const Layer& l : layers_) {
    pointers.push_back({Bf16(l.input_norm), Bf16(l.qkv), Bf16(l.q_norm), Bf16(l.k_norm), Bf16(l.o), Bf16(l.post_norm), Bf16(l.router), Bf16(l.gate_up), Bf16(l.down),
                        Bf16(l.k_cache), Bf16(l.v_cache)});
  }
  const auto bytes = at::TensorOptions().dtype(at::kByte).device(at::kCUDA);
  const size_t size = pointers.size() * sizeof(pointers[0]);
  layer_pointers_ = at::empty({static_cast<int64_t>(size)}, bytes);
  Must(cudaMemcpy(layer_pointers_.data_ptr(), pointers.data(), size, cudaMemcpyHostToDevice), "layer pointers");
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

// y = x W^T (+ residual), by whichever product is faster at this many rows.
void FusedStage::DecodeLinear(const at::Tensor& x, const at::Tensor& weight, at::Tensor& y, int64_t tokens, const at::Tensor* residual) {
  // Own products win while a matrix is small or the rows few; lm_head at 32 rows took 238 us here and 150 us in cuBLAS.
  if (tokens <= kSkinny && (tokens <= kSkinny / 2 || weight.size(0) <= 16384)) {
    KERNEL(DecodeLinear({.x = Bf16(x),
                         .w = Bf16(weight),
                         .y = Bf16(y),
                         .residual = residual != nullptr ? Bf16(*residual) : nullptr,
                         .tokens = static_cast<int>(tokens),
                         .n = static_cast<int>(weight.size(0)),
                         .k = static_cast<int>(weight.size(1))},
                        stream_));
    return;
  }
  const at::Tensor rows = x.narrow(0, 0, tokens);
  at::Tensor out = y.narrow(0, 0, tokens);
  if (residual == nullptr) {
    at::mm_out(out, rows, weight.t());
  } else {
    QP_CHECK(residual->data_ptr() == y.data_ptr());  // the residual stream is updated in place
    at::Tensor product = decode_.product.narrow(0, 0, tokens);
    at::mm_out(product, rows, weight.t());
    out.add_(product);
  }
}

void FusedStage::EnqueueDecode(int64_t tokens, int64_t table_stride) {
  const Metadata meta = At(device_meta_.data_ptr<int32_t>());
  const int count = static_cast<int>(tokens);
  const float eps = shape_.rms_eps;
  DecodeBuffers& b = decode_;
  const auto norm = [&](const at::Tensor& weight) {
    KERNEL(RmsNorm({.x = Bf16(b.hidden), .weight = Bf16(weight), .y = Bf16(b.normed), .eps = eps, .tokens = count, .hidden = shape_.hidden}, stream_));
  };
  const bool one_kernel = tokens <= one_kernel_tokens_;
  if (one_kernel) {
    // It takes its rows itself.
  } else if (first_) {
    KERNEL(GatherRows(Bf16(embedding_), meta.tokens, Bf16(b.hidden), count, shape_.hidden, stream_));
  } else {
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
                        stream_));
  }
  for (const Layer& layer : layers_) {
    if (one_kernel) break;
    if (tokens <= kFusedNorm) {
      KERNEL(DecodeLinear({.x = Bf16(b.hidden),
                           .w = Bf16(layer.qkv),
                           .y = Bf16(b.qkv),
                           .norm_weight = Bf16(layer.input_norm),
                           .norm_eps = eps,
                           .tokens = count,
                           .n = static_cast<int>(layer.qkv.size(0)),
                           .k = shape_.hidden},
                          stream_));
    } else {
      norm(layer.input_norm);
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
    DecodeLinear(b.attended, layer.o, b.hidden, tokens, &b.hidden);
    DecodeMlp(layer, tokens);
  }
  if (last_) {
    norm(norm_);
    DecodeLinear(b.normed, lm_head_, b.logits, tokens, nullptr);
  }
}

void FusedStage::DecodeMlp(const Layer& layer, int64_t tokens) {
  DecodeBuffers& b = decode_;
  const int count = static_cast<int>(tokens);
  const float eps = shape_.rms_eps;
  const kernels::RmsNormArgs norm{
      .x = Bf16(b.hidden), .weight = Bf16(layer.post_norm), .y = Bf16(b.normed), .eps = eps, .tokens = count, .hidden = shape_.hidden};
  if (!layer.router.defined()) {
    KERNEL(RmsNorm(norm, stream_));
    DecodeLinear(b.normed, layer.gate_up, b.gate_up, tokens, nullptr);
    KERNEL(SiluMul(Bf16(b.gate_up), Bf16(b.dense), count, shape_.intermediate, stream_));
    DecodeLinear(b.dense, layer.down, b.hidden, tokens, &b.hidden);
    return;
  }
  const kernels::MoeShapeArgs moe = MoeArgs(shape_, tokens);
  const kernels::MoeRouting routing{Int32(b.expert_of), Bf16(b.weight_of), reinterpret_cast<int4*>(b.group.data_ptr()), Int32(b.order)};
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
    DecodeLinear(b.normed, layer.router, b.router_logits, tokens, nullptr);
  }
  KERNEL(MoeRoute(moe, Bf16(b.router_logits), routing, shape_.moe->norm_topk_prob, stream_));
  if (tokens > kStreamTokens) {
    KERNEL(MoeStreamGateUp(moe, Bf16(b.normed), layer.stream, routing, Bf16(b.active), stream_));
    KERNEL(MoeStreamDown(moe, Bf16(b.active), layer.stream, routing, Bf16(b.partial), stream_));
  } else {
    KERNEL(MoeGateUp(moe, Bf16(b.normed), Bf16(layer.gate_up), routing, Bf16(b.active), stream_));
    KERNEL(MoeDown(moe, Bf16(b.active), Bf16(layer.down), routing, Bf16(b.partial), stream_));
  }
  KERNEL(MoeCombine(moe, Bf16(b.partial), Bf16(b.hidden), Bf16(b.hidden), stream_));
}

Result<model::StageOutput> FusedStage::Prefill(const step::StepPlan& plan, model::StageActivations state, const at::Tensor& visual_rows) {
  const int64_t tokens = plan.token_count();
  const int count = static_cast<int>(tokens), heads = shape_.heads, kv_heads = shape_.kv_heads;
  const float eps = shape_.rms_eps;

  // Sequences that add one token come first in a plan (the engine's rule 1); they take the decode kernel.
  int64_t decodes = 0, stride = kTableStrideMin;
  while (decodes < static_cast<int64_t>(plan.spans.size()) && plan.spans[static_cast<size_t>(decodes)].tokens.size() == 1) ++decodes;
  for (int64_t i = 0; i < decodes; ++i) stride = std::max(stride, static_cast<int64_t>(plan.spans[static_cast<size_t>(i)].blocks.size()));
  std::vector<int32_t> positions(static_cast<size_t>(3 * tokens)), context, table(static_cast<size_t>(decodes * stride), 0);
  std::vector<int32_t> query_end = {0}, key_end = {0};  // of the sequences after the decodes
  std::vector<int64_t> slots, key_rows, samples;
  int64_t row = 0, query_max = 0, key_max = 0;
  bool prefix = false;
  for (size_t s = 0; s < plan.spans.size(); ++s) {
    const step::SequenceSpan& span = plan.spans[s];
    const auto added = static_cast<int64_t>(span.tokens.size()), length = span.begin + added;
    for (int64_t i = 0; i < added; ++i) {
      const step::Position& p = span.positions[static_cast<size_t>(i)];
      positions[static_cast<size_t>(row + i)] = p.t;
      positions[static_cast<size_t>(tokens + row + i)] = p.h;
      positions[static_cast<size_t>(2 * tokens + row + i)] = p.w;
      slots.push_back(CacheRow(span, span.begin + i, block_tokens_));
    }
    if (static_cast<int64_t>(s) < decodes) {
      context.push_back(span.begin);
      std::copy(span.blocks.begin(), span.blocks.end(), table.begin() + static_cast<int64_t>(s) * stride);
    } else {
      query_end.push_back(static_cast<int32_t>(query_end.back() + added));
      key_end.push_back(static_cast<int32_t>(key_end.back() + length));
      query_max = std::max(query_max, added);
      key_max = std::max(key_max, length);
      prefix |= span.begin > 0;
      for (int64_t i = 0; i < length; ++i) key_rows.push_back(CacheRow(span, i, block_tokens_));
    }
    row += added;
    if (span.sample) samples.push_back(row - 1);
  }
  const at::Tensor device_positions = Upload(positions, at::kInt), device_slots = Upload(slots, at::kLong);
  const int64_t prompts = tokens - decodes;  // rows of sequences that are not decodes
  at::Tensor device_context, device_table, ends_q, ends_k, rows_k;
  if (decodes > 0) {
    device_context = Upload(context, at::kInt);
    device_table = Upload(table, at::kInt);
  }
  if (prompts > 0) {
    ends_q = Upload(query_end, at::kInt);
    ends_k = prefix ? Upload(key_end, at::kInt) : ends_q;
    if (prefix) rows_k = Upload(key_rows, at::kLong);
  }
  const auto bf16 = state.hidden.options();
  const at::Tensor cos_sin = at::empty({tokens, kDim}, bf16);
  KERNEL(RotaryTable({.positions = Int32(device_positions),
                      .inverse = inverse_.const_data_ptr<float>(),
                      .axis = axis_.const_data_ptr<int32_t>(),
                      .cos_sin = Bf16(cos_sin),
                      .scaling = static_cast<float>(rotary_scaling_),
                      .tokens = count},
                     stream_));

  at::Tensor hidden = state.hidden.contiguous();
  if (!first_) hidden = hidden.clone();  // the caller's input is not written
  const at::Tensor normed = at::empty_like(hidden);
  const at::Tensor attended = at::empty({tokens, heads * kDim}, bf16);
  const double scale = 1.0 / std::sqrt(static_cast<double>(kDim));
  const int64_t width = (heads + 2 * kv_heads) * kDim;
  // Prompts from their beginning that are long enough go to cuDNN one by one, everything else to one flash attention.
  bool cudnn = cudnn_ && prompts > 0 && !prefix;
  for (size_t s = static_cast<size_t>(decodes); s < plan.spans.size(); ++s) {
    const auto length = static_cast<int64_t>(plan.spans[s].tokens.size());
    cudnn &= length >= kCudnnStep / 2 && length <= kCudnnMax;
  }
  const at::Tensor qkv_rows = at::empty({tokens + kCudnnStep, width}, bf16);
  if (cudnn) qkv_rows.narrow(0, tokens, kCudnnStep).zero_();  // a NaN there times probability 0 would still be NaN
  at::Tensor qkv = qkv_rows.narrow(0, 0, tokens);
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer& layer = layers_[i];
    KERNEL(RmsNorm({.x = Bf16(hidden), .weight = Bf16(layer.input_norm), .y = Bf16(normed), .eps = eps, .tokens = count, .hidden = shape_.hidden}, stream_));
    at::mm_out(qkv, normed, layer.qkv.t());
    if (decodes > 0) {
      KERNEL(AttentionDecode({.qkv = Bf16(qkv),
                              .q_norm = Bf16(layer.q_norm),
                              .k_norm = Bf16(layer.k_norm),
                              .cos_sin = Bf16(cos_sin),
                              .k_cache = Bf16(layer.k_cache),
                              .v_cache = Bf16(layer.v_cache),
                              .block_table = Int32(device_table),
                              .context = Int32(device_context),
                              .out = Bf16(attended),
                              .norm_eps = eps,
                              .tokens = static_cast<int>(decodes),
                              .heads = heads,
                              .kv_heads = kv_heads,
                              .block_tokens = static_cast<int>(block_tokens_),
                              .table_stride = static_cast<int>(stride)},
                             stream_));
    }
    if (prompts > 0) {
      const at::Tensor part = qkv.narrow(0, decodes, prompts);
      KERNEL(RopeKvWrite({.qkv = Bf16(part),
                          .q_norm = Bf16(layer.q_norm),
                          .k_norm = Bf16(layer.k_norm),
                          .cos_sin = Bf16(cos_sin) + decodes * kDim,
                          .slot = device_slots.const_data_ptr<int64_t>() + decodes,
                          .k_cache = Bf16(layer.k_cache),
                          .v_cache = Bf16(layer.v_cache),
                          .norm_eps = eps,
                          .tokens = static_cast<int>(prompts),
                          .heads = heads,
                          .kv_heads = kv_heads},
                         stream_));
      if (cudnn) {
        for (size_t s = static_cast<size_t>(decodes), first = 0; s < plan.spans.size(); first += plan.spans[s].tokens.size(), ++s) {
          const auto begin = decodes + static_cast<int64_t>(first), length = static_cast<int64_t>(plan.spans[s].tokens.size());
          attended.narrow(0, begin, length).copy_(CudnnAttention(qkv_rows, begin, length));
        }
      } else {
        const at::Tensor parts = part.view({prompts, heads + 2 * kv_heads, kDim});
        at::Tensor keys = parts.narrow(1, heads, kv_heads), values = parts.narrow(1, heads + kv_heads, kv_heads);
        if (prefix) {  // what was cached before, gathered; the new rows have just been written there
          keys = layer.k_cache.view({-1, kv_heads, kDim}).index_select(0, rows_k);
          values = layer.v_cache.view({-1, kv_heads, kDim}).index_select(0, rows_k);
        }
        const at::Tensor out = std::get<0>(at::_flash_attention_forward(parts.narrow(1, 0, heads), keys, values, ends_q, ends_k, query_max,
                                                                        prefix ? key_max : query_max, 0.0, /*is_causal=*/true,
                                                                        /*return_debug_mask=*/false, scale));
        attended.narrow(0, decodes, prompts).copy_(out.view({prompts, heads * kDim}));
      }
    }
    hidden.add_(at::mm(attended, layer.o.t()));
    KERNEL(RmsNorm({.x = Bf16(hidden), .weight = Bf16(layer.post_norm), .y = Bf16(normed), .eps = eps, .tokens = count, .hidden = shape_.hidden}, stream_));
    hidden = PrefillMlp(layer, hidden, normed);
    if (state.deepstack.defined()) {  // the first tap still owed belongs to this layer
      const at::Tensor rows = hidden.index_select(0, visual_rows) + state.deepstack[0];
      hidden.index_copy_(0, visual_rows, rows);
      const int64_t left = state.deepstack.size(0) - 1;
      state.deepstack = left > 0 ? state.deepstack.narrow(0, 1, left) : at::Tensor();
    }
  }
  model::StageOutput output;
  if (!last_) {
    output.activations = {std::move(hidden), std::move(state.deepstack)};
    return output;
  }
  if (!samples.empty()) {
    const at::Tensor rows = hidden.index_select(0, Upload(samples, at::kLong));
    const auto sampled = rows.size(0);
    at::Tensor last = at::empty_like(rows);
    KERNEL(RmsNorm({.x = Bf16(rows), .weight = Bf16(norm_), .y = Bf16(last), .eps = eps, .tokens = static_cast<int>(sampled), .hidden = shape_.hidden}, stream_));
    output.logits = at::empty({sampled, shape_.vocab}, bf16);
    DecodeLinear(last, lm_head_, output.logits, sampled, nullptr);
  }
  return output;
}

at::Tensor FusedStage::PrefillMlp(const Layer& layer, at::Tensor hidden, const at::Tensor& normed) {
  const int64_t tokens = hidden.size(0);
  if (!layer.router.defined()) {
    const at::Tensor gate_up = at::mm(normed, layer.gate_up.t());
    const at::Tensor active = at::empty({tokens, shape_.intermediate}, hidden.options());
    KERNEL(SiluMul(Bf16(gate_up), Bf16(active), static_cast<int>(tokens), shape_.intermediate, stream_));
    return hidden.add_(at::mm(active, layer.down.t()));
  }
  const kernels::MoeShapeArgs moe = MoeArgs(shape_, tokens);
  const int64_t assignments = tokens * moe.top_k;
  const auto int32 = hidden.options().dtype(at::kInt);
  const at::Tensor logits = at::mm(normed, layer.router.t());
  const at::Tensor expert_of = at::empty({assignments}, int32), weight_of = at::empty({assignments}, hidden.options());
  const at::Tensor counts = at::empty({moe.experts}, int32), ends = at::empty({moe.experts}, int32);
  const at::Tensor source = at::empty({assignments}, int32), row_of = at::empty({assignments}, int32);
  const kernels::MoePermutation permutation{Int32(expert_of), Bf16(weight_of), Int32(counts), Int32(ends), Int32(source), Int32(row_of)};
  KERNEL(MoePermute(moe, Bf16(logits), permutation, shape_.moe->norm_topk_prob, stream_));
  const at::Tensor active = at::empty({assignments, moe.inter}, hidden.options()), down = at::empty({assignments, moe.hidden}, hidden.options());
  KERNEL(MoeGroupedGateUp(moe, Bf16(normed), layer.grouped, permutation, Bf16(active), stream_));
  KERNEL(MoeGroupedDown(moe, Bf16(active), layer.grouped, permutation, Bf16(down), stream_));
  KERNEL(MoePrefillCombine(moe, Bf16(down), permutation, Bf16(hidden), Bf16(hidden), stream_));
  return hidden;
}

}  // namespace qwen::fused

// What the stage finds after opening the library.
extern "C" __attribute__((visibility("default"))) const qwen::model::StageBackendFactory* qwen_fused_backend() {
  static const qwen::model::StageBackendFactory factory = qwen::fused::FusedStage::Create;
  return &factory;
}
