#include "stage/model/decoder_layer.h"

#include <cmath>

#include "stage/base/check.h"
#include "stage/ops/norm.h"

namespace qwen::model {
namespace {

const at::Tensor& Find(const weights::TensorMap& tensors, const std::string& slot) {
  const auto found = tensors.find(slot);
  QP_CHECK(found != tensors.end()) << slot;
  return found->second;
}

}  // namespace

DecoderLayer::DecoderLayer(const contract::ModelShape& shape, const Options& options, const weights::TensorMap& tensors)
    : head_dim_(shape.head_dim), rms_eps_(shape.rms_eps) {
  const std::string prefix = "layers." + std::to_string(options.layer) + ".";
  const auto find = [&](const std::string& name) { return Find(tensors, prefix + name); };
  const auto projection = [&](const std::string& name) {
    return Projection{find(name + ".weight"), shape.attention_bias ? find(name + ".bias") : at::Tensor()};
  };
  input_norm_ = find("input_layernorm.weight");
  post_attention_norm_ = find("post_attention_layernorm.weight");
  q_norm_ = find("self_attn.q_norm.weight");
  k_norm_ = find("self_attn.k_norm.weight");
  q_ = projection("self_attn.q_proj");
  k_ = projection("self_attn.k_proj");
  v_ = projection("self_attn.v_proj");
  o_ = projection("self_attn.o_proj");
  if (shape.IsMoeLayer(options.layer)) {
    moe_ = Moe{find("mlp.gate.weight"), shape.moe->experts_per_token,
               shape.moe->norm_topk_prob ? ops::RouterWeights::kNormalised : ops::RouterWeights::kAsIs,
               options.ties,
               ops::MakeExpertWeights(find("mlp.experts.gate_up_proj"), find("mlp.experts.down_proj"))};
  } else {
    dense_ = Dense{find("mlp.gate_proj.weight"), find("mlp.up_proj.weight"), find("mlp.down_proj.weight")};
  }
}

at::Tensor DecoderLayer::Forward(const at::Tensor& hidden, const Batch& batch, const ops::RotaryTable& rotary,
                                 const ops::PagedKv& cache) const {
  at::Tensor attended = Attention(ops::RmsNorm(hidden, input_norm_, rms_eps_), batch, rotary, cache);
  attended.add_(hidden);
  at::Tensor out = Mlp(ops::RmsNorm(attended, post_attention_norm_, rms_eps_), batch);
  return out.add_(attended);
}

at::Tensor DecoderLayer::Attention(const at::Tensor& x, const Batch& batch, const ops::RotaryTable& rotary,
                                   const ops::PagedKv& cache) const {
  const auto heads = [&](const Projection& projection) {  // (tokens, heads, head_dim)
    return ops::Linear(x, projection.weight, projection.bias, batch.groups).view({batch.tokens, -1, head_dim_});
  };
  const at::Tensor q = ops::ApplyRotary(ops::RmsNorm(heads(q_), q_norm_, rms_eps_), rotary);
  const at::Tensor k = ops::ApplyRotary(ops::RmsNorm(heads(k_), k_norm_, rms_eps_), rotary);
  const double scale = 1.0 / std::sqrt(static_cast<double>(head_dim_));
  const at::Tensor attended =
      ops::PagedAttention(q, k, heads(v_), cache, batch.cache_rows, batch.spans, scale);
  return ops::Linear(attended, o_.weight, o_.bias, batch.groups);
}

at::Tensor DecoderLayer::Mlp(const at::Tensor& x, const Batch& batch) const {
  if (moe_) {
    const at::Tensor logits = ops::Linear(x, moe_->router, at::Tensor(), batch.groups);
    const ops::Routing routing = ops::Route(logits, moe_->experts_per_token, moe_->normalisation, moe_->ties);
    return ops::Experts(x, routing, moe_->experts, batch.groups);
  }
  at::Tensor activated = ops::Silu(ops::Linear(x, dense_->gate, at::Tensor(), batch.groups), batch.groups);
  activated.mul_(ops::Linear(x, dense_->up, at::Tensor(), batch.groups));
  return ops::Linear(activated, dense_->down, at::Tensor(), batch.groups);
}

}  // namespace qwen::model
