// qwenctl — run a pipeline on this machine, plan one, talk to one, measure one, look into a checkpoint or a cluster. Subcommands: one
// file each. As kubectl-qwenpipeline it is a plugin of kubectl.
#include "controller/ctl/commands.h"

int main(int argc, char** argv) {
  CLI::App app{"qwenctl: pipelines of Qwen3-VL stages, on this machine or planned for a cluster", "qwenctl"};
  app.set_version_flag("--version", "qwenctl " QWEN_VERSION);
  app.require_subcommand(1);
  int exit_code = 0;
  qwen::ctl::AddRun(app, exit_code);
  qwen::ctl::AddPlan(app, exit_code);
  qwen::ctl::AddChat(app, exit_code);
  qwen::ctl::AddInspect(app, exit_code);
  qwen::ctl::AddBench(app, exit_code);
  qwen::ctl::AddStatus(app, exit_code);
  qwen::ctl::AddLogs(app, exit_code);
  qwen::ctl::AddDiff(app, exit_code);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    const int code = app.exit(error);  // prints help, version or what is wrong
    return code == 0 ? 0 : 64;
  }
  return exit_code;
}
