// controller/ctl/commands.h — the subcommands of qwenctl, one file each. Add* declares a subcommand with its flags on `app`; its
// callback writes the process's exit code.
#pragma once
#include <CLI/CLI.hpp>

#include "stage/base/status.h"

namespace qwen::ctl {

void AddRun(CLI::App& app, int& exit_code);
void AddPlan(CLI::App& app, int& exit_code);
void AddChat(CLI::App& app, int& exit_code);
void AddInspect(CLI::App& app, int& exit_code);
void AddBench(CLI::App& app, int& exit_code);
void AddStatus(CLI::App& app, int& exit_code);
void AddLogs(CLI::App& app, int& exit_code);
void AddDiff(CLI::App& app, int& exit_code);

// Prints "error: ..." on stderr; the exit code that suits the status (64 for bad input, else 1).
int Report(const Status& status);

}  // namespace qwen::ctl
