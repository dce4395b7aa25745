// stage/ops/moe.h — top-k routing and the experts of one MoE block, in the reference's order of rounding.
// Source: transformers 5.17.0 Qwen3VLMoeTextTopKRouter, integrations/moe.py grouped_mm_experts_forward (its default on
// CPU and CUDA). Thread safety: pure functions.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "stage/ops/linear.h"

namespace qwen::ops {

struct Routing {
  at::Tensor experts;  // (tokens, k) int64, most likely first
  at::Tensor weights;  // (tokens, k) model dtype
};
enum class RouterWeights { kNormalised, kAsIs };  // divided by their sum over the k (Qwen3-VL-MoE always), or not
// bf16 logits do tie now and then, and a tie at the border of the k changes the result.
enum class RouterTies {
  kLowestExpert,  // defined: the lower expert id wins and comes first, on every device
  kTopk           // whatever at::topk does on this device: the reference's bits, for parity runs on a CPU
};
// logits (tokens, experts), model dtype: softmax in float32, top k, division in float32, then one rounding to the dtype.
Routing Route(const at::Tensor& logits, int64_t k, RouterWeights normalisation, RouterTies ties);

struct ExpertWeights {
  at::Tensor gate_up;  // (experts, 2 * intermediate, hidden): gate rows, then up rows
  at::Tensor down;     // (experts, hidden, intermediate)
  // gate_up[e]^T and down[e]^T as views, made once: making them anew costs more than a small expert's product.
  std::vector<at::Tensor> gate_up_t, down_t;
};
ExpertWeights MakeExpertWeights(at::Tensor gate_up, at::Tensor down);

// x (tokens, hidden) -> (tokens, hidden): per expert silu(gate) * up -> down, times the weight, each step rounded to the
// dtype, then the k contributions summed in routing order with one rounding.
// Products are taken per (row group, expert). The expert ids are needed on the host: one copy per call on a GPU.
at::Tensor Experts(const at::Tensor& x, const Routing& routing, const ExpertWeights& weights, const RowGroups& groups);

}  // namespace qwen::ops
