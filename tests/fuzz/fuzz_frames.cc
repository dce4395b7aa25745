// Fuzz: whatever bytes arrive on a control connection, in whatever pieces, the parser and the codec neither crash nor hold
// more than what arrived; and a message that decodes says the same after another round trip.
// Input: first byte = size of the pieces, then the stream. An odd first byte wraps the rest into one valid frame, so that
// the codec sees payloads that no random checksum would let through.
#include <cstdint>
#include <cstdlib>

#include "stage/transport/codec.h"
#include "stage/transport/edge.h"
#include "stage/transport/frame.h"

namespace {

void Decode(const std::string& payload, qwen::transport::VisionAssembler& vision) {
  auto message = qwen::transport::DecodeMessage(payload);
  if (!message.ok()) return;
  const std::string encoded = qwen::transport::EncodeMessage(*message);
  auto again = qwen::transport::DecodeMessage(encoded);
  if (!again.ok() || again->index() != message->index() || qwen::transport::EncodeMessage(*again) != encoded) std::abort();
  if (auto* plan = std::get_if<qwen::step::StepPlan>(&*message)) {
    (void)qwen::step::ValidatePlan(*plan, {.block_count = 64, .max_slots = 8, .max_batch_tokens = 64, .max_sequence_tokens = 1024, .vocab_size = 1000});
  }
  if (auto* chunk = std::get_if<qwen::transport::VisionChunk>(&*message)) (void)vision.Add(std::move(*chunk));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::span<const std::byte> rest(reinterpret_cast<const std::byte*>(data) + 1, size - 1);
  std::string framed;
  std::span<const std::byte> stream = rest;
  if (data[0] % 2 == 1) {
    framed = qwen::transport::EncodeFrame(rest);
    stream = std::as_bytes(std::span(framed.data(), framed.size()));
  }
  qwen::transport::FrameParser parser(1 << 20);
  qwen::transport::VisionAssembler vision(1 << 20);
  const size_t piece = 1 + data[0];
  for (size_t at = 0; at < stream.size(); at += piece) {
    parser.Feed(stream.subspan(at, std::min(piece, stream.size() - at)));
    for (;;) {
      auto payload = parser.Next();
      if (!payload.ok() || !payload->has_value()) break;
      Decode(**payload, vision);
    }
  }
  if (parser.buffered_bytes() > stream.size()) std::abort();
  if (rest.size() >= qwen::transport::kEdgeHeaderBytes) {
    (void)qwen::transport::CheckEdgeHeader(rest.first(qwen::transport::kEdgeHeaderBytes), 1, 2, 3);
  }
  return 0;
}
