// The decoder once more, in double and plain loops over one whole sequence: no cache, no batch, no ATen arithmetic.
// The oracle of stage_model_test.cc; it shares no code with what it checks.
#pragma once
#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "stage/contract/model_shape.h"
#include "stage/weights/loader.h"

namespace qwen::model {

using Row = std::vector<double>;
using Rows = std::vector<Row>;

inline Row ToRow(const at::Tensor& tensor) {
  const at::Tensor flat = tensor.to(at::kDouble).contiguous().flatten();
  return {flat.const_data_ptr<double>(), flat.const_data_ptr<double>() + flat.numel()};
}
inline Rows ToRows(const at::Tensor& tensor) {
  Rows rows;
  for (int64_t i = 0; i < tensor.size(0); ++i) rows.push_back(ToRow(tensor[i]));
  return rows;
}
inline Row Multiply(const Rows& weight, const Row& x) {
  Row y(weight.size(), 0.0);
  for (size_t o = 0; o < weight.size(); ++o) {
    for (size_t i = 0; i < x.size(); ++i) y[o] += weight[o][i] * x[i];
  }
  return y;
}
inline Row Normalised(const Row& x, const Row& weight, double eps) {
  double square = 0;
  for (double v : x) square += v * v;
  Row y(x.size());
  for (size_t i = 0; i < x.size(); ++i) y[i] = weight[i] * x[i] / std::sqrt(square / x.size() + eps);
  return y;
}
inline Row Silu(const Row& gate, const Row& up) {
  Row y(gate.size());
  for (size_t i = 0; i < gate.size(); ++i) y[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
  return y;
}

class SlowDecoder {
 public:
  SlowDecoder(const contract::ModelShape& shape, const weights::TensorMap& tensors) : shape_(shape), tensors_(tensors) {}

  struct Token {
    Row embedding;
    std::array<int, 3> position;
    Rows taps;  // what is added after layer i; empty for text
  };
  // Logits of every token.
  Rows Logits(const std::vector<Token>& tokens) const {
    Rows x;
    for (const Token& token : tokens) x.push_back(token.embedding);
    for (int layer = 0; layer < shape_.layers; ++layer) {
      Layer(layer, tokens, x);
      for (size_t t = 0; t < x.size(); ++t) {
        if (layer >= static_cast<int>(tokens[t].taps.size())) continue;
        for (size_t i = 0; i < x[t].size(); ++i) x[t][i] += tokens[t].taps[layer][i];
      }
    }
    Rows logits;
    for (const Row& row : x) logits.push_back(Multiply(Matrix("lm_head.weight"), Normalised(row, ToRow(Slot("norm.weight")), shape_.rms_eps)));
    return logits;
  }

 private:
  const at::Tensor& Slot(const std::string& name) const { return tensors_.find(name)->second; }
  Rows Matrix(const std::string& name) const { return ToRows(Slot(name)); }

  // Heads of one projection, normalised and turned by the token's position.
  Rows Heads(const Row& flat, const Row* norm, const std::array<int, 3>& position) const {
    const int d = shape_.head_dim, half = d / 2;
    Rows heads;
    for (size_t h = 0; h < flat.size() / d; ++h) {
      Row head(flat.begin() + h * d, flat.begin() + (h + 1) * d);
      if (norm != nullptr) {
        head = Normalised(head, *norm, shape_.rms_eps);
        Row turned(d);
        for (int i = 0; i < half; ++i) {
          int axis = 0;
          if (i % 3 == 1 && i < 3 * shape_.mrope_section[1]) axis = 1;
          if (i % 3 == 2 && i < 3 * shape_.mrope_section[2]) axis = 2;
          const double angle = position[axis] / std::pow(shape_.rope_theta, 2.0 * i / d);
          turned[i] = head[i] * std::cos(angle) - head[i + half] * std::sin(angle);
          turned[i + half] = head[i + half] * std::cos(angle) + head[i] * std::sin(angle);
        }
        head = turned;
      }
      heads.push_back(head);
    }
    return heads;
  }

  void Layer(int layer, const std::vector<Token>& tokens, Rows& x) const {
    const std::string p = "layers." + std::to_string(layer) + ".";
    const Row q_norm = ToRow(Slot(p + "self_attn.q_norm.weight")), k_norm = ToRow(Slot(p + "self_attn.k_norm.weight"));
    const Rows wq = Matrix(p + "self_attn.q_proj.weight"), wk = Matrix(p + "self_attn.k_proj.weight");
    const Rows wv = Matrix(p + "self_attn.v_proj.weight"), wo = Matrix(p + "self_attn.o_proj.weight");
    std::vector<Rows> q, k, v;
    for (size_t t = 0; t < x.size(); ++t) {
      const Row normed = Normalised(x[t], ToRow(Slot(p + "input_layernorm.weight")), shape_.rms_eps);
      q.push_back(Heads(Multiply(wq, normed), &q_norm, tokens[t].position));
      k.push_back(Heads(Multiply(wk, normed), &k_norm, tokens[t].position));
      v.push_back(Heads(Multiply(wv, normed), nullptr, tokens[t].position));
    }
    for (size_t t = 0; t < x.size(); ++t) {
      Row attended;
      for (int h = 0; h < shape_.heads; ++h) {
        const int g = h / (shape_.heads / shape_.kv_heads);
        Row weight(t + 1);
        for (size_t j = 0; j <= t; ++j) {
          weight[j] = std::exp(std::inner_product(q[t][h].begin(), q[t][h].end(), k[j][g].begin(), 0.0) / std::sqrt(shape_.head_dim));
        }
        const double total = std::accumulate(weight.begin(), weight.end(), 0.0);
        for (int c = 0; c < shape_.head_dim; ++c) {
          double sum = 0;
          for (size_t j = 0; j <= t; ++j) sum += weight[j] / total * v[j][g][c];
          attended.push_back(sum);
        }
      }
      const Row out = Multiply(wo, attended);
      for (size_t i = 0; i < out.size(); ++i) x[t][i] += out[i];
    }
    for (Row& row : x) {
      const Row out = Block(p, layer, Normalised(row, ToRow(Slot(p + "post_attention_layernorm.weight")), shape_.rms_eps));
      for (size_t i = 0; i < out.size(); ++i) row[i] += out[i];
    }
  }

  Row Block(const std::string& p, int layer, const Row& x) const {
    if (!shape_.IsMoeLayer(layer)) {
      const Row inner = Silu(Multiply(Matrix(p + "mlp.gate_proj.weight"), x), Multiply(Matrix(p + "mlp.up_proj.weight"), x));
      return Multiply(Matrix(p + "mlp.down_proj.weight"), inner);
    }
    const Row logits = Multiply(Matrix(p + "mlp.gate.weight"), x);
    std::vector<int> order(logits.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
    double total = 0, chosen = 0;
    for (double l : logits) total += std::exp(l);
    for (int k = 0; k < shape_.moe->experts_per_token; ++k) chosen += std::exp(logits[order[k]]);
    Row y(x.size(), 0.0);
    for (int k = 0; k < shape_.moe->experts_per_token; ++k) {
      const Row both = Multiply(ToRows(Slot(p + "mlp.experts.gate_up_proj")[order[k]]), x);
      const size_t half = both.size() / 2;
      const Row inner = Silu(Row(both.begin(), both.begin() + half), Row(both.begin() + half, both.end()));
      const Row out = Multiply(ToRows(Slot(p + "mlp.experts.down_proj")[order[k]]), inner);
      const double weight = std::exp(logits[order[k]]) / (shape_.moe->norm_topk_prob ? chosen : total);
      for (size_t i = 0; i < y.size(); ++i) y[i] += weight * out[i];
    }
    return y;
  }

  const contract::ModelShape& shape_;
  const weights::TensorMap& tensors_;
};

}  // namespace qwen::model
