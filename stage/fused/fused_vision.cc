#include "stage/fused/fused_vision.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "stage/base/check.h"
#include "stage/fused/launch.h"
#include "stage/kernels/vision.h"

namespace qwen::fused {
namespace {

constexpr double kLayerNormEps = 1e-6;
constexpr double kRotaryTheta = 10000.0;

at::Tensor Pinned(at::IntArrayRef sizes, at::ScalarType type) { return at::empty(sizes, at::TensorOptions().dtype(type).pinned_memory(true)); }

// From a transposed weight: bias and product are one call, rounded once.
template <typename Affine>
at::Tensor Linear(const at::Tensor& x, const Affine& affine) {
  return at::addmm(affine.bias, x, affine.weight);
}

template <typename Affine>
at::Tensor Norm(const at::Tensor& x, const Affine& affine) {
  return at::layer_norm(x, {x.size(-1)}, affine.weight, affine.bias, kLayerNormEps);
}

}  // namespace

std::string FusedVision::Unfit(const contract::ModelShape& shape, const vision::VisionOptions& options) {
  if (std::string unfit = UnfitDevice(options.device, options.dtype); !unfit.empty()) return unfit;
  const contract::VisionShape& v = *shape.vision;
  if (v.hidden_act != "gelu_pytorch_tanh") return "vision_config.hidden_act";
  if (v.heads < 1 || v.hidden % v.heads != 0 || v.head_dim() % 8 != 0 || v.head_dim() > 256) return "vision_config.num_heads";
  if (v.hidden % 8 != 0) return "vision_config.hidden_size";
  return "";
}

Result<vision::Encoder> FusedVision::Create(const contract::ModelShape& shape, const vision::VisionOptions& options, const weights::TensorMap& tensors) {
  if (const std::string unfit = Unfit(shape, options); !unfit.empty()) return UnimplementedError("no kernels for this " + unfit);
  // Shared because std::function must be copyable; there is one tower.
  const std::shared_ptr<const FusedVision> tower(new FusedVision(shape, options, tensors));
  return vision::Encoder([tower](std::span<const step::VisionInput> inputs) -> Result<std::vector<at::Tensor>> { return tower->Encode(inputs); });
}

FusedVision::FusedVision(const contract::ModelShape& shape, const vision::VisionOptions& options, const weights::TensorMap& tensors)
    : shape_(*shape.vision), options_(options) {
  const auto find = [&](const std::string& slot) {
    const auto found = tensors.find("visual." + slot);
    QP_CHECK(found != tensors.end()) << slot;
    return found->second;
  };
  const auto norm = [&](const std::string& name) { return Affine{find(name + ".weight"), find(name + ".bias")}; };
  const auto product = [&](const std::string& name) { return Affine{find(name + ".weight").flatten(1).t(), find(name + ".bias")}; };
  const auto merger = [&](const std::string& name) {
    return Merger{norm(name + ".norm"), product(name + ".linear_fc1"), product(name + ".linear_fc2")};
  };
  patch_embed_ = product("patch_embed.proj");
  position_table_ = find("pos_embed.weight").contiguous();
  for (int32_t i = 0; i < shape_.depth; ++i) {
    const std::string block = "blocks." + std::to_string(i) + ".";
    blocks_.push_back({norm(block + "norm1"), norm(block + "norm2"), product(block + "attn.qkv"), product(block + "attn.proj"),
                       product(block + "mlp.linear_fc1"), product(block + "mlp.linear_fc2")});
  }
  merger_ = merger("merger");
  for (int32_t i = 0; i < shape.deepstack_count(); ++i) deepstack_mergers_.push_back(merger("deepstack_merger_list." + std::to_string(i)));

  const auto channels = [&](const std::array<double, 3>& values) {  // in float32, as the reference multiplies them
    const at::Tensor tensor = at::tensor(std::vector<double>(values.begin(), values.end()), at::kFloat);
    return (tensor * (1.0 / options_.rescale)).unsqueeze(1).to(options_.device);
  };
  mean_ = channels(options_.mean);
  deviation_ = channels(options_.std);
  const int64_t spatial = shape_.head_dim() / 2;
  const auto floats = at::TensorOptions().dtype(at::kFloat).device(options_.device);
  inverse_ = at::pow(at::Scalar(kRotaryTheta), at::arange(0, spatial, 2, floats) / static_cast<double>(spatial)).reciprocal();
}

// Through pinned memory: a copy from pageable memory would wait for all work on the stream.
FusedVision::Metadata FusedVision::Upload(std::span<const step::VisionInput> inputs, const Pass& pass) const {
  const int64_t elements = shape_.patch_elements();
  const at::Tensor bytes = Pinned({pass.patches, elements}, at::kByte);
  const at::Tensor numbers = Pinned({4 * pass.patches + pass.frames + 1}, at::kInt);  // places, then frame ends
  auto* pixel = bytes.mutable_data_ptr<uint8_t>();
  auto* place = reinterpret_cast<kernels::PatchPlace*>(numbers.mutable_data_ptr<int32_t>());
  int32_t* end = numbers.mutable_data_ptr<int32_t>() + 4 * pass.patches;
  *end = 0;
  for (const Piece& piece : pass.pieces) {
    const step::VisionInput& input = inputs[piece.input];
    const int32_t height = input.grid[1], width = input.grid[2], merge = shape_.merge;
    const int64_t count = int64_t{height} * width;
    const auto size = static_cast<size_t>(piece.frames * count * elements);
    std::memcpy(pixel, input.patches.data() + piece.frame * count * elements, size);
    pixel += size;
    for (int32_t frame = 0; frame < piece.frames; ++frame) {
      for (int32_t y = 0; y < height; y += merge) {
        for (int32_t x = 0; x < width; x += merge) {
          for (int32_t i = 0; i < merge * merge; ++i) *place++ = {y + i / merge, x + i % merge, height, width};
        }
      }
      end[1] = static_cast<int32_t>(end[0] + count);
      ++end;
    }
  }
  Metadata metadata;
  const at::Tensor device_numbers = numbers.to(options_.device, /*non_blocking=*/true);
  metadata.places = device_numbers.narrow(0, 0, 4 * pass.patches);
  metadata.frame_ends = device_numbers.narrow(0, 4 * pass.patches, pass.frames + 1);
  const at::Tensor wide = bytes.to(options_.device, /*non_blocking=*/true).to(at::kFloat);
  wide.view({pass.patches, shape_.in_channels, -1}).sub_(mean_).div_(deviation_);
  metadata.pixels = wide.to(at::kBFloat16);
  const at::Tensor angles = at::arange(pass.side_max, inverse_.options()).unsqueeze(1) * inverse_;
  metadata.cosines = angles.cos();
  metadata.sines = angles.sin();
  return metadata;
}

at::Tensor FusedVision::Attention(const Block& block, const at::Tensor& x, const Pass& pass, const Metadata& metadata) const {
  const int64_t heads = shape_.heads, dim = shape_.head_dim();
  const at::Tensor qkv = Linear(x, block.qkv);
  KERNEL(VisionRope({.places = static_cast<const kernels::PatchPlace*>(metadata.places.const_data_ptr()),
                     .cosines = metadata.cosines.const_data_ptr<float>(),
                     .sines = metadata.sines.const_data_ptr<float>(),
                     .qkv = Bf16(qkv),
                     .patches = pass.patches,
                     .heads = shape_.heads,
                     .head_dim = shape_.head_dim()},
                    c10::cuda::getCurrentCUDAStream()));
  const at::Tensor parts = qkv.view({pass.patches, 3 * heads, dim});
  if (pass.cudnn && !cudnn_refused_) {
    const auto by_frame = [&](int64_t first) {
      return parts.narrow(1, first, heads).view({pass.frames, pass.frame_patches_max, heads, dim}).transpose(1, 2);
    };
    at::Tensor out;
    try {
      out = std::get<0>(at::_scaled_dot_product_cudnn_attention(by_frame(0), by_frame(heads), by_frame(2 * heads), std::nullopt,
                                                                /*compute_log_sumexp=*/false, /*dropout_p=*/0.0, /*is_causal=*/false,
                                                                /*return_debug_mask=*/false, 1.0 / std::sqrt(static_cast<double>(dim))));
    } catch (const c10::Error&) {
      cudnn_refused_ = true;  // no cuDNN, or none that can: flash attention does it
    }
    if (out.defined()) return Linear(out.transpose(1, 2).reshape({pass.patches, shape_.hidden}), block.proj);
  }
  const at::Tensor attended = std::get<0>(at::_flash_attention_forward(parts.narrow(1, 0, heads), parts.narrow(1, heads, heads), parts.narrow(1, 2 * heads, heads),
                                                                       metadata.frame_ends, metadata.frame_ends, pass.frame_patches_max,
                                                                       pass.frame_patches_max, 0.0, /*is_causal=*/false, /*return_debug_mask=*/false,
                                                                       1.0 / std::sqrt(static_cast<double>(dim))));
  return Linear(attended.reshape({pass.patches, shape_.hidden}), block.proj);
}

bool FusedVision::TakesCudnn(const Pass& pass) const {
  if (!pass.equal_frames) return false;
  const std::pair<int64_t, int64_t> kind(pass.frames, pass.frame_patches_max);
  if (seen_.size() >= kCudnnKindsMax && !seen_.contains(kind)) return false;
  int& count = seen_[kind];
  if (count > kCudnnAfter) return true;
  if (count == kCudnnAfter && cudnn_plans_ >= kCudnnPlansMax) return false;
  if (++count <= kCudnnAfter) return false;
  ++cudnn_plans_;
  return true;
}

void FusedVision::Merge(const Merger& merger, const at::Tensor& normed, at::Tensor out) const {
  at::Tensor inner = Linear(normed, merger.fc1);
  at::addmm_out(out, merger.fc2.bias, at::gelu_(inner), merger.fc2.weight);
}

at::Tensor FusedVision::Run(std::span<const step::VisionInput> inputs, const Pass& pass) const {
  const int64_t joined = int64_t{shape_.merge} * shape_.merge, merged = joined * shape_.hidden;
  Metadata metadata = Upload(inputs, pass);
  at::Tensor hidden = Linear(metadata.pixels, patch_embed_);
  metadata.pixels.reset();
  KERNEL(VisionPosition({.places = static_cast<const kernels::PatchPlace*>(metadata.places.const_data_ptr()),
                         .table = Bf16(position_table_),
                         .hidden = Bf16(hidden),
                         .patches = pass.patches,
                         .side = static_cast<int>(std::lround(std::sqrt(static_cast<double>(shape_.position_table)))),
                         .width = shape_.hidden},
                        c10::cuda::getCurrentCUDAStream()));
  const at::Tensor features = at::empty({1 + static_cast<int64_t>(deepstack_mergers_.size()), pass.patches / joined, shape_.out_hidden}, hidden.options());
  size_t taps = 0;
  for (int32_t i = 0; i < shape_.depth; ++i) {
    const Block& block = blocks_[static_cast<size_t>(i)];
    hidden.add_(Attention(block, Norm(hidden, block.norm1), pass, metadata));
    // GELU stays a kernel of its own: in cuBLAS' epilogue it would see the product before its rounding.
    at::Tensor inner = Linear(Norm(hidden, block.norm2), block.fc1);
    hidden.add_(Linear(at::gelu_(inner, "tanh"), block.fc2));
    if (taps < deepstack_mergers_.size() && shape_.deepstack_layers[taps] == i) {
      const Merger& merger = deepstack_mergers_[taps++];
      Merge(merger, Norm(hidden.view({-1, merged}), merger.norm), features[static_cast<int64_t>(taps)]);
    }
  }
  Merge(merger_, Norm(hidden, merger_.norm).view({-1, merged}), features[0]);
  return features;
}

// Frames in order into passes; an input's features are put together when its frames fell into several.
std::vector<at::Tensor> FusedVision::Encode(std::span<const step::VisionInput> inputs) const {
  const int64_t joined = int64_t{shape_.merge} * shape_.merge;
  std::vector<at::Tensor> features(inputs.size());
  Pass pass;
  const auto run = [&] {
    pass.cudnn = TakesCudnn(pass);
    const at::Tensor all = Run(inputs, pass);
    int64_t row = 0;
    for (const Piece& piece : pass.pieces) {
      const auto& grid = inputs[piece.input].grid;
      const int64_t frame_tokens = int64_t{grid[1]} * grid[2] / joined;
      const at::Tensor part = all.narrow(1, row, piece.frames * frame_tokens);
      row += part.size(1);
      at::Tensor& out = features[piece.input];
      if (piece.frames == grid[0]) {
        out = part.contiguous();  // its own memory, unless it was alone in the pass
      } else {
        if (!out.defined()) out = at::empty({all.size(0), grid[0] * frame_tokens, all.size(2)}, all.options());
        out.narrow(1, piece.frame * frame_tokens, part.size(1)).copy_(part);
      }
    }
    pass = {};
  };
  for (size_t i = 0; i < inputs.size(); ++i) {
    const auto [frames, height, width] = inputs[i].grid;
    const int64_t count = int64_t{height} * width;
    for (int32_t frame = 0; frame < frames; ++frame) {
      if (pass.patches > 0 && pass.patches + count > options_.pass_patches_max) run();
      if (pass.pieces.empty() || pass.pieces.back().input != i) pass.pieces.push_back({.input = i, .frame = frame});
      ++pass.pieces.back().frames;
      ++pass.frames;
      pass.patches += count;
      pass.equal_frames &= pass.frame_patches_max == 0 || pass.frame_patches_max == count;
      pass.frame_patches_max = std::max(pass.frame_patches_max, count);
      pass.side_max = std::max({pass.side_max, height, width});
    }
  }
  if (pass.patches > 0) run();
  return features;
}

}  // namespace qwen::fused

// What the stage finds after opening the library.
extern "C" __attribute__((visibility("default"))) const qwen::vision::TowerFactory* qwen_fused_vision() {
  static const qwen::vision::TowerFactory factory = qwen::fused::FusedVision::Create;
  return &factory;
}
