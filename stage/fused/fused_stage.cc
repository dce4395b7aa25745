#include "stage/fused/fused_stage.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "stage/base/check.h"
#include "stage/fused/launch.h"
#include "stage/kernels/fp8_weights.h"
#include "stage/kernels/moe_grouped.h"

namespace qwen::fused {
namespace {

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

// Scales as loaded, (..., rows / 128, columns / 128), with the kernels' stride; what pads them is zero.
at::Tensor WideScales(const at::Tensor& scales, int64_t columns) {
  std::vector<int64_t> sizes = scales.sizes().vec();
  const int64_t blocks = sizes.back();
  sizes.back() = kernels::Fp8ScaleStride(static_cast<int>(columns));
  const at::Tensor wide = at::zeros(sizes, scales.options().dtype(at::kFloat));
  wide.narrow(-1, 0, blocks).copy_(scales);
  return wide;
}

bool IsFp8(const at::Tensor& tensor) { return tensor.scalar_type() == at::kFloat8_e4m3fn; }

}  // namespace

std::string FusedStage::UnfitFp8(const contract::ModelShape& shape, const model::StageModelOptions& options, const weights::TensorMap& tensors) {
  size_t fp8 = 0, all = 0;
  for (int32_t layer = options.layers.begin; layer < options.layers.end; ++layer) {
    std::vector<std::string> names = {"self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight"};
    if (shape.IsMoeLayer(layer)) {
      names.insert(names.end(), {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"});
    } else {
      names.insert(names.end(), {"mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"});
    }
    for (const std::string& name : names) fp8 += IsFp8(Find(tensors, "layers." + std::to_string(layer) + "." + name));
    all += names.size();
  }
  if (fp8 == 0) return "";
  if (fp8 != all) return "mixture of FP8 and other weights";
  return UnfitFp8(shape, options);
}

std::string FusedStage::UnfitFp8(const contract::ModelShape& shape, const model::StageModelOptions& options) {
  if (!shape.quantization || shape.quantization->block_rows != kernels::kFp8Block || shape.quantization->block_columns != kernels::kFp8Block) return "FP8 block size";
  // Products of few tokens share a row's columns among eight warps, of an expert's down projection among four, 64 at a time.
  if (shape.hidden % 512 != 0 || shape.heads * kDim % 512 != 0) return "hidden_size or num_attention_heads in FP8";
  if (shape.moe && shape.moe->intermediate % 256 != 0) return "moe_intermediate_size in FP8";
  for (int32_t layer = options.layers.begin; layer < options.layers.end; ++layer) {
    if (!shape.IsMoeLayer(layer) && shape.intermediate % 512 != 0) return "intermediate_size in FP8";
  }
  return "";
}

// One matrix out of the rows of several.
FusedStage::Matrix FusedStage::TakeMatrix(weights::TensorMap& tensors, const std::vector<std::string>& slots, cudaStream_t stream) {
  if (!IsFp8(Find(tensors, slots[0]))) {
    return {.values = slots.size() > 1 ? Merge(tensors, slots) : Find(tensors, slots[0]).contiguous(), .scales = {}};
  }
  std::vector<at::Tensor> codes, scales;
  for (const std::string& slot : slots) {
    codes.push_back(Find(tensors, slot).contiguous().view(at::kByte));
    scales.push_back(WideScales(Find(tensors, slot + "_scale_inv"), codes.back().size(-1)));
  }
  Matrix matrix{.values = slots.size() > 1 ? at::cat(codes, 0) : codes[0], .scales = slots.size() > 1 ? at::cat(scales, 0) : scales[0]};
  auto* bytes = static_cast<kernels::Fp8*>(matrix.values.data_ptr());
  Must(kernels::PackFp8Weights(bytes, bytes, static_cast<size_t>(matrix.values.numel()), stream), "FP8 codes");
  return matrix;
}

std::string FusedStage::Unfit(const contract::ModelShape& shape, const model::StageModelOptions& options) {
  if (std::string unfit = UnfitDevice(options.device, options.dtype); !unfit.empty()) return unfit;
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
  if (const std::string unfit = UnfitFp8(shape, options, tensors); !unfit.empty()) return UnimplementedError("no kernels for this " + unfit);
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
  int64_t multiplied_out = 0;  // values of the largest dense FP8 matrix
  for (int32_t layer = range_.begin; layer < range_.end; ++layer) {
    const std::string p = "layers." + std::to_string(layer) + ".";
    Layer l;
    l.input_norm = Find(tensors, p + "input_layernorm.weight");
    l.post_norm = Find(tensors, p + "post_attention_layernorm.weight");
    l.q_norm = Find(tensors, p + "self_attn.q_norm.weight");
    l.k_norm = Find(tensors, p + "self_attn.k_norm.weight");
    l.qkv = TakeMatrix(tensors, {p + "self_attn.q_proj.weight", p + "self_attn.k_proj.weight", p + "self_attn.v_proj.weight"}, stream_);
    l.o = TakeMatrix(tensors, {p + "self_attn.o_proj.weight"}, stream_);
    if (shape.IsMoeLayer(layer)) {
      l.router = Find(tensors, p + "mlp.gate.weight").contiguous();
      l.gate_up = TakeMatrix(tensors, {p + "mlp.experts.gate_up_proj"}, stream_);
      l.down = TakeMatrix(tensors, {p + "mlp.experts.down_proj"}, stream_);
      if (l.gate_up.fp8()) {
        const kernels::Fp8Matrix gate_up = Fp8Of(l.gate_up.values, l.gate_up.scales), down = Fp8Of(l.down.values, l.down.scales);
        KERNEL(MakeMoeGroupedWeights(MoeArgs(shape, 1), gate_up, down, &l.grouped));
      } else {
        KERNEL(MakeMoeGroupedWeights(MoeArgs(shape, 1), Bf16(l.gate_up.values), Bf16(l.down.values), &l.grouped));
      }
    } else {
      l.gate_up = TakeMatrix(tensors, {p + "mlp.gate_proj.weight", p + "mlp.up_proj.weight"}, stream_);
      l.down = TakeMatrix(tensors, {p + "mlp.down_proj.weight"}, stream_);
    }
    for (const Matrix* matrix : {&l.qkv, &l.o, &l.gate_up, &l.down}) {
      if (matrix->fp8() && matrix->values.dim() == 2) multiplied_out = std::max(multiplied_out, matrix->values.numel());
    }
    const ops::PagedKv& kv = cache[static_cast<size_t>(layer - range_.begin)];
    l.k_cache = kv.keys;
    l.v_cache = kv.values;
    layers_.push_back(std::move(l));
  }
  if (multiplied_out > 0) multiplied_out_ = at::empty({multiplied_out}, at::TensorOptions().dtype(at::kBFloat16).device(at::kCUDA));
  inverse_ = rotary.inverse.contiguous();
  axis_ = rotary.axis.to(at::kInt).contiguous();
  Must(cudaEventCreateWithFlags(&uploaded_, cudaEventDisableTiming), "event");
  AllocateDecode();
  PlanDecodeLayers();
  PlanCudnn(options.max_batch_tokens);
  Must(cudaStreamSynchronize(stream_), "loading");  // what was merged or padded above came from tensors that others may free now
}

FusedStage::~FusedStage() {
  cudaStreamSynchronize(stream_);
  for (const auto& [size, graph] : graphs_) {
    if (graph.exec != nullptr) cudaGraphExecDestroy(graph.exec);
  }
  if (uploaded_ != nullptr) cudaEventDestroy(uploaded_);
}

}  // namespace qwen::fused

// What the stage finds after opening the library.
extern "C" __attribute__((visibility("default"))) const qwen::model::StageBackendFactory* qwen_fused_backend() {
  static const qwen::model::StageBackendFactory factory = qwen::fused::FusedStage::Create;
  return &factory;
}
extern "C" __attribute__((visibility("default"))) const qwen::model::StageFp8Check* qwen_fused_takes_fp8() {
  static const qwen::model::StageFp8Check check = [](const qwen::contract::ModelShape& shape, const qwen::model::StageModelOptions& options) {
    std::string unfit = qwen::fused::FusedStage::Unfit(shape, options);
    return unfit.empty() ? qwen::fused::FusedStage::UnfitFp8(shape, options) : unfit;
  };
  return &check;
}
