// stage/weights/weight_map.h — which tensors a stage must have, under which names they may lie on disk, and in which shape.
// A data table, pure: no file is touched here. docs/weights.md lists every key.
//
// A *slot* is a tensor of the model as stage/ holds it. Its name is transformers 5.17's parameter name without the
// "model.language_model." (or "model.") prefix; vision slots start with "visual.":
//
//   embed_tokens.weight (vocab, hidden)   norm.weight (hidden)   lm_head.weight (vocab, hidden)
//   layers.N.input_layernorm.weight, layers.N.post_attention_layernorm.weight           (hidden)
//   layers.N.self_attn.q_proj.weight (heads*head_dim, hidden)   k_proj, v_proj (kv_heads*head_dim, hidden)
//   layers.N.self_attn.o_proj.weight (hidden, heads*head_dim)   q_norm, k_norm .weight (head_dim)
//   layers.N.self_attn.{q,k,v,o}_proj.bias                      only with attention_bias
//   layers.N.mlp.{gate,up}_proj.weight (intermediate, hidden), down_proj.weight (hidden, intermediate)     dense layer
//   layers.N.mlp.gate.weight (experts, hidden)                                                             MoE layer
//   layers.N.mlp.experts.gate_up_proj (experts, 2*I, hidden), experts.down_proj (experts, hidden, I)       MoE layer
//   visual.patch_embed.proj.{weight,bias}, visual.pos_embed.weight, visual.blocks.N.{norm1,norm2,attn.qkv,attn.proj,
//   mlp.linear_fc1,mlp.linear_fc2}.{weight,bias}, visual.merger.{norm,linear_fc1,linear_fc2}.{weight,bias},
//   visual.deepstack_merger_list.N.{norm,linear_fc1,linear_fc2}.{weight,bias}
//
// Block-FP8 weights come with a second slot "<slot>_scale_inv" ("....weight_scale_inv", "....experts.gate_up_proj_scale_inv")
// of shape (..., ceil(rows/block_rows), ceil(columns/block_columns)); Checkpoint adds it when the stored dtype is F8_E4M3.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "stage/contract/layer_plan.h"
#include "stage/contract/model_shape.h"

namespace qwen::weights {

// Which part of a model a stage holds.
struct StageSpec {
  contract::LayerRange layers;
  int32_t index = 0, stages = 1;
  bool first() const { return index == 0; }           // holds the vision tower and the embedding
  bool last() const { return index == stages - 1; }   // holds the final norm and lm_head
};

// One way in which a slot may lie on disk.
//   kPlain       one tensor, in the slot's shape
//   kFused       one tensor (E, R, C), or its transpose (E, C, R) as the hub's Qwen3-VL-MoE checkpoints have it
//   kPerExpert   E * parts tensors, each (R/parts, C): concatenated in expert order, within an expert in part order
enum class Layout { kPlain, kFused, kPerExpert };
struct Source {
  Layout layout = Layout::kPlain;
  std::vector<std::string> keys;  // one for kPlain and kFused; E * parts for kPerExpert, in order of concatenation
};
struct Slot {
  std::string name;
  std::vector<int64_t> shape;
  std::vector<Source> sources;  // in order of preference; the first whose first key exists is taken
  bool quantizable = false;     // may be stored as F8_E4M3 with a scale slot
};

// All slots of a stage, in load order (vision, embedding, layers ascending, norm, head). REQUIRES: spec.layers within shape.
std::vector<Slot> StageSlots(const contract::ModelShape& shape, const StageSpec& spec);

// Keys that may be in a checkpoint and are not a weight: rotary inv_freq buffers of old exports.
bool IsIgnorableKey(std::string_view key);

}  // namespace qwen::weights
