// stage/server/guided_constraint.h — a compiled grammar as the engine's Constraint. With a Thinking model the grammar holds
// from </think> on; what comes before it is free. Thread safety: see engine::Constraint.
#pragma once
#include <memory>

#include "stage/engine/request.h"
#include "stage/server/generation_options.h"
#include "stage/server/model_assets.h"

namespace qwen::server {

// kInvalidArgument when the schema, regex or grammar is wrong. `after_think`: the output begins inside <think>.
Result<std::unique_ptr<engine::Constraint>> MakeConstraint(const ModelAssets& assets, const GuidedDecoding& guided, bool after_think);

}  // namespace qwen::server
