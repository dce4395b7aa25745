// stage/engine/request.h — what the server asks of the engine and what it hears back. Values, apart from Constraint.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "stage/step/sampling_params.h"
#include "stage/step/step_plan.h"
#include "stage/step/step_result.h"

namespace qwen::engine {

// Grammar-constrained decoding of one sequence. The engine thread alone calls it.
class Constraint {
 public:
  virtual ~Constraint() = default;
  // Sets bit i%32 of word i/32 for every token that may come next. `mask` has ceil(vocab/32) zeroed words.
  virtual void FillMask(std::vector<uint32_t>& mask) = 0;
  virtual Status Accept(int32_t token) = 0;  // the token that was sampled
};

struct VisionSpan {
  std::shared_ptr<const step::VisionInput> input;  // id unique per request and image
  // Placeholder tokens of this input in `Request::tokens`, in order: (first token, count). A video has one run per
  // frame pair.
  std::vector<std::pair<int32_t, int32_t>> runs;
  std::string content_hash;  // of pixels and grid; equal content may share KV (prefix cache)
};

enum class FinishReason { kStop, kLength, kCancelled, kError };

struct TokenEvent {
  int32_t token = 0;
  float logprob = 0.0f;
  std::vector<step::TokenLogprob> top;
};
struct FinishEvent {
  FinishReason reason = FinishReason::kStop;
  int32_t stop_token = -1;  // the id that ended it (also delivered as TokenEvent), or -1
  std::string error;        // for kError
  int32_t cached_prompt_tokens = 0;
  int64_t queued_micros = -1;  // from the engine's inbox to the first admission; -1 when it was never admitted
};
using RequestEvent = std::variant<TokenEvent, FinishEvent>;

struct Request {
  step::SequenceId id = 0;                // given by the server, unique
  std::string log_id;                     // request id for log lines
  std::vector<int32_t> tokens;            // prompt, with one placeholder token per merged visual token
  std::vector<step::Position> positions;  // one per prompt token
  int32_t position_delta = 0;             // decode position of token i is i + delta on all three axes
  std::vector<VisionSpan> vision;
  step::SamplingParams params;  // params.stop_tokens end the sequence
  int32_t max_tokens = 0;       // > 0; prompt + max_tokens <= max_sequence_tokens
  bool ignore_stop_tokens = false;
  std::unique_ptr<Constraint> constraint;  // may be null
  // Called on the engine thread, in order; must not block. The last call is a FinishEvent.
  std::function<void(RequestEvent)> on_event;
};

}  // namespace qwen::engine
