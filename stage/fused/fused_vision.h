// stage/fused/fused_vision.h — the vision tower on a GPU in bfloat16: many images and videos in one pass. Patches of all frames lie one
// after the other, LibTorch's products and layer norms run over all of them at once, attention within each frame is flash attention
// with cumulative lengths (it takes head_dim 72 as it is), or cuDNN's for a pass of equal frames that recurs, and position table and rotation are kernels of stage/kernels/vision.h.
//
// Numerics: the roundings of stage/vision, the reference (docs/numerics.md, section 2); sums run in another order, and probabilities are
// rounded to bf16 before they meet v, as flash attention does. What an input gives depends on its company in the last bit only.
// What it takes: sm_90, bf16, head_dim % 8 == 0. Everything else is kUnimplemented and runs on the reference.
// Thread safety: none; one thread, on its current stream. Enqueues only: the caller's next work on the stream sees the features.
// Memory: the weights, and cuDNN's plans for kCudnnPlansMax kinds of pass; a pass takes about 40 KB a patch at D = 1152 (options.pass_patches_max bounds a pass, unless a single
// frame is larger).
#pragma once
#include <ATen/core/Tensor.h>

#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "stage/contract/model_shape.h"
#include "stage/step/step_plan.h"
#include "stage/vision/vision_tower.h"

namespace qwen::fused {

class FusedVision {
 public:
  // As vision::TowerFactory says. Takes the slots "visual.*"; REQUIRES: they are all there.
  static Result<vision::Encoder> Create(const contract::ModelShape& shape, const vision::VisionOptions& options, const weights::TensorMap& tensors);
  // The first thing that no kernel is made for; empty when all fits.
  static std::string Unfit(const contract::ModelShape& shape, const vision::VisionOptions& options);

  // One tensor for each input, as VisionTower::Encode gives it. REQUIRES: each has passed vision::CheckInput. May throw c10::Error.
  std::vector<at::Tensor> Encode(std::span<const step::VisionInput> inputs) const;

 private:
  struct Affine {
    at::Tensor weight, bias;  // of products: weight transposed, (in, out)
  };
  struct Block {
    Affine norm1, norm2, qkv, proj, fc1, fc2;
  };
  struct Merger {
    Affine norm, fc1, fc2;
  };
  struct Piece {  // frames [frame, frame + frames) of an input
    size_t input = 0;
    int32_t frame = 0, frames = 0;
  };
  struct Pass {
    std::vector<Piece> pieces;
    int64_t patches = 0, frames = 0, frame_patches_max = 0;
    int32_t side_max = 0;
    bool equal_frames = true;
    bool cudnn = false;
  };
  struct Metadata {
    at::Tensor pixels;         // (patches, patch elements) bf16, normalised
    at::Tensor places;         // (patches, 4) int32: kernels::PatchPlace
    at::Tensor frame_ends;     // (frames + 1) int32, from 0
    at::Tensor cosines, sines; // (side_max, head_dim / 4) float32
  };

  // cuDNN's attention takes 0.55 (1 frame of 4,096 patches, H200: 218 us against 395) to 0.7 (16 of 784: 200 against 286) of flash
  // attention's time, but makes a plan for each number and size of frames, some 60 ms: so only for what has come so often. LibTorch keeps
  // its plans for ever, hence the bound.
  static constexpr int kCudnnAfter = 8;
  static constexpr size_t kCudnnPlansMax = 64, kCudnnKindsMax = 4096;
  bool TakesCudnn(const Pass& pass) const;

  FusedVision(const contract::ModelShape& shape, const vision::VisionOptions& options, const weights::TensorMap& tensors);
  Metadata Upload(std::span<const step::VisionInput> inputs, const Pass& pass) const;
  at::Tensor Attention(const Block& block, const at::Tensor& x, const Pass& pass, const Metadata& metadata) const;
  void Merge(const Merger& merger, const at::Tensor& normed, at::Tensor out) const;
  at::Tensor Run(std::span<const step::VisionInput> inputs, const Pass& pass) const;  // (1 + taps, tokens, out_hidden)

  const contract::VisionShape shape_;
  const vision::VisionOptions options_;
  at::Tensor mean_, deviation_;  // (channels, 1) float32, of bytes
  at::Tensor inverse_;           // (head_dim / 4) float32
  Affine patch_embed_;
  at::Tensor position_table_;
  std::vector<Block> blocks_;
  Merger merger_;
  std::vector<Merger> deepstack_mergers_;
  mutable std::map<std::pair<int64_t, int64_t>, int> seen_;  // passes of equal frames, by (frames, patches of one)
  mutable size_t cudnn_plans_ = 0;
  mutable bool cudnn_refused_ = false;
};

}  // namespace qwen::fused
