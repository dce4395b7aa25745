// controller/plan/weights.h — from which volume each pod reads its weights, and what fills it (spec.weights). Pure.
//
//   Shared    model.source, mounted by head and every stage
//   PerStage  the claim PREFIX-<stage>, filled by its owner; the head reads model.source
//   Export    a claim and a Job for every stage, made by the operator: python_export writes the stage's shard into it, once.
//             NAME-weights-<hash>-<stage>, NAME-export-<hash>-<stage>; the hash is of source and layers, so other shards are other
//             claims, and those that serve are never written to. No group begins before its Jobs are complete.
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "controller/api/types.h"
#include "controller/plan/group.h"
#include "controller/plan/objects.h"
#include "controller/plan/observed.h"
#include "controller/plan/sizing.h"

namespace qwen::plan {

// Of the pod's volume "model". Stage -1: the head. REQUIRES: CheckWeights is OK.
api::ModelSource WeightsOf(const api::QwenPipeline& pipeline, const PipelineSize& size, int32_t stage);
// kInvalidArgument names the field.
Status CheckWeights(const api::Spec& spec, const PipelineSize& size, const Images& images);

struct WeightsPlan {
  std::vector<nlohmann::json> create;  // claims and Jobs that are missing
  bool ready = true;
  Blocker state;  // of the condition WeightsReady
};
// REQUIRES: the pipeline has a revision (objects.h).
WeightsPlan PlanWeights(const Observed& observed, const Images& images);

}  // namespace qwen::plan
