// stage/contract/pod_contract.h — what the operator (and `qwenctl run`), the pods and the monitoring must agree on: names,
// ports and numbers, each with one sentence. Nothing here is computed. Changing a value is a change of the contract: it
// moves together with the manifests, the chart and docs/operations.md.
#pragma once
#include <cstdint>
#include <string_view>

namespace qwen::contract {

// ---- Exit codes of qwen-stage and qwen-head. 64..78 follow sysexits.h where it has a meaning; below 128, so that they are
// ---- never taken for a signal (a shell reports 128 + signal).
enum class ExitCode : int {
  kOk = 0,              // Drained: everything admitted was finished, or the head said Shutdown.
  kInternal = 1,        // A failure without a better name (an unexpected Status of the system or of a library).
  kBadFlags = 64,       // A flag is missing, malformed or contradicts another: restarting cannot help.
  kBadCheckpoint = 65,  // config.json or the tensors are missing, unexpected or mismatched: restarting cannot help.
  kDoesNotFit = 66,     // Weights, or one sequence of maxModelLen in KV, exceed the memory: plan more stages.
  kHeadUnreachable = 67,  // The head could not be reached, or was lost and did not come back, in the time allowed.
  kProtocol = 68,       // The peer speaks another version, another config hash, or sent something malformed.
  kAuth = 69,           // The handshake's HMAC is wrong: the secrets of head and stage differ.
  kGpuFault = 70,       // The own GPU reported a sticky error: the device must be given back, the node may be bad.
  kStalled = 71,        // No progress within stallTimeout and no way back: the watchdog ended the process.
  kPortInUse = 72,      // A listening address could not be bound.
  kDrainTimeout = 73,   // Requests were still running when the drain's time was over.
};
// The reason that status messages and `qwenctl run` print for an exit code; empty when the code is none of the above.
constexpr std::string_view ExitReason(int code) {
  switch (static_cast<ExitCode>(code)) {
    case ExitCode::kOk: return "finished";
    case ExitCode::kInternal: return "internal failure";
    case ExitCode::kBadFlags: return "bad flags";
    case ExitCode::kBadCheckpoint: return "bad checkpoint";
    case ExitCode::kDoesNotFit: return "does not fit into memory";
    case ExitCode::kHeadUnreachable: return "cannot reach the head";
    case ExitCode::kProtocol: return "protocol error";
    case ExitCode::kAuth: return "authentication failed: secrets differ";
    case ExitCode::kGpuFault: return "GPU fault";
    case ExitCode::kStalled: return "stalled: no progress";
    case ExitCode::kPortInUse: return "a listening port is in use";
    case ExitCode::kDrainTimeout: return "requests still running at the end of the drain";
  }
  return "";
}

// ---- Ports inside a pod (as local processes they are flags, 0 = any free one).
inline constexpr uint16_t kApiPort = 8000;      // Head: the OpenAI API, /healthz, /ready and /metrics.
inline constexpr uint16_t kControlPort = 7000;  // Head: stages dial it (control channel).
inline constexpr uint16_t kDataPort = 7001;     // Stage: the previous stage dials it (hidden states, when not NCCL).
inline constexpr uint16_t kStageMetricsPort = 9400;  // Stage: /healthz, /ready and /metrics.

// ---- HTTP paths of both binaries.
inline constexpr std::string_view kHealthPath = "/healthz";  // 200 while the process makes progress, 500 when it does not.
inline constexpr std::string_view kReadyPath = "/ready";     // 200 when it serves, 503 with the reason while loading or draining.
inline constexpr std::string_view kMetricsPath = "/metrics";  // Prometheus text.

// ---- Environment of a pod.
inline constexpr std::string_view kEnvPipelineUid = "QWEN_PIPELINE_UID";  // metadata.uid of the QwenPipeline (or a local one).
inline constexpr std::string_view kEnvEpoch = "QWEN_EPOCH";          // Epoch at which the pod was made; older ones are refused.
inline constexpr std::string_view kEnvStage = "QWEN_STAGE";          // Index of the stage, from 0; not set on the head.
inline constexpr std::string_view kEnvStages = "QWEN_STAGES";        // Number of stages.
inline constexpr std::string_view kEnvPodName = "QWEN_POD_NAME";     // Downward API: appears in log lines and Hello.
inline constexpr std::string_view kEnvPodIp = "QWEN_POD_IP";         // Downward API: the address that a stage advertises for data.
inline constexpr std::string_view kEnvSecretFile = "QWEN_SECRET_FILE";  // File with the handshake secret (never its value).
inline constexpr std::string_view kEnvLogFormat = "QWEN_LOG_FORMAT";    // "text" or "json".

// ---- Files mounted into a pod.
inline constexpr std::string_view kModelMountPath = "/model";               // The checkpoint, read-only.
inline constexpr std::string_view kSecretMountPath = "/etc/qwen/secret";    // Folder with the key kSecretKey.
inline constexpr std::string_view kSecretKey = "handshake";                 // Key of the Secret that holds the HMAC secret.
inline constexpr std::string_view kApiKeysMountPath = "/etc/qwen/api-keys";  // Folder of spec.server.apiKeys' Secret.
inline constexpr std::string_view kApiKeysKey = "keys";                     // Its key: one API key a line.

// ---- API group.
inline constexpr std::string_view kApiGroup = "qwenpipeline.dev";
inline constexpr std::string_view kApiVersion = "qwenpipeline.dev/v1alpha1";
inline constexpr std::string_view kKind = "QwenPipeline";

// Of a QwenPipeline: it stays until its heads have finished their requests and its stages have gone after them.
inline constexpr std::string_view kDrainFinalizer = "qwenpipeline.dev/drain";

// ---- Labels and annotations of children.
inline constexpr std::string_view kLabelPipeline = "qwenpipeline.dev/pipeline";    // metadata.name of the QwenPipeline.
inline constexpr std::string_view kLabelRole = "qwenpipeline.dev/role";            // "head" or "stage".
inline constexpr std::string_view kLabelStage = "qwenpipeline.dev/stage";          // Index of the stage.
inline constexpr std::string_view kLabelReplica = "qwenpipeline.dev/replica";      // Index of the whole pipeline, from 0.
inline constexpr std::string_view kLabelEpoch = "qwenpipeline.dev/epoch";          // The epoch key: part of the pod's name too.
inline constexpr std::string_view kLabelGroup = "qwenpipeline.dev/group";          // Epoch at which the pod's group began; below the pod's own if it replaced another.
inline constexpr std::string_view kLabelRevision = "qwenpipeline.dev/revision";    // Hash of the pod template's inputs.
inline constexpr std::string_view kRoleHead = "head";
inline constexpr std::string_view kRoleStage = "stage";
inline constexpr std::string_view kFieldManager = "qwen-controller";  // The one manager of server-side applies.

// A name of a QwenPipeline: pod names are "<name>-<replica>-stage-<index>-<epoch>" and must stay labels of 63 characters.
inline constexpr int kPipelineNameBytesMax = 40;
inline constexpr int kStagesMax = 64;  // More than any released model needs: 94 layers, one GPU a stage.

}  // namespace qwen::contract
