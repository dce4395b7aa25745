// The vision tower against plain loops in double over one image or video: no ATen arithmetic in the oracle.
#include "stage/vision/vision_tower.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>

namespace qwen::vision {
namespace {

using Row = std::vector<double>;
using Rows = std::vector<Row>;

contract::ModelShape TinyShape() {
  contract::ModelShape shape;
  shape.hidden = 12;
  contract::VisionShape vision;
  vision.depth = 3;
  vision.hidden = 16;
  vision.heads = 2;
  vision.intermediate = 20;
  vision.patch = 4;
  vision.out_hidden = 12;
  vision.position_table = 25;
  vision.deepstack_layers = {0, 2};
  shape.vision = vision;
  return shape;
}

weights::TensorMap TinyWeights(const contract::VisionShape& v) {
  at::manual_seed(3);
  weights::TensorMap tensors;
  const auto affine = [&](const std::string& name, std::vector<int64_t> sizes, bool norm = false) {
    tensors["visual." + name + ".weight"] = norm ? 1 + at::randn(sizes) * 0.1 : at::randn(sizes) * 0.2;
    tensors["visual." + name + ".bias"] = at::randn({sizes[0]}) * 0.1;
  };
  affine("patch_embed.proj", {v.hidden, v.in_channels, v.temporal_patch, v.patch, v.patch});
  tensors["visual.pos_embed.weight"] = at::randn({v.position_table, v.hidden});
  for (int i = 0; i < v.depth; ++i) {
    const std::string p = "blocks." + std::to_string(i) + ".";
    affine(p + "norm1", {v.hidden}, true);
    affine(p + "norm2", {v.hidden}, true);
    affine(p + "attn.qkv", {3 * v.hidden, v.hidden});
    affine(p + "attn.proj", {v.hidden, v.hidden});
    affine(p + "mlp.linear_fc1", {v.intermediate, v.hidden});
    affine(p + "mlp.linear_fc2", {v.hidden, v.intermediate});
  }
  const int64_t merged = 4 * v.hidden;
  const auto merger = [&](const std::string& name, int64_t norm) {
    affine(name + ".norm", {norm}, true);
    affine(name + ".linear_fc1", {merged, merged});
    affine(name + ".linear_fc2", {v.out_hidden, merged});
  };
  merger("merger", v.hidden);
  merger("deepstack_merger_list.0", merged);
  merger("deepstack_merger_list.1", merged);
  return tensors;
}

step::VisionInput RandomInput(const contract::VisionShape& shape, std::array<int32_t, 3> grid) {
  step::VisionInput input{.id = 1, .grid = grid};
  std::mt19937 random(5);
  for (int64_t i = 0; i < input.patch_count() * shape.patch_elements(); ++i) input.patches.push_back(random() & 255);
  return input;
}

class SlowTower {
 public:
  SlowTower(const contract::VisionShape& shape, const weights::TensorMap& tensors) : v_(shape), tensors_(tensors) {}

  // [0] merged features, then the taps.
  std::vector<Rows> Encode(const step::VisionInput& input) const {
    const auto [frames, h, w] = input.grid;
    Rows x;
    std::vector<std::array<int, 3>> place;  // frame, row, column of every patch: merge blocks, then within a block
    for (int f = 0; f < frames; ++f) {
      for (int by = 0; by < h / 2; ++by) {
        for (int bx = 0; bx < w / 2; ++bx) {
          for (int y = 0; y < 2; ++y) {
            for (int c = 0; c < 2; ++c) place.push_back({f, 2 * by + y, 2 * bx + c});
          }
        }
      }
    }
    const size_t elements = v_.patch_elements();
    for (size_t p = 0; p < place.size(); ++p) {
      Row pixels(elements);
      for (size_t i = 0; i < elements; ++i) pixels[i] = (input.patches[p * elements + i] - 127.5) / 127.5;
      Row row = Apply("patch_embed.proj", pixels);
      const Row position = Position(place[p][1], place[p][2], h, w);
      for (size_t i = 0; i < row.size(); ++i) row[i] += position[i];
      x.push_back(row);
    }
    std::vector<Rows> features(1);
    for (int layer = 0; layer < v_.depth; ++layer) {
      Block(layer, place, x);
      for (size_t tap = 0; tap < v_.deepstack_layers.size(); ++tap) {
        if (v_.deepstack_layers[tap] == layer) features.push_back(Merge("deepstack_merger_list." + std::to_string(tap), x, true));
      }
    }
    features[0] = Merge("merger", x, false);
    return features;
  }

 private:
  Row Values(const std::string& name) const {
    const at::Tensor flat = tensors_.at("visual." + name).to(at::kDouble).flatten();
    return {flat.const_data_ptr<double>(), flat.const_data_ptr<double>() + flat.numel()};
  }
  Row Apply(const std::string& name, const Row& x) const {
    const Row weight = Values(name + ".weight");
    Row y = Values(name + ".bias");
    for (size_t o = 0; o < y.size(); ++o) {
      for (size_t i = 0; i < x.size(); ++i) y[o] += weight[o * x.size() + i] * x[i];
    }
    return y;
  }
  Row LayerNorm(const std::string& name, const Row& x) const {
    const Row weight = Values(name + ".weight"), bias = Values(name + ".bias");
    double mean = 0, variance = 0;
    for (double value : x) mean += value / x.size();
    for (double value : x) variance += (value - mean) * (value - mean) / x.size();
    Row y(x.size());
    for (size_t i = 0; i < x.size(); ++i) y[i] = (x[i] - mean) / std::sqrt(variance + 1e-6) * weight[i] + bias[i];
    return y;
  }
  // The table stretched so that its corners lie on the corners of the grid, bilinear.
  Row Position(int row, int column, int h, int w) const {
    const int side = 5;
    const Row table = Values("pos_embed.weight");
    const double y = h > 1 ? row * (side - 1.0) / (h - 1) : 0, x = w > 1 ? column * (side - 1.0) / (w - 1) : 0;
    Row out(v_.hidden, 0.0);
    for (int ty = 0; ty < side; ++ty) {
      for (int tx = 0; tx < side; ++tx) {
        const double weight = std::max(0.0, 1 - std::abs(y - ty)) * std::max(0.0, 1 - std::abs(x - tx));
        for (int i = 0; i < v_.hidden; ++i) out[i] += weight * table[(ty * side + tx) * v_.hidden + i];
      }
    }
    return out;
  }
  void Turn(double* head, int row, int column) const {
    const int d = v_.head_dim(), half = d / 2, quarter = d / 4;
    for (int i = 0; i < half; ++i) {
      const double angle = (i < quarter ? row : column) / std::pow(10000.0, 2.0 * (i % quarter) / half);
      const double a = head[i], b = head[i + half];
      head[i] = a * std::cos(angle) - b * std::sin(angle);
      head[i + half] = b * std::cos(angle) + a * std::sin(angle);
    }
  }
  void Block(int layer, const std::vector<std::array<int, 3>>& place, Rows& x) const {
    const std::string p = "blocks." + std::to_string(layer) + ".";
    const int d = v_.head_dim(), n = v_.hidden;
    Rows qkv;
    for (size_t i = 0; i < x.size(); ++i) {
      qkv.push_back(Apply(p + "attn.qkv", LayerNorm(p + "norm1", x[i])));
      for (int h = 0; h < 2 * v_.heads; ++h) Turn(&qkv[i][h * d], place[i][1], place[i][2]);  // q and k heads, not v
    }
    Rows attended(x.size(), Row(n, 0.0));
    for (size_t i = 0; i < x.size(); ++i) {
      for (int h = 0; h < v_.heads; ++h) {
        Row weight(x.size(), 0.0);
        double total = 0;
        for (size_t j = 0; j < x.size(); ++j) {
          if (place[i][0] != place[j][0]) continue;  // frames do not see each other
          double dot = 0;
          for (int c = 0; c < d; ++c) dot += qkv[i][h * d + c] * qkv[j][n + h * d + c];
          total += weight[j] = std::exp(dot / std::sqrt(d));
        }
        for (size_t j = 0; j < x.size(); ++j) {
          for (int c = 0; c < d; ++c) attended[i][h * d + c] += weight[j] / total * qkv[j][2 * n + h * d + c];
        }
      }
    }
    for (size_t i = 0; i < x.size(); ++i) {
      const Row projected = Apply(p + "attn.proj", attended[i]);
      for (int c = 0; c < n; ++c) x[i][c] += projected[c];
      Row inner = Apply(p + "mlp.linear_fc1", LayerNorm(p + "norm2", x[i]));
      for (double& value : inner) {
        value = 0.5 * value * (1 + std::tanh(std::sqrt(2 / M_PI) * (value + 0.044715 * value * value * value)));
      }
      const Row out = Apply(p + "mlp.linear_fc2", inner);
      for (int c = 0; c < n; ++c) x[i][c] += out[c];
    }
  }
  Rows Merge(const std::string& name, const Rows& x, bool join_first) const {
    Rows merged;
    for (size_t i = 0; i < x.size(); i += 4) {
      Row joined;
      for (size_t j = i; j < i + 4; ++j) {
        const Row part = join_first ? x[j] : LayerNorm(name + ".norm", x[j]);
        joined.insert(joined.end(), part.begin(), part.end());
      }
      if (join_first) joined = LayerNorm(name + ".norm", joined);
      Row inner = Apply(name + ".linear_fc1", joined);
      for (double& value : inner) value = 0.5 * value * (1 + std::erf(value / std::sqrt(2.0)));
      merged.push_back(Apply(name + ".linear_fc2", inner));
    }
    return merged;
  }

  const contract::VisionShape& v_;
  const weights::TensorMap& tensors_;
};

class VisionTowerTest : public ::testing::Test {
 protected:
  contract::ModelShape shape_ = TinyShape();
  weights::TensorMap weights_ = TinyWeights(*shape_.vision);
  VisionTower tower_ = VisionTower::Create(shape_, {.dtype = at::kFloat}, weights_).value();

  void ExpectLikePlainLoops(std::array<int32_t, 3> grid) {
    const step::VisionInput input = RandomInput(*shape_.vision, grid);
    const at::Tensor features = tower_.Encode(input).value();
    const std::vector<Rows> expected = SlowTower(*shape_.vision, weights_).Encode(input);
    ASSERT_EQ(features.sizes(), (std::vector<int64_t>{3, input.token_count(), 12}));
    for (size_t f = 0; f < expected.size(); ++f) {
      for (size_t t = 0; t < expected[f].size(); ++t) {
        for (size_t i = 0; i < expected[f][t].size(); ++i) {
          ASSERT_NEAR(features[f][t][i].item<double>(), expected[f][t][i], 1e-4) << f << " " << t << " " << i;
        }
      }
    }
  }
};

TEST_F(VisionTowerTest, AnImageSmallerThanThePositionTable) { ExpectLikePlainLoops({1, 4, 2}); }
TEST_F(VisionTowerTest, AnImageLargerThanThePositionTable) { ExpectLikePlainLoops({1, 8, 6}); }
TEST_F(VisionTowerTest, AVideoWhoseFramesDoNotSeeEachOther) { ExpectLikePlainLoops({3, 2, 4}); }

TEST_F(VisionTowerTest, CompanyChangesNoBit) {
  const Encoder encode = MakeEncoderFactory(shape_, {.dtype = at::kFloat})(weights_).value();
  std::vector<step::VisionInput> inputs;
  for (const std::array<int32_t, 3> grid : {std::array{1, 4, 2}, {3, 2, 4}, {1, 8, 6}}) inputs.push_back(RandomInput(*shape_.vision, grid));
  const std::vector<at::Tensor> together = encode(inputs).value();
  ASSERT_EQ(together.size(), inputs.size());
  for (size_t i = 0; i < inputs.size(); ++i) EXPECT_TRUE(at::equal(together[i], tower_.Encode(inputs[i]).value())) << i;
}

// Frames share a call, and each still gets what it would get as a picture.
TEST_F(VisionTowerTest, AFrameOfAVideoHasTheFeaturesOfAnImage) {
  const step::VisionInput video = RandomInput(*shape_.vision, {3, 4, 6});
  const at::Tensor features = tower_.Encode(video).value();
  const size_t frame_bytes = video.patches.size() / 3;
  for (int64_t frame = 0; frame < 3; ++frame) {
    step::VisionInput image{.id = 2, .grid = {1, 4, 6}, .patches = {}};
    image.patches.assign(video.patches.begin() + frame * static_cast<ptrdiff_t>(frame_bytes), video.patches.begin() + (frame + 1) * static_cast<ptrdiff_t>(frame_bytes));
    EXPECT_TRUE(at::allclose(features.narrow(1, frame * 6, 6), tower_.Encode(image).value(), 1e-4, 1e-4)) << frame;
  }
}

// A tower of another kind of device: what it takes it computes, on inputs that have been checked; what it does not the reference computes.
TEST_F(VisionTowerTest, AnotherTowerTakesThePlaceOfTheReferenceWhereItCan) {
  const std::vector<step::VisionInput> inputs = {RandomInput(*shape_.vision, {1, 4, 2})};
  int asked = 0;
  const TowerFactory fast = [&](const contract::ModelShape&, const VisionOptions&, const weights::TensorMap&) -> Result<Encoder> {
    return Encoder([&](std::span<const step::VisionInput> given) -> Result<std::vector<at::Tensor>> {
      ++asked;
      return std::vector<at::Tensor>(given.size(), at::ones({1}));
    });
  };
  const Encoder encode = MakeEncoderFactory(shape_, {.dtype = at::kFloat}, fast)(weights_).value();
  EXPECT_TRUE(at::equal(encode(inputs).value()[0], at::ones({1})));
  std::vector<step::VisionInput> wrong = {inputs[0], inputs[0]};
  wrong[1].grid = {1, 4, 6};
  EXPECT_EQ(encode(wrong).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(asked, 1);
  const TowerFactory unfit = [](const auto&, const auto&, const auto&) -> Result<Encoder> { return UnimplementedError("no kernels"); };
  const Encoder reference = MakeEncoderFactory(shape_, {.dtype = at::kFloat}, unfit)(weights_).value();
  EXPECT_TRUE(at::equal(reference(inputs).value()[0], tower_.Encode(inputs[0]).value()));
  const TowerFactory broken = [](const auto&, const auto&, const auto&) -> Result<Encoder> { return InternalError("broken"); };
  EXPECT_EQ(MakeEncoderFactory(shape_, {.dtype = at::kFloat}, broken)(weights_).status().code(), StatusCode::kInternal);
}

TEST_F(VisionTowerTest, NormalisationMapsBytesToMinusOneToOneExactly) {
  step::VisionInput input{.id = 1, .grid = {1, 2, 2}, .patches = std::vector<uint8_t>(4 * 96, 0)};
  input.patches[0] = 255;
  input.patches[1] = 128;
  const at::Tensor pixels = tower_.Normalise(input);
  EXPECT_EQ(pixels[0][0].item<float>(), 1.0f);
  EXPECT_EQ(pixels[0][1].item<float>(), 0.5f / 127.5f);
  EXPECT_EQ(pixels[0][2].item<float>(), -1.0f);
}

TEST_F(VisionTowerTest, MeanAndDeviationArePerChannel) {
  const VisionTower tower =
      VisionTower::Create(shape_, {.dtype = at::kFloat, .mean = {0.0, 0.5, 1.0}, .std = {1.0, 0.5, 0.25}}, weights_).value();
  const step::VisionInput input{.id = 1, .grid = {1, 2, 2}, .patches = std::vector<uint8_t>(4 * 96, 51)};  // 0.2
  const at::Tensor pixels = tower.Normalise(input);
  EXPECT_NEAR(pixels[2][0].item<float>(), 0.2, 1e-6);
  EXPECT_NEAR(pixels[2][32].item<float>(), -0.6, 1e-6);
  EXPECT_NEAR(pixels[2][64].item<float>(), -3.2, 1e-6);
}

TEST_F(VisionTowerTest, Bf16StaysCloseToFloat32) {
  weights::TensorMap cast;
  for (const auto& [slot, tensor] : weights_) cast[slot] = tensor.to(at::kBFloat16);
  const VisionTower tower = VisionTower::Create(shape_, {.dtype = at::kBFloat16}, cast).value();
  const step::VisionInput input = RandomInput(*shape_.vision, {2, 4, 4});
  const at::Tensor wide = tower_.Encode(input).value(), narrow = tower.Encode(input).value();
  EXPECT_EQ(narrow.scalar_type(), at::kBFloat16);
  EXPECT_LE((wide - narrow.to(at::kFloat)).abs().max().item<float>(), 0.1f * wide.abs().max().item<float>());
}

TEST_F(VisionTowerTest, GridsThatDoNotFitAreRefused) {
  step::VisionInput input = RandomInput(*shape_.vision, {1, 4, 4});
  input.grid = {1, 4, 6};
  EXPECT_EQ(tower_.Encode(input).status().code(), StatusCode::kInvalidArgument);
  input.grid = {1, 16, 1};  // as many patches, but a width that cannot be merged
  EXPECT_EQ(tower_.Encode(input).status().code(), StatusCode::kInvalidArgument);
  input.grid = {0, 4, 4};
  EXPECT_EQ(tower_.Encode(input).status().code(), StatusCode::kInvalidArgument);
}

TEST_F(VisionTowerTest, AnotherActivationIsRefused) {
  shape_.vision->hidden_act = "quick_gelu";
  EXPECT_EQ(VisionTower::Create(shape_, {}, weights_).status().code(), StatusCode::kUnimplemented);
}

}  // namespace
}  // namespace qwen::vision
