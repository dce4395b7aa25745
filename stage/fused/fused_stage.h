// stage/fused/fused_stage.h — the CUDA backend of a stage's layers: the kernels of stage/kernels, one CUDA graph for each
// batch size of decode, and for prompts more kernels around LibTorch's dense products (cuBLAS, cuDNN and flash attention).
//
// What it takes: sm_90, bf16, head_dim 128, no attention bias, sizes that the kernels want (Unfit says which); dense and
// MoE layers. Everything else is kUnimplemented and runs on the reference. Weights of layers may be block FP8 (LoadOptions::keep_fp8):
// they stay so in memory, and their codes are put into the kernels' order where they lie, so such a map of tensors serves one stage.
// Numerics: the reference's roundings; only the order of sums inside a product differs. Thread safety: one thread; the
// constructor makes a stream of its own that thread's current stream, so the vision tower and the sampler follow it.
// Memory: decode keeps buffers for kDecodeBatchMax tokens; a prompt's intermediates come from LibTorch's allocator; with FP8 one dense
// matrix multiplied out (the largest), for LibTorch's products.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "stage/contract/model_shape.h"
#include "stage/kernels/decode_layers.h"
#include "stage/kernels/moe_grouped.h"
#include "stage/kernels/moe_prefill.h"
#include "stage/model/stage_backend.h"
#include "stage/model/stage_model.h"

namespace qwen::fused {

class FusedStage final : public model::StageBackend {
 public:
  static constexpr int64_t kDecodeBatchMax = 256;

  static Result<std::unique_ptr<model::StageBackend>> Create(const contract::ModelShape& shape, const model::StageModelOptions& options,
                                                             weights::TensorMap& tensors, const std::vector<ops::PagedKv>& cache,
                                                             const ops::RotaryFrequencies& rotary);
  // The first thing about `shape` that no kernel is made for; empty when all fits.
  static std::string Unfit(const contract::ModelShape& shape, const model::StageModelOptions& options);
  // The same for weights in FP8, beyond Unfit; and for the tensors of a stage, which may be none of FP8. Looks at no values.
  static std::string UnfitFp8(const contract::ModelShape& shape, const model::StageModelOptions& options);
  static std::string UnfitFp8(const contract::ModelShape& shape, const model::StageModelOptions& options, const weights::TensorMap& tensors);

  ~FusedStage() override;

  void* stream() const override { return stream_.stream(); }
  bool TakesDecode(const step::StepPlan& plan) const override;
  Result<model::StageOutput> Decode(const step::StepPlan& plan, const model::StageActivations& input) override;
  Result<model::StageOutput> Prefill(const step::StepPlan& plan, model::StageActivations state, const at::Tensor& visual_rows) override;

 private:
  struct Matrix {
    at::Tensor values;  // bf16, or FP8 codes in the kernels' order (stage/kernels/common/fp8.h)
    at::Tensor scales;  // of FP8: (..., rows / 128, Fp8ScaleStride(columns)) float32
    bool fp8() const { return scales.defined(); }
  };
  struct Layer {
    at::Tensor input_norm, post_norm, q_norm, k_norm;
    Matrix qkv, o;                // ((heads + 2 * kv_heads) * 128, H), (H, heads * 128)
    at::Tensor router;            // (experts, H); undefined in a dense layer
    Matrix gate_up, down;         // (experts, 2I, H), (experts, H, I); dense: (2I, H), (H, I)
    kernels::MoeGroupedWeights grouped;  // how the grouped products find gate_up and down of a MoE layer
    at::Tensor k_cache, v_cache;  // (blocks, block_tokens, kv_heads, 128)
  };
  struct DecodeGraph {
    cudaGraphExec_t exec = nullptr;
    bool seen = false;     // a step of this size has run
    int64_t last_use = 0;  // of decodes_
  };
  // What the kernels read of a plan. One pinned buffer and its copy on the device, so a step costs one transfer.
  struct Metadata {
    int32_t *context, *tokens, *positions, *table;
  };
  struct DecodeBuffers {
    at::Tensor input, hidden, normed, qkv, attended, cos_sin, logits;      // rows: kDecodeBatchMax
    at::Tensor product;                                                    // of cuBLAS, before it meets the residual
    at::Tensor router_logits, expert_of, weight_of, group, order, count, end, row_of, active, partial;  // MoE
    at::Tensor gate_up, dense;                                             // dense layers
  };

  FusedStage(const contract::ModelShape& shape, const model::StageModelOptions& options, weights::TensorMap& tensors,
             const std::vector<ops::PagedKv>& cache, const ops::RotaryFrequencies& rotary);
  static constexpr int64_t kGraphsMax = 128;  // a few hundred KiB of the GPU's memory each
  static constexpr int64_t kCudnnMax = 8192;  // tokens of a prompt beyond which flash attention is used
  static Matrix TakeMatrix(weights::TensorMap& tensors, const std::vector<std::string>& slots, cudaStream_t stream);
  void AllocateDecode();
  void PlanDecodeLayers();
  // The attention of rows [begin, begin + length) of qkv among themselves -> (length, heads * 128). qkv has kCudnnStep rows more.
  at::Tensor CudnnAttention(const at::Tensor& qkv, int64_t begin, int64_t length) const;
  void PlanCudnn(int64_t tokens_max);
  Metadata At(int32_t* base) const;
  void RunDecode(int64_t tokens, int64_t table_stride);
  void DropOldGraph();
  cudaGraphExec_t CaptureDecode(int64_t tokens, int64_t table_stride);
  void EnqueueDecode(int64_t tokens, int64_t table_stride);  // allocates nothing, so that it can be captured as it is
  // As LibTorch's products want it: (rows, columns) bf16. Of FP8: multiplied out, valid until the next call on the stream.
  at::Tensor Bf16Weight(const Matrix& matrix);
  void DecodeLinear(const at::Tensor& x, const Matrix& weight, at::Tensor& y, int64_t tokens, const at::Tensor* residual);
  void DecodeNorm(const at::Tensor& weight, int64_t tokens);
  // `begun`: decode_.normed holds the layer's first norm already; returns whether it now holds that of `next_norm`, the next norm's weight (or null).
  bool EnqueueLayer(const Layer& layer, int64_t tokens, int64_t table_stride, bool begun, const at::Tensor* next_norm);
  // Beyond kSkinny tokens decode_.product is still to be added to the residual stream.
  bool DecodeMlp(const Layer& layer, int64_t tokens, const at::Tensor* next_norm);
  // A MoE block of many tokens, added to `hidden`: routes, then the two grouped products. `active`, `down`: what lies between them, a row an
  // assignment. With `next_norm` `normed` ends as hidden after that norm.
  void GroupedMlp(const Layer& layer, const kernels::MoeShapeArgs& moe, const at::Tensor& router_logits, const kernels::MoePermutation& permutation,
                  const at::Tensor& normed, const at::Tensor& active, const at::Tensor& down, const at::Tensor& hidden, const at::Tensor* next_norm);
  // Adds the block to `hidden` (in place) and returns it. `normed`: hidden after the post-attention norm; with `next_norm` (of a MoE
  // layer) it then holds hidden after that one.
  at::Tensor PrefillMlp(const Layer& layer, at::Tensor hidden, const at::Tensor& normed, const at::Tensor* next_norm);

  const contract::ModelShape shape_;
  const contract::LayerRange range_;
  const bool first_, last_;
  const int64_t block_tokens_, max_blocks_;  // of one sequence
  const c10::cuda::CUDAStream stream_;
  at::Tensor embedding_, norm_, lm_head_;
  std::vector<Layer> layers_;
  at::Tensor inverse_, axis_;  // (64) float32, (64) int32
  double rotary_scaling_ = 1.0;
  at::Tensor multiplied_out_;  // bf16 values of the largest dense FP8 matrix; undefined without FP8
  bool cudnn_ = false;

  DecodeBuffers decode_;
  int64_t one_kernel_tokens_ = 0;  // up to here all layers of a step are one kernel
  at::Tensor layer_pointers_, layers_workspace_;
  at::Tensor host_meta_, device_meta_;  // int32
  cudaEvent_t uploaded_ = nullptr;      // the last copy of host_meta_
  int64_t decodes_ = 0;
  std::map<std::pair<int64_t, int64_t>, DecodeGraph> graphs_;  // by (tokens, table stride)
};

}  // namespace qwen::fused
