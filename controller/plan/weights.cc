#include "controller/plan/weights.h"

#include <algorithm>

#include "controller/plan/template.h"
#include "stage/contract/pod_contract.h"

namespace qwen::plan {
namespace {
using nlohmann::json;
using api::WeightsMode;

constexpr int32_t kExportTries = 4;

// "0:24,24:48"
std::string Layers(const PipelineSize& size) {
  std::string text;
  for (const StageSize& stage : size.stages) text += (text.empty() ? "" : ",") + ToString(stage.layers);
  return text;
}

// Of what shards are made of.
std::string ShardHash(const api::Spec& spec, const PipelineSize& size) {
  const api::ModelSource& source = spec.model.source;
  const std::string from = source.claim ? "claim " + source.claim->claim_name + " " + source.claim->sub_path : "path " + source.path.value_or("");
  return Hash(from + " " + Layers(size)).substr(0, 8);
}

std::string ExportName(const api::QwenPipeline& pipeline, const PipelineSize& size, const char* what, int32_t stage) {
  return pipeline.metadata.name + "-" + what + "-" + ShardHash(pipeline.spec, size) + "-" + std::to_string(stage);
}

json Claim(const api::QwenPipeline& pipeline, const PipelineSize& size, int32_t stage) {
  const api::Weights& weights = pipeline.spec.weights;
  json spec = {{"accessModes", {weights.access_mode}}, {"resources", {{"requests", {{"storage", weights.size}}}}}};
  if (weights.storage_class) spec["storageClassName"] = *weights.storage_class;
  return {{"apiVersion", "v1"}, {"kind", "PersistentVolumeClaim"}, {"metadata", ChildMetadata(pipeline, ExportName(pipeline, size, "weights", stage))},
          {"spec", std::move(spec)}};
}

// Its pods carry none of the labels that make a pod one of a group.
json Job(const api::QwenPipeline& pipeline, const PipelineSize& size, const Images& images, int32_t stage) {
  json container = {{"name", "export"}, {"image", images.exporter},
                    {"args", {"export", std::string(contract::kModelMountPath), "--out", "/weights", "--layers", Layers(size), "--stage", std::to_string(stage)}},
                    {"securityContext", ContainerSecurity()}};
  json spec = {{"restartPolicy", "Never"}, {"automountServiceAccountToken", false}, {"enableServiceLinks", false}, {"securityContext", PodSecurity()},
               {"volumes", json::array()}};
  const api::ModelSource& source = pipeline.spec.model.source;
  json from = {{"name", "model"}, {"mountPath", contract::kModelMountPath}, {"readOnly", true}};
  if (source.claim && !source.claim->sub_path.empty()) from["subPath"] = source.claim->sub_path;
  container["volumeMounts"] = {from, {{"name", "weights"}, {"mountPath", "/weights"}}};
  spec["volumes"].push_back(ModelVolume(source));
  spec["volumes"].push_back({{"name", "weights"}, {"persistentVolumeClaim", {{"claimName", ExportName(pipeline, size, "weights", stage)}}}});
  spec["containers"] = json::array({std::move(container)});
  json pod = {{"metadata", {{"labels", {{"app.kubernetes.io/name", "qwen-pipeline"}, {"app.kubernetes.io/component", "export"},
                                        {"app.kubernetes.io/instance", pipeline.metadata.name}}}}},
              {"spec", std::move(spec)}};
  ApplyTemplate(pipeline.spec.weights.pod, pod);
  if (!pipeline.spec.weights.pod.image.empty()) pod["spec"]["containers"][0]["image"] = pipeline.spec.weights.pod.image;
  for (const api::EnvVar& variable : pipeline.spec.weights.pod.env)
    pod["spec"]["containers"][0]["env"].push_back({{"name", variable.name}, {"value", variable.value}});
  return {{"apiVersion", "batch/v1"}, {"kind", "Job"}, {"metadata", ChildMetadata(pipeline, ExportName(pipeline, size, "export", stage))},
          {"spec", {{"backoffLimit", kExportTries}, {"template", std::move(pod)}}}};
}

WeightsPlan PlanExport(const Observed& observed, const PipelineSize& size, const Images& images) {
  WeightsPlan plan;
  int32_t done = 0;
  std::string working, failed;
  const auto stages = static_cast<int32_t>(size.stages.size());
  for (int32_t stage = 0; stage < stages; ++stage) {
    if (!observed.claims.contains(ExportName(observed.pipeline, size, "weights", stage))) plan.create.push_back(Claim(observed.pipeline, size, stage));
    const std::string name = ExportName(observed.pipeline, size, "export", stage);
    const auto job = observed.jobs.find(name);
    if (job == observed.jobs.end()) plan.create.push_back(Job(observed.pipeline, size, images, stage));
    if (job != observed.jobs.end() && job->second.complete) {
      ++done;
    } else if (job != observed.jobs.end() && job->second.failed) {
      if (failed.empty()) failed = "job " + name + " failed" + (job->second.message.empty() ? "" : ": " + job->second.message) + "; its pods' logs say why; delete it to try again";
    } else if (working.empty()) {
      working = "job " + name;
    }
  }
  plan.ready = done == stages;
  const std::string count = std::to_string(done) + " of " + std::to_string(stages) + " shards are exported";
  if (plan.ready) plan.state = {0, "Exported", count};
  if (!plan.ready) plan.state = failed.empty() ? Blocker{4, "Exporting", count + "; " + working + " is next"} : Blocker{90, "ExportFailed", failed};
  return plan;
}

}  // namespace

api::ModelSource WeightsOf(const api::QwenPipeline& pipeline, const PipelineSize& size, int32_t stage) {
  const api::Spec& spec = pipeline.spec;
  if (stage < 0 || spec.weights.mode == WeightsMode::kShared) return spec.model.source;
  const std::string name = spec.weights.mode == WeightsMode::kPerStage ? spec.weights.claim_prefix + "-" + std::to_string(stage)
                                                                       : ExportName(pipeline, size, "weights", stage);
  return {.claim = api::PersistentVolumeClaimSource{.claim_name = name}};
}

Status CheckWeights(const api::Spec& spec, const PipelineSize& size, const Images& images) {
  if (spec.weights.mode == WeightsMode::kPerStage && spec.weights.claim_prefix.empty())
    return InvalidArgumentError("spec.weights.claimPrefix: required with mode PerStage");
  if (spec.weights.mode != WeightsMode::kExport) return OkStatus();
  if (spec.weights.size.empty()) return InvalidArgumentError("spec.weights.size: required with mode Export");
  if (std::any_of(size.stages.begin(), size.stages.end(), [](const StageSize& stage) { return stage.layers.count() == 0; }))
    return InvalidArgumentError("spec.weights.mode: Export needs model.shape or stages.list, because a shard is of known layers");
  if (images.exporter.empty() && spec.weights.pod.image.empty())
    return InvalidArgumentError("spec.weights.mode: this operator was given no --image-export; name one in spec.weights.template.image");
  return OkStatus();
}

WeightsPlan PlanWeights(const Observed& observed, const Images& images) {
  const api::Spec& spec = observed.pipeline.spec;
  if (spec.weights.mode == WeightsMode::kExport) return PlanExport(observed, *ClusterSize(spec), images);
  const bool shared = spec.weights.mode == WeightsMode::kShared;
  const std::string what = !shared                     ? "claims " + spec.weights.claim_prefix + "-0 and following"
                           : spec.model.source.claim ? "claim " + spec.model.source.claim->claim_name
                                                       : "folder " + spec.model.source.path.value_or("") + " of each node";
  return {.state = {0, "AsGiven", what + (what.starts_with("claims") ? " are read as they are" : " is read as it is")}};
}

}  // namespace qwen::plan
