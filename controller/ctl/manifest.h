// controller/ctl/manifest.h — a manifest file (YAML or JSON) as a QwenPipeline. The only file that knows yaml-cpp.
#pragma once
#include <string>
#include <string_view>

#include "controller/api/types.h"
#include "stage/base/status.h"

namespace qwen::ctl {

// One YAML document of at most 1 MiB as JSON text: numbers, true/false and null by YAML's core schema, everything quoted as
// a string. kInvalidArgument with line and column for what is not YAML, has a key twice, or is nested deeper than 32.
Result<std::string> YamlToJson(std::string_view yaml);

// Reads and parses the file. A relative spec.model.source.path and spec.server.apiKeys.file count from the manifest's own
// folder, so that a manifest works from wherever it is called.
Result<api::QwenPipeline> LoadManifest(const std::string& path);

}  // namespace qwen::ctl
