// stage/ops/rotary.h — rotary position embedding: plain, interleaved M-RoPE, YaRN. Thread safety: pure functions.
//
// Halves (i, i + d/2) of a head rotate together, not neighbouring pairs. Source: transformers 5.17.0
// Qwen3VLMoeTextRotaryEmbedding, apply_rotary_pos_emb, modeling_rope_utils._compute_yarn_parameters.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>

#include "stage/ops/linear.h"

namespace qwen::ops {

struct RotaryOptions {
  int64_t head_dim = 0;
  double theta = 0.0;
  std::array<int32_t, 3> mrope_section = {0, 0, 0};  // all zero: every frequency follows the t axis (plain RoPE)
  struct Yarn {
    double factor = 1.0;
    double attention_factor = 0.0;  // 0 = 0.1 * ln(factor) + 1
    double beta_fast = 32.0, beta_slow = 1.0;
    int64_t original_max_positions = 0;  // 0: no YaRN
  } yarn;
};

// What does not depend on a batch. Lives on the device of the model.
struct RotaryFrequencies {
  at::Tensor inverse;  // (head_dim/2) float32
  at::Tensor axis;     // (head_dim/2) int64: 0 = t, 1 = h, 2 = w
  bool plain = true;   // axis is all t
  double scaling = 1.0;  // multiplies cos and sin (YaRN's attention factor)
};
RotaryFrequencies MakeRotaryFrequencies(const RotaryOptions& options, at::Device device);

// cos and sin of every token of a batch: (tokens, head_dim), computed in float32, then rounded to the model's dtype.
struct RotaryTable {
  at::Tensor cos, sin;
};
// positions (3, tokens) float32: rows t, h, w. Position values up to 2^24 are exact. `groups`: linear.h says why.
RotaryTable MakeRotaryTable(const RotaryFrequencies& frequencies, const at::Tensor& positions, at::ScalarType dtype,
                            const RowGroups& groups);

// x (tokens, heads, head_dim) -> x * cos + rotate_half(x) * sin; each product and the sum round to x's dtype.
at::Tensor ApplyRotary(const at::Tensor& x, const RotaryTable& table);

}  // namespace qwen::ops
