// stage/model/decoder_layer.h — one decoder layer: attention with q/k norms and rotary, then a dense or an MoE block.
// Pre-norm, two residual additions in the model's dtype. Source: transformers 5.17.0 Qwen3VLMoeTextDecoderLayer.
//
// Thread safety: Forward by one thread (it writes the KV cache); weights are read only.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

#include "stage/contract/model_shape.h"
#include "stage/model/batch.h"
#include "stage/ops/moe.h"
#include "stage/ops/rotary.h"
#include "stage/weights/loader.h"

namespace qwen::model {

class DecoderLayer {
 public:
  struct Options {
    int32_t layer = 0;
    ops::RouterTies ties = ops::RouterTies::kLowestExpert;
  };
  // Takes its weights out of `tensors` by slot name (weights/weight_map.h). REQUIRES: they are all there, in shape.
  DecoderLayer(const contract::ModelShape& shape, const Options& options, const weights::TensorMap& tensors);

  // hidden (tokens, H) -> (tokens, H).
  at::Tensor Forward(const at::Tensor& hidden, const Batch& batch, const ops::RotaryTable& rotary,
                     const ops::PagedKv& cache) const;

 private:
  struct Projection {
    at::Tensor weight, bias;  // bias undefined unless attention_bias
  };
  struct Dense {
    at::Tensor gate, up, down;
  };
  struct Moe {
    at::Tensor router;  // (experts, H)
    int64_t experts_per_token = 0;
    ops::RouterWeights normalisation = ops::RouterWeights::kNormalised;
    ops::RouterTies ties = ops::RouterTies::kLowestExpert;
    ops::ExpertWeights experts;
  };

  at::Tensor Attention(const at::Tensor& x, const Batch& batch, const ops::RotaryTable& rotary,
                       const ops::PagedKv& cache) const;
  at::Tensor Mlp(const at::Tensor& x, const Batch& batch) const;

  const int64_t head_dim_;
  const double rms_eps_;
  at::Tensor input_norm_, post_attention_norm_;  // (H)
  at::Tensor q_norm_, k_norm_;                   // (head_dim)
  Projection q_, k_, v_, o_;
  std::optional<Dense> dense_;  // exactly one of the two
  std::optional<Moe> moe_;
};

}  // namespace qwen::model
