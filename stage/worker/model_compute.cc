#include "stage/worker/model_compute.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <dlfcn.h>

#include <cstring>
#include <fstream>
#include <optional>

#include "stage/base/log.h"
#include "stage/sampling/sampler.h"
#include "stage/vision/vision_tower.h"
#include "stage/worker/kv_sizing.h"

namespace qwen::worker {
namespace {

Result<at::ScalarType> DtypeOf(const std::string& name, const contract::ModelShape& shape) {
  if (name == "float32") return at::kFloat;
  if (name == "bfloat16") return at::kBFloat16;
  if (name != "auto") return InvalidArgumentError("dtype: " + name + " is not auto, float32 or bfloat16");
  return shape.dtype == contract::Dtype::kFloat32 ? at::kFloat : at::kBFloat16;  // FP8 weights are multiplied out to bf16
}

Result<weights::LoadMethod> LoadMethodOf(const std::string& name) {
  if (name == "plain") return weights::LoadMethod::kPlain;
  if (name == "overlapped") return weights::LoadMethod::kOverlapped;
  return InvalidArgumentError("load: " + name + " is not overlapped or plain");
}

// Opens LibTorch's CUDA part at start, so that a CPU stage needs no CUDA library at all.
Result<at::Device> OpenDevice(const std::string& name) {
  if (name == "cpu") return at::Device(at::kCPU);
  if (name != "cuda") return InvalidArgumentError("device: " + name + " is not cpu or cuda");
  if (dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_GLOBAL) == nullptr) return UnavailableError(std::string("device cuda: ") + dlerror());
  if (!at::hasCUDA()) return UnavailableError("device cuda: no GPU that LibTorch can use");
  return at::Device(at::kCUDA, 0);
}

// What `symbol` of the kernels' library gives; only a GPU stage opens it. Null when it is not there: a build without CUDA.
template <typename Factory>
const Factory* OpenFused(const char* symbol) {
  void* library = dlopen("libqwen_fused.so", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    log::Warning("no kernels: the reference backend computes", {{"reason", dlerror()}});
    return nullptr;
  }
  const auto get = reinterpret_cast<const Factory* (*)()>(dlsym(library, symbol));
  return get != nullptr ? get() : nullptr;
}

// Null, with a line in the log, when the host has to sample.
Result<std::unique_ptr<ops::RowSampler>> OpenSampler(const ops::RowSamplerOptions& options) {
  const auto* make = OpenFused<ops::RowSamplerFactory>("qwen_fused_sampler");
  if (make == nullptr) return std::unique_ptr<ops::RowSampler>();
  Result<std::unique_ptr<ops::RowSampler>> sampler = (*make)(options);
  if (sampler.ok() || sampler.status().code() != StatusCode::kUnimplemented) return sampler;
  log::Warning("the host samples", {{"reason", sampler.status().message()}});
  return std::unique_ptr<ops::RowSampler>();
}

// Edges of GPU memory, out of the library that knows NCCL.
Result<std::unique_ptr<transport::EdgeTransport>> OpenNccl(void* stream) {
  void* library = dlopen("libqwen_nccl.so", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return UnavailableError(std::string("edges nccl: ") + dlerror());
  const auto make = reinterpret_cast<transport::EdgeTransport* (*)(void*)>(dlsym(library, "qwen_nccl_edges"));
  if (make == nullptr) return UnavailableError(std::string("edges nccl: ") + dlerror());
  return std::unique_ptr<transport::EdgeTransport>(make(stream));
}

// Free bytes of the device's memory; -1 when the system does not say.
int64_t FreeBytes(const at::Device& device) {
  if (device.is_cuda()) {
    // libcudart comes with LibTorch; this file is compiled without CUDA's headers.
    const auto query = reinterpret_cast<int (*)(size_t*, size_t*)>(dlsym(RTLD_DEFAULT, "cudaMemGetInfo"));
    size_t free = 0, total = 0;
    return query != nullptr && query(&free, &total) == 0 ? static_cast<int64_t>(free) : -1;
  }
  std::ifstream meminfo("/proc/meminfo");
  for (std::string key, unit; meminfo >> key;) {
    int64_t kibibytes = 0;
    meminfo >> kibibytes;
    std::getline(meminfo, unit);
    if (key == "MemAvailable:") return kibibytes << 10;
  }
  return -1;
}

class ModelCompute final : public StageCompute {
 public:
  // `edges`: of device memory, or null for TCP and host memory.
  // `device_sampler`: null when the host samples.
  ModelCompute(std::unique_ptr<model::StageModel> model, const transport::StageCapacity& capacity, std::unique_ptr<transport::EdgeTransport> edges,
               std::unique_ptr<ops::RowSampler> device_sampler)
      : model_(std::move(model)), capacity_(capacity), edges_(std::move(edges)), device_sampler_(std::move(device_sampler)) {
    Reset();
    if (!edges_) return;
    // The largest plan's activations, allocated once: NCCL may still read a buffer when the next plan is looked at.
    const auto allocate = [&](int32_t layer) {
      const step::ActivationSizes sizes = model_->activation_sizes();
      const int64_t taps = std::max<int64_t>(0, sizes.deepstack_taps - layer);
      const int64_t bytes = int64_t{capacity_.max_batch_tokens} * sizes.hidden * sizes.element_bytes * (1 + taps);
      return at::empty({2, bytes}, at::TensorOptions().dtype(at::kByte).device(model_->options().device));
    };
    if (!model_->first()) device_input_ = allocate(model_->options().layers.begin);
    if (!model_->last()) device_output_ = allocate(model_->options().layers.end);
  }

  transport::EdgeTransport& edges() override { return edges_ ? *edges_ : StageCompute::edges(); }
  std::span<std::byte> InputBuffer(uint64_t step, size_t bytes) override {
    return edges_ ? Half(device_input_, step, bytes) : StageCompute::InputBuffer(step, bytes);
  }
  std::span<std::byte> OutputBuffer(uint64_t step, size_t bytes) override {
    return edges_ ? Half(device_output_, step, bytes) : StageCompute::OutputBuffer(step, bytes);
  }

  transport::StageCapacity capacity() const override { return capacity_; }
  step::ActivationSizes activation_sizes() const override { return model_->activation_sizes(); }
  int32_t vocab_size() const override { return model_->shape().vocab; }

  void Reset() override {
    model_->Reset();
    if (model_->last()) sampler_.emplace(sampling::Sampler::Options{.max_slots = capacity_.max_slots, .device = device_sampler_.get()});
  }

  Status AddVision(std::span<const step::VisionInput> inputs) override { return model_->AddVision(inputs); }
  // On a CPU company saves nothing, and the watchdog's patience is for one input.
  int64_t vision_patches_together() const override {
    return model_->options().device.is_cuda() ? vision::VisionOptions().pass_patches_max : 0;
  }

  Status Forward(const step::StepPlan& plan, std::span<const std::byte> in, std::span<std::byte> out,
                 std::vector<step::SampledToken>& samples) override {
    try {
      ASSIGN_OR_RETURN(model::StageOutput output, model_->Forward(plan, Unpack(plan, in)));
      if (!model_->last()) {
        if (edges_) return PackDevice(output.activations, out);
        return Pack(output.activations, out);
      }
      ASSIGN_OR_RETURN(step::StepResult result, sampler_->Step(plan, output.logits, output.begun));
      samples = std::move(result.samples);
      if (const model::StageModel::Ahead* ahead = model_->RunAhead(plan, samples)) sampler_->BeginAhead(ahead->plan, ahead->logits);
      return OkStatus();
    } catch (const c10::Error& error) {  // of the copies below; the model keeps its own
      return InternalError(std::string("activations: ") + error.what_without_backtrace());
    }
  }

 private:
  static std::span<std::byte> Half(const at::Tensor& buffers, uint64_t step, size_t bytes) {
    QP_CHECK_LE(bytes, static_cast<size_t>(buffers.size(1)));
    return {static_cast<std::byte*>(buffers[static_cast<int64_t>(step % 2)].data_ptr()), bytes};
  }

  // Into device memory, in the order of the compute stream; then waits for the GPU, so that a step that hangs or fails does
  // so here, under the watchdog's eyes.
  Status PackDevice(const model::StageActivations& activations, std::span<std::byte> out) const {
    int64_t at = 0;
    const at::Tensor target = at::from_blob(out.data(), {static_cast<int64_t>(out.size())}, at::TensorOptions().dtype(at::kByte).device(model_->options().device));
    for (const at::Tensor& tensor : {activations.hidden, activations.deepstack}) {
      if (!tensor.defined()) continue;
      const auto bytes = static_cast<int64_t>(tensor.nbytes());
      QP_CHECK_LE(at + bytes, target.size(0));
      target.narrow(0, at, bytes).view(tensor.scalar_type()).view(tensor.sizes()).copy_(tensor);
      at += bytes;
    }
    QP_CHECK_EQ(at, target.size(0));
    const auto synchronize = reinterpret_cast<int (*)(void*)>(dlsym(RTLD_DEFAULT, "cudaStreamSynchronize"));
    if (synchronize == nullptr || synchronize(model_->stream()) != 0) return InternalError("the GPU failed in a step");
    return OkStatus();
  }

  // Views on `in` for the CPU and for device memory, copies for a GPU behind TCP. `in` outlives the call, and the model keeps nothing of its input.
  model::StageActivations Unpack(const step::StepPlan& plan, std::span<const std::byte> in) const {
    if (model_->first()) return {};
    const auto shape = step::ActivationsBefore(model_->options().layers.begin, plan, model_->activation_sizes());
    QP_CHECK_EQ(static_cast<int64_t>(in.size()), shape.total_bytes());
    const int64_t hidden = model_->shape().hidden;
    auto options = at::TensorOptions().dtype(model_->options().dtype);
    if (edges_) options = options.device(model_->options().device);
    auto* bytes = const_cast<std::byte*>(in.data());  // from_blob has no const form; the model does not write to its input
    model::StageActivations activations;
    activations.hidden = at::from_blob(bytes, {shape.tokens, hidden}, options).to(model_->options().device);
    if (shape.deepstack_bytes > 0) {
      activations.deepstack =
          at::from_blob(bytes + shape.hidden_bytes, {shape.taps, shape.visual_tokens, hidden}, options).to(model_->options().device);
    }
    return activations;
  }

  static Status Pack(const model::StageActivations& activations, std::span<std::byte> out) {
    size_t at = 0;
    for (const at::Tensor& tensor : {activations.hidden, activations.deepstack}) {
      if (!tensor.defined()) continue;
      const at::Tensor host = tensor.contiguous().cpu();
      const size_t bytes = host.nbytes();
      QP_CHECK_LE(at + bytes, out.size());
      std::memcpy(out.data() + at, host.const_data_ptr(), bytes);
      at += bytes;
    }
    QP_CHECK_EQ(at, out.size());
    return OkStatus();
  }

  const std::unique_ptr<model::StageModel> model_;
  const transport::StageCapacity capacity_;
  const std::unique_ptr<transport::EdgeTransport> edges_;
  at::Tensor device_input_, device_output_;  // (2, bytes) each, with edges_
  const std::unique_ptr<ops::RowSampler> device_sampler_;
  std::optional<sampling::Sampler> sampler_;  // last stage
};

Result<std::unique_ptr<model::StageModel>> MakeModel(weights::Checkpoint* checkpoint, const contract::ModelShape& shape,
                                                     const ModelComputeOptions& options, const model::StageModelOptions& model_options,
                                                     const LoadProgress& progress) {
  if (checkpoint != nullptr) return model::StageModel::Load(*checkpoint, shape, model_options, progress);
  ASSIGN_OR_RETURN(const weights::TensorMap tensors,
                   weights::RandomTensors(shape,
                                          {.spec = {.layers = options.layers, .index = options.stage, .stages = options.stages},
                                           .device = model_options.device,
                                           .dtype = model_options.dtype,
                                           .keep_fp8 = model_options.keep_fp8},
                                          *options.random_seed));
  return model::StageModel::Create(shape, model_options, tensors);
}

// Whether weights in block FP8 stay so in the GPU's memory.
Result<bool> KeepsFp8(const contract::ModelShape& shape, const ModelComputeOptions& options, const at::Device& device, at::ScalarType dtype) {
  if (options.fp8 != "auto" && options.fp8 != "expand" && options.fp8 != "keep") return InvalidArgumentError("fp8: " + options.fp8 + " is not auto, expand or keep");
  if (!shape.quantization || options.fp8 == "expand") return false;
  const auto* check = device.is_cuda() && options.backend != "reference" ? OpenFused<model::StageFp8Check>("qwen_fused_takes_fp8") : nullptr;
  if (check == nullptr) {
    if (options.fp8 == "auto") return false;
    return InvalidArgumentError("fp8: keep needs the kernels (device cuda, backend auto)");
  }
  const std::string unfit = (*check)(shape, {.layers = options.layers, .device = device, .dtype = dtype, .block_tokens = options.block_tokens});
  if (unfit.empty()) return true;
  if (options.fp8 == "keep") return InvalidArgumentError("fp8: keep: no kernels for this " + unfit);
  log::Warning("FP8 weights are multiplied out", {{"reason", "no kernels for this " + unfit}});
  return false;
}

}  // namespace

Result<std::unique_ptr<StageCompute>> LoadModelCompute(weights::Checkpoint* checkpoint, const contract::ModelShape& shape,
                                                       const ModelComputeOptions& options, const LoadProgress& progress) {
  if (options.threads > 0) at::set_num_threads(options.threads);  // a setting of the calling thread, which will compute
  ASSIGN_OR_RETURN(const at::Device device, OpenDevice(options.device));
  ASSIGN_OR_RETURN(const at::ScalarType dtype, DtypeOf(options.dtype, shape));
  ASSIGN_OR_RETURN(const weights::LoadMethod load_method, LoadMethodOf(options.load));
  if (options.sampler != "auto" && options.sampler != "host") return InvalidArgumentError("sampler: " + options.sampler + " is not auto or host");
  const contract::Dtype held = dtype == at::kFloat ? contract::Dtype::kFloat32 : contract::Dtype::kBFloat16;
  ASSIGN_OR_RETURN(const bool keep_fp8, KeepsFp8(shape, options, device, dtype));
  const int64_t weight_bytes = contract::WeightBytes(shape, options.layers, keep_fp8 ? contract::Dtype::kFloat8E4M3 : held).total();
  ASSIGN_OR_RETURN(const KvSizing sizing, SizeKv({.free_bytes = FreeBytes(device),
                                                  .weight_bytes = weight_bytes,
                                                  .kv_bytes_per_token = contract::KvBytesPerToken(shape, options.layers, held),
                                                  .max_positions = shape.max_positions,
                                                  .block_tokens = options.block_tokens,
                                                  .kv_blocks = options.kv_blocks,
                                                  .max_sequences = options.max_sequences,
                                                  .max_model_len = options.max_model_len}));
  log::Info("loading", {{"stage", options.stage}, {"layers", contract::ToString(options.layers)}, {"device", options.device},
                        {"dtype", c10::toString(dtype)}, {"weight_bytes", weight_bytes}, {"kv_blocks", sizing.blocks},
                        {"max_sequence_tokens", sizing.max_sequence_tokens}});
  model::StageModelOptions model_options{.layers = options.layers,
                                         .stage = options.stage,
                                         .stages = options.stages,
                                         .device = device,
                                         .dtype = dtype,
                                         .block_tokens = options.block_tokens,
                                         .block_count = sizing.blocks};
  model_options.load_method = load_method;
  model_options.keep_fp8 = keep_fp8;
  model_options.max_batch_tokens = options.max_batch_tokens;
  model_options.max_sequence_tokens = sizing.max_sequence_tokens;
  if (device.is_cuda()) {
    model_options.grouping = model::RowGrouping::kWholeBatch;  // a GPU reads the weights once per plan
    if (options.backend != "reference") {
      if (const auto* backend = OpenFused<model::StageBackendFactory>("qwen_fused_backend")) model_options.backend = *backend;
    }
  }
  if (options.stage == 0 && shape.vision) {
    const vision::TowerFactory* tower = device.is_cuda() && options.backend != "reference" ? OpenFused<vision::TowerFactory>("qwen_fused_vision") : nullptr;
    model_options.vision = vision::MakeEncoderFactory(shape, {.device = device, .dtype = dtype}, tower != nullptr ? *tower : vision::TowerFactory());
  }
  Result<std::unique_ptr<model::StageModel>> made = MakeModel(checkpoint, shape, options, model_options, progress);
  if (!made.ok() && keep_fp8 && options.fp8 == "auto" && made.status().code() == StatusCode::kFailedPrecondition) {
    // Only the tensors show that some layers are not in FP8, which the kernels do not mix.
    log::Warning("FP8 weights are multiplied out", {{"reason", made.status().message()}});
    ModelComputeOptions expanded = options;
    expanded.fp8 = "expand";
    return LoadModelCompute(checkpoint, shape, expanded, progress);
  }
  ASSIGN_OR_RETURN(auto model, std::move(made));
  if (device.is_cuda()) log::Info("backend", {{"stage", options.stage}, {"backend", model->fused() ? "fused" : "reference"}});
  const transport::StageCapacity capacity{.block_tokens = options.block_tokens,
                                          .block_count = sizing.blocks,
                                          .max_slots = options.max_sequences,
                                          .max_batch_tokens = options.max_batch_tokens,
                                          .max_sequence_tokens = sizing.max_sequence_tokens,
                                          .weight_bytes = weight_bytes};
  std::unique_ptr<transport::EdgeTransport> edges;
  if (device.is_cuda() && options.stages > 1 && options.edges != "tcp") {
    ASSIGN_OR_RETURN(edges, OpenNccl(model->stream()));
  }
  std::unique_ptr<ops::RowSampler> sampler;
  if (device.is_cuda() && options.sampler == "auto" && options.backend != "reference" && model->last()) {
    ASSIGN_OR_RETURN(sampler, OpenSampler({.vocab = shape.vocab, .max_slots = options.max_sequences}));
    log::Info("sampler", {{"stage", options.stage}, {"sampler", sampler ? "kernel" : "host"}});
  }
  return std::unique_ptr<StageCompute>(new ModelCompute(std::move(model), capacity, std::move(edges), std::move(sampler)));
}

}  // namespace qwen::worker
