// controller/plan/template.h — spec.head, spec.stages.template and a listed stage's own fields, put over a pod. Pure.
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>

#include "controller/api/types.h"

namespace qwen::plan {

// `over` upon `base`: maps and env by key, lists one after the other, the rest replaced where `over` has it.
api::PodTemplate Merge(const api::PodTemplate& base, const api::PodTemplate& over);
// Of one pod; stage -1: the head.
api::PodTemplate TemplateOf(const api::Spec& spec, int32_t stage);
// Everything but image and env, which are the process's (desired.h). The first container is the operator's.
void ApplyTemplate(const api::PodTemplate& pod_template, nlohmann::json& pod);

}  // namespace qwen::plan
