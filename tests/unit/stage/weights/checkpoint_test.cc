// Goal: a stage finds exactly its tensors in every form in which a checkpoint may lie on disk, reads exactly their bytes, and what
// does not fit its config is reported with name, expected and found shape. Files are written byte by byte here; the expected
// key lists are spelled out from the published checkpoints, not taken from the weight map.
#include "stage/weights/checkpoint.h"

#include <gtest/gtest.h>
#include <openssl/sha.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <set>

namespace qwen::weights {
namespace {

namespace fs = std::filesystem;
using contract::ModelShape;

struct Tensor {
  std::string dtype;
  std::vector<int64_t> shape;
};
using Tensors = std::map<std::string, Tensor>;

int64_t BytesOf(const Tensor& t) {
  const int64_t element = t.dtype == "F32" ? 4 : t.dtype == "F8_E4M3" ? 1 : 2;
  return std::accumulate(t.shape.begin(), t.shape.end(), element, std::multiplies<>());
}
// Bytes that tell every tensor and every position apart.
std::string DataOf(const std::string& key, const Tensor& t) {
  std::string data(static_cast<size_t>(BytesOf(t)), '\0');
  uint32_t state = 2166136261u;
  for (const char c : key) state = (state ^ static_cast<unsigned char>(c)) * 16777619u;
  for (char& c : data) {
    state = state * 1664525u + 1013904223u;
    c = static_cast<char>(state >> 24);
  }
  return data;
}
void WriteSafetensors(const std::string& path, const Tensors& tensors) {
  std::string header = "{", data;
  for (const auto& [key, t] : tensors) {
    const std::string bytes = DataOf(key, t);
    header += (header.size() > 1 ? ",\"" : "\"") + key + "\":{\"dtype\":\"" + t.dtype + "\",\"shape\":" + ShapeToString(t.shape) + ",\"data_offsets\":[" +
              std::to_string(data.size()) + "," + std::to_string(data.size() + bytes.size()) + "]}";
    data += bytes;
  }
  header += "}";
  std::string length(8, '\0');
  for (int i = 0; i < 8; ++i) length[static_cast<size_t>(i)] = static_cast<char>((header.size() >> (8 * i)) & 0xff);
  std::ofstream(path, std::ios::binary) << length << header << data;
}

// hidden 6, 2 heads of 4, 1 kv head, 3 experts of 5, top-2, 3 layers of which the second is dense (intermediate 7), vocab 11.
ModelShape TinyMoe() {
  ModelShape s;
  s.model_type = "qwen3_moe";
  s.layers = 3, s.hidden = 6, s.heads = 2, s.kv_heads = 1, s.head_dim = 4, s.intermediate = 7, s.vocab = 11;
  s.moe = contract::MoeShape{.experts = 3, .experts_per_token = 2, .intermediate = 5, .mlp_only_layers = {1}};
  return s;
}
Tensors Attention(const std::string& layer) {
  return {{layer + "input_layernorm.weight", {"BF16", {6}}},       {layer + "post_attention_layernorm.weight", {"BF16", {6}}},
          {layer + "self_attn.q_proj.weight", {"BF16", {8, 6}}},   {layer + "self_attn.k_proj.weight", {"BF16", {4, 6}}},
          {layer + "self_attn.v_proj.weight", {"BF16", {4, 6}}},   {layer + "self_attn.o_proj.weight", {"BF16", {6, 8}}},
          {layer + "self_attn.q_norm.weight", {"BF16", {4}}},      {layer + "self_attn.k_norm.weight", {"BF16", {4}}}};
}
enum class Experts { kHub, kSaved, kEach };
Tensors TinyMoeTensors(Experts experts, const std::string& prefix = "model.", bool head = true) {
  Tensors t = {{prefix + "embed_tokens.weight", {"BF16", {11, 6}}}, {prefix + "norm.weight", {"BF16", {6}}}};
  if (head) t["lm_head.weight"] = {"BF16", {11, 6}};
  for (int i = 0; i < 3; ++i) {
    const std::string layer = prefix + "layers." + std::to_string(i) + ".";
    t.merge(Attention(layer));
    if (i == 1) {
      t[layer + "mlp.gate_proj.weight"] = {"BF16", {7, 6}};
      t[layer + "mlp.up_proj.weight"] = {"BF16", {7, 6}};
      t[layer + "mlp.down_proj.weight"] = {"BF16", {6, 7}};
      continue;
    }
    t[layer + "mlp.gate.weight"] = {"BF16", {3, 6}};
    if (experts == Experts::kEach) {
      for (int e = 0; e < 3; ++e) {
        const std::string expert = layer + "mlp.experts." + std::to_string(e) + ".";
        t[expert + "gate_proj.weight"] = {"BF16", {5, 6}};
        t[expert + "up_proj.weight"] = {"BF16", {5, 6}};
        t[expert + "down_proj.weight"] = {"BF16", {6, 5}};
      }
    } else {
      const bool hub = experts == Experts::kHub;
      t[layer + "mlp.experts.gate_up_proj"] = {"BF16", hub ? std::vector<int64_t>{3, 6, 10} : std::vector<int64_t>{3, 10, 6}};
      t[layer + "mlp.experts.down_proj"] = {"BF16", hub ? std::vector<int64_t>{3, 5, 6} : std::vector<int64_t>{3, 6, 5}};
    }
  }
  return t;
}

class CheckpointTest : public ::testing::Test {
 protected:
  void SetUp() override {
    dir_ = ::testing::TempDir() + "/ckpt_" + ::testing::UnitTest::GetInstance()->current_test_info()->name();
    fs::remove_all(dir_);
    fs::create_directories(dir_);
  }
  void TearDown() override { fs::remove_all(dir_); }

  StageTensors Resolve(const ModelShape& shape, const StageSpec& spec) {
    auto opened = Checkpoint::Open(dir_);
    EXPECT_TRUE(opened.ok()) << opened.status().ToString();
    checkpoint_.emplace(std::move(*opened));
    auto resolved = checkpoint_->ResolveStage(shape, spec);
    EXPECT_TRUE(resolved.ok()) << resolved.status().ToString();
    return std::move(*resolved);
  }
  StageTensors Whole(const ModelShape& shape) { return Resolve(shape, {.layers = {0, shape.layers}, .index = 0, .stages = 1}); }
  std::string BytesOfSlot(const StageTensors& stage, const std::string& slot) {
    const Entry* entry = stage.Find(slot);
    if (entry == nullptr) return "no slot " + slot;
    std::string out(static_cast<size_t>(entry->bytes), '\0');
    EXPECT_TRUE(checkpoint_->Read(*entry, std::as_writable_bytes(std::span(out))).ok());
    return out;
  }

  std::string dir_;
  std::optional<Checkpoint> checkpoint_;
};

TEST_F(CheckpointTest, AMiddleStageGetsItsLayersAndNothingElse) {
  const Tensors tensors = TinyMoeTensors(Experts::kSaved);
  WriteSafetensors(dir_ + "/model.safetensors", tensors);
  const StageTensors stage = Resolve(TinyMoe(), {.layers = {1, 2}, .index = 1, .stages = 3});
  EXPECT_TRUE(stage.report.ok()) << stage.report.ToStatus().ToString();
  std::set<std::string> slots;
  int64_t bytes = 0;
  for (const Entry& entry : stage.entries) {
    slots.insert(entry.slot);
    bytes += entry.bytes;
    EXPECT_EQ(BytesOfSlot(stage, entry.slot), DataOf("model." + entry.slot, tensors.at("model." + entry.slot)));
  }
  EXPECT_EQ(slots, (std::set<std::string>{"layers.1.input_layernorm.weight", "layers.1.post_attention_layernorm.weight", "layers.1.self_attn.q_proj.weight",
                                          "layers.1.self_attn.k_proj.weight", "layers.1.self_attn.v_proj.weight", "layers.1.self_attn.o_proj.weight",
                                          "layers.1.self_attn.q_norm.weight", "layers.1.self_attn.k_norm.weight", "layers.1.mlp.gate_proj.weight",
                                          "layers.1.mlp.up_proj.weight", "layers.1.mlp.down_proj.weight"}));
  EXPECT_EQ(bytes, stage.report.bytes);
}

TEST_F(CheckpointTest, TheHubsExpertLayoutIsTransposedAndTheSavedOneIsNot) {
  for (const Experts layout : {Experts::kHub, Experts::kSaved}) {
    WriteSafetensors(dir_ + "/model.safetensors", TinyMoeTensors(layout));
    const StageTensors stage = Whole(TinyMoe());
    ASSERT_TRUE(stage.report.ok()) << stage.report.ToStatus().ToString();
    const Entry* gate_up = stage.Find("layers.0.mlp.experts.gate_up_proj");
    const Entry* down = stage.Find("layers.2.mlp.experts.down_proj");
    ASSERT_TRUE(gate_up && down);
    EXPECT_EQ(gate_up->shape, (std::vector<int64_t>{3, 10, 6}));
    EXPECT_EQ(down->shape, (std::vector<int64_t>{3, 6, 5}));
    const auto expected = layout == Experts::kHub ? Transform::kTransposeLastTwo : Transform::kNone;
    EXPECT_EQ(gate_up->transform, expected);
    EXPECT_EQ(down->transform, expected);
    EXPECT_EQ(gate_up->stored_shape, layout == Experts::kHub ? (std::vector<int64_t>{3, 6, 10}) : (std::vector<int64_t>{3, 10, 6}));
  }
}

TEST_F(CheckpointTest, WhereBothExpertLayoutsHaveOneShapeNothingIsTransposed) {
  // hidden == 2 * I: transformers compares with the shape in memory first and keeps the tensor as it lies.
  ModelShape shape = TinyMoe();
  shape.layers = 1;
  shape.moe->intermediate = 3;
  shape.moe->mlp_only_layers.clear();
  Tensors t = Attention("model.layers.0.");
  t["model.layers.0.mlp.gate.weight"] = {"BF16", {3, 6}};
  t["model.layers.0.mlp.experts.gate_up_proj"] = {"BF16", {3, 6, 6}};
  t["model.layers.0.mlp.experts.down_proj"] = {"BF16", {3, 3, 6}};
  t["model.embed_tokens.weight"] = t["lm_head.weight"] = {"BF16", {11, 6}};
  t["model.norm.weight"] = {"BF16", {6}};
  WriteSafetensors(dir_ + "/model.safetensors", t);
  const StageTensors stage = Whole(shape);
  ASSERT_TRUE(stage.report.ok()) << stage.report.ToStatus().ToString();
  EXPECT_EQ(stage.Find("layers.0.mlp.experts.gate_up_proj")->transform, Transform::kNone);
  EXPECT_EQ(stage.Find("layers.0.mlp.experts.down_proj")->transform, Transform::kTransposeLastTwo);
}

TEST_F(CheckpointTest, SeparateExpertsAreConcatenatedGateThenUpInExpertOrder) {
  const Tensors tensors = TinyMoeTensors(Experts::kEach);
  WriteSafetensors(dir_ + "/model.safetensors", tensors);
  const StageTensors stage = Whole(TinyMoe());
  ASSERT_TRUE(stage.report.ok()) << stage.report.ToStatus().ToString();
  std::string gate_up, down;
  for (const char* e : {"0", "1", "2"}) {
    for (const char* part : {"gate_proj", "up_proj", "down_proj"}) {
      const std::string key = std::string("model.layers.2.mlp.experts.") + e + "." + part + ".weight";
      (std::string(part) == "down_proj" ? down : gate_up) += DataOf(key, tensors.at(key));
    }
  }
  EXPECT_EQ(BytesOfSlot(stage, "layers.2.mlp.experts.gate_up_proj"), gate_up);
  EXPECT_EQ(BytesOfSlot(stage, "layers.2.mlp.experts.down_proj"), down);
  EXPECT_EQ(stage.Find("layers.2.mlp.experts.gate_up_proj")->shape, (std::vector<int64_t>{3, 10, 6}));

  // A range across the seam of two pieces.
  const Entry& entry = *stage.Find("layers.2.mlp.experts.gate_up_proj");
  std::string part(70, '\0');
  ASSERT_TRUE(checkpoint_->ReadRange(entry, 50, std::as_writable_bytes(std::span(part))).ok());
  EXPECT_EQ(part, gate_up.substr(50, 70));
}

TEST_F(CheckpointTest, OtherSpellingsOfTheKeysAreFound) {
  for (const char* prefix : {"model.", "model.language_model.", "language_model.", ""}) {
    WriteSafetensors(dir_ + "/model.safetensors", TinyMoeTensors(Experts::kSaved, prefix));
    EXPECT_TRUE(Whole(TinyMoe()).report.ok()) << prefix << ": " << checkpoint_->ResolveStage(TinyMoe(), {.layers = {0, 3}, .index = 0, .stages = 1})->report.ToStatus().ToString();
  }
  Tensors tensors = TinyMoeTensors(Experts::kSaved, "model.language_model.", false);
  tensors["model.language_model.lm_head.weight"] = {"BF16", {11, 6}};
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = {"F32", {2}};  // a buffer of old exports, not a weight
  WriteSafetensors(dir_ + "/model.safetensors", tensors);
  EXPECT_TRUE(Whole(TinyMoe()).report.ok());
}

TEST_F(CheckpointTest, ATiedHeadComesFromTheEmbeddingOnWhicheverStageItIs) {
  ModelShape shape = TinyMoe();
  shape.tie_embeddings = true;
  const Tensors tensors = TinyMoeTensors(Experts::kSaved, "model.", false);
  WriteSafetensors(dir_ + "/model.safetensors", tensors);
  const std::string matrix = DataOf("model.embed_tokens.weight", tensors.at("model.embed_tokens.weight"));

  const StageTensors lone = Whole(shape);
  ASSERT_TRUE(lone.report.ok()) << lone.report.ToStatus().ToString();
  EXPECT_EQ(lone.Find("lm_head.weight")->alias_of, "embed_tokens.weight");
  EXPECT_EQ(lone.Find("lm_head.weight")->bytes, 0);

  const StageTensors last = Resolve(shape, {.layers = {2, 3}, .index = 1, .stages = 2});
  ASSERT_TRUE(last.report.ok());
  EXPECT_EQ(last.Find("lm_head.weight")->alias_of, "");
  EXPECT_EQ(BytesOfSlot(last, "lm_head.weight"), matrix);
  EXPECT_EQ(last.Find("embed_tokens.weight"), nullptr);

  // Not tied, and no head: missing.
  shape.tie_embeddings = false;
  const StageTensors untied = Whole(shape);
  EXPECT_EQ(untied.report.missing, (std::vector<std::string>{"tensor lm_head.weight: missing, expected [11, 6]"}));
}

TEST_F(CheckpointTest, ATiedModelThatCarriesAHeadOfItsOwnLoadsThatHead) {
  // transformers does not tie when both are in the file and differ.
  ModelShape shape = TinyMoe();
  shape.tie_embeddings = true;
  const Tensors tensors = TinyMoeTensors(Experts::kSaved);
  WriteSafetensors(dir_ + "/model.safetensors", tensors);
  const StageTensors stage = Whole(shape);
  ASSERT_TRUE(stage.report.ok()) << stage.report.ToStatus().ToString();
  EXPECT_EQ(stage.Find("lm_head.weight")->alias_of, "");
  EXPECT_EQ(BytesOfSlot(stage, "lm_head.weight"), DataOf("lm_head.weight", tensors.at("lm_head.weight")));
}

TEST_F(CheckpointTest, WhatDoesNotFitIsReportedWithExpectedAndFoundShape) {
  Tensors tensors = TinyMoeTensors(Experts::kSaved);
  tensors["model.layers.0.self_attn.q_proj.weight"].shape = {6, 6};
  tensors["model.layers.2.mlp.experts.down_proj"].shape = {3, 4, 6};
  tensors["model.layers.1.self_attn.k_norm.weight"].dtype = "F16";
  tensors.erase("model.norm.weight");
  tensors["model.layers.3.input_layernorm.weight"] = {"BF16", {6}};
  WriteSafetensors(dir_ + "/model.safetensors", tensors);
  const Report report = Whole(TinyMoe()).report;
  EXPECT_EQ(report.mismatched, (std::vector<std::string>{
                                   "tensor model.layers.0.self_attn.q_proj.weight: expected [8, 6], found [6, 6] in model.safetensors",
                                   "tensor model.layers.1.self_attn.k_norm.weight: expected BF16 or F32, found F16 in model.safetensors",
                                   "tensor model.layers.2.mlp.experts.down_proj: expected [3, 6, 5] or [3, 5, 6], found [3, 4, 6] in model.safetensors"}));
  EXPECT_EQ(report.missing, (std::vector<std::string>{"tensor model.norm.weight: missing, expected [6]"}));
  EXPECT_EQ(report.unexpected, (std::vector<std::string>{"tensor model.layers.3.input_layernorm.weight: not part of this qwen3_moe of 3 layers, found in model.safetensors"}));
  const Status status = report.ToStatus();
  EXPECT_EQ(status.code(), StatusCode::kDataLoss);
  EXPECT_NE(status.message().find("expected [8, 6], found [6, 6]"), std::string::npos);

  // A stage judges its own tensors' shapes only, but the whole file's names.
  const Report middle = Resolve(TinyMoe(), {.layers = {1, 2}, .index = 1, .stages = 3}).report;
  EXPECT_EQ(middle.mismatched.size(), 1u);
  EXPECT_TRUE(middle.missing.empty());
  EXPECT_EQ(middle.unexpected.size(), 1u);
}

TEST_F(CheckpointTest, ALostExpertIsNamed) {
  Tensors tensors = TinyMoeTensors(Experts::kEach);
  tensors.erase("model.layers.0.mlp.experts.0.gate_proj.weight");
  tensors.erase("model.layers.2.mlp.experts.1.down_proj.weight");
  WriteSafetensors(dir_ + "/model.safetensors", tensors);
  EXPECT_EQ(Whole(TinyMoe()).report.missing,
            (std::vector<std::string>{"tensor model.layers.0.mlp.experts.0.gate_proj.weight: missing, expected [5, 6]",
                                      "tensor model.layers.2.mlp.experts.1.down_proj.weight: missing, expected [6, 5]"}));
}

TEST_F(CheckpointTest, OnlyTheShardsOfTheStageAreOpened) {
  Tensors a = TinyMoeTensors(Experts::kSaved), b;
  for (auto it = a.begin(); it != a.end();) {
    if (it->first.starts_with("model.layers.1.")) b.insert(a.extract(it++));
    else ++it;
  }
  WriteSafetensors(dir_ + "/b.safetensors", b);
  std::ofstream(dir_ + "/a.safetensors") << "not a safetensors file: must not be touched by the middle stage";
  std::string map;
  for (const auto& [key, t] : a) map += (map.empty() ? "\"" : ",\"") + key + "\":\"a.safetensors\"";
  for (const auto& [key, t] : b) map += ",\"" + key + "\":\"b.safetensors\"";
  std::ofstream(dir_ + "/model.safetensors.index.json") << "{\"metadata\":{\"total_size\":1},\"weight_map\":{" << map << "}}";
  EXPECT_TRUE(Resolve(TinyMoe(), {.layers = {1, 2}, .index = 1, .stages = 3}).report.ok());
  const auto first = checkpoint_->ResolveStage(TinyMoe(), {.layers = {0, 1}, .index = 0, .stages = 3});
  EXPECT_EQ(first.status().code(), StatusCode::kDataLoss);
  EXPECT_NE(first.status().message().find("a.safetensors"), std::string::npos);
}

TEST_F(CheckpointTest, AnIndexMayNotLeadOutOfItsFolderOrToTensorsThatAreNotThere) {
  for (const char* name : {"../b.safetensors", "/etc/passwd", ".hidden.safetensors", "weights.bin", ""}) {
    std::ofstream(dir_ + "/model.safetensors.index.json", std::ios::trunc) << "{\"weight_map\":{\"k\":\"" << name << "\"}}";
    EXPECT_EQ(Checkpoint::Open(dir_).status().code(), StatusCode::kDataLoss) << name;
  }
  WriteSafetensors(dir_ + "/a.safetensors", {{"x", {"BF16", {1}}}});
  std::ofstream(dir_ + "/model.safetensors.index.json", std::ios::trunc) << R"({"weight_map":{"model.norm.weight":"a.safetensors"}})";
  auto opened = Checkpoint::Open(dir_);
  ASSERT_TRUE(opened.ok());
  const auto resolved = opened->ResolveStage(TinyMoe(), {.layers = {2, 3}, .index = 1, .stages = 2});
  EXPECT_NE(resolved.status().message().find("places tensor model.norm.weight in a.safetensors, where it is not"), std::string::npos);
  fs::remove(dir_ + "/model.safetensors.index.json");
  EXPECT_EQ(Checkpoint::Open(dir_).status().code(), StatusCode::kNotFound);
}

// ---- FP8

ModelShape Fp8Moe() {
  ModelShape s = TinyMoe();
  s.quantization = contract::QuantizationShape{.block_rows = 5, .block_columns = 4};
  return s;
}
// Quantises every linear of the layers but the router: blocks of 5 rows and 4 columns.
Tensors Fp8Tensors(Experts experts, const std::string& suffix) {
  Tensors tensors = TinyMoeTensors(experts), out;
  for (auto& [key, t] : tensors) {
    const bool linear = key.find("_proj") != std::string::npos;
    if (linear) {
      std::vector<int64_t> scale = t.shape;
      const bool hub = experts == Experts::kHub && scale.size() == 3;  // transposed weights carry transposed scales
      int64_t& rows = scale[scale.size() - (hub ? 1 : 2)];
      int64_t& columns = scale[scale.size() - (hub ? 2 : 1)];
      rows = (rows + 4) / 5, columns = (columns + 3) / 4;
      out[key + suffix] = {"F32", scale};
      t.dtype = "F8_E4M3";
    }
    out[key] = t;
  }
  return out;
}

TEST_F(CheckpointTest, Fp8WeightsComeWithTheirBlockScalesInEveryLayout) {
  for (const Experts experts : {Experts::kSaved, Experts::kHub, Experts::kEach}) {
    for (const char* suffix : {"_scale_inv", "_scale"}) {
      const Tensors tensors = Fp8Tensors(experts, suffix);
      WriteSafetensors(dir_ + "/model.safetensors", tensors);
      const StageTensors stage = Whole(Fp8Moe());
      ASSERT_TRUE(stage.report.ok()) << stage.report.ToStatus().ToString();
      const Entry* q = stage.Find("layers.0.self_attn.q_proj.weight");
      const Entry* q_scale = stage.Find("layers.0.self_attn.q_proj.weight_scale_inv");
      const Entry* experts_scale = stage.Find("layers.0.mlp.experts.gate_up_proj_scale_inv");
      ASSERT_TRUE(q && q_scale && experts_scale);
      EXPECT_EQ(q->dtype, StoredDtype::kFloat8E4M3);
      EXPECT_EQ(q_scale->shape, (std::vector<int64_t>{2, 2}));  // 8 rows in blocks of 5, 6 columns in blocks of 4
      EXPECT_EQ(q_scale->dtype, StoredDtype::kFloat32);
      EXPECT_EQ(experts_scale->shape, (std::vector<int64_t>{3, 2, 2}));
      EXPECT_EQ(experts_scale->transform, experts == Experts::kHub ? Transform::kTransposeLastTwo : Transform::kNone);
      EXPECT_EQ(experts_scale->bytes, 3 * 2 * 2 * 4);
      EXPECT_EQ(stage.Find("layers.0.mlp.gate.weight")->dtype, StoredDtype::kBFloat16);
    }
  }
}

TEST_F(CheckpointTest, Fp8WithoutItsScaleOrWithoutAConfigForItIsRefused) {
  Tensors tensors = Fp8Tensors(Experts::kSaved, "_scale_inv");
  tensors.erase("model.layers.1.mlp.up_proj.weight_scale_inv");
  tensors["model.layers.0.self_attn.o_proj.weight_scale_inv"].shape = {1, 2};
  WriteSafetensors(dir_ + "/model.safetensors", tensors);
  const Report report = Whole(Fp8Moe()).report;
  EXPECT_EQ(report.missing, (std::vector<std::string>{"tensor model.layers.1.mlp.up_proj.weight_scale_inv: missing, expected [2, 2]"}));
  EXPECT_EQ(report.mismatched,
            (std::vector<std::string>{"tensor model.layers.0.self_attn.o_proj.weight_scale_inv: expected [2, 2], found [1, 2] in model.safetensors"}));
  EXPECT_FALSE(Whole(TinyMoe()).report.mismatched.empty()) << "config.json says nothing of FP8";
}

// ---- Vision

TEST_F(CheckpointTest, TheVisionTowerIsOnTheFirstStageOnlyWithThePublishedKeys) {
  ModelShape shape = TinyMoe();
  shape.model_type = "qwen3_vl_moe";
  shape.vision = contract::VisionShape{.depth = 2, .hidden = 8, .heads = 2, .intermediate = 10, .in_channels = 3, .patch = 2, .temporal_patch = 2, .merge = 2,
                                       .out_hidden = 6, .position_table = 9, .deepstack_layers = {0}};
  Tensors tensors = TinyMoeTensors(Experts::kHub, "model.language_model.");
  const std::string v = "model.visual.";
  const auto add = [&](const std::string& name, std::vector<int64_t> weight) {
    tensors[v + name + ".bias"] = {"BF16", {weight[0]}};
    tensors[v + name + ".weight"] = {"BF16", std::move(weight)};
  };
  add("patch_embed.proj", {8, 3, 2, 2, 2});
  tensors[v + "pos_embed.weight"] = {"BF16", {9, 8}};
  for (const std::string block : {"blocks.0.", "blocks.1."}) {
    add(block + "norm1", {8});
    add(block + "norm2", {8});
    add(block + "attn.qkv", {24, 8});
    add(block + "attn.proj", {8, 8});
    add(block + "mlp.linear_fc1", {10, 8});
    add(block + "mlp.linear_fc2", {8, 10});
  }
  add("merger.norm", {8});  // before the 2x2 view
  add("merger.linear_fc1", {32, 32});
  add("merger.linear_fc2", {6, 32});
  add("deepstack_merger_list.0.norm", {32});  // after it
  add("deepstack_merger_list.0.linear_fc1", {32, 32});
  add("deepstack_merger_list.0.linear_fc2", {6, 32});
  WriteSafetensors(dir_ + "/model.safetensors", tensors);
  const StageTensors first = Resolve(shape, {.layers = {0, 1}, .index = 0, .stages = 2});
  EXPECT_TRUE(first.report.ok()) << first.report.ToStatus().ToString();
  EXPECT_EQ(BytesOfSlot(first, "visual.merger.norm.weight"), DataOf(v + "merger.norm.weight", tensors.at(v + "merger.norm.weight")));
  const StageTensors last = Resolve(shape, {.layers = {1, 3}, .index = 1, .stages = 2});
  EXPECT_TRUE(last.report.ok());
  for (const Entry& entry : last.entries) EXPECT_FALSE(entry.slot.starts_with("visual.")) << entry.slot;
  EXPECT_EQ(first.entries.size() + last.entries.size(), tensors.size()) << "every tensor of the file is on exactly one stage";
}

// ---- Per-stage exports

std::string Sha256Hex(const std::string& bytes) {
  unsigned char digest[SHA256_DIGEST_LENGTH];
  SHA256(reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size(), digest);
  std::string hex;
  for (const unsigned char byte : digest) {
    char pair[3];
    std::snprintf(pair, sizeof(pair), "%02x", byte);
    hex += pair;
  }
  return hex;
}
void WriteStageExport(const std::string& folder, const Tensors& tensors) {
  fs::create_directories(folder);
  WriteSafetensors(folder + "/model.safetensors", tensors);
  std::string manifest;
  for (const auto& [key, t] : tensors)
    manifest += (manifest.empty() ? "{\n \"" : ",\n \"") + key + "\": {\"shape\": " + ShapeToString(t.shape) + ", \"dtype\": \"" + t.dtype +
                "\", \"bytes\": " + std::to_string(BytesOf(t)) + ", \"sha256\": \"" + Sha256Hex(DataOf(key, t)) + "\"}";
  std::ofstream(folder + "/weights_manifest.json") << manifest << "\n}\n";
}

TEST_F(CheckpointTest, AStageOfAnExportIsPickedByIndexAndCheckedAgainstItsManifest) {
  Tensors all = TinyMoeTensors(Experts::kHub), first, last;
  for (const auto& [key, t] : all) {
    const bool is_first = key == "model.embed_tokens.weight" || key.starts_with("model.layers.0.");
    (is_first ? first : last)[key] = t;
  }
  WriteStageExport(dir_ + "/stage-00-of-02", first);
  WriteStageExport(dir_ + "/stage-01-of-02", last);

  auto opened = Checkpoint::OpenStage(dir_, 1, 2);
  ASSERT_TRUE(opened.ok()) << opened.status().ToString();
  EXPECT_TRUE(opened->is_stage_export());
  const auto stage = opened->ResolveStage(TinyMoe(), {.layers = {1, 3}, .index = 1, .stages = 2});
  ASSERT_TRUE(stage.ok()) << stage.status().ToString();
  EXPECT_TRUE(stage->report.ok()) << stage->report.ToStatus().ToString();
  EXPECT_TRUE(opened->VerifySha256().ok());

  // Another split than the export's: the tensors of layer 1 are elsewhere.
  auto wrong = Checkpoint::OpenStage(dir_, 0, 2)->ResolveStage(TinyMoe(), {.layers = {0, 2}, .index = 0, .stages = 2});
  ASSERT_TRUE(wrong.ok());
  EXPECT_EQ(wrong->report.missing.size(), 11u);
  const Status other_count = Checkpoint::OpenStage(dir_, 0, 4).status();
  EXPECT_EQ(other_count.code(), StatusCode::kNotFound);
  EXPECT_NE(other_count.message().find("stage-00-of-04"), std::string::npos) << other_count.ToString();
}

TEST_F(CheckpointTest, ABitFlippedInAnExportIsFoundBySha256AndATensorThatIsNotInTheManifestAtOpen) {
  const Tensors tensors = TinyMoeTensors(Experts::kSaved);
  WriteStageExport(dir_, tensors);
  ASSERT_TRUE(Checkpoint::Open(dir_)->VerifySha256().ok());
  {
    std::fstream file(dir_ + "/model.safetensors", std::ios::in | std::ios::out | std::ios::binary);
    file.seekg(-3, std::ios::end);
    const char byte = static_cast<char>(file.get() ^ 1);
    file.seekp(-3, std::ios::end);
    file.put(byte);
  }
  const Status flipped = Checkpoint::Open(dir_)->VerifySha256();
  EXPECT_EQ(flipped.code(), StatusCode::kDataLoss);
  EXPECT_NE(flipped.message().find("tensor model.norm.weight: sha256 is"), std::string::npos) << flipped.ToString();

  Tensors more = tensors;
  more["zzz"] = {"BF16", {1}};
  WriteSafetensors(dir_ + "/model.safetensors", more);
  EXPECT_NE(Checkpoint::Open(dir_).status().message().find("zzz: is in model.safetensors, but not in the manifest"), std::string::npos);
  more.erase("zzz");
  more["model.norm.weight"].shape = {3};
  WriteSafetensors(dir_ + "/model.safetensors", more);
  const auto resolved = Checkpoint::Open(dir_)->ResolveStage(TinyMoe(), {.layers = {0, 3}, .index = 0, .stages = 1});
  EXPECT_NE(resolved.status().message().find("the manifest says BF16 [6], the file BF16 [3]"), std::string::npos) << resolved.status().ToString();

  WriteSafetensors(dir_ + "/model.safetensors", tensors);
  fs::remove(dir_ + "/weights_manifest.json");
  EXPECT_EQ(Checkpoint::Open(dir_)->VerifySha256().code(), StatusCode::kFailedPrecondition);
}

// ---- ReadAll

TEST_F(CheckpointTest, ReadAllDeliversEveryByteReportsProgressAndStopsAtAnError) {
  // One tensor of 160 MiB, so that several readers share it; the file's data is a hole in the middle with marked ends.
  ModelShape shape = TinyMoe();
  shape.vocab = 80 << 20, shape.hidden = 1;
  const int64_t big = int64_t{160} << 20;
  const std::string header = "{\"lm_head.weight\":{\"dtype\":\"BF16\",\"shape\":[" + std::to_string(80 << 20) + ",1],\"data_offsets\":[0," + std::to_string(big) + "]}}";
  {
    std::ofstream file(dir_ + "/model.safetensors", std::ios::binary);
    std::string length(8, '\0');
    length[0] = static_cast<char>(header.size());
    file << length << header;
    for (const int64_t at : {int64_t{0}, (int64_t{64} << 20) - 1, int64_t{64} << 20, big - 1}) {
      file.seekp(static_cast<std::streamoff>(8 + header.size() + at));
      file.put('!');
    }
  }
  auto checkpoint = Checkpoint::Open(dir_);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().ToString();
  auto stage = checkpoint->ResolveStage(shape, {.layers = {2, 3}, .index = 1, .stages = 2});
  ASSERT_TRUE(stage.ok());
  ASSERT_EQ(stage->entries.size(), 1u);
  std::vector<std::byte> memory(static_cast<size_t>(big), std::byte{7});
  std::vector<int64_t> progress;
  int placed = 0;
  Checkpoint::ReadAllOptions options;
  options.place = [&](const Entry&) -> Result<std::span<std::byte>> { return std::span(memory); };
  options.placed = [&](const Entry& entry) {
    placed += entry.slot == "lm_head.weight";
    return OkStatus();
  };
  options.progress = [&](int64_t done, int64_t total) {
    progress.push_back(done);
    EXPECT_EQ(total, big);
    return OkStatus();
  };
  ASSERT_TRUE(checkpoint->ReadAll(*stage, options).ok());
  EXPECT_EQ(placed, 1);
  EXPECT_EQ(progress.size(), 3u);
  EXPECT_EQ(progress.back(), big);
  for (const int64_t at : {int64_t{0}, (int64_t{64} << 20) - 1, int64_t{64} << 20, big - 1}) {
    EXPECT_EQ(memory[static_cast<size_t>(at)], std::byte{'!'}) << at;
    memory[static_cast<size_t>(at)] = std::byte{0};
  }
  EXPECT_EQ(memory[0], std::byte{0});
  EXPECT_EQ(std::memcmp(memory.data(), memory.data() + 1, memory.size() - 1), 0);  // so every byte is 0

  fs::resize_file(dir_ + "/model.safetensors", 8 + header.size() + big / 2);
  EXPECT_EQ(checkpoint->ReadAll(*stage, options).code(), StatusCode::kDataLoss);
  options.place = [](const Entry&) -> Result<std::span<std::byte>> { return ResourceExhaustedError("no memory"); };
  EXPECT_EQ(checkpoint->ReadAll(*stage, options).code(), StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace qwen::weights
