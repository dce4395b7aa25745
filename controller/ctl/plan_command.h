// controller/ctl/plan_command.h — who gets which layers, and does it fit: the text that `qwenctl plan` prints. Pure.
#pragma once
#include <cstdint>
#include <optional>
#include <string>

#include "controller/plan/sizing.h"

namespace qwen::ctl {

std::string PlanText(const std::string& title, const contract::ModelShape& shape, const plan::PipelineSize& size, std::optional<int64_t> stage_memory);

}  // namespace qwen::ctl
