// stage/vision/vision_tower.h — the vision transformer of Qwen3-VL: uint8 patches of one image or video in, merged features
// and DeepStack taps out. Same arithmetic for all released sizes.
//
// patch_embed -> + interpolated position table -> blocks (pre-norm, 2-D rotary, attention within a frame) -> merger;
// the taps leave after the blocks of deepstack_layers, each through a merger of its own.
// Source: transformers 5.17.0 Qwen3VLMoeVisionModel, vision_utils.py; roundings in docs/numerics.md.
// This is the reference, on any device; on a GPU in bfloat16 stage/fused/fused_vision.h takes its place (TowerFactory).
// Thread safety: Encode only reads; one thread at a time is all that is needed.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <functional>
#include <span>
#include <vector>

#include "stage/base/status.h"
#include "stage/contract/model_shape.h"
#include "stage/step/step_plan.h"
#include "stage/weights/loader.h"

namespace qwen::vision {

struct VisionOptions {
  at::Device device = at::kCPU;
  at::ScalarType dtype = at::kBFloat16;
  // Normalisation of preprocessor_config.json. Computed as (x - mean/rescale) / (std/rescale) in float32, as the
  // reference's fast processors do; with 0.5, 0.5, 1/255 that is (x - 127.5) / 127.5.
  std::array<double, 3> mean = {0.5, 0.5, 0.5};
  std::array<double, 3> std = {0.5, 0.5, 0.5};
  double rescale = 1.0 / 255.0;
  // Patches that a tower which takes several inputs together computes in one pass; beyond it frames go into the next one. Products
  // are at their best long before, and a pass takes about 40 KB a patch at D = 1152: 0.7 GB. A single frame may be larger.
  int64_t pass_patches_max = 16384;
};

class VisionTower {
 public:
  // Takes the slots "visual.*" (weights/weight_map.h). REQUIRES: shape.vision, and the slots are all there.
  // kUnimplemented for a vision activation other than gelu_pytorch_tanh.
  static Result<VisionTower> Create(const contract::ModelShape& shape, const VisionOptions& options,
                                    const weights::TensorMap& tensors);

  // (1 + taps, t*h*w/merge^2, out_hidden) in the options' dtype: [0] the merged features, [1 + i] DeepStack tap i.
  // kInvalidArgument when grid and patches do not fit each other. May throw c10::Error.
  Result<at::Tensor> Encode(const step::VisionInput& input) const;

  // float32 (patches, channels * temporal_patch * patch * patch), as the reference's processor gives pixel_values.
  at::Tensor Normalise(const step::VisionInput& input) const;

 private:
  struct Affine {
    at::Tensor weight, bias;
  };
  struct Block {
    Affine norm1, norm2, qkv, proj, fc1, fc2;
  };
  struct Merger {
    Affine norm, fc1, fc2;
  };
  struct Rotary {
    at::Tensor cos, sin;  // (patches, 1, head_dim) float32
  };

  VisionTower(const contract::VisionShape& shape, const VisionOptions& options) : shape_(shape), options_(options) {}
  at::Tensor PatchEmbed(const at::Tensor& pixels) const;
  at::Tensor PositionEmbedding(const std::array<int32_t, 3>& grid) const;
  Rotary RotaryOf(const std::array<int32_t, 3>& grid) const;
  at::Tensor Attention(const Block& block, const at::Tensor& x, const Rotary& rotary, int64_t frames) const;

  contract::VisionShape shape_;
  VisionOptions options_;
  Affine patch_embed_;        // weight (D, channels, temporal_patch, patch, patch)
  at::Tensor position_table_; // (position_table, D)
  std::vector<Block> blocks_;
  Merger merger_;
  std::vector<Merger> deepstack_mergers_;
};

// kInvalidArgument when the grid cannot be merged, or does not fit the number of bytes.
Status CheckInput(const step::VisionInput& input, const contract::VisionShape& shape);

// The features of several images and videos, one tensor each, as VisionTower::Encode gives them. The reference takes them one after
// the other, so that company changes no bit; another tower may take them together. May throw c10::Error.
using Encoder = std::function<Result<std::vector<at::Tensor>>(std::span<const step::VisionInput> inputs)>;
using EncoderFactory = std::function<Result<Encoder>(const weights::TensorMap& tensors)>;

// A tower for one kind of device (stage/fused has one). kUnimplemented when it has no kernels for the shape or the options.
// Its encoder may rely on inputs that have passed CheckInput.
using TowerFactory = std::function<Result<Encoder>(const contract::ModelShape& shape, const VisionOptions& options, const weights::TensorMap& tensors)>;

// For model::StageModelOptions::vision: makes a tower out of the stage's tensors; `fast` where that takes the model, the reference
// otherwise (or when it is empty).
EncoderFactory MakeEncoderFactory(const contract::ModelShape& shape, const VisionOptions& options, const TowerFactory& fast = {});

}  // namespace qwen::vision
