// A random four-layer Qwen3-VL-MoE, small enough for plain loops: shape, weights, plans. For the model's unit tests.
#pragma once
#include <ATen/ATen.h>

#include <string>
#include <vector>

#include "stage/contract/model_shape.h"
#include "stage/model/stage_model.h"
#include "stage/step/step_plan.h"

namespace qwen::model {

// Layer 1 is dense, the others have 6 experts; three DeepStack taps. hidden != 2 * intermediate keeps the layouts apart.
inline contract::ModelShape TinyShape() {
  contract::ModelShape shape;
  shape.model_type = "qwen3_vl_moe";
  shape.dtype = contract::Dtype::kFloat32;
  shape.layers = 4;
  shape.hidden = 24;
  shape.heads = 4;
  shape.kv_heads = 2;
  shape.head_dim = 8;
  shape.intermediate = 20;
  shape.vocab = 40;
  shape.rope_theta = 1000.0;
  shape.mrope_section = {2, 1, 1};
  shape.max_positions = 1024;
  shape.moe = contract::MoeShape{.experts = 6, .experts_per_token = 2, .intermediate = 10, .mlp_only_layers = {1}};
  contract::VisionShape vision;
  vision.depth = 4;
  vision.hidden = 16;
  vision.heads = 2;
  vision.intermediate = 20;
  vision.patch = 4;
  vision.out_hidden = 24;
  vision.position_table = 36;
  vision.deepstack_layers = {0, 1, 2};
  shape.vision = vision;
  shape.image_token = 30;
  return shape;
}

// All text slots of weights/weight_map.h, normal with a spread that makes logits differ clearly.
inline weights::TensorMap TinyWeights(const contract::ModelShape& s, uint64_t seed = 1) {
  at::manual_seed(seed);
  weights::TensorMap tensors;
  const auto matrix = [&](const std::string& slot, std::vector<int64_t> sizes) { tensors[slot] = at::randn(sizes) * 0.25; };
  const auto norm = [&](const std::string& slot, int64_t n) { tensors[slot] = 1 + at::randn({n}) * 0.1; };
  tensors["embed_tokens.weight"] = at::randn({s.vocab, s.hidden});
  matrix("lm_head.weight", {s.vocab, s.hidden});
  norm("norm.weight", s.hidden);
  for (int32_t layer = 0; layer < s.layers; ++layer) {
    const std::string p = "layers." + std::to_string(layer) + ".";
    norm(p + "input_layernorm.weight", s.hidden);
    norm(p + "post_attention_layernorm.weight", s.hidden);
    norm(p + "self_attn.q_norm.weight", s.head_dim);
    norm(p + "self_attn.k_norm.weight", s.head_dim);
    matrix(p + "self_attn.q_proj.weight", {s.heads * s.head_dim, s.hidden});
    matrix(p + "self_attn.k_proj.weight", {s.kv_heads * s.head_dim, s.hidden});
    matrix(p + "self_attn.v_proj.weight", {s.kv_heads * s.head_dim, s.hidden});
    matrix(p + "self_attn.o_proj.weight", {s.hidden, s.heads * s.head_dim});
    if (s.IsMoeLayer(layer)) {
      matrix(p + "mlp.gate.weight", {s.moe->experts, s.hidden});
      matrix(p + "mlp.experts.gate_up_proj", {s.moe->experts, 2 * s.moe->intermediate, s.hidden});
      matrix(p + "mlp.experts.down_proj", {s.moe->experts, s.hidden, s.moe->intermediate});
    } else {
      matrix(p + "mlp.gate_proj.weight", {s.intermediate, s.hidden});
      matrix(p + "mlp.up_proj.weight", {s.intermediate, s.hidden});
      matrix(p + "mlp.down_proj.weight", {s.hidden, s.intermediate});
    }
  }
  return tensors;
}

// Features of a "vision input": random, fixed by its id. Stands in for the vision tower.
inline at::Tensor FakeFeatures(const contract::ModelShape& shape, const step::VisionInput& input) {
  at::Generator generator = at::detail::createCPUGenerator(input.id);
  return at::randn({1 + shape.deepstack_count(), input.token_count(shape.vision->merge), shape.hidden}, generator,
                   at::TensorOptions().dtype(at::kFloat));
}
inline VisionEncoderFactory FakeVision(const contract::ModelShape& shape, at::ScalarType dtype) {
  return [shape, dtype](const weights::TensorMap&) -> Result<VisionEncoder> {
    return VisionEncoder([shape, dtype](std::span<const step::VisionInput> inputs) -> Result<std::vector<at::Tensor>> {
      std::vector<at::Tensor> features;
      for (const step::VisionInput& input : inputs) features.push_back(FakeFeatures(shape, input).to(dtype));
      return features;
    });
  };
}

// A sequence as a test sees it: tokens and positions of the prompt and of everything after it.
struct TinySequence {
  uint64_t id = 1;
  std::vector<int32_t> tokens;
  std::vector<step::Position> positions;      // of the prompt
  int32_t position_delta = 0;
  std::vector<step::BlockId> blocks;          // enough for all tokens
  std::vector<step::VisionInput> vision;      // input j fills run j
  std::vector<std::pair<int32_t, int32_t>> runs;

  step::SequenceSpan Span(int32_t begin, int32_t count, int32_t block_tokens, bool sample) const {
    step::SequenceSpan span{.sequence = id, .slot = static_cast<int32_t>(id), .begin = begin, .sample = sample};
    for (int32_t i = begin; i < begin + count; ++i) {
      span.tokens.push_back(tokens.at(i));
      const int32_t p = i + position_delta;
      span.positions.push_back(i < static_cast<int32_t>(positions.size()) ? positions[i] : step::Position{p, p, p});
    }
    span.blocks.assign(blocks.begin(), blocks.begin() + (begin + count + block_tokens - 1) / block_tokens);
    for (size_t j = 0; j < runs.size(); ++j) {
      const int32_t from = std::max(runs[j].first, begin), to = std::min(runs[j].first + runs[j].second, begin + count);
      if (from < to) span.vision.push_back({vision[j].id, from - runs[j].first, from - begin, to - from});
    }
    return span;
  }
};

// Twelve text tokens, a 2x3 image in the middle of them, then five more.
inline TinySequence ImageSequence(uint64_t id) {
  TinySequence sequence{.id = id};
  int32_t next = 0;
  const auto text = [&](int32_t count) {
    for (int32_t i = 0; i < count; ++i, ++next) {
      sequence.tokens.push_back((7 * next + static_cast<int32_t>(id)) % 29);
      sequence.positions.push_back({next, next, next});
    }
  };
  text(12);
  sequence.vision.push_back({.id = 100 + id, .grid = {1, 4, 6}});
  sequence.runs.push_back({12, 6});
  for (int32_t i = 0; i < 6; ++i) {
    sequence.tokens.push_back(30);
    sequence.positions.push_back({next, next + i / 3, next + i % 3});
  }
  next += 3;
  text(5);
  sequence.position_delta = next - static_cast<int32_t>(sequence.tokens.size());
  return sequence;
}
inline TinySequence TextSequence(uint64_t id, int32_t count) {
  TinySequence sequence{.id = id};
  for (int32_t i = 0; i < count; ++i) {
    sequence.tokens.push_back((11 * i + 3 * static_cast<int32_t>(id)) % 29);
    sequence.positions.push_back({i, i, i});
  }
  return sequence;
}

}  // namespace qwen::model
