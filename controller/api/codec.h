// controller/api/codec.h — QwenPipeline manifests from and to JSON. Pure; thread-safe.
//
// Parsing is strict: an unknown field (of a file), a wrong type, a value out of bounds or a broken union is kInvalidArgument whose message
// begins with the field's path ("spec.stages.count: must be in [1, 64], found 0"). The bounds equal those of
// crds/qwenpipeline.yaml, so that `qwenctl run` refuses what the API server would refuse.
#pragma once
#include <string>
#include <string_view>

#include "controller/api/types.h"
#include "stage/base/status.h"

namespace qwen::api {

// kIgnore is for what the API server holds: it took nothing that its definition does not name, and during an upgrade that is newer
// than the controller that still leads. A file is refused, because there a misspelt field would be a silent default.
enum class UnknownFields { kRefuse, kIgnore };
Result<QwenPipeline> ParsePipeline(std::string_view json, UnknownFields unknown = UnknownFields::kRefuse);
// With every default written out. ParsePipeline(PipelineToJson(p)) equals p.
std::string PipelineToJson(const QwenPipeline& pipeline);

std::string_view DeviceName(Device device);            // "Cuda", "Cpu"
std::string_view DtypeChoiceName(DtypeChoice dtype);   // "Auto", "Float32", "BFloat16"
std::string_view TransportName(TransportType type);    // "Auto", "TCP", "NCCL"
std::string_view BalanceName(contract::BalancePolicy balance);  // "Time", "EvenLayers"

}  // namespace qwen::api
