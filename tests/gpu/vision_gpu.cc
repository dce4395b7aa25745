#include "tests/gpu/vision_gpu.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "stage/base/check.h"
#include "stage/contract/model_shape.h"
#include "stage/vision/vision_tower.h"

extern "C" const qwen::vision::TowerFactory* qwen_fused_vision();

namespace qwen {
namespace {

using Features = std::vector<at::Tensor>;
const at::Device kGpu(at::kCUDA, 0);

void Row(const std::string& name, const char* unit, double value) {
  std::printf("{\"suite\":\"vision\",\"case\":\"%s\",\"unit\":\"%s\",\"ours\":%.6g}\n", name.c_str(), unit, value);
  std::fflush(stdout);
}

contract::ModelShape Shape() {
  auto shape = contract::NamedModelShape("Qwen3-VL-30B-A3B");
  QP_CHECK(shape.ok() && shape->vision) << shape.status().ToString();
  return *shape;
}

// bf16 on the GPU. Attention gets logits of several units, so that it is no mere average.
weights::TensorMap Weights(const contract::ModelShape& shape) {
  const contract::VisionShape& v = *shape.vision;
  at::manual_seed(11);
  const auto floats = at::TensorOptions().dtype(at::kFloat).device(kGpu);
  weights::TensorMap tensors;
  const auto affine = [&](const std::string& name, std::vector<int64_t> sizes, double gain = 1.0) {
    at::Tensor weight = at::randn(sizes, floats);
    if (sizes.size() == 1) {
      weight = 1 + weight * 0.1;
    } else {
      weight *= gain / std::sqrt(static_cast<double>(weight.numel() / sizes[0]));
    }
    tensors["visual." + name + ".weight"] = weight.to(at::kBFloat16);
    tensors["visual." + name + ".bias"] = (at::randn({sizes[0]}, floats) * 0.1).to(at::kBFloat16);
  };
  affine("patch_embed.proj", {v.hidden, v.in_channels, v.temporal_patch, v.patch, v.patch});
  tensors["visual.pos_embed.weight"] = at::randn({v.position_table, v.hidden}, floats).to(at::kBFloat16);
  for (int32_t i = 0; i < v.depth; ++i) {
    const std::string p = "blocks." + std::to_string(i) + ".";
    affine(p + "norm1", {v.hidden});
    affine(p + "norm2", {v.hidden});
    affine(p + "attn.qkv", {3 * v.hidden, v.hidden}, 1.7);
    affine(p + "attn.proj", {v.hidden, v.hidden});
    affine(p + "mlp.linear_fc1", {v.intermediate, v.hidden});
    affine(p + "mlp.linear_fc2", {v.hidden, v.intermediate});
  }
  const int64_t merged = int64_t{v.merge} * v.merge * v.hidden;
  const auto merger = [&](const std::string& name, int64_t norm) {
    affine(name + ".norm", {norm});
    affine(name + ".linear_fc1", {merged, merged});
    affine(name + ".linear_fc2", {v.out_hidden, merged});
  };
  merger("merger", v.hidden);
  for (int32_t i = 0; i < shape.deepstack_count(); ++i) merger("deepstack_merger_list." + std::to_string(i), merged);
  return tensors;
}

weights::TensorMap Cast(const weights::TensorMap& tensors, at::Device device, at::ScalarType dtype) {
  weights::TensorMap cast;
  for (const auto& [slot, tensor] : tensors) cast[slot] = tensor.to(device, dtype);
  return cast;
}

std::vector<step::VisionInput> Inputs(const contract::ModelShape& shape, const std::vector<std::array<int32_t, 3>>& grids) {
  std::mt19937 random(5);
  std::vector<step::VisionInput> inputs;
  for (const auto& grid : grids) {
    step::VisionInput input{.id = inputs.size(), .grid = grid, .patches = {}};
    input.patches.resize(static_cast<size_t>(input.patch_count() * shape.vision->patch_elements()));
    for (uint8_t& byte : input.patches) byte = static_cast<uint8_t>(random());
    inputs.push_back(std::move(input));
  }
  return inputs;
}

vision::Encoder Reference(const contract::ModelShape& shape, const weights::TensorMap& tensors, at::Device device, at::ScalarType dtype) {
  auto encoder = vision::MakeEncoderFactory(shape, {.device = device, .dtype = dtype})(tensors);
  QP_CHECK(encoder.ok()) << encoder.status().ToString();
  return *encoder;
}
vision::Encoder Fused(const contract::ModelShape& shape, const weights::TensorMap& tensors, int64_t pass_patches_max) {
  auto encoder = (*qwen_fused_vision())(shape, {.device = kGpu, .dtype = at::kBFloat16, .pass_patches_max = pass_patches_max}, tensors);
  QP_CHECK(encoder.ok()) << encoder.status().ToString();
  return *encoder;
}

Features Encode(const vision::Encoder& encoder, std::span<const step::VisionInput> inputs) {
  auto features = encoder(inputs);
  QP_CHECK(features.ok()) << features.status().ToString();
  return *features;
}

double Relative(const at::Tensor& got, const at::Tensor& want) {
  const at::Tensor g = got.to(at::kCPU, at::kFloat), w = want.to(at::kCPU, at::kFloat);
  return ((g - w).norm() / w.norm()).item<double>();
}

// Medians over rounds, after twelve that warm up (what recurs takes cuDNN's attention from the ninth on).
struct Times {
  double total_ms = 0;  // pixels in the host's memory to features on the GPU
  double host_ms = 0;   // until the call returns
};
Times Time(const std::function<void()>& call) {
  std::vector<double> total, host;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  for (int round = 0; round < 22; ++round) {
    stream.synchronize();
    const auto start = std::chrono::steady_clock::now();
    const auto since = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() * 1e3; };
    call();
    const double returned = since();
    stream.synchronize();
    if (round < 12) continue;
    host.push_back(returned);
    total.push_back(since());
  }
  std::sort(total.begin(), total.end());
  std::sort(host.begin(), host.end());
  return {total[total.size() / 2], host[host.size() / 2]};
}

// Where the time goes, and what another choice of library call would take: µs a block.
void BenchParts(const contract::VisionShape& v, int64_t frames, int64_t frame_patches) {
  const int64_t patches = frames * frame_patches, heads = v.heads, dim = v.head_dim();
  const auto bf16 = at::TensorOptions().dtype(at::kBFloat16).device(kGpu);
  const std::string name = ".parts." + std::to_string(frames) + "x" + std::to_string(frame_patches);
  constexpr int kCalls = 10;
  const auto row = [&](const std::string& part, const std::function<void()>& call) {
    try {
      const auto start = std::chrono::steady_clock::now();
      call();
      c10::cuda::getCurrentCUDAStream().synchronize();
      const double first = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      if (part.starts_with("attention")) Row("vision" + name + "." + part + ".first", "ms", first * 1e3);  // a library's plan for these sizes
      Row("vision" + name + "." + part, "us", Time([&] { for (int i = 0; i < kCalls; ++i) call(); }).total_ms * 1e3 / kCalls);
    } catch (const c10::Error& error) {
      std::fprintf(stderr, "vision%s.%s: %s\n", name.c_str(), part.c_str(), error.what_without_backtrace());
    }
  };
  const at::Tensor qkv = at::randn({patches, 3 * heads, dim}, bf16);
  const at::Tensor ends = at::arange(0, patches + 1, frame_patches, bf16.dtype(at::kInt));
  const double scale = 1.0 / std::sqrt(static_cast<double>(dim));
  const auto part = [&](int64_t which) { return qkv.narrow(1, which * heads, heads); };
  row("attention.flash", [&] {
    at::_flash_attention_forward(part(0), part(1), part(2), ends, ends, frame_patches, frame_patches, 0.0, false, false, scale);
  });
  const auto dense = [&](int64_t which) { return part(which).view({frames, frame_patches, heads, dim}).transpose(1, 2); };
  row("attention.cudnn", [&] {
    at::_scaled_dot_product_cudnn_attention(dense(0), dense(1), dense(2), std::nullopt, false, 0.0, false, false, scale);
  });
  const at::Tensor x = at::randn({patches, v.hidden}, bf16), wide = at::randn({patches, v.intermediate}, bf16);
  const at::Tensor w = at::randn({v.intermediate, v.hidden}, bf16), bias = at::randn({v.intermediate}, bf16), w2 = at::randn({v.hidden, v.intermediate}, bf16),
                   bias2 = at::randn({v.hidden}, bf16), w_qkv = at::randn({3 * v.hidden, v.hidden}, bf16), bias_qkv = at::randn({3 * v.hidden}, bf16);
  row("qkv", [&] { at::addmm(bias_qkv, x, w_qkv.t()); });
  row("fc1", [&] { at::addmm(bias, x, w.t()); });
  row("fc1_then_gelu", [&] {
    at::Tensor inner = at::addmm(bias, x, w.t());
    at::gelu_(inner, "tanh");
  });
  row("fc1_gelu_epilogue", [&] { at::_addmm_activation(bias, x, w.t(), 1, 1, /*use_gelu=*/true); });
  row("fc2", [&] { at::addmm(bias2, wide, w2.t()); });
  row("layer_norm", [&] { at::layer_norm(x, {v.hidden}, bias2, bias2, 1e-6); });
}

}  // namespace

int CheckVision() {
  at::globalContext().setAllowTF32CuBLAS(false);
  at::globalContext().setAllowTF32CuDNN(false);
  const contract::ModelShape shape = Shape();
  const weights::TensorMap tensors = Weights(shape), wide_tensors = Cast(tensors, kGpu, at::kFloat);
  const std::vector<step::VisionInput> inputs =
      Inputs(shape, {{1, 16, 16}, {1, 28, 28}, {1, 2, 2}, {3, 8, 12}, {1, 64, 64}, {5, 28, 20}, {1, 10, 6}, {2, 50, 2}, {1, 2, 30}});
  const Features wide = Encode(Reference(shape, wide_tensors, kGpu, at::kFloat), inputs);
  const Features one_by_one = Encode(Reference(shape, tensors, kGpu, at::kBFloat16), inputs);
  int failures = 0;
  // The yardstick is what bf16 costs the reference itself: the fused tower may be a quarter further from float32 than that.
  std::vector<std::vector<double>> allowed(inputs.size());
  double reference_worst = 0;
  for (size_t i = 0; i < inputs.size(); ++i) {
    for (int64_t f = 0; f < wide[i].size(0); ++f) {
      const double away = Relative(one_by_one[i][f], wide[i][f]);
      reference_worst = std::max(reference_worst, away);
      allowed[i].push_back(1.25 * away + 0.001);
    }
  }
  Row("vision.check.reference_from_float32", "1", reference_worst);
  if (!(reference_worst < 0.1)) {
    std::fprintf(stderr, "vision: the reference in bf16 is %.4f from float32: too much to tell a mistake from noise\n", reference_worst);
    ++failures;
  }
  const auto compare = [&](const std::string& what, const Features& got) {
    double worst = 0, worst_share = 0;
    for (size_t i = 0; i < inputs.size(); ++i) {
      QP_CHECK(got[i].sizes() == wide[i].sizes() && got[i].scalar_type() == at::kBFloat16);
      for (int64_t f = 0; f < wide[i].size(0); ++f) {
        const double away = Relative(got[i][f], wide[i][f]), limit = allowed[i][static_cast<size_t>(f)];
        worst = std::max(worst, away);
        worst_share = std::max(worst_share, away / limit);
        if (away <= limit) continue;
        std::fprintf(stderr, "vision: %s: input %zu, features %lld: %.5f from float32, allowed %.5f\n", what.c_str(), i, static_cast<long long>(f), away, limit);
        ++failures;
      }
    }
    Row("vision.check." + what + ".from_float32", "1", worst);
    std::fprintf(stderr, "vision: %s: at most %.4f from float32 (the reference in bf16: %.4f), %.2f of what is allowed\n", what.c_str(), worst, reference_worst, worst_share);
  };
  compare("together", Encode(Fused(shape, tensors, 16384), inputs));
  compare("small_passes", Encode(Fused(shape, tensors, 600), inputs));  // cuts the videos between frames
  Features alone;
  const vision::Encoder fused = Fused(shape, tensors, 16384);
  for (const step::VisionInput& input : inputs) alone.push_back(Encode(fused, {&input, 1})[0]);
  compare("alone", alone);
  for (int round = 0; round < 12; ++round) {  // what recurs takes another library's attention
    for (size_t i = 0; i < inputs.size(); ++i) alone[i] = Encode(fused, {&inputs[i], 1})[0];
  }
  compare("recurring", alone);
  // And the yardstick itself against the CPU, whose tower is held against transformers by the parity tests.
  const std::vector<step::VisionInput> few = Inputs(shape, {{1, 16, 16}, {3, 8, 12}});
  const Features cpu = Encode(Reference(shape, Cast(tensors, at::kCPU, at::kFloat), at::kCPU, at::kFloat), few);
  const Features gpu = Encode(Reference(shape, wide_tensors, kGpu, at::kFloat), few), together = Encode(fused, few);
  double worst = 0, worst_fused = 0;
  for (size_t i = 0; i < few.size(); ++i) {
    worst = std::max(worst, Relative(gpu[i], cpu[i]));
    worst_fused = std::max(worst_fused, Relative(together[i], cpu[i]));
  }
  Row("vision.check.float32_gpu_from_cpu", "1", worst);
  Row("vision.check.together_from_cpu", "1", worst_fused);
  if (!(worst < 1e-3) || !(worst_fused < 1.25 * reference_worst + 0.001)) {
    std::fprintf(stderr, "vision: from the CPU's float32: the GPU's %.6f (allowed 0.001), the fused tower %.5f (allowed %.5f)\n", worst, worst_fused,
                 1.25 * reference_worst + 0.001);
    ++failures;
  }
  return failures;
}

void BenchVision() {
  const contract::ModelShape shape = Shape();
  const weights::TensorMap tensors = Weights(shape);
  const vision::Encoder reference = Reference(shape, tensors, kGpu, at::kBFloat16), fused = Fused(shape, tensors, 16384);
  const auto bench = [&](const std::string& name, const std::vector<std::array<int32_t, 3>>& grids, double images) {
    const std::vector<step::VisionInput> inputs = Inputs(shape, grids);
    for (const auto& [way, encoder] : {std::pair<std::string, const vision::Encoder*>{"one_by_one", &reference}, {"fused", &fused}}) {
      const Times times = Time([&] { Encode(*encoder, inputs); });
      Row("vision." + name + "." + way, "ms", times.total_ms);
      Row("vision." + name + "." + way + ".host", "ms", times.host_ms);
      Row("vision." + name + "." + way + ".rate", "images/s", images / times.total_ms * 1e3);
    }
  };
  bench("1x1024x1024", {{1, 64, 64}}, 1);
  bench("1x448x448", {{1, 28, 28}}, 1);
  bench("16x448x448", std::vector<std::array<int32_t, 3>>(16, {1, 28, 28}), 16);
  bench("video_32x448x448", {{16, 28, 28}}, 32);
  BenchParts(*shape.vision, 1, 4096);
  BenchParts(*shape.vision, 16, 784);
}

}  // namespace qwen
