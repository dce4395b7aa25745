// Goal: config.json files as they really are become the right sizes; what is wrong is named by its key. The documents here
// are the hub's and those that transformers 5.17.0 writes (save_pretrained), shortened to what is read.
#include "stage/contract/model_shape.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

namespace qwen::contract {
namespace {

// The hub's form of Qwen3-VL-235B-A22B: nested, rope_scaling + rope_theta, num_experts, dtype in text_config.
const char kHub235B[] = R"({
  "architectures": ["Qwen3VLMoeForConditionalGeneration"], "image_token_id": 151655, "model_type": "qwen3_vl_moe",
  "text_config": {
    "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 151643, "decoder_sparse_step": 1, "dtype": "bfloat16",
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12288,
    "max_position_embeddings": 262144, "mlp_only_layers": [], "model_type": "qwen3_vl_moe_text", "moe_intermediate_size": 1536,
    "norm_topk_prob": true, "num_attention_heads": 64, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 94,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_interleaved": true, "mrope_section": [24, 20, 20], "rope_type": "default"},
    "rope_theta": 5000000, "use_cache": true, "vocab_size": 151936},
  "tie_word_embeddings": false, "transformers_version": "4.57.0.dev0", "video_token_id": 151656,
  "vision_config": {"deepstack_visual_indexes": [8, 16, 24], "depth": 27, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 1152,
    "in_channels": 3, "intermediate_size": 4304, "model_type": "qwen3_vl_moe", "num_heads": 16, "num_position_embeddings": 2304,
    "out_hidden_size": 4096, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2},
  "vision_end_token_id": 151653, "vision_start_token_id": 151652})";

std::string Replaced(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}
std::string ErrorOf(const std::string& json) {
  const auto shape = ParseModelShape(json);
  return shape.ok() ? "OK" : shape.status().message();
}

TEST(ModelShape, ReadsTheHubsFormOfThe235B) {
  const auto parsed = ParseModelShape(kHub235B);
  ASSERT_TRUE(parsed.ok()) << parsed.status().ToString();
  const ModelShape& s = *parsed;
  EXPECT_EQ(s.model_type, "qwen3_vl_moe");
  EXPECT_EQ(s.dtype, Dtype::kBFloat16);
  EXPECT_EQ(s.layers, 94);
  EXPECT_EQ(s.hidden, 4096);
  EXPECT_EQ(s.heads, 64);
  EXPECT_EQ(s.kv_heads, 4);
  EXPECT_EQ(s.head_dim, 128);  // not hidden / heads = 64
  EXPECT_EQ(s.vocab, 151936);
  EXPECT_EQ(s.rope_theta, 5e6);
  EXPECT_EQ(s.rope_type, "default");
  EXPECT_EQ(s.mrope_section, (std::array<int32_t, 3>{24, 20, 20}));
  EXPECT_EQ(s.max_positions, 262144);
  EXPECT_FALSE(s.tie_embeddings);
  ASSERT_TRUE(s.moe);
  EXPECT_EQ(s.moe->experts, 128);
  EXPECT_EQ(s.moe->experts_per_token, 8);
  EXPECT_EQ(s.moe->intermediate, 1536);
  EXPECT_TRUE(s.IsMoeLayer(0) && s.IsMoeLayer(93));
  ASSERT_TRUE(s.vision);
  EXPECT_EQ(s.vision->out_hidden, 4096);
  EXPECT_EQ(s.vision->head_dim(), 72);
  EXPECT_EQ(s.vision->patch_elements(), 1536);
  EXPECT_EQ(s.deepstack_count(), 3);
  EXPECT_FALSE(s.quantization);
  EXPECT_EQ(s.image_token, 151655);
}

TEST(ModelShape, ThePlanningTableSaysTheSameAsTheHubsFile) {
  const auto file = ParseModelShape(kHub235B);
  for (const char* name : {"Qwen3-VL-235B-A22B", "Qwen/Qwen3-VL-235B-A22B-Instruct", "Qwen3-VL-235B-A22B-Thinking"}) {
    const auto named = NamedModelShape(name);
    ASSERT_TRUE(named.ok()) << name;
    EXPECT_EQ(ConfigHash(*named), ConfigHash(*file)) << name;
  }
  EXPECT_TRUE(NamedModelShape("Qwen3-VL-235B-A22B-Instruct-FP8")->quantization);
  const auto unknown = NamedModelShape("Qwen3-VL-7B");
  EXPECT_EQ(unknown.status().code(), StatusCode::kNotFound);
  EXPECT_NE(unknown.status().message().find("Qwen3-VL-8B"), std::string::npos) << "the message lists what there is";
}

TEST(ModelShape, ReadsWhatTransformers5Writes) {
  // rope_parameters instead of rope_scaling, num_local_experts instead of num_experts, dtype at the top, theta inside.
  const char json[] = R"({"dtype": "float32", "model_type": "qwen3_vl_moe", "image_token_id": 200, "video_token_id": 201,
    "vision_start_token_id": 202, "vision_end_token_id": 203,
    "text_config": {"decoder_sparse_step": 2, "head_dim": 32, "hidden_size": 64, "intermediate_size": 96, "mlp_only_layers": [3],
      "moe_intermediate_size": 48, "num_attention_heads": 4, "num_experts_per_tok": 2, "num_hidden_layers": 6, "num_key_value_heads": 2,
      "num_local_experts": 8, "tie_word_embeddings": true, "vocab_size": 256, "max_position_embeddings": 4096,
      "rope_parameters": {"mrope_interleaved": true, "mrope_section": [6, 5, 5], "rope_theta": 10000.0, "rope_type": "default"}},
    "tie_word_embeddings": false,
    "vision_config": {"deepstack_visual_indexes": [0, 1], "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
      "num_position_embeddings": 64, "out_hidden_size": 64, "patch_size": [16, 16]}})";
  const auto parsed = ParseModelShape(json);
  ASSERT_TRUE(parsed.ok()) << parsed.status().ToString();
  EXPECT_EQ(parsed->dtype, Dtype::kFloat32);
  EXPECT_EQ(parsed->moe->experts, 8);
  EXPECT_EQ(parsed->rope_theta, 10000.0);
  EXPECT_EQ(parsed->mrope_section, (std::array<int32_t, 3>{6, 5, 5}));
  EXPECT_FALSE(parsed->tie_embeddings) << "text_config's class default is true and does not count";
  std::string kinds;
  for (int i = 0; i < 6; ++i) kinds += parsed->IsMoeLayer(i) ? 'M' : 'd';
  EXPECT_EQ(kinds, "dMdddM");  // every second layer, but layer 3 is listed as dense
}

TEST(ModelShape, ASectionLongerThanTheHeadIsCutAsTransformersCutsItsSlices) {
  // 16 frequencies: slice(1, 60, 3) of 16 is {1,4,7,10,13}, slice(2, 60, 3) is {2,5,8,11,14}; T keeps {0,3,6,9,12,15}.
  const std::string json = Replaced(Replaced(kHub235B, R"("head_dim": 128)", R"("head_dim": 32)"), R"("mrope_section": [24, 20, 20], )", "");
  const auto parsed = ParseModelShape(json);
  ASSERT_TRUE(parsed.ok()) << parsed.status().ToString();
  EXPECT_EQ(parsed->mrope_section, (std::array<int32_t, 3>{6, 5, 5}));
}

TEST(ModelShape, AbsentKeysHaveTheDefaultsOfTransformers5170) {
  // The classes' own defaults, printed by transformers 5.17.0 for each family.
  const auto moe = ParseModelShape(R"({"model_type": "qwen3_moe", "hidden_size": 2048, "num_attention_heads": 32, "num_hidden_layers": 24})");
  ASSERT_TRUE(moe.ok()) << moe.status().ToString();
  EXPECT_EQ(moe->head_dim, 64) << "Qwen3MoeConfig has no head_dim: hidden / heads";
  EXPECT_EQ(moe->kv_heads, 4);
  EXPECT_EQ(moe->moe->experts, 128);
  EXPECT_EQ(moe->moe->intermediate, 768);
  EXPECT_FALSE(moe->moe->norm_topk_prob);
  EXPECT_EQ(moe->rope_theta, 10000.0);
  EXPECT_EQ(moe->max_positions, 32768);
  EXPECT_FALSE(moe->vision);
  EXPECT_EQ(moe->mrope_section, (std::array<int32_t, 3>{0, 0, 0}));

  const auto dense = ParseModelShape(R"({"model_type": "qwen3", "hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 28,
    "num_key_value_heads": null, "tie_word_embeddings": true, "torch_dtype": "bfloat16"})");
  ASSERT_TRUE(dense.ok()) << dense.status().ToString();
  EXPECT_EQ(dense->head_dim, 128);
  EXPECT_EQ(dense->kv_heads, 16) << "null: as many as heads";
  EXPECT_EQ(dense->intermediate, 22016);
  EXPECT_TRUE(dense->tie_embeddings);

  const auto vl = ParseModelShape(R"({"model_type": "qwen3_vl_moe", "vision_config": {"out_hidden_size": 2048},
    "text_config": {"hidden_size": 2048, "num_attention_heads": 16, "num_hidden_layers": 24, "norm_topk_prob": false}})");
  ASSERT_TRUE(vl.ok()) << vl.status().ToString();
  EXPECT_EQ(vl->rope_theta, 500000.0);
  EXPECT_EQ(vl->max_positions, 128000);
  EXPECT_EQ(vl->moe->experts, 60);
  EXPECT_EQ(vl->moe->experts_per_token, 4);
  EXPECT_EQ(vl->moe->intermediate, 1408);
  EXPECT_TRUE(vl->moe->norm_topk_prob) << "the VL router divides whatever the file says";
  EXPECT_EQ(vl->head_dim, 128);
  EXPECT_EQ(vl->kv_heads, 16);
  EXPECT_EQ(vl->vision->depth, 27);
}

TEST(ModelShape, ReadsYarnAndRefusesOtherScalings) {
  const std::string yarn = Replaced(kHub235B, R"("rope_type": "default")", R"("rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 262144)");
  const auto parsed = ParseModelShape(yarn);
  ASSERT_TRUE(parsed.ok()) << parsed.status().ToString();
  EXPECT_EQ(parsed->rope_type, "yarn");
  EXPECT_EQ(parsed->rope_factor, 3.0);
  EXPECT_EQ(parsed->rope_original_max_positions, 262144);
  EXPECT_EQ(ErrorOf(Replaced(kHub235B, R"("rope_type": "default")", R"("rope_type": "dynamic")")),
            "config.json: text_config.rope_scaling.rope_type: must be default or yarn, found \"dynamic\"");
  EXPECT_EQ(ErrorOf(Replaced(kHub235B, R"("rope_type": "default")", R"("rope_type": "yarn")")),
            "config.json: text_config.rope_scaling.factor: must be a number >= 1 for yarn");
}

TEST(ModelShape, ReadsBlockFp8AndRefusesOtherQuantisation) {
  const auto with = [](const std::string& q) { return Replaced(kHub235B, R"("transformers_version")", "\"quantization_config\": " + q + ", \"transformers_version\""); };
  const auto parsed = ParseModelShape(with(R"({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 64],
    "modules_to_not_convert": ["lm_head", "model.visual"]})"));
  ASSERT_TRUE(parsed.ok()) << parsed.status().ToString();
  EXPECT_EQ(parsed->quantization->block_rows, 128);
  EXPECT_EQ(parsed->quantization->block_columns, 64);
  EXPECT_EQ(parsed->quantization->not_converted, (std::vector<std::string>{"lm_head", "model.visual"}));
  EXPECT_EQ(ErrorOf(with(R"({"quant_method": "gptq"})")), "config.json: quantization_config.quant_method: must be fp8 (block-wise), found \"gptq\"");
  EXPECT_EQ(ErrorOf(with(R"({"quant_method": "fp8", "activation_scheme": "static"})")),
            "config.json: quantization_config.activation_scheme: must be dynamic, found \"static\"");
}

TEST(ModelShape, WhatIsWrongIsNamedByItsKey) {
  struct Case {
    const char *from, *to, *message;
  };
  const Case cases[] = {
      {R"("model_type": "qwen3_vl_moe",)", R"("model_type": "llama",)", "model_type: must be qwen3_vl_moe, qwen3_vl, qwen3_moe or qwen3, found \"llama\""},
      {R"("num_hidden_layers": 94)", R"("layers": 94)", "text_config.num_hidden_layers: missing"},
      {R"("num_hidden_layers": 94)", R"("num_hidden_layers": 0)", "text_config.num_hidden_layers: must be in [1, 16777216], found 0"},
      {R"("num_hidden_layers": 94)", R"("num_hidden_layers": 18446744073709551615)", "text_config.num_hidden_layers: must be in [1, 16777216], found 18446744073709551615"},
      {R"("num_hidden_layers": 94)", R"("num_hidden_layers": "94")", "text_config.num_hidden_layers: must be an integer, found \"94\""},
      {R"("num_key_value_heads": 4)", R"("num_key_value_heads": 5)", "text_config.num_key_value_heads: does not divide num_attention_heads"},
      {R"("num_experts_per_tok": 8)", R"("num_experts_per_tok": 129)", "text_config.num_experts_per_tok: is more than num_experts"},
      {R"("out_hidden_size": 4096)", R"("out_hidden_size": 3584)", "vision_config.out_hidden_size: is 3584, but text_config.hidden_size is 4096"},
      {R"("num_position_embeddings": 2304)", R"("num_position_embeddings": 2305)", "vision_config.num_position_embeddings: must be a square"},
      {R"([8, 16, 24])", R"([8, 16, 27])", "vision_config.deepstack_visual_indexes: names a block that is not there"},
      {R"([8, 16, 24])", R"([8, 24, 16])", "vision_config.deepstack_visual_indexes: must ascend"},
      {R"("dtype": "bfloat16")", R"("dtype": "float16")", "text_config.dtype: must be bfloat16 or float32, found \"float16\""},
      {R"("vision_config")", R"("vision")", "vision_config: missing"},
      {R"("image_token_id": 151655)", R"("image_token_id": 151936)", "image_token_id: is not below text_config.vocab_size"},
      {R"("hidden_act": "silu")", R"("hidden_act": "gelu")", "text_config.hidden_act: must be silu"},
      {R"("use_cache": true)", R"("use_sliding_window": true)", "text_config.use_sliding_window: sliding windows are not supported"},
      {R"("use_cache": true)", R"("layer_types": ["sliding_attention"])", "text_config.layer_types: must all be full_attention"},
      {R"("rope_theta": 5000000)", R"("rope_theta": -1)", "text_config.rope_theta: must be a number > 1"},
      {R"([24, 20, 20])", R"([24, 20])", "text_config.rope_scaling.mrope_section: must have three numbers (t, h, w)"},
  };
  for (const Case& c : cases) EXPECT_EQ(ErrorOf(Replaced(kHub235B, c.from, c.to)), std::string("config.json: ") + c.message);
  EXPECT_EQ(ErrorOf("[]"), "config.json: not a JSON object");
  EXPECT_EQ(ErrorOf("{"), "config.json: not a JSON object");
}

TEST(ModelShape, LoadTakesEitherFileNameAndNamesTheFolder) {
  const std::string dir = ::testing::TempDir() + "/shape_load";
  std::filesystem::remove_all(dir);
  std::filesystem::create_directories(dir);
  EXPECT_EQ(LoadModelShape(dir).status().code(), StatusCode::kNotFound);
  std::ofstream(dir + "/hf_config.json") << kHub235B;
  EXPECT_TRUE(LoadModelShape(dir).ok());
  std::ofstream(dir + "/config.json") << "{}";
  const Status wrong = LoadModelShape(dir).status();
  EXPECT_NE(wrong.message().find(dir), std::string::npos) << wrong.ToString();
  EXPECT_NE(wrong.message().find("model_type"), std::string::npos) << wrong.ToString();
}

TEST(ModelShape, TheHashTellsShapesApartAndIgnoresTheFormOfTheFile) {
  const std::string hash = ConfigHash(*ParseModelShape(kHub235B));
  EXPECT_EQ(hash.size(), 64u);
  const std::string newer = Replaced(kHub235B, R"("rope_scaling": {"mrope_interleaved": true, "mrope_section": [24, 20, 20], "rope_type": "default"},
    "rope_theta": 5000000)", R"("rope_parameters": {"mrope_section": [24, 20, 20], "rope_type": "default", "rope_theta": 5000000.0})");
  EXPECT_EQ(ConfigHash(*ParseModelShape(newer)), hash);
  for (const auto& [from, to] : {std::pair{"1e-06", "1e-05"}, {"\"rope_theta\": 5000000", "\"rope_theta\": 1000000"}, {"[8, 16, 24]", "[8, 16, 25]"},
                                 {"\"mlp_only_layers\": []", "\"mlp_only_layers\": [1]"}})
    EXPECT_NE(ConfigHash(*ParseModelShape(Replaced(kHub235B, from, to))), hash) << to;
}

}  // namespace
}  // namespace qwen::contract
