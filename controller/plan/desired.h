// controller/plan/desired.h — a manifest as processes: one qwen-head and S qwen-stage, with arguments and environment. Pure.
// `qwenctl run` starts them on this machine; in a cluster the same arguments go into pods.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "controller/api/types.h"
#include "controller/plan/sizing.h"
#include "stage/base/status.h"

namespace qwen::plan {

enum class Role { kHead, kStage };
struct Process {
  std::string name;  // "head", or the stage's name ("stage-0", or as listed in the manifest)
  Role role = Role::kHead;
  int32_t stage = -1;
  std::string program;  // "qwen-head" or "qwen-stage"
  std::vector<std::string> args;
  std::map<std::string, std::string> env;  // beside what the process inherits
};

// Where things are: what a manifest does not say because it differs between a laptop and a pod.
struct Placement {
  std::string model_dir;       // as the processes see it
  std::string pipeline_uid;
  std::string secret_file;     // handshake secret
  std::string head_address;    // HOST:PORT that stages dial
  std::string control_listen;  // ADDR:PORT of the head
  std::string api_listen;      // ADDR:PORT of the head
  std::string data_listen;     // ADDR:PORT of every stage; port 0: any free one
  std::string data_advertise;  // host that the previous stage dials
  std::vector<uint16_t> metrics_ports;  // one per stage
  std::string api_keys_file;   // empty: none
  int32_t cores = 1;           // of this machine, shared out between stages on it; 0: a stage has its machine to itself
  std::string log_level = "info";
};

// Head first, then stages ascending. kInvalidArgument or kUnimplemented names the field. REQUIRES: one metrics port a stage.
Result<std::vector<Process>> DesiredProcesses(const api::QwenPipeline& pipeline, const PipelineSize& size, const Placement& placement);

}  // namespace qwen::plan
