// controller/plan/status.h — what `kubectl get qp` and `kubectl describe qp` say: counts and conditions. Pure.
//
// Conditions: Ready (every wanted replica serves the wanted revision), Progressing (something is being brought about), Failed
// (nothing more is tried until the spec changes), WeightsReady (pods have something to read). Each has ONE message, of the worst thing, which names the pod. Nothing in a
// status depends on the time that passes, so a pipeline at rest has a status at rest.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "controller/api/status.h"
#include "controller/plan/group.h"
#include "controller/plan/observed.h"
#include "controller/plan/weights.h"

namespace qwen::plan {

// `error`: what is wrong with the spec; non-empty: nothing was planned. `groups`: as planned, of wanted replicas and of those
// that are going.
// `weights`: null when nobody looked; the condition is then as it was.
api::PipelineStatus MakeStatus(const Observed& observed, const std::vector<GroupPlan>& groups, const std::string& error, int64_t now_seconds,
                               const WeightsPlan* weights = nullptr);

// The condition of that type, or null.
const api::Condition* FindCondition(const api::PipelineStatus& status, std::string_view type);

}  // namespace qwen::plan
