#include "stage/vision/vision_tower.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <cmath>
#include <memory>

#include "stage/base/check.h"
#include "stage/ops/linear.h"

namespace qwen::vision {
namespace {

constexpr double kLayerNormEps = 1e-6;     // not in the config: fixed in the reference
constexpr double kRotaryTheta = 10000.0;   // vision_config.rope_parameters has no other value in any released model

at::Tensor Linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  return ops::Linear(x, weight, bias, {{0, x.size(0)}});
}

// Row and column of every patch of one frame, in merge-block order: (h*w) int64 each.
struct PatchCoordinates {
  at::Tensor row, column;
};
PatchCoordinates Coordinates(int64_t h, int64_t w, int64_t merge, at::Device device) {
  const auto options = at::TensorOptions().dtype(at::kLong).device(device);
  const auto in_blocks = [&](const at::Tensor& raster) {  // (h, w) -> (h/m, w/m, m, m) flattened
    return raster.reshape({h / merge, merge, w / merge, merge}).transpose(1, 2).flatten();
  };
  return {in_blocks(at::arange(h, options).unsqueeze(1).expand({h, w})),
          in_blocks(at::arange(w, options).unsqueeze(0).expand({h, w}))};
}

// Two taps and their weights on an axis of `size` targets over a table of `side` entries, endpoints on endpoints
// (align_corners): source = index * (side - 1) / max(size - 1, 1), in float32 in this order.
struct Taps {
  at::Tensor index;   // (n, 2) int64, clamped into the table
  at::Tensor weight;  // (n, 2) float32
};
Taps AxisTaps(const at::Tensor& index, int64_t size, int64_t side) {
  const at::Tensor source = index.to(at::kFloat) * (side - 1) / static_cast<double>(std::max<int64_t>(size - 1, 1));
  const at::Tensor floor = at::floor(source);
  const at::Tensor offsets = at::arange(0, 2, index.options());
  const at::Tensor distance = (source.unsqueeze(1) - floor.unsqueeze(1) - offsets).abs();
  return {(floor.to(at::kLong).unsqueeze(1) + offsets).clamp(0, side - 1), (1 - distance).clamp_min(0)};
}

at::Tensor RotateHalf(const at::Tensor& x) {
  const int64_t half = x.size(-1) / 2;
  return at::cat({x.narrow(-1, half, half).neg(), x.narrow(-1, 0, half)}, -1);
}

}  // namespace

Status CheckInput(const step::VisionInput& input, const contract::VisionShape& shape) {
  const auto [t, h, w] = input.grid;
  if (t <= 0 || h <= 0 || w <= 0 || h % shape.merge != 0 || w % shape.merge != 0) {
    return InvalidArgumentError("vision.grid: (" + std::to_string(t) + ", " + std::to_string(h) + ", " + std::to_string(w) + ")");
  }
  const int64_t expected = input.patch_count() * shape.patch_elements();
  if (static_cast<int64_t>(input.patches.size()) != expected) {
    return InvalidArgumentError("vision.patches: " + std::to_string(input.patches.size()) + " bytes, expected " + std::to_string(expected));
  }
  return OkStatus();
}

Result<VisionTower> VisionTower::Create(const contract::ModelShape& shape, const VisionOptions& options,
                                        const weights::TensorMap& tensors) {
  QP_CHECK(shape.vision.has_value());
  if (shape.vision->hidden_act != "gelu_pytorch_tanh") {
    return UnimplementedError("vision_config.hidden_act: " + shape.vision->hidden_act);
  }
  VisionTower tower(*shape.vision, options);
  const auto find = [&](const std::string& slot) {
    const auto found = tensors.find("visual." + slot);
    QP_CHECK(found != tensors.end()) << slot;
    return found->second;
  };
  const auto affine = [&](const std::string& name) { return Affine{find(name + ".weight"), find(name + ".bias")}; };
  const auto merger = [&](const std::string& name) {
    return Merger{affine(name + ".norm"), affine(name + ".linear_fc1"), affine(name + ".linear_fc2")};
  };
  tower.patch_embed_ = affine("patch_embed.proj");
  tower.position_table_ = find("pos_embed.weight");
  for (int32_t i = 0; i < shape.vision->depth; ++i) {
    const std::string block = "blocks." + std::to_string(i) + ".";
    tower.blocks_.push_back({affine(block + "norm1"), affine(block + "norm2"), affine(block + "attn.qkv"),
                             affine(block + "attn.proj"), affine(block + "mlp.linear_fc1"), affine(block + "mlp.linear_fc2")});
  }
  tower.merger_ = merger("merger");
  for (int32_t i = 0; i < shape.deepstack_count(); ++i) {
    tower.deepstack_mergers_.push_back(merger("deepstack_merger_list." + std::to_string(i)));
  }
  return tower;
}

at::Tensor VisionTower::Normalise(const step::VisionInput& input) const {
  const int64_t patches = input.patch_count();
  // from_blob does not own the bytes; the conversion to float32 copies them.
  const at::Tensor bytes = at::from_blob(const_cast<uint8_t*>(input.patches.data()),
                                         {patches, shape_.in_channels, shape_.patch_elements() / shape_.in_channels},
                                         at::TensorOptions().dtype(at::kByte));
  const auto channels = [&](const std::array<double, 3>& values) {  // (3, 1) float32, multiplied by 1/rescale in float32
    at::Tensor tensor = at::tensor(std::vector<double>(values.begin(), values.end()), at::kFloat);
    return (tensor * (1.0 / options_.rescale)).unsqueeze(1).to(options_.device);
  };
  at::Tensor pixels = bytes.to(options_.device).to(at::kFloat);
  return pixels.sub_(channels(options_.mean)).div_(channels(options_.std)).view({patches, shape_.patch_elements()});
}

at::Tensor VisionTower::PatchEmbed(const at::Tensor& pixels) const {
  const int64_t patch = shape_.patch, frames = shape_.temporal_patch;
  const at::Tensor volumes = pixels.to(options_.dtype).view({-1, shape_.in_channels, frames, patch, patch});
  return at::conv3d(volumes, patch_embed_.weight, patch_embed_.bias, {frames, patch, patch}).view({-1, shape_.hidden});
}

// The learned square table, resampled bilinearly to the grid: weights and sum in float32, then one rounding.
at::Tensor VisionTower::PositionEmbedding(const std::array<int32_t, 3>& grid) const {
  const int64_t side = static_cast<int64_t>(std::lround(std::sqrt(static_cast<double>(shape_.position_table))));
  const PatchCoordinates at_patch = Coordinates(grid[1], grid[2], shape_.merge, options_.device);
  const Taps rows = AxisTaps(at_patch.row, grid[1], side);
  const Taps columns = AxisTaps(at_patch.column, grid[2], side);
  const at::Tensor index = (rows.index.unsqueeze(2) * side + columns.index.unsqueeze(1)).flatten(1);       // (h*w, 4)
  const at::Tensor weight = (rows.weight.unsqueeze(2) * columns.weight.unsqueeze(1)).flatten(1);           // (h*w, 4)
  const at::Tensor taps = position_table_.index_select(0, index.flatten()).view({index.size(0), 4, shape_.hidden});
  return (taps * weight.unsqueeze(2)).sum(1).to(options_.dtype).repeat({grid[0], 1});
}

// Half of the rotated pairs follow the row, half the column.
VisionTower::Rotary VisionTower::RotaryOf(const std::array<int32_t, 3>& grid) const {
  const int64_t spatial = shape_.head_dim() / 2;
  const auto options = at::TensorOptions().dtype(at::kFloat).device(options_.device);
  const at::Tensor inverse =
      at::pow(at::Scalar(kRotaryTheta), at::arange(0, spatial, 2, options) / static_cast<double>(spatial)).reciprocal();
  const PatchCoordinates at_patch = Coordinates(grid[1], grid[2], shape_.merge, options_.device);
  const at::Tensor angles = at::cat({at_patch.row.to(at::kFloat).unsqueeze(1) * inverse,
                                     at_patch.column.to(at::kFloat).unsqueeze(1) * inverse}, -1)
                                .repeat({grid[0], 1});  // (patches, head_dim/2)
  const auto whole = [](const at::Tensor& half) { return at::cat({half, half}, -1).unsqueeze(1); };
  return {whole(angles.cos()), whole(angles.sin())};
}

at::Tensor VisionTower::Attention(const Block& block, const at::Tensor& x, const Rotary& rotary, int64_t frames) const {
  const int64_t patches = x.size(0), heads = shape_.heads, head_dim = shape_.head_dim();
  const at::Tensor qkv = Linear(x, block.qkv.weight, block.qkv.bias).view({patches, 3, heads, head_dim});
  const auto rotate = [&](const at::Tensor& part) {  // in float32, rounded once at the end
    const at::Tensor wide = part.to(at::kFloat);
    return (wide * rotary.cos + RotateHalf(wide) * rotary.sin).to(options_.dtype);
  };
  const auto by_frame = [&](const at::Tensor& part) { return part.reshape({frames, patches / frames, heads, head_dim}).transpose(1, 2); };
  const at::Tensor q = by_frame(rotate(qkv.select(1, 0))), k = by_frame(rotate(qkv.select(1, 1))), v = by_frame(qkv.select(1, 2));
  const double scale = 1.0 / std::sqrt(static_cast<double>(head_dim));
  const at::Tensor attended = at::scaled_dot_product_attention(q, k, v, std::nullopt, 0.0, /*is_causal=*/false, scale)  // (frames, heads, n, d)
                                  .transpose(1, 2)
                                  .reshape({patches, shape_.hidden});
  return Linear(attended, block.proj.weight, block.proj.bias);
}

Result<at::Tensor> VisionTower::Encode(const step::VisionInput& input) const {
  RETURN_IF_ERROR(CheckInput(input, shape_));
  const auto norm = [](const at::Tensor& x, const Affine& affine) {
    return at::layer_norm(x, {x.size(-1)}, affine.weight, affine.bias, kLayerNormEps);
  };
  const int64_t merged = int64_t{shape_.hidden} * shape_.merge * shape_.merge;
  // The tower's own merger normalises patches and then joins 4 of them; the DeepStack ones join first.
  const auto merge = [&](const Merger& merger, const at::Tensor& normalised) {
    return Linear(at::gelu(Linear(normalised, merger.fc1.weight, merger.fc1.bias)), merger.fc2.weight, merger.fc2.bias);
  };

  at::Tensor hidden = PatchEmbed(Normalise(input));
  hidden = hidden + PositionEmbedding(input.grid);
  const Rotary rotary = RotaryOf(input.grid);
  std::vector<at::Tensor> features(1);
  for (int32_t i = 0; i < shape_.depth; ++i) {
    const Block& block = blocks_[i];
    hidden = hidden + Attention(block, norm(hidden, block.norm1), rotary, input.grid[0]);
    const at::Tensor inner = at::gelu(Linear(norm(hidden, block.norm2), block.fc1.weight, block.fc1.bias), "tanh");
    hidden = hidden + Linear(inner, block.fc2.weight, block.fc2.bias);
    if (features.size() <= deepstack_mergers_.size() && shape_.deepstack_layers[features.size() - 1] == i) {
      const Merger& merger = deepstack_mergers_[features.size() - 1];
      features.push_back(merge(merger, norm(hidden.view({-1, merged}), merger.norm)));
    }
  }
  features[0] = merge(merger_, norm(hidden, merger_.norm).view({-1, merged}));
  return at::stack(features);
}

EncoderFactory MakeEncoderFactory(const contract::ModelShape& shape, const VisionOptions& options, const TowerFactory& fast) {
  return [shape, options, fast](const weights::TensorMap& tensors) -> Result<Encoder> {
    c10::InferenceMode inference;
    if (fast) {
      Result<Encoder> tower = fast(shape, options, tensors);
      if (tower.ok()) {
        return Encoder([shape, encode = std::move(tower).value()](std::span<const step::VisionInput> inputs) -> Result<std::vector<at::Tensor>> {
          for (const step::VisionInput& input : inputs) RETURN_IF_ERROR(CheckInput(input, *shape.vision));
          return encode(inputs);
        });
      }
      if (tower.status().code() != StatusCode::kUnimplemented) return tower.status();
    }
    ASSIGN_OR_RETURN(VisionTower tower, VisionTower::Create(shape, options, tensors));
    // Shared because std::function must be copyable; there is one tower.
    auto shared = std::make_shared<const VisionTower>(std::move(tower));
    return Encoder([shared](std::span<const step::VisionInput> inputs) -> Result<std::vector<at::Tensor>> {
      std::vector<at::Tensor> features;
      for (const step::VisionInput& input : inputs) {
        ASSIGN_OR_RETURN(features.emplace_back(), shared->Encode(input));
      }
      return features;
    });
  };
}

}  // namespace qwen::vision
