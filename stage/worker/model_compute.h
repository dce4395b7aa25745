// stage/worker/model_compute.h — the StageCompute that is a model: StageModel, the vision tower on stage 0, the sampler on
// the last stage. The only file of this room that knows LibTorch (target qp_model_compute).
//
// Thread safety: everything on the worker's compute thread.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "stage/base/status.h"
#include "stage/contract/layer_plan.h"
#include "stage/contract/model_shape.h"
#include "stage/model/stage_model.h"
#include "stage/worker/stage_compute.h"

namespace qwen::worker {

struct ModelComputeOptions {
  contract::LayerRange layers;
  int32_t stage = 0, stages = 1;
  std::string device = "cpu";    // "cpu" or "cuda" (the process's first GPU)
  std::string dtype = "auto";    // "auto": the checkpoint's; "float32", "bfloat16"
  std::string backend = "auto";  // on a GPU "auto": kernels where they fit the shape; "reference": ATen operators alone
  std::string sampler = "auto";  // on a GPU "auto": kernel `sampler` for the rows that it takes; "host": all but plain greedy ones on the CPU
  std::string edges = "auto";    // "auto": NCCL on a GPU, else TCP; "tcp"; "nccl" (two stages may not share a GPU then)
  std::optional<uint64_t> random_seed;  // noise of this seed instead of the checkpoint's weights
  std::string fp8 = "auto";      // of a block-FP8 checkpoint: "keep" in the GPU's memory, "expand" to the dtype when loading; "auto": kept where kernels take it
  std::string load = "overlapped";  // weights::LoadMethod, or "plain"
  int32_t block_tokens = 16;
  int32_t kv_blocks = 0;         // 0: what the free memory holds (kv_sizing.h)
  int32_t max_batch_tokens = 2048;
  int32_t max_sequences = 256;
  int32_t max_model_len = 0;     // 0: the model's, or less when the KV cache cannot hold one sequence of it
  int32_t threads = 0;           // of ATen's CPU operators; 0: LibTorch's own choice
};

// Loads the stage out of `checkpoint`; with a random_seed it may be null. kDataLoss when it does not fit `shape` (tensor, expected and found shape),
// kResourceExhausted when memory does not suffice, kUnavailable when the device is not there.
Result<std::unique_ptr<StageCompute>> LoadModelCompute(weights::Checkpoint* checkpoint, const contract::ModelShape& shape,
                                                       const ModelComputeOptions& options, const LoadProgress& progress);

}  // namespace qwen::worker
