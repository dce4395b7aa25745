// stage/transport/message.h — every message of the control channel as a plain struct (docs/wire.md says who sends what
// when). Protobuf stays behind codec.h. Values.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "stage/step/step_plan.h"
#include "stage/step/step_result.h"

namespace qwen::transport {

inline constexpr uint32_t kProtocolVersion = 1;

// head -> stage, the first message of a connection.
struct Challenge {
  uint32_t protocol_version = kProtocolVersion;
  std::string nonce;  // kNonceBytes (handshake.h)
};

// What one stage can hold; known when its weights are loaded.
struct StageCapacity {
  int32_t block_tokens = 0;
  int32_t block_count = 0;
  int32_t max_slots = 0;
  int32_t max_batch_tokens = 0;
  int32_t max_sequence_tokens = 0;
  int64_t weight_bytes = 0;
  bool operator==(const StageCapacity&) const = default;
};

// stage -> head, answers the challenge.
struct Hello {
  uint32_t protocol_version = kProtocolVersion;
  std::string pipeline_uid;
  int32_t stage = 0;
  int32_t stages = 0;
  int32_t layer_begin = 0;
  int32_t layer_end = 0;
  std::string config_hash;   // contract::ConfigHash
  std::string data_address;  // host:port where the previous stage's hidden states are accepted
  StageCapacity capacity;    // zeros while `loading`
  bool loading = false;
  std::string nonce;         // for the head to prove itself
  std::string hmac;
  uint64_t epoch = 0;        // last epoch that this stage served
  uint64_t pod_epoch = 0;    // epoch at which the operator made this process; 0 without an operator
  std::string instance;      // random per process
};

// head -> stage: accepted.
struct Welcome {
  uint64_t epoch = 0;  // the group's at this moment
  std::string hmac;
};

// head -> stage: drop everything of older epochs and build the edges of this one.
struct Assemble {
  uint64_t epoch = 0;
  std::string next_address;  // data address of the next stage; empty on the last
  int32_t block_count = 0;   // the group's: the smallest stage's
};
struct Assembled {  // stage -> head
  uint64_t epoch = 0;
};

// head -> stage 0: a piece of VisionInput::patches. Pieces of one input follow each other, in order, nothing between.
struct VisionChunk {
  step::VisionId id = 0;
  std::array<int32_t, 3> grid = {0, 0, 0};
  uint64_t total_bytes = 0;
  uint64_t offset = 0;
  std::string patches;  // 1 .. kVisionChunkBytes
};
inline constexpr size_t kVisionChunkBytes = size_t{4} << 20;

struct Heartbeat {
  uint64_t sent_micros = 0;
  uint64_t steps_done = 0;  // by the stage; in the other direction: by all stages together
};
struct Shutdown {};  // head -> stage: drained, exit 0

enum class FailureCode : uint32_t {
  kUnspecified = 0,
  kAuth = 1,       // HMAC does not match: the secrets differ
  kProtocol = 2,   // another protocol version, or something malformed or out of order
  kConfig = 3,     // another pipeline, config hash, stage count or layer range
  kStale = 4,      // a younger process of this stage is known, or the epoch is over
  kBusy = 5,       // the stage index is taken by a live process: try again
  kEpochLost = 6,  // the epoch is over; the connection stays
  kLeaving = 7,    // the sender was told to stop
};
std::string_view FailureCodeName(FailureCode code);

struct Failure {  // both ways
  uint64_t epoch = 0;
  FailureCode code = FailureCode::kUnspecified;
  std::string reason;
  bool fatal = false;  // do not come back
  std::string hmac;    // of the head's answer to Hello, so that nobody else can send a stage away
};

struct Loading {  // stage -> head
  int64_t bytes_done = 0;
  int64_t bytes_total = 0;
};
struct Loaded {  // stage -> head, once, when Hello said `loading`
  StageCapacity capacity;
};

using Message = std::variant<Challenge, Hello, Welcome, Assemble, Assembled, step::StepPlan, step::StepResult, VisionChunk,
                             Heartbeat, Shutdown, Failure, Loading, Loaded>;
std::string_view MessageName(const Message& message);  // "Hello"

}  // namespace qwen::transport
