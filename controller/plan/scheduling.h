// controller/plan/scheduling.h — spec.scheduling and spec.transport.rdma over a group's pods: all of them or none (gang), near each
// other (topology), on the fast network. Pure.
//
//   Kueue         labels and annotations of a plain pod group; Kueue makes the rest
//   Coscheduling  a PodGroup of scheduling.x-k8s.io, named by a label
//   Volcano       a PodGroup of scheduling.volcano.sh, named by an annotation
// A PodGroup has the group's name with its epoch and belongs to the group's head, so it goes with it.
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "controller/api/types.h"
#include "controller/plan/objects.h"

namespace qwen::plan {

std::string GangName(const api::QwenPipeline& pipeline, Group group);  // NAME-<replica>-<epoch>
// REQUIRES: the pod has its labels and its first container.
void ApplyScheduling(const api::QwenPipeline& pipeline, Group group, bool head, nlohmann::json& pod);
// Empty: the gang needs none.
std::optional<nlohmann::json> PodGroup(const api::QwenPipeline& pipeline, Group group, const std::string& head_name, const std::string& head_uid);

}  // namespace qwen::plan
