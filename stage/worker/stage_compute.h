// stage/worker/stage_compute.h — what the worker wants of a model: bytes of activations in, bytes or samples out. The
// real one binds model::StageModel (model_compute.h); tests use one without LibTorch.
//
// Thread safety: one thread, the worker's compute thread.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "stage/base/status.h"
#include "stage/step/activation_shape.h"
#include "stage/step/step_plan.h"
#include "stage/step/step_result.h"
#include "stage/transport/edge.h"
#include "stage/transport/message.h"

namespace qwen::worker {

class StageCompute {
 public:
  virtual ~StageCompute() = default;

  virtual transport::StageCapacity capacity() const = 0;
  virtual step::ActivationSizes activation_sizes() const = 0;
  virtual int32_t vocab_size() const = 0;

  // How its activations travel, and the buffers of `bytes` that they are received into and sent from: two of each, by the
  // parity of `step`. Host memory and TCP unless the compute says otherwise (device memory and NCCL). The result of an
  // earlier call with the same parity is void.
  virtual transport::EdgeTransport& edges() { return transport::TcpEdges(); }
  virtual std::span<std::byte> InputBuffer(uint64_t step, size_t bytes) { return Host(input_[step % 2], bytes); }
  virtual std::span<std::byte> OutputBuffer(uint64_t step, size_t bytes) { return Host(output_[step % 2], bytes); }

  // A new epoch: KV content, vision features and sampler slots are void.
  virtual void Reset() = 0;
  // Stage 0 only: runs the vision tower and keeps the features until a plan releases them. Inputs that wait together come in one
  // call as long as their patches add up to no more than vision_patches_together(); 0: always one by one.
  virtual Status AddVision(std::span<const step::VisionInput> inputs) = 0;
  virtual int64_t vision_patches_together() const { return 0; }
  // One plan. `in`: hidden (tokens, H), then deepstack (taps, visual tokens, H), step/activation_shape.h; empty on stage 0.
  // `out`: the same for the next stage, to be filled; empty on the last stage, which appends one sample per sampling span
  // to `samples` instead. REQUIRES: the plan is valid under capacity(), sizes of `in` and `out` are those of the plan.
  // kInternal means the device or a library failed: the process ends. Anything else ends the epoch only.
  virtual Status Forward(const step::StepPlan& plan, std::span<const std::byte> in, std::span<std::byte> out,
                         std::vector<step::SampledToken>& samples) = 0;

 private:
  static std::span<std::byte> Host(std::vector<std::byte>& buffer, size_t bytes) {
    buffer.resize(bytes);
    return buffer;
  }
  std::vector<std::byte> input_[2], output_[2];
};

// Called while weights are loaded; an error ends the loading with it (the stage was told to stop).
using LoadProgress = std::function<Status(int64_t bytes_done, int64_t bytes_total)>;
// Loads the weights; called once, on the compute thread.
using ComputeLoader = std::function<Result<std::unique_ptr<StageCompute>>(const LoadProgress& progress)>;

}  // namespace qwen::worker
