// controller/ctl/inspect_command.h — what is in a checkpoint's folder, and does it fit its config.
#pragma once
#include <string>

#include "stage/base/status.h"

namespace qwen::ctl {

struct Inspection {
  std::string text;    // for the terminal
  bool fits = false;   // nothing missing, mismatched or unexpected, checksums right
};
// `dir`: a checkpoint, one stage's folder of an export, or an export's top folder (all its stages are looked at). `verify`: also
// compares the sha256 of exports.
Result<Inspection> Inspect(const std::string& dir, bool verify);

}  // namespace qwen::ctl
