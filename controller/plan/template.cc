#include "controller/plan/template.h"

#include <algorithm>

namespace qwen::plan {
namespace {
using nlohmann::json;

void Replace(std::string& base, const std::string& over) {
  if (!over.empty()) base = over;
}

void Append(std::string& base, const std::string& over) {
  if (base.empty() || over.empty()) return Replace(base, over);
  json list = json::parse(base);
  for (json& item : json::parse(over)) list.push_back(std::move(item));
  base = list.dump();
}

void AppendTo(json& list, const std::string& more) {
  if (more.empty()) return;
  for (json& item : json::parse(more)) list.push_back(std::move(item));
}

}  // namespace

api::PodTemplate Merge(const api::PodTemplate& base, const api::PodTemplate& over) {
  api::PodTemplate merged = base;
  Replace(merged.image, over.image);
  for (const api::EnvVar& variable : over.env) {
    std::erase_if(merged.env, [&](const api::EnvVar& known) { return known.name == variable.name; });
    merged.env.push_back(variable);
  }
  for (const auto& [key, value] : over.node_selector) merged.node_selector[key] = value;
  for (const auto& [key, value] : over.annotations) merged.annotations[key] = value;
  Replace(merged.priority_class_name, over.priority_class_name);
  Replace(merged.resources, over.resources);
  Append(merged.tolerations, over.tolerations);
  Append(merged.volumes, over.volumes);
  Append(merged.volume_mounts, over.volume_mounts);
  Append(merged.image_pull_secrets, over.image_pull_secrets);
  return merged;
}

api::PodTemplate TemplateOf(const api::Spec& spec, int32_t stage) {
  if (stage < 0) return spec.head;
  return spec.stages.list.empty() ? spec.stages.pod : Merge(spec.stages.pod, spec.stages.list[static_cast<size_t>(stage)].pod);
}

void ApplyTemplate(const api::PodTemplate& pod_template, json& pod) {
  json& spec = pod.at("spec");
  json& container = spec.at("containers").at(0);
  if (!pod_template.node_selector.empty()) spec["nodeSelector"] = pod_template.node_selector;
  if (!pod_template.annotations.empty()) pod["metadata"]["annotations"] = pod_template.annotations;
  if (!pod_template.priority_class_name.empty()) spec["priorityClassName"] = pod_template.priority_class_name;
  if (!pod_template.image_pull_secrets.empty()) spec["imagePullSecrets"] = json::parse(pod_template.image_pull_secrets);
  if (!pod_template.tolerations.empty()) spec["tolerations"] = json::parse(pod_template.tolerations);
  AppendTo(spec["volumes"], pod_template.volumes);
  AppendTo(container["volumeMounts"], pod_template.volume_mounts);
  if (pod_template.resources.empty()) return;
  // The number of GPUs is the operator's, unless the template names it.
  json resources = json::parse(pod_template.resources);
  if (const auto own = container.find("resources"); own != container.end()) {
    json limits = own->value("limits", json::object());
    if (resources.contains("limits")) limits.update(resources["limits"]);
    resources["limits"] = std::move(limits);
  }
  container["resources"] = std::move(resources);
}

}  // namespace qwen::plan
