// stage/transport/codec.h — messages <-> bytes (Protobuf, stage/contract/wire.proto). Thread safety: pure functions.
//
// Decoding checks everything that can be checked without knowing the group: lengths, ranges, finite numbers, that counts
// fit each other. What depends on the group's limits is step::ValidatePlan's, called by whoever receives a plan.
#pragma once
#include <optional>
#include <string>

#include "stage/base/status.h"
#include "stage/step/step_plan.h"
#include "stage/transport/message.h"

namespace qwen::transport {

std::string EncodeMessage(const Message& message);  // the payload of a frame
// kDataLoss "message: ..." when the bytes are no message, kInvalidArgument naming the field when one is out of range.
Result<Message> DecodeMessage(const std::string& payload);

// A whole frame, ready to be sent. kResourceExhausted when the message is larger than a frame may be.
Result<std::string> EncodeFramedMessage(const Message& message);

// The frame of piece number `index` (from 0) of an input; nullopt when there are no more. A piece is encoded when it is
// about to be sent, so that an image waits as one shared VisionInput and not as a second copy.
std::optional<std::string> EncodeVisionChunk(const step::VisionInput& input, size_t index);

// Puts pieces together again on stage 0. Memory grows with what arrived. Thread safety: none.
class VisionAssembler {
 public:
  explicit VisionAssembler(uint64_t input_bytes_max) : input_bytes_max_(input_bytes_max) {}
  // The input when `chunk` was its last piece. kInvalidArgument when a piece is out of order, too large or contradicts
  // the first: the connection is then closed.
  Result<std::optional<step::VisionInput>> Add(VisionChunk chunk);
  bool in_progress() const { return current_.has_value(); }

 private:
  const uint64_t input_bytes_max_;
  std::optional<step::VisionInput> current_;
  uint64_t total_bytes_ = 0;
};
// Bytes of one patch row: 3 channels x 2 frames x 16 x 16 pixels, uint8 (VisionInput::patches).
inline constexpr uint64_t kPatchBytes = 3 * 2 * 16 * 16;

}  // namespace qwen::transport
