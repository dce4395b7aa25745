// stage/step/step_plan.h — what one step does: the one struct between deciding (engine) and doing (stages).
//
// The head's scheduler makes a StepPlan; every stage receives the same plan over its control channel, ahead of the hidden
// states, and executes plans in `step` order. A plan is one microbatch. Everything that a stage must know to run it is in
// it or was in an earlier plan of the same epoch; stages keep no other state per sequence than KV blocks (addressed only
// through `blocks`) and, on the last stage, the sampler's history per slot.
//
// Thread safety: values.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "stage/base/status.h"
#include "stage/step/sampling_params.h"

namespace qwen::step {

using BlockId = int32_t;      // a KV block; every stage uses the same id over its own layers' memory
using SequenceId = uint64_t;  // unique for the life of a head process, never reused
using VisionId = uint64_t;    // one image or video of one request; unique for the life of a head process

// Interleaved M-RoPE position of one token (docs/numerics.md). Text tokens have t == h == w.
struct Position {
  int32_t t = 0, h = 0, w = 0;
  bool operator==(const Position&) const = default;
};

// The pixels of one image or video, sent to stage 0 before the first plan that names `id`.
struct VisionInput {
  VisionId id = 0;
  std::array<int32_t, 3> grid = {0, 0, 0};  // (t, h, w) in patches of 2 frames x 16 x 16, before the 2x2 merge; h, w even
  // (t*h*w, 3*2*16*16) uint8: resized pixels, not yet normalised. A row is one patch in the order (channel, frame, y, x);
  // rows in the reference's order: per frame pair, 2x2 merge blocks row-major, 4 patches of a block together.
  std::vector<uint8_t> patches;
  int64_t patch_count() const { return int64_t{grid[0]} * grid[1] * grid[2]; }
  int64_t token_count(int merge = 2) const { return patch_count() / (merge * merge); }
};

// `count` merged visual tokens of input `id`, from its feature row `feature_begin` on, replace the embeddings of the
// tokens [span_offset, span_offset + count) of the span.
struct VisionSlice {
  VisionId id = 0;
  int32_t feature_begin = 0;
  int32_t span_offset = 0;
  int32_t count = 0;
  bool operator==(const VisionSlice&) const = default;
};

// The part of one sequence that a microbatch computes: tokens [begin, begin + tokens.size()) of the sequence.
struct SequenceSpan {
  SequenceId sequence = 0;
  int32_t slot = 0;                  // sampler state on the last stage, 0 <= slot < max_slots
  int32_t begin = 0;                 // tokens of this sequence that are in the KV cache already
  std::vector<int32_t> tokens;       // ids to feed; never empty. Decode: one
  std::vector<Position> positions;   // as many as tokens
  // Block i holds tokens [i*bt, (i+1)*bt): ceil((begin + tokens.size()) / bt) entries, or one more for the token after these.
  std::vector<BlockId> blocks;
  std::vector<VisionSlice> vision;   // ascending span_offset, not overlapping
  bool sample = false;               // true: sample from the logits of the span's last token
  std::vector<uint32_t> allowed;     // grammar mask, bit i%32 of word i/32 = token i may be sampled; empty = all
};

// Sets up sampler slot `slot` on the last stage (always before the slot's first sampling span, and again after a
// preemption or a new epoch, when `tokens` also holds what was generated before).
struct SequenceStart {
  SequenceId sequence = 0;
  int32_t slot = 0;
  SamplingParams params;
  std::vector<int32_t> tokens;  // prompt, then tokens generated so far
  int32_t prompt_tokens = 0;    // how many of `tokens` are prompt
};

struct StepPlan {
  uint64_t epoch = 0;
  uint64_t step = 0;                         // ascending by 1 within an epoch, from 0
  std::vector<SequenceStart> starts;         // applied before the spans
  std::vector<VisionId> vision_released;     // stage 0 may drop these features after this step
  std::vector<SequenceSpan> spans;           // at least one

  int64_t token_count() const;
  int64_t vision_token_count() const;
  int64_t sample_count() const;
};

// Bounds that both ends check, agreed in the handshake.
struct PlanLimits {
  int32_t block_tokens = 16;        // tokens a KV block
  int32_t block_count = 0;          // ids are [0, block_count)
  int32_t max_slots = 256;          // sequences at once; also spans a plan
  int32_t max_batch_tokens = 2048;  // tokens a plan
  int32_t max_sequence_tokens = 0;  // maxModelLen
  int32_t vocab_size = 0;           // ids are [0, vocab_size)
};
// Everything that can be wrong with a plan that came over the wire: counts, ranges, sizes, duplicate slots. OK or
// kInvalidArgument naming the field.
Status ValidatePlan(const StepPlan& plan, const PlanLimits& limits);

}  // namespace qwen::step
