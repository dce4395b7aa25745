// stage/weights/loader.h — the tensors of one stage, in memory on its device: what checkpoint.h finds, as at::Tensor.
// The only file of this room that knows LibTorch (target qp_loader).
//
// Both expert layouts on disk become one (weight_map.h), tied tensors share storage, block-FP8 weights are multiplied out
// to `dtype` or kept. Thread safety: call from one thread.
#pragma once
#include <ATen/core/Tensor.h>

#include <map>
#include <string>

#include "stage/contract/model_shape.h"
#include "stage/weights/checkpoint.h"

namespace qwen::weights {

using TensorMap = std::map<std::string, at::Tensor, std::less<>>;  // by slot name (weight_map.h)

// How the bytes get from the files into the tensors.
//   kPlain       tensor by tensor: read into host memory of its size, then to the device, transposed and multiplied out there
//   kOverlapped  request by request through a ring of bounded size (reader.h), read in the order of the files while the bytes
//                before are copied, transposed and multiplied out (stream_loader.h)
enum class LoadMethod { kPlain, kOverlapped };

struct LoadOptions {
  StageSpec spec;
  at::Device device = at::kCPU;
  at::ScalarType dtype = at::kBFloat16;  // every tensor is converted to it; no conversion when stored so
  int32_t threads = 4;
  LoadProgress progress;  // may be empty
  LoadMethod method = LoadMethod::kOverlapped;
  // FP8 weights stay as stored, with their scales in float32 under "<slot>_scale_inv": for a backend that computes with them, which the
  // reference does not. Of RandomTensors: noise in FP8 when the shape has quantization.
  bool keep_fp8 = false;
};
// kDataLoss with tensor, expected and found shape when the checkpoint does not fit the shape; kResourceExhausted when the
// device's memory does not suffice.
Result<TensorMap> LoadTensors(Checkpoint& checkpoint, const contract::ModelShape& shape, const LoadOptions& options);

// Noise in place of a checkpoint: every tensor of the stage, made on its device from (seed, slot name), so the same for
// every split. Matrices have the variance 1 / columns, so activations keep their size and a router is near uniform; norms
// are 1, biases 0. For measuring shapes whose checkpoint is not at hand.
Result<TensorMap> RandomTensors(const contract::ModelShape& shape, const LoadOptions& options, uint64_t seed);

}  // namespace qwen::weights
