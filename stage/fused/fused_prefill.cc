// Plans with prompts: kernels around LibTorch's dense products and attention.
#include "stage/fused/fused_stage.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "stage/fused/launch.h"
#include "stage/kernels/attention_decode.h"
#include "stage/kernels/moe_grouped.h"
#include "stage/kernels/moe_prefill.h"
#include "stage/kernels/rms_norm.h"
#include "stage/kernels/rope.h"

namespace qwen::fused {
namespace {

// cuDNN's attention takes half the time of LibTorch's flash attention for a prompt without a prefix (2,048 tokens, 32:4
// heads on an H200: 85 against 172 us), but makes a plan for every length, 60 ms each. So lengths are rounded up to these.
constexpr int64_t kCudnnStep = 512;

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
  bool begun = false;  // `normed` holds the layer's first norm already
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer& layer = layers_[i];
    if (!begun) {
      KERNEL(RmsNorm({.x = Bf16(hidden), .weight = Bf16(layer.input_norm), .y = Bf16(normed), .eps = eps, .tokens = count, .hidden = shape_.hidden}, stream_));
    }
    at::mm_out(qkv, normed, Bf16Weight(layer.qkv).t());
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
    const at::Tensor product = at::mm(attended, Bf16Weight(layer.o).t());
    KERNEL(RmsNorm({.x = Bf16(hidden), .weight = Bf16(layer.post_norm), .y = Bf16(normed), .add = Bf16(product), .sum = Bf16(hidden), .eps = eps, .tokens = count, .hidden = shape_.hidden},
                   stream_));
    begun = layer.router.defined() && !state.deepstack.defined() && i + 1 < layers_.size();
    hidden = PrefillMlp(layer, hidden, normed, begun ? &layers_[i + 1].input_norm : nullptr);
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
    DecodeLinear(last, {lm_head_, {}}, output.logits, sampled, nullptr);
  }
  return output;
}

void FusedStage::GroupedMlp(const Layer& layer, const kernels::MoeShapeArgs& moe, const at::Tensor& router_logits, const kernels::MoePermutation& permutation,
                            const at::Tensor& normed, const at::Tensor& active, const at::Tensor& down, const at::Tensor& hidden, const at::Tensor* next_norm) {
  kernels::MoeNextNorm norm;
  if (next_norm != nullptr) norm = {.weight = Bf16(*next_norm), .y = Bf16(normed), .eps = shape_.rms_eps};
  KERNEL(MoePermute(moe, Bf16(router_logits), permutation, shape_.moe->norm_topk_prob, stream_));
  KERNEL(MoeGroupedGateUp(moe, Bf16(normed), layer.grouped, permutation, Bf16(active), stream_));
  KERNEL(MoeGroupedDown(moe, Bf16(active), layer.grouped, permutation, Bf16(down), stream_));
  KERNEL(MoePrefillCombine(moe, Bf16(down), permutation, Bf16(hidden), Bf16(hidden), stream_, norm));
}

at::Tensor FusedStage::PrefillMlp(const Layer& layer, at::Tensor hidden, const at::Tensor& normed, const at::Tensor* next_norm) {
  const int64_t tokens = hidden.size(0);
  if (!layer.router.defined()) {
    const at::Tensor gate_up = at::mm(normed, Bf16Weight(layer.gate_up).t());
    const at::Tensor active = at::empty({tokens, shape_.intermediate}, hidden.options());
    KERNEL(SiluMul(Bf16(gate_up), Bf16(active), static_cast<int>(tokens), shape_.intermediate, stream_));
    return hidden.add_(at::mm(active, Bf16Weight(layer.down).t()));
  }
  const kernels::MoeShapeArgs moe = MoeArgs(shape_, tokens);
  const int64_t assignments = tokens * moe.top_k;
  const auto int32 = hidden.options().dtype(at::kInt);
  const at::Tensor logits = at::mm(normed, layer.router.t());
  const at::Tensor expert_of = at::empty({assignments}, int32), weight_of = at::empty({assignments}, hidden.options());
  const at::Tensor counts = at::empty({moe.experts}, int32), ends = at::empty({moe.experts}, int32);
  const at::Tensor source = at::empty({assignments}, int32), row_of = at::empty({assignments}, int32);
  const kernels::MoePermutation permutation{Int32(expert_of), Bf16(weight_of), Int32(counts), Int32(ends), Int32(source), Int32(row_of)};
  const at::Tensor active = at::empty({assignments, moe.inter}, hidden.options()), down = at::empty({assignments, moe.hidden}, hidden.options());
  GroupedMlp(layer, moe, logits, permutation, normed, active, down, hidden, next_norm);
  return hidden;
}

}  // namespace qwen::fused
