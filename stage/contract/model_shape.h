// stage/contract/model_shape.h — the sizes of a checkpoint, read from its config.json (Hugging Face form). Pure.
//
// Families: qwen3_vl_moe, qwen3_vl, qwen3_moe, qwen3. One decoder with an optional MoE block and an optional vision tower.
// Sources of every rule: transformers 5.17.0 models/qwen3*/configuration_*.py; docs/numerics.md says how each is used.
#pragma once
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "stage/base/status.h"

namespace qwen::contract {

enum class Dtype { kFloat32, kBFloat16, kFloat8E4M3 };
int64_t DtypeBytes(Dtype dtype);
std::string_view DtypeName(Dtype dtype);  // "float32", "bfloat16", "float8_e4m3fn"

struct MoeShape {
  int32_t experts = 0;            // E
  int32_t experts_per_token = 0;  // top-k
  int32_t intermediate = 0;       // I of one expert
  bool norm_topk_prob = true;     // Qwen3-VL-MoE divides always; qwen3_moe reads the flag
  int32_t decoder_sparse_step = 1;
  std::vector<int32_t> mlp_only_layers;
};

struct VisionShape {
  int32_t depth = 0, hidden = 0, heads = 0, intermediate = 0;
  int32_t in_channels = 3, patch = 16, temporal_patch = 2, merge = 2;
  int32_t out_hidden = 0;
  int32_t position_table = 0;               // entries; a square (48^2 for the released models)
  std::vector<int32_t> deepstack_layers;    // ViT block indices whose output is tapped, ascending; tap i is added after text layer i
  std::string hidden_act = "gelu_pytorch_tanh";
  int32_t head_dim() const { return hidden / heads; }
  int32_t patch_elements() const { return in_channels * temporal_patch * patch * patch; }
};

struct QuantizationShape {  // block FP8, model card form: weight ~= weight_fp8 * scale of its block
  int32_t block_rows = 128, block_columns = 128;
  std::vector<std::string> not_converted;  // modules kept in dtype
};

struct ModelShape {
  std::string model_type;  // one of the four families
  Dtype dtype = Dtype::kBFloat16;
  int32_t layers = 0, hidden = 0, heads = 0, kv_heads = 0, head_dim = 0;
  int32_t intermediate = 0;  // dense MLP
  int32_t vocab = 0;
  float rms_eps = 1e-6f;
  double rope_theta = 5e6;
  std::array<int32_t, 3> mrope_section = {0, 0, 0};  // sums to head_dim/2; all zero: plain RoPE (text families)
  // YaRN or other rope scaling: type "default" only changes nothing; unsupported types are an error in Parse.
  std::string rope_type = "default";
  double rope_factor = 1.0;                 // yarn
  int32_t rope_original_max_positions = 0;  // yarn
  double rope_attention_factor = 0.0, rope_beta_fast = 32.0, rope_beta_slow = 1.0;  // yarn; attention_factor 0 = derive
  int32_t max_positions = 0;
  bool tie_embeddings = false;
  bool attention_bias = false;
  std::optional<MoeShape> moe;
  std::optional<VisionShape> vision;
  std::optional<QuantizationShape> quantization;
  int32_t image_token = -1, video_token = -1, vision_start_token = -1, vision_end_token = -1;

  bool IsMoeLayer(int32_t layer) const;
  int32_t deepstack_count() const { return vision ? static_cast<int32_t>(vision->deepstack_layers.size()) : 0; }
};

// Parses config.json's text. kInvalidArgument naming the key for what is missing, contradictory or not supported.
Result<ModelShape> ParseModelShape(std::string_view config_json);
Result<ModelShape> LoadModelShape(const std::string& checkpoint_dir);  // dir/config.json or dir/hf_config.json
// The real models by name, for planning without a checkpoint: "Qwen3-VL-235B-A22B", "Qwen3-VL-30B-A3B" (with or without
// the "Qwen/" prefix and "-Instruct"/"-Thinking"/"-FP8" suffixes), dense "Qwen3-VL-2B|4B|8B|32B". kNotFound lists what there is.
Result<ModelShape> NamedModelShape(std::string_view name);
// A digest of everything above that must be equal on all members of a group (SHA-256, hex).
std::string ConfigHash(const ModelShape& shape);

}  // namespace qwen::contract
