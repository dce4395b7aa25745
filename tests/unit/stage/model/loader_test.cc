// weights/loader.h through real files: both expert layouts, dtype conversion, tied heads, FP8 blocks, wrong shapes. Every way
// of loading must give the same: tensor by tensor, overlapped, and overlapped with a GPU's operators (on the CPU).
#include "stage/weights/loader.h"
#include "stage/weights/stream_loader.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "tests/unit/stage/model/tiny_model.h"

namespace qwen::weights {
namespace {

namespace fs = std::filesystem;

enum class Way { kPlain, kOverlapped, kDeviceOperators };

class LoaderTest : public ::testing::TestWithParam<Way> {
 protected:
  LoaderTest() {
    shape_.vision.reset();
    shape_.tie_embeddings = false;
    std::string pattern = (fs::temp_directory_path() / "loader_test.XXXXXX").string();
    dir_ = mkdtemp(pattern.data());
  }
  ~LoaderTest() override { fs::remove_all(dir_); }

  // model.safetensors under the names that Qwen3-VL-MoE has on disk.
  void Write(const std::map<std::string, at::Tensor>& slots) {
    nlohmann::json header = nlohmann::json::object();
    std::string data;
    for (const auto& [slot, value] : slots) {
      const at::Tensor tensor = value.contiguous();
      const char* dtype = tensor.scalar_type() == at::kFloat ? "F32" : tensor.scalar_type() == at::kBFloat16 ? "BF16" : "F8_E4M3";
      const std::string key = slot == "lm_head.weight" ? slot : "model.language_model." + slot;
      header[key] = {{"dtype", dtype}, {"shape", tensor.sizes().vec()}, {"data_offsets", {data.size(), data.size() + tensor.nbytes()}}};
      data.append(static_cast<const char*>(tensor.const_data_ptr()), tensor.nbytes());
    }
    const std::string text = header.dump();
    const uint64_t length = text.size();
    std::ofstream file(dir_ / "model.safetensors", std::ios::binary);
    file.write(reinterpret_cast<const char*>(&length), sizeof(length));
    file << text << data;
    file.close();
    std::ofstream(dir_ / "config.json") << "{}";
  }
  Result<TensorMap> Load(at::ScalarType dtype, StageSpec spec = {.layers = {0, 4}}) {
    LoadOptions options{.spec = spec, .dtype = dtype};
    return LoadBy(GetParam(), options);
  }
  // Overlapped in requests of 500 bytes: every tensor comes in several.
  Result<TensorMap> LoadBy(Way way, LoadOptions options) {
    ASSIGN_OR_RETURN(Checkpoint checkpoint, Checkpoint::Open(dir_.string()));
    options.method = way == Way::kPlain ? LoadMethod::kPlain : LoadMethod::kOverlapped;
    if (way == Way::kPlain) return LoadTensors(checkpoint, shape_, options);
    ASSIGN_OR_RETURN(const StageTensors found, checkpoint.ResolveStage(shape_, options.spec));
    RETURN_IF_ERROR(found.report.ToStatus());
    return StreamTensors(checkpoint, shape_, found, options, {.request_bytes = 500, .device_operators = way == Way::kDeviceOperators});
  }

  contract::ModelShape shape_ = model::TinyShape();
  TensorMap weights_ = model::TinyWeights(shape_);
  fs::path dir_;
};

TEST_P(LoaderTest, TensorsOfAFloat32CheckpointArriveUnchanged) {
  Write({weights_.begin(), weights_.end()});
  const TensorMap loaded = Load(at::kFloat).value();
  ASSERT_EQ(loaded.size(), weights_.size());
  for (const auto& [slot, tensor] : weights_) EXPECT_TRUE(loaded.at(slot).equal(tensor)) << slot;
}

TEST_P(LoaderTest, TheHubsTransposedExpertsBecomeTheSameTensors) {
  std::map<std::string, at::Tensor> hub(weights_.begin(), weights_.end());
  for (auto& [slot, tensor] : hub) {
    if (slot.find("mlp.experts.") != std::string::npos) tensor = tensor.transpose(1, 2).contiguous();
  }
  Write(hub);
  const TensorMap loaded = Load(at::kFloat).value();
  for (const auto& [slot, tensor] : weights_) {
    EXPECT_TRUE(loaded.at(slot).equal(tensor)) << slot;
    EXPECT_TRUE(loaded.at(slot).is_contiguous()) << slot;
  }
}

TEST_P(LoaderTest, AStageGetsItsLayersAndTheDtypeAskedFor) {
  Write({weights_.begin(), weights_.end()});
  const TensorMap loaded = Load(at::kBFloat16, {.layers = {1, 3}, .index = 1, .stages = 3}).value();
  EXPECT_EQ(loaded.count("embed_tokens.weight") + loaded.count("norm.weight") + loaded.count("lm_head.weight"), 0u);
  for (const auto& [slot, tensor] : loaded) {
    EXPECT_TRUE(slot.starts_with("layers.1.") || slot.starts_with("layers.2.")) << slot;
    EXPECT_TRUE(tensor.equal(weights_.at(slot).to(at::kBFloat16))) << slot;
  }
}

TEST_P(LoaderTest, ATiedHeadSharesTheEmbeddingsMemory) {
  shape_.tie_embeddings = true;
  std::map<std::string, at::Tensor> tied(weights_.begin(), weights_.end());
  tied.erase("lm_head.weight");
  Write(tied);
  const TensorMap loaded = Load(at::kFloat).value();
  EXPECT_EQ(loaded.at("lm_head.weight").const_data_ptr(), loaded.at("embed_tokens.weight").const_data_ptr());
}

TEST_P(LoaderTest, Fp8BlocksAreMultipliedByTheirScale) {
  shape_.quantization = contract::QuantizationShape{.block_rows = 8, .block_columns = 16};
  std::map<std::string, at::Tensor> stored(weights_.begin(), weights_.end());
  const std::string slot = "layers.0.self_attn.q_proj.weight";  // (32, 24): 4 x 2 blocks, the second column of blocks half full
  const at::Tensor quantized = (stored[slot] * 64).to(at::kFloat8_e4m3fn), scale = at::rand({4, 2}) + 0.5;
  stored[slot] = quantized;
  stored[slot + "_scale_inv"] = scale;
  Write(stored);
  const Result<TensorMap> loaded = Load(at::kFloat);
  ASSERT_TRUE(loaded.ok()) << loaded.status().ToString();
  EXPECT_EQ(loaded->count(slot + "_scale_inv"), 0u);
  const at::Tensor wide = quantized.to(at::kFloat);
  for (int r = 0; r < 32; ++r) {
    for (int c = 0; c < 24; ++c) {
      EXPECT_FLOAT_EQ(loaded->at(slot)[r][c].item<float>(), wide[r][c].item<float>() * scale[r / 8][c / 16].item<float>());
    }
  }
}

// Fused and transposed on disk, with transposed scales, blocks that end ragged, and a row of scales of their own.
TEST_P(LoaderTest, TransposedFp8ExpertsAreMultipliedByTheirScaleToo) {
  shape_.quantization = contract::QuantizationShape{.block_rows = 7, .block_columns = 5};
  std::map<std::string, at::Tensor> stored(weights_.begin(), weights_.end());
  std::map<std::string, at::Tensor> expected;
  for (auto& [slot, tensor] : weights_) {
    if (slot.find("mlp.experts.") == std::string::npos) continue;
    const at::Tensor quantized = (tensor * 64).to(at::kFloat8_e4m3fn);
    const auto blocks = [](int64_t size, int64_t block) { return (size + block - 1) / block; };
    const at::Tensor scale = at::rand({tensor.size(0), blocks(tensor.size(1), 7), blocks(tensor.size(2), 5)}) + 0.5;
    at::Tensor wide = quantized.to(at::kFloat).clone();
    for (int64_t e = 0; e < wide.size(0); ++e) {
      for (int64_t r = 0; r < wide.size(1); ++r) {
        for (int64_t c = 0; c < wide.size(2); ++c) wide.accessor<float, 3>()[e][r][c] *= scale.accessor<float, 3>()[e][r / 7][c / 5];
      }
    }
    expected[slot] = wide;
    stored[slot] = quantized.transpose(1, 2).contiguous();
    stored[slot + "_scale_inv"] = scale.transpose(1, 2).contiguous();
  }
  ASSERT_FALSE(expected.empty());
  Write(stored);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const Result<TensorMap> loaded = Load(dtype);
    ASSERT_TRUE(loaded.ok()) << loaded.status().ToString();
    ASSERT_EQ(loaded->size(), weights_.size());
    for (const auto& [slot, wide] : expected) EXPECT_TRUE(loaded->at(slot).equal(wide.to(dtype))) << slot;
  }
}

TEST_P(LoaderTest, ProgressRisesToTheWholeAndEndsTheLoadingWhenItSaysSo) {
  Write({weights_.begin(), weights_.end()});
  int64_t last = 0, whole = 0;
  LoadOptions options{.spec = {.layers = {0, 4}}, .dtype = at::kFloat};
  options.progress = [&](int64_t done, int64_t total) {
    EXPECT_GT(done, last);
    last = done, whole = total;
    return OkStatus();
  };
  ASSERT_TRUE(LoadBy(GetParam(), options).ok());
  int64_t bytes = 0;
  for (const auto& [slot, tensor] : weights_) bytes += static_cast<int64_t>(tensor.nbytes());
  EXPECT_EQ(last, bytes);
  EXPECT_EQ(whole, bytes);
  int calls = 0;
  options.progress = [&](int64_t, int64_t) { return ++calls < 3 ? OkStatus() : CancelledError("told to stop"); };
  EXPECT_EQ(LoadBy(GetParam(), options).status().code(), StatusCode::kCancelled);
  EXPECT_EQ(calls, 3);
}

TEST_P(LoaderTest, KeptFp8BlocksAndScalesArriveAsTheyLieInTheFile) {
  shape_.quantization = contract::QuantizationShape{.block_rows = 8, .block_columns = 16};
  std::map<std::string, at::Tensor> stored(weights_.begin(), weights_.end());
  const std::string slot = "layers.0.self_attn.q_proj.weight";  // (32, 24)
  const at::Tensor quantized = (stored[slot] * 64).to(at::kFloat8_e4m3fn), scale = (at::rand({4, 2}) + 0.5).to(at::kBFloat16);
  stored[slot] = quantized;
  stored[slot + "_scale_inv"] = scale;
  const std::string experts = "layers.0.mlp.experts.down_proj";  // transposed in the file, and its scales
  const at::Tensor fused = (stored.at(experts) * 64).to(at::kFloat8_e4m3fn);
  const at::Tensor fused_scale = at::rand({fused.size(0), (fused.size(1) + 7) / 8, (fused.size(2) + 15) / 16}) + 0.5;
  stored[experts] = fused.transpose(1, 2).contiguous();
  stored[experts + "_scale_inv"] = fused_scale.transpose(1, 2).contiguous();
  Write(stored);
  const Result<TensorMap> result = LoadBy(GetParam(), {.spec = {.layers = {0, 4}}, .dtype = at::kBFloat16, .keep_fp8 = true});
  ASSERT_TRUE(result.ok()) << result.status().ToString();
  const TensorMap& loaded = *result;
  EXPECT_EQ(loaded.size(), weights_.size() + 2);
  EXPECT_EQ(loaded.at(slot).scalar_type(), at::kFloat8_e4m3fn);
  EXPECT_TRUE(loaded.at(slot).view(at::kByte).equal(quantized.view(at::kByte)));
  EXPECT_TRUE(loaded.at(slot + "_scale_inv").equal(scale.to(at::kFloat)));
  EXPECT_TRUE(loaded.at(experts).view(at::kByte).equal(fused.view(at::kByte)));
  EXPECT_TRUE(loaded.at(experts + "_scale_inv").equal(fused_scale));
  EXPECT_TRUE(loaded.at("norm.weight").equal(weights_.at("norm.weight").to(at::kBFloat16)));
}

TEST_P(LoaderTest, AWrongShapeNamesTheTensor) {
  std::map<std::string, at::Tensor> wrong(weights_.begin(), weights_.end());
  wrong["layers.2.self_attn.q_norm.weight"] = at::ones({9});
  Write(wrong);
  const Result<TensorMap> loaded = Load(at::kFloat);
  EXPECT_EQ(loaded.status().code(), StatusCode::kDataLoss);
  EXPECT_NE(loaded.status().message().find("layers.2.self_attn.q_norm.weight"), std::string::npos) << loaded.status().ToString();
}

INSTANTIATE_TEST_SUITE_P(Ways, LoaderTest, ::testing::Values(Way::kPlain, Way::kOverlapped, Way::kDeviceOperators), [](const auto& info) {
  return std::string(info.param == Way::kPlain ? "Plain" : info.param == Way::kOverlapped ? "Overlapped" : "DeviceOperators");
});

}  // namespace
}  // namespace qwen::weights
