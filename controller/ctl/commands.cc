#include "controller/ctl/commands.h"

#include <cstdio>

#include "stage/contract/pod_contract.h"

namespace qwen::ctl {

int Report(const Status& status) {
  std::fprintf(stderr, "error: %s\n", status.message().c_str());
  switch (status.code()) {
    case StatusCode::kInvalidArgument:
    case StatusCode::kUnimplemented: return static_cast<int>(contract::ExitCode::kBadFlags);
    case StatusCode::kDataLoss: return static_cast<int>(contract::ExitCode::kBadCheckpoint);
    default: return static_cast<int>(contract::ExitCode::kInternal);
  }
}

}  // namespace qwen::ctl
