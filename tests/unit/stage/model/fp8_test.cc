// Block FP8 in memory: quantising as python_export does, loading without multiplying out, noise in FP8.
#include "stage/weights/fp8.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

#include "stage/contract/layer_plan.h"
#include "stage/model/stage_model.h"
#include "stage/weights/loader.h"
#include "tests/unit/stage/model/tiny_model.h"

namespace qwen::weights {
namespace {

TEST(Fp8, ABlocksLargestValueIsKeptAndNothingIsOffByMoreThanHalfAStep) {
  const contract::QuantizationShape block{.block_rows = 8, .block_columns = 16};
  at::manual_seed(3);
  const at::Tensor weight = at::randn({2, 20, 40}) * at::exp(at::randn({2, 20, 1}));  // 3 x 3 blocks each, the last ones not full
  const Fp8Tensor fp8 = Quantize(weight, block);
  ASSERT_EQ(fp8.codes.sizes(), weight.sizes());
  ASSERT_EQ(fp8.scales.sizes(), at::IntArrayRef({2, 3, 3}));
  EXPECT_TRUE(fp8.scales.equal(fp8.scales.to(at::kBFloat16).to(at::kFloat))) << "scales are bf16 numbers";
  const at::Tensor back = MultiplyOut(fp8.codes, fp8.scales, block);
  for (int e = 0; e < 2; ++e) {
    for (int r = 0; r < 20; ++r) {
      for (int c = 0; c < 40; ++c) {
        const double want = weight[e][r][c].item<double>(), got = back[e][r][c].item<double>(), scale = fp8.scales[e][r / 8][c / 16].item<double>();
        // Three bits of fraction: half a step is 1/16 of the value's power of two; below 2^-6 steps are 2^-9.
        const double allowed = scale * std::max(std::ldexp(1.0, -10), std::ldexp(1.0, static_cast<int>(std::floor(std::log2(std::abs(want) / scale + 1e-30))) - 4)) * 1.001;
        EXPECT_LE(std::abs(want - got), allowed) << e << " " << r << " " << c;
      }
    }
  }
  const at::Tensor first = weight[0].narrow(0, 0, 8).narrow(1, 0, 16).abs().max();
  EXPECT_LE(first.item<float>(), 448 * fp8.scales[0][0][0].item<float>());
  EXPECT_GT(first.item<float>() * 1.01f, 448 * fp8.scales[0][0][0].item<float>()) << "a scale larger than need be";
}

TEST(Fp8, ABlockOfZerosHasAScaleOfOne) {
  const Fp8Tensor fp8 = Quantize(at::zeros({128, 128}), {});
  EXPECT_EQ(fp8.scales.item<float>(), 1.0f);
  EXPECT_EQ(fp8.codes.to(at::kFloat).abs().max().item<float>(), 0.0f);
}

TEST(Fp8, NoiseIsQuantisedWhereACheckpointIsAndWeighsWhatThePlanSays) {
  contract::ModelShape shape = model::TinyShape();
  shape.vision.reset();
  shape.quantization = contract::QuantizationShape{.block_rows = 8, .block_columns = 8};
  const LoadOptions wide{.spec = {.layers = {0, shape.layers}}};
  LoadOptions kept = wide;
  kept.keep_fp8 = true;
  const TensorMap bf16 = RandomTensors(shape, wide, 5).value(), fp8 = RandomTensors(shape, kept, 5).value();
  int64_t bytes = 0, quantised = 0;
  for (const auto& [name, tensor] : fp8) {
    const bool scale = name.ends_with("_scale_inv");
    bytes += scale ? tensor.numel() * 2 : static_cast<int64_t>(tensor.nbytes());  // the plan counts scales as files hold them, in bf16
    if (scale) continue;
    ASSERT_TRUE(bf16.count(name)) << name;
    if (tensor.scalar_type() != at::kFloat8_e4m3fn) {
      EXPECT_TRUE(tensor.equal(bf16.at(name))) << name;
      continue;
    }
    ++quantised;
    const at::Tensor back = MultiplyOut(tensor, fp8.at(name + "_scale_inv"), *shape.quantization), want = bf16.at(name).to(at::kFloat);
    EXPECT_LT(((back - want).norm() / want.norm()).item<double>(), 0.04) << name;
  }
  int64_t wanted = 0;
  for (int layer = 0; layer < shape.layers; ++layer) wanted += shape.IsMoeLayer(layer) ? 6 : 7;
  EXPECT_EQ(quantised, wanted) << "q, k, v, o, and gate_up and down or gate, up and down";
  EXPECT_EQ(bytes, contract::WeightBytes(shape, {0, shape.layers}, contract::Dtype::kFloat8E4M3).total());
}

TEST(Fp8, TheReferenceRefusesWeightsThatWereKept) {
  contract::ModelShape shape = model::TinyShape();
  shape.vision.reset();
  shape.quantization = contract::QuantizationShape{.block_rows = 8, .block_columns = 8};
  const TensorMap kept = RandomTensors(shape, {.spec = {.layers = {0, shape.layers}}, .keep_fp8 = true}, 5).value();
  const auto created = model::StageModel::Create(shape, {.layers = {0, shape.layers}, .block_count = 4}, kept);
  EXPECT_EQ(created.status().code(), StatusCode::kFailedPrecondition) << created.status().ToString();
}

}  // namespace
}  // namespace qwen::weights
