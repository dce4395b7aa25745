// controller/api/codec.h — QwenPipeline manifests from and to JSON. Pure; thread-safe.
//
// Parsing is strict: an unknown field, a wrong type, a value out of bounds or a broken union is kInvalidArgument whose message
// begins with the field's path ("spec.stages.count: must be in [1, 64], found 0"). The bounds equal those of
// crds/qwenpipeline.yaml, so that `qwenctl run` refuses what the API server would refuse.
#pragma once
#include <string>
#include <string_view>

#include "controller/api/types.h"
#include "stage/base/status.h"

namespace qwen::api {

Result<QwenPipeline> ParsePipeline(std::string_view json);
// With every default written out. ParsePipeline(PipelineToJson(p)) equals p.
std::string PipelineToJson(const QwenPipeline& pipeline);

std::string_view DeviceName(Device device);            // "Cuda", "Cpu"
std::string_view DtypeChoiceName(DtypeChoice dtype);   // "Auto", "Float32", "BFloat16"
std::string_view TransportName(TransportType type);    // "Auto", "TCP", "NCCL"
std::string_view BalanceName(contract::BalancePolicy balance);  // "Time", "EvenLayers"

}  // namespace qwen::api
