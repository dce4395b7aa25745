#include "controller/ctl/plan_command.h"

#include "controller/ctl/commands.h"
#include "controller/ctl/manifest.h"
#include "controller/ctl/table.h"
#include "controller/ctl/units.h"
#include "stage/contract/pod_contract.h"

namespace qwen::ctl {
namespace {

struct PlanFlags {
  std::string manifest, model, gpu_memory, balance = "time", dtype = "auto";
  std::optional<int> stages, max_model_len;
};

api::Spec SpecOf(const PlanFlags& flags) {
  api::Spec spec;
  spec.stages.count = flags.stages.value_or(1);
  spec.stages.balance = flags.balance == "even" ? contract::BalancePolicy::kEvenLayers : contract::BalancePolicy::kTime;
  spec.model.max_model_len = flags.max_model_len;
  if (flags.dtype == "float32") spec.model.dtype = api::DtypeChoice::kFloat32;
  if (flags.dtype == "bfloat16") spec.model.dtype = api::DtypeChoice::kBFloat16;
  return spec;
}

Result<int> PlanOrStatus(const PlanFlags& flags) {
  std::optional<int64_t> memory;
  if (!flags.gpu_memory.empty()) {
    ASSIGN_OR_RETURN(memory, ParseBytes(flags.gpu_memory));
  }
  api::Spec spec = SpecOf(flags);
  std::string title = flags.model;
  Result<contract::ModelShape> shape = InvalidArgumentError("give either -f MANIFEST or --model NAME");
  if (!flags.manifest.empty()) {
    ASSIGN_OR_RETURN(const api::QwenPipeline pipeline, LoadManifest(flags.manifest));
    spec = pipeline.spec;
    title = spec.model.id;
    if (flags.stages) {
      spec.stages.list.clear();
      spec.stages.count = flags.stages;
    }
    if (flags.max_model_len) spec.model.max_model_len = flags.max_model_len;
    // A claim cannot be read from here; a model of a known name needs no checkpoint.
    if (!spec.model.shape.empty()) {
      shape = contract::NamedModelShape(spec.model.shape);
    } else {
      shape = spec.model.source.path ? contract::LoadModelShape(*spec.model.source.path) : contract::NamedModelShape(spec.model.id);
    }
    if (!memory && spec.stages.gpu_memory_gb) memory = int64_t{*spec.stages.gpu_memory_gb} * 1'000'000'000 * spec.stages.gpus_per_stage;
  } else if (!flags.model.empty()) {
    shape = contract::NamedModelShape(flags.model);
  }
  if (!shape.ok()) return shape.status();
  ASSIGN_OR_RETURN(const plan::PipelineSize size, plan::SizePipeline(spec, *shape, memory));
  std::fputs(PlanText(title, *shape, size, memory).c_str(), stdout);
  return size.fits() ? 0 : static_cast<int>(contract::ExitCode::kDoesNotFit);
}

}  // namespace

std::string PlanText(const std::string& title, const contract::ModelShape& shape, const plan::PipelineSize& size, std::optional<int64_t> stage_memory) {
  std::string out = title + ": " + std::to_string(shape.layers) + " layers on " + std::to_string(size.stages.size()) + " stages, weights in " +
                    std::string(contract::DtypeName(size.weight_dtype)) + ", KV in " + std::string(contract::DtypeName(size.kv_dtype)) + ", maxModelLen " +
                    FormatCount(size.max_model_len) + "\n\n";
  Table table({"stage", "layers", "count", "weights", "KV bytes/token", "KV capacity", "fits"});
  int64_t weights = 0, kv = 0;
  for (size_t k = 0; k < size.stages.size(); ++k) {
    const plan::StageSize& s = size.stages[k];
    weights += s.weights.total();
    kv += s.kv_bytes_per_token;
    const std::string capacity = !s.kv_capacity_tokens ? "-" : *s.kv_capacity_tokens < 0 ? "none" : FormatCount(*s.kv_capacity_tokens) + " tokens";
    table.Add({std::to_string(k), ToString(s.layers), std::to_string(s.layers.count()), FormatBytes(static_cast<double>(s.weights.total())),
               FormatCount(s.kv_bytes_per_token), capacity, !stage_memory ? "-" : s.fits ? "yes" : "NO"});
  }
  table.Add({"all", "0:" + std::to_string(shape.layers), std::to_string(shape.layers), FormatBytes(static_cast<double>(weights)), FormatCount(kv), "", ""});
  out += table.ToString();
  if (!stage_memory) return out + "\nGive --gpu-memory (for example 141GB) to see what fits.\n";
  out += "\nOf " + FormatBytes(static_cast<double>(*stage_memory)) + " a stage, 92 % is used; " + FormatBytes(static_cast<double>(size.stages.back().work_bytes)) +
         " of it for activations (last stage).\n";
  out += size.fits() ? "The pipeline's KV cache holds " + FormatCount(size.kv_blocks * size.block_tokens) + " tokens in blocks of " + std::to_string(size.block_tokens) + ".\n"
                     : "It does not fit: use more stages, FP8 weights, or a smaller maxModelLen.\n";
  return out;
}

void AddPlan(CLI::App& app, int& exit_code) {
  auto flags = std::make_shared<PlanFlags>();
  CLI::App* command = app.add_subcommand("plan", "show which stage gets which layers, what that weighs, and whether it fits");
  auto* file = command->add_option("-f,--file", flags->manifest, "manifest (YAML or JSON)")->check(CLI::ExistingFile);
  command->add_option("--model", flags->model, "a released model instead of a manifest, e.g. Qwen3-VL-235B-A22B (also -FP8)")->excludes(file);
  command->add_option("--stages", flags->stages, "number of stages")->check(CLI::Range(1, contract::kStagesMax));
  command->add_option("--balance", flags->balance, "time or even (with --model)")->check(CLI::IsMember({"time", "even"}))->capture_default_str();
  command->add_option("--dtype", flags->dtype, "of the weights (with --model)")->check(CLI::IsMember({"auto", "bfloat16", "float32"}))->capture_default_str();
  command->add_option("--max-model-len", flags->max_model_len, "tokens of one sequence")->check(CLI::PositiveNumber);
  command->add_option("--gpu-memory", flags->gpu_memory, "memory of one stage's GPU, e.g. 141GB or 80GiB");
  command->callback([flags, &exit_code] {
    const Result<int> code = PlanOrStatus(*flags);
    exit_code = code.ok() ? *code : Report(code.status());
  });
}

}  // namespace qwen::ctl
