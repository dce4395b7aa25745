// controller/ctl/status_command.h — the texts of `qwenctl status NAME` and `qwenctl diff`. Pure.
#pragma once
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "controller/plan/observed.h"
#include "controller/plan/plan.h"

namespace qwen::ctl {

std::string StatusText(const plan::Observed& observed);
// `live`: of what is to be applied, the objects that are there, by "Kind/name".
std::string DiffText(const plan::Observed& observed, const plan::Actions& actions, const std::map<std::string, nlohmann::json>& live);

}  // namespace qwen::ctl
