#include "stage/weights/loader.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <cmath>
#include <optional>

#include "stage/weights/fp8.h"
#include "stage/weights/guarded.h"
#include "stage/weights/stream_loader.h"

namespace qwen::weights {
namespace {

std::optional<at::ScalarType> ToScalarType(StoredDtype dtype) {
  switch (dtype) {
    case StoredDtype::kFloat32: return at::kFloat;
    case StoredDtype::kBFloat16: return at::kBFloat16;
    case StoredDtype::kFloat8E4M3: return at::kFloat8_e4m3fn;
    default: return std::nullopt;
  }
}

class Loading {
 public:
  Loading(const contract::ModelShape& shape, const LoadOptions& options) : shape_(shape), options_(options) {}

  Result<std::span<std::byte>> Place(const Entry& entry) {
    const std::optional<at::ScalarType> dtype = ToScalarType(entry.dtype);
    if (!dtype) {
      return DataLossError("tensor " + entry.slot + ": dtype " + std::string(StoredDtypeName(entry.dtype)) + " not supported");
    }
    staging_ = at::empty(entry.stored_shape, at::TensorOptions().dtype(*dtype));
    return std::span(static_cast<std::byte*>(staging_.mutable_data_ptr()), static_cast<size_t>(staging_.nbytes()));
  }

  Status Placed(const Entry& entry) {
    at::Tensor tensor = std::move(staging_);
    // FP8 waits for its scale; scales stay in float32.
    const bool quantized = entry.dtype == StoredDtype::kFloat8E4M3;
    const bool scale = entry.slot.ends_with("_scale_inv");
    tensor = tensor.to(options_.device);
    if (!quantized) tensor = tensor.to(scale ? at::kFloat : options_.dtype);
    if (entry.transform == Transform::kTransposeLastTwo) tensor = tensor.transpose(-1, -2);
    tensors_[entry.slot] = tensor.contiguous();
    return OkStatus();
  }

  // Multiplies FP8 weights out, unless they are to be kept, and gives aliases their tensor.
  Result<TensorMap> Finish(const StageTensors& found) {
    for (const Entry& entry : found.entries) {
      if (entry.dtype != StoredDtype::kFloat8E4M3) continue;
      const auto scale = tensors_.find(entry.slot + "_scale_inv");
      if (scale == tensors_.end() || !shape_.quantization) {
        return DataLossError("tensor " + entry.slot + ": float8 without a scale or without quantization_config");
      }
      if (options_.keep_fp8) continue;
      at::Tensor& weight = tensors_[entry.slot];
      weight = MultiplyOut(weight, scale->second, *shape_.quantization).to(options_.dtype);
      tensors_.erase(scale);
    }
    for (const Entry& entry : found.entries) {
      if (!entry.alias_of.empty()) tensors_[entry.slot] = tensors_.at(entry.alias_of);
    }
    return std::move(tensors_);
  }

 private:
  const contract::ModelShape& shape_;
  const LoadOptions& options_;
  at::Tensor staging_;  // of the entry being read
  TensorMap tensors_;
};

}  // namespace

Result<TensorMap> LoadTensors(Checkpoint& checkpoint, const contract::ModelShape& shape, const LoadOptions& options) {
  c10::InferenceMode inference;
  ASSIGN_OR_RETURN(const StageTensors found, checkpoint.ResolveStage(shape, options.spec));
  RETURN_IF_ERROR(found.report.ToStatus());
  if (options.method == LoadMethod::kOverlapped) {
    return StreamTensors(checkpoint, shape, found, options);
  }
  return Guarded("loading weights", [&]() -> Result<TensorMap> {
    Loading loading(shape, options);
    Checkpoint::ReadAllOptions read;
    read.place = [&](const Entry& entry) { return loading.Place(entry); };
    read.placed = [&](const Entry& entry) { return loading.Placed(entry); };
    read.progress = options.progress;
    read.threads = options.threads;
    RETURN_IF_ERROR(checkpoint.ReadAll(found, read));
    return loading.Finish(found);
  });
}

Result<TensorMap> RandomTensors(const contract::ModelShape& shape, const LoadOptions& options, uint64_t seed) {
  return Guarded("random weights", [&]() -> Result<TensorMap> {
    c10::InferenceMode inference;
    TensorMap tensors;
    for (const Slot& slot : StageSlots(shape, options.spec)) {
      uint64_t hash = 0xcbf29ce484222325u ^ seed;  // FNV-1a: the same on every machine
      for (const char c : slot.name) hash = (hash ^ static_cast<uint8_t>(c)) * 0x100000001b3u;
      at::Tensor tensor = at::empty(slot.shape, at::TensorOptions().dtype(options.dtype).device(options.device));
      if (slot.shape.size() >= 2) {
        at::Generator generator = at::globalContext().defaultGenerator(options.device).clone();
        generator.set_current_seed(hash);
        // Rows of about one at a table of embeddings, else variance 1 / columns.
        const bool table = slot.name == "embed_tokens.weight" || slot.name == "visual.pos_embed.weight";
        tensor.normal_(0.0, table ? 1.0 : 1.0 / std::sqrt(static_cast<double>(slot.shape.back())), generator);
      } else {
        tensor.fill_(slot.name.ends_with(".bias") ? 0.0 : 1.0);
      }
      if (options.keep_fp8 && shape.quantization && slot.quantizable) {
        Fp8Tensor fp8 = Quantize(tensor, *shape.quantization);
        tensor = std::move(fp8.codes);
        tensors[slot.name + "_scale_inv"] = std::move(fp8.scales);
      }
      tensors[slot.name] = std::move(tensor);
    }
    if (options.spec.last() && shape.tie_embeddings && options.spec.first()) tensors["lm_head.weight"] = tensors.at("embed_tokens.weight");
    return tensors;
  });
}

}  // namespace qwen::weights
