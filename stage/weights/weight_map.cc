#include "stage/weights/weight_map.h"

namespace qwen::weights {
namespace {

using contract::ModelShape;

// Where the decoder lies in a file. VL checkpoints: model.language_model.*; text checkpoints: model.*; exports made through
// AutoModel (no head class) lack "model.". All are tried for every tensor, so that a mixed export loads too.
// The family's own comes first: it is also the name that a "missing" message prints.
using Names = std::vector<std::string>;
const Names& TextPrefixes(const ModelShape& shape) {
  static const Names vision_language = {"model.language_model.", "model.", "language_model.", ""};
  static const Names text_only = {"model.", "model.language_model.", "language_model.", ""};
  return shape.vision ? vision_language : text_only;
}
const Names& VisionPrefixes() {
  static const Names names = {"model.visual.", "visual."};
  return names;
}
const Names& HeadKeys() {
  static const Names names = {"lm_head.weight", "model.language_model.lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight"};
  return names;
}

class Builder {
 public:
  explicit Builder(const ModelShape& shape) : shape_(shape) {}

  std::vector<Slot> Take() { return std::move(slots_); }

  void Text(const std::string& name, std::vector<int64_t> shape, bool quantizable = false) {
    slots_.push_back({name, std::move(shape), Plain(TextPrefixes(shape_), name), quantizable});
  }
  void Vision(const std::string& name, std::vector<int64_t> shape) {
    slots_.push_back({"visual." + name, std::move(shape), Plain(VisionPrefixes(), name), false});
  }
  // A layer with weight (out, in) and bias (out).
  void VisionLinear(const std::string& name, int64_t out, int64_t in) {
    Vision(name + ".weight", {out, in});
    Vision(name + ".bias", {out});
  }
  void VisionNorm(const std::string& name, int64_t size) {
    Vision(name + ".weight", {size});
    Vision(name + ".bias", {size});
  }
  // Experts: one fused tensor, or `parts` tensors an expert.
  void Experts(const std::string& module, const char* fused, std::vector<const char*> parts, std::vector<int64_t> shape) {
    Slot slot{module + fused, std::move(shape), {}, true};
    for (const std::string& prefix : TextPrefixes(shape_)) slot.sources.push_back({Layout::kFused, {prefix + module + fused}});
    for (const std::string& prefix : TextPrefixes(shape_)) {
      Source source{Layout::kPerExpert, {}};
      for (int32_t e = 0; e < shape_.moe->experts; ++e)
        for (const char* part : parts) source.keys.push_back(prefix + module + std::to_string(e) + "." + part + ".weight");
      slot.sources.push_back(std::move(source));
    }
    slots_.push_back(std::move(slot));
  }
  // The embedding and the head may stand for each other when they are tied: whichever is there (as transformers' tie_weights).
  void Embedding() {
    Slot slot{"embed_tokens.weight", {shape_.vocab, shape_.hidden}, Plain(TextPrefixes(shape_), "embed_tokens.weight"), false};
    if (shape_.tie_embeddings) Append(slot, Head());
    slots_.push_back(std::move(slot));
  }
  void LmHead() {
    Slot slot{"lm_head.weight", {shape_.vocab, shape_.hidden}, Head(), false};
    if (shape_.tie_embeddings) Append(slot, Plain(TextPrefixes(shape_), "embed_tokens.weight"));
    slots_.push_back(std::move(slot));
  }

 private:
  static std::vector<Source> Plain(const Names& prefixes, const std::string& name) {
    std::vector<Source> sources;
    for (const std::string& prefix : prefixes) sources.push_back({Layout::kPlain, {prefix + name}});
    return sources;
  }
  static std::vector<Source> Head() {
    std::vector<Source> sources;
    for (const std::string& key : HeadKeys()) sources.push_back({Layout::kPlain, {key}});
    return sources;
  }
  static void Append(Slot& slot, std::vector<Source> more) {
    for (Source& source : more) slot.sources.push_back(std::move(source));
  }

  const ModelShape& shape_;
  std::vector<Slot> slots_;
};

void VisionSlots(const contract::VisionShape& v, Builder& b) {
  const int64_t merged = int64_t{v.hidden} * v.merge * v.merge;
  b.Vision("patch_embed.proj.weight", {v.hidden, v.in_channels, v.temporal_patch, v.patch, v.patch});
  b.Vision("patch_embed.proj.bias", {v.hidden});
  b.Vision("pos_embed.weight", {v.position_table, v.hidden});
  for (int32_t i = 0; i < v.depth; ++i) {
    const std::string block = "blocks." + std::to_string(i) + ".";
    b.VisionNorm(block + "norm1", v.hidden);
    b.VisionNorm(block + "norm2", v.hidden);
    b.VisionLinear(block + "attn.qkv", 3 * int64_t{v.hidden}, v.hidden);
    b.VisionLinear(block + "attn.proj", v.hidden, v.hidden);
    b.VisionLinear(block + "mlp.linear_fc1", v.intermediate, v.hidden);
    b.VisionLinear(block + "mlp.linear_fc2", v.hidden, v.intermediate);
  }
  // The merger normalises patches before the 2x2 view, the DeepStack mergers after it: the norms differ in size.
  b.VisionNorm("merger.norm", v.hidden);
  b.VisionLinear("merger.linear_fc1", merged, merged);
  b.VisionLinear("merger.linear_fc2", v.out_hidden, merged);
  for (size_t i = 0; i < v.deepstack_layers.size(); ++i) {
    const std::string merger = "deepstack_merger_list." + std::to_string(i) + ".";
    b.VisionNorm(merger + "norm", merged);
    b.VisionLinear(merger + "linear_fc1", merged, merged);
    b.VisionLinear(merger + "linear_fc2", v.out_hidden, merged);
  }
}

void LayerSlots(const ModelShape& s, int32_t index, Builder& b) {
  const std::string layer = "layers." + std::to_string(index) + ".";
  const int64_t hidden = s.hidden, q = int64_t{s.heads} * s.head_dim, kv = int64_t{s.kv_heads} * s.head_dim;
  b.Text(layer + "input_layernorm.weight", {hidden});
  const auto projection = [&](const char* name, int64_t out, int64_t in) {
    b.Text(layer + "self_attn." + name + ".weight", {out, in}, true);
    if (s.attention_bias) b.Text(layer + "self_attn." + name + ".bias", {out});
  };
  projection("q_proj", q, hidden);
  projection("k_proj", kv, hidden);
  projection("v_proj", kv, hidden);
  projection("o_proj", hidden, q);
  b.Text(layer + "self_attn.q_norm.weight", {s.head_dim});
  b.Text(layer + "self_attn.k_norm.weight", {s.head_dim});
  b.Text(layer + "post_attention_layernorm.weight", {hidden});
  if (s.IsMoeLayer(index)) {
    const int64_t experts = s.moe->experts, inner = s.moe->intermediate;
    b.Text(layer + "mlp.gate.weight", {experts, hidden});
    b.Experts(layer + "mlp.experts.", "gate_up_proj", {"gate_proj", "up_proj"}, {experts, 2 * inner, hidden});
    b.Experts(layer + "mlp.experts.", "down_proj", {"down_proj"}, {experts, hidden, inner});
  } else {
    b.Text(layer + "mlp.gate_proj.weight", {s.intermediate, hidden}, true);
    b.Text(layer + "mlp.up_proj.weight", {s.intermediate, hidden}, true);
    b.Text(layer + "mlp.down_proj.weight", {hidden, s.intermediate}, true);
  }
}

}  // namespace

std::vector<Slot> StageSlots(const ModelShape& shape, const StageSpec& spec) {
  QP_CHECK(0 <= spec.layers.begin && spec.layers.begin < spec.layers.end && spec.layers.end <= shape.layers) << ToString(spec.layers);
  QP_CHECK(0 <= spec.index && spec.index < spec.stages);
  Builder builder(shape);
  if (spec.first()) {
    if (shape.vision) VisionSlots(*shape.vision, builder);
    builder.Embedding();
  }
  for (int32_t i = spec.layers.begin; i < spec.layers.end; ++i) LayerSlots(shape, i, builder);
  if (spec.last()) {
    builder.Text("norm.weight", {shape.hidden});
    builder.LmHead();
  }
  return builder.Take();
}

bool IsIgnorableKey(std::string_view key) { return key.ends_with("rotary_emb.inv_freq") || key.ends_with("rotary_pos_emb.inv_freq"); }

}  // namespace qwen::weights
