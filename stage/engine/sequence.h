// stage/engine/sequence.h — one request on its way through the scheduler: its tokens, and how far they are computed.
//
// Thread safety: none; owned by the engine thread. Every field is written by Scheduler alone.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "stage/base/status.h"
#include "stage/engine/block_pool.h"
#include "stage/engine/prefix_cache.h"
#include "stage/engine/request.h"

namespace qwen::engine {

// What can be said of a request without a group of stages: every field consistent with the others. kInvalidArgument
// names the field.
Status ValidateRequest(const Request& request);
// And against a group's limits: length, KV capacity, vocabulary. kInvalidArgument states the limit and what was asked.
// `prompt_tokens`: how many of request.tokens are prompt (the engine appends what it generates).
Status ValidateRequestLimits(const Request& request, int32_t prompt_tokens, const step::PlanLimits& limits);

// Where the placeholder tokens of one input lie: tokens [first, first + count) take as many feature rows from
// `feature_begin` on.
struct VisionRun {
  int32_t first = 0;
  int32_t count = 0;
  int32_t feature_begin = 0;
  int32_t input = 0;  // index into Request::vision
};

enum class Phase {
  kWaiting,  // holds no slot and no block
  kRunning,  // holds a slot and blocks for at least all its tokens but the newest
  kRetired,  // has had its FinishEvent; holds slot and blocks until no plan in flight names it
};

struct Sequence {
  Sequence(Request&& request, uint64_t arrival, int64_t now_micros);

  const uint64_t arrival;  // order of submission: who is older
  const int64_t submitted_micros;
  Request request;  // `tokens` grows: prompt, then what was generated
  const int32_t prompt_tokens;
  std::vector<VisionRun> runs;  // ascending

  Phase phase = Phase::kWaiting;
  int32_t slot = -1;
  BlockList blocks;
  int32_t scheduled = 0;           // tokens whose KV is written by plans up to the newest submitted one
  int32_t plans_in_flight = 0;     // that name this sequence
  bool started = false;            // SequenceStart was sent for `slot`
  bool preempt_when_idle = false;  // chosen as a victim while in flight; takes no part in further plans
  int32_t published = 0;           // blocks known to the prefix cache
  PrefixCache::Node node;          // the last of them
  bool publishing = true;          // false once the chain in the cache is broken
  bool admitted_before = false;
  int64_t queued_micros = -1;        // submitted to first admitted; -1 before it
  int32_t cached_prompt_tokens = 0;  // found in the prefix cache at the first admission
  std::vector<uint8_t> vision_sent;  // (inputs): stage 0 holds the pixels or features

  step::SequenceId id() const { return request.id; }
  int32_t token_count() const { return static_cast<int32_t>(request.tokens.size()); }
  int32_t pending() const { return token_count() - scheduled; }  // 0: its next token is being sampled
  int32_t generated() const { return token_count() - prompt_tokens; }

  // Back to kWaiting with nothing computed; what was generated stays. The caller has given back slot and blocks.
  void ForgetPlace();
  // Of token `index`: from the request in the prompt, index + position_delta on all axes after it.
  step::Position PositionOf(int32_t index) const;
  // What of `runs` lies in tokens [begin, end), cut to it, ascending.
  std::vector<VisionRun> RunsIn(int32_t begin, int32_t end) const;
  // One past the last placeholder token of input `input`.
  int32_t VisionEnd(int32_t input) const;
  // Everything that the KV of tokens [index * block_tokens, + block_tokens) depends on beyond what lies before: ids,
  // the positions unless each equals its index, and the content and row of the visual features. Equal iff equal.
  std::string BlockContent(int32_t index, int32_t block_tokens) const;
};

}  // namespace qwen::engine
