#include "controller/plan/desired.h"

#include <algorithm>

#include "controller/plan/template.h"
#include "stage/contract/pod_contract.h"

namespace qwen::plan {
namespace {

std::string_view DtypeFlag(api::DtypeChoice dtype) {
  switch (dtype) {
    case api::DtypeChoice::kAuto: return "auto";
    case api::DtypeChoice::kFloat32: return "float32";
    case api::DtypeChoice::kBFloat16: return "bfloat16";
  }
  return "auto";
}

class Arguments {
 public:
  Arguments& Add(std::string_view flag, std::string_view value) {
    list_.emplace_back(flag);
    list_.emplace_back(value);
    return *this;
  }
  Arguments& Add(std::string_view flag, int64_t value) { return Add(flag, std::to_string(value)); }
  std::vector<std::string> Take() { return std::move(list_); }

 private:
  std::vector<std::string> list_;
};

// Sizes that head and stages must agree on: both check them in the handshake.
void AddLimits(Arguments& args, const api::Engine& engine, const PipelineSize& size) {
  args.Add("--block-tokens", size.block_tokens)
      .Add("--max-batch-tokens", engine.max_batch_tokens)
      .Add("--max-sequences", engine.max_sequences)
      .Add("--max-model-len", size.max_model_len);
}

std::map<std::string, std::string> Environment(const api::Spec& spec, int32_t stage) {
  std::map<std::string, std::string> environment;
  for (const api::EnvVar& variable : TemplateOf(spec, stage).env) environment[variable.name] = variable.value;
  return environment;
}

Process Head(const api::QwenPipeline& pipeline, const PipelineSize& size, const Placement& placement) {
  const api::Spec& spec = pipeline.spec;
  Arguments args;
  args.Add("--model", placement.model_dir).Add("--model-id", spec.model.id).Add("--stages", static_cast<int64_t>(size.stages.size()));
  args.Add("--control-listen", placement.control_listen).Add("--listen", placement.api_listen);
  args.Add("--pipeline-uid", placement.pipeline_uid).Add("--secret-file", placement.secret_file);
  AddLimits(args, spec.engine, size);
  args.Add("--queue", spec.engine.queue_limit);
  if (!placement.api_keys_file.empty()) args.Add("--api-keys-file", placement.api_keys_file);
  for (const std::string& host : spec.server.allowed_image_hosts) args.Add("--allow-image-host", host);
  args.Add("--drain-timeout", spec.server.drain_timeout_seconds).Add("--stall-timeout", spec.restart.stall_timeout_seconds);
  args.Add("--log-level", placement.log_level);
  return {.name = "head", .role = Role::kHead, .program = "qwen-head", .args = args.Take(), .env = Environment(spec, -1)};
}

Process Stage(const api::QwenPipeline& pipeline, const PipelineSize& size, const Placement& placement, int32_t index) {
  const api::Spec& spec = pipeline.spec;
  const bool cpu = spec.engine.device == api::Device::kCpu;
  const auto stages = static_cast<int32_t>(size.stages.size());
  Arguments args;
  args.Add("--model", placement.model_dir).Add("--index", index).Add("--stages", stages);
  if (const contract::LayerRange layers = size.stages[index].layers; layers.count() > 0) args.Add("--layers", ToString(layers));
  args.Add("--head", placement.head_address).Add("--data-listen", placement.data_listen).Add("--data-advertise", placement.data_advertise);
  args.Add("--device", cpu ? "cpu" : "cuda").Add("--dtype", DtypeFlag(spec.model.dtype));
  if (!cpu && spec.transport.type != api::TransportType::kAuto) args.Add("--edges", spec.transport.type == api::TransportType::kTcp ? "tcp" : "nccl");
  AddLimits(args, spec.engine, size);
  args.Add("--kv-blocks", size.kv_blocks).Add("--metrics-port", placement.metrics_ports[index]);
  args.Add("--pipeline-uid", placement.pipeline_uid).Add("--secret-file", placement.secret_file);
  if (spec.engine.threads) {
    args.Add("--threads", *spec.engine.threads);
  } else if (placement.cores > 0) {
    args.Add("--threads", std::max(1, placement.cores / stages));  // stages of one machine work at the same time
  }
  args.Add("--stall-timeout", spec.restart.stall_timeout_seconds).Add("--log-level", placement.log_level);
  Process process{.name = "stage-" + std::to_string(index), .role = Role::kStage, .stage = index, .program = "qwen-stage", .args = args.Take(),
                  .env = Environment(spec, index)};
  if (!spec.stages.list.empty()) process.name = spec.stages.list[index].name;
  return process;
}

}  // namespace

Result<std::vector<Process>> DesiredProcesses(const api::QwenPipeline& pipeline, const PipelineSize& size, const Placement& placement) {
  QP_CHECK_EQ(placement.metrics_ports.size(), size.stages.size());
  if (pipeline.spec.transport.type == api::TransportType::kNccl && pipeline.spec.engine.device == api::Device::kCpu)
    return InvalidArgumentError("spec.transport.type: NCCL connects GPUs, and spec.engine.device is Cpu");
  if (pipeline.spec.stages.gpus_per_stage != 1)
    return UnimplementedError("spec.stages.gpusPerStage: only 1 is offered by this build of qwen-stage");
  std::vector<Process> processes{Head(pipeline, size, placement)};
  for (size_t k = 0; k < size.stages.size(); ++k) processes.push_back(Stage(pipeline, size, placement, static_cast<int32_t>(k)));
  return processes;
}

}  // namespace qwen::plan
