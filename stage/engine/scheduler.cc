#include "stage/engine/scheduler.h"

#include <algorithm>

#include "stage/base/check.h"

namespace qwen::engine {
namespace {

// SequenceStarts carry whole histories: 2^20 tokens are at most 5 MiB on the wire. After a fault many long sequences
// may be ready to sample in one plan (their prefixes shared), and a plan must stay far below the largest frame.
constexpr int64_t kStartTokensMax = int64_t{1} << 20;

// Fewer tokens of prompts than this do not make a plan of a mixture of experts cheaper: it reads every expert's weights
// anyway (docs/benchmarks/gpu.json, prefill over length).
constexpr int64_t kPrefillShareMin = 2048;

int32_t CeilDivide(int32_t a, int32_t b) { return (a + b - 1) / b; }

template <typename T>
void Remove(std::vector<T*>& list, const T* item) {
  list.erase(std::remove(list.begin(), list.end(), item), list.end());
}

}  // namespace

struct Scheduler::Draft {
  ScheduledStep step;
  int64_t now_micros = 0;
  int32_t budget = 0;        // tokens that still fit
  int64_t start_tokens = 0;  // in plan.starts
  std::vector<std::pair<Sequence*, bool>> parts;
};

// ---- Sequences come and go ----

void Scheduler::Add(Request&& request, int64_t now_micros) {
  auto sequence = std::make_unique<Sequence>(std::move(request), next_arrival_++, now_micros);
  Sequence& added = *sequence;
  const bool fresh = sequences_.emplace(added.id(), std::move(sequence)).second;
  QP_CHECK(fresh) << "sequence " << added.id() << " is live";
  waiting_.push_back(&added);
  if (pool_ == nullptr) return;
  if (const Status fits = ValidateRequestLimits(added.request, added.prompt_tokens, limits_); !fits.ok()) {
    Finish(added, {.reason = FinishReason::kError, .error = fits.message()});
  }
}

void Scheduler::Cancel(step::SequenceId id) {
  const auto found = sequences_.find(id);
  if (found == sequences_.end() || found->second->phase == Phase::kRetired) return;
  Finish(*found->second, {.reason = FinishReason::kCancelled});
}

void Scheduler::StartOver(uint64_t epoch, const step::PlanLimits& limits, int32_t stages) {
  QP_CHECK_GT(stages, 0);
  QP_CHECK_GT(limits.max_slots, 0);
  QP_CHECK_GT(limits.max_batch_tokens, 0);
  epoch_ = epoch;
  limits_ = limits;
  if (options_.max_batch_tokens > 0)
    limits_.max_batch_tokens = std::min(limits.max_batch_tokens, options_.max_batch_tokens);
  stages_ = stages;
  next_step_ = 0;
  in_flight_.clear();
  released_.clear();
  retiring_ = 0;
  refusal_.reset();
  cache_.reset();
  pool_ = std::make_unique<BlockPool>(
      BlockPool::Options{.block_count = limits.block_count, .block_tokens = limits.block_tokens});
  cache_ = std::make_unique<PrefixCache>(*pool_, options_.prefix_cache);
  free_slots_.clear();
  for (int32_t slot = limits.max_slots - 1; slot >= 0; --slot) free_slots_.push_back(slot);

  std::erase_if(sequences_, [](const auto& entry) { return entry.second->phase == Phase::kRetired; });
  for (Sequence* sequence : std::exchange(running_, {})) {
    sequence->ForgetPlace();
    InsertByArrival(waiting_, sequence);
  }
  for (Sequence* sequence : waiting_) std::fill(sequence->vision_sent.begin(), sequence->vision_sent.end(), 0);
  for (Sequence* sequence : std::vector<Sequence*>(waiting_)) {
    const Status fits = ValidateRequestLimits(sequence->request, sequence->prompt_tokens, limits_);
    if (!fits.ok()) Finish(*sequence, {.reason = FinishReason::kError, .error = fits.message()});
  }
  ready_ = true;
}

void Scheduler::Finish(Sequence& sequence, FinishEvent event) {
  event.cached_prompt_tokens = sequence.cached_prompt_tokens;
  event.queued_micros = sequence.queued_micros;
  events_.push_back({sequence.id(), std::move(event)});
  for (size_t i = 0; i < sequence.vision_sent.size(); ++i) {
    // Plans in flight may still use it: the release goes out with a later plan, and plans are executed in order.
    if (sequence.vision_sent[i]) released_.push_back(sequence.request.vision[i].input->id);
  }
  if (sequence.phase == Phase::kWaiting) {
    Remove(waiting_, &sequence);
    sequences_.erase(sequence.id());
    return;
  }
  Remove(running_, &sequence);
  if (sequence.plans_in_flight == 0) {
    FreeResources(sequence);
    sequences_.erase(sequence.id());
    return;
  }
  retiring_ += !sequence.preempt_when_idle;  // a victim was counted when it was chosen
  sequence.phase = Phase::kRetired;
}

void Scheduler::FreeResources(Sequence& sequence) {
  QP_CHECK_EQ(sequence.plans_in_flight, 0) << "sequence " << sequence.id();
  retiring_ -= sequence.phase == Phase::kRetired || sequence.preempt_when_idle;
  cache_->Release(sequence.blocks);
  free_slots_.push_back(sequence.slot);
  sequence.ForgetPlace();
}

void Scheduler::Preempt(Sequence& sequence) {
  Remove(running_, &sequence);
  FreeResources(sequence);
  InsertByArrival(waiting_, &sequence);
  ++counters_.preemptions;
}

void Scheduler::InsertByArrival(std::vector<Sequence*>& list, Sequence* sequence) {
  const auto older = [](const Sequence* a, const Sequence* b) { return a->arrival < b->arrival; };
  list.insert(std::upper_bound(list.begin(), list.end(), sequence, older), sequence);
}

std::optional<int64_t> Scheduler::waiting_since() const {
  if (waiting_.empty()) return std::nullopt;
  return waiting_.front()->submitted_micros;
}

// ---- Schedule ----

std::optional<ScheduledStep> Scheduler::Schedule(int64_t now_micros) {
  if (committed_since_) counters_.last_step_micros = now_micros - *std::exchange(committed_since_, std::nullopt);
  if (!ready_ || plans_in_flight() >= stages_) return std::nullopt;
  Draft draft{.now_micros = now_micros, .budget = limits_.max_batch_tokens};
  const size_t live = sequences_.size();
  AddDecodes(draft);
  draft.budget = std::min(draft.budget, PrefillShare());
  AddPrefills(draft);
  AdmitWaiting(draft);
  if (draft.parts.empty()) {
    // A grammar that ended gave back its blocks after somebody had asked in vain: ask again, with fewer sequences.
    if (sequences_.size() < live) return Schedule(now_micros);
    // README.md "Progress": somebody can always go on, or a result is on its way.
    QP_CHECK(!in_flight_.empty() || sequences_.empty()) << sequences_.size() << " sequences are stuck";
    return std::nullopt;
  }
  step::StepPlan& plan = draft.step.plan;
  plan.epoch = epoch_;
  plan.step = next_step_++;
  plan.vision_released.insert(plan.vision_released.end(), released_.begin(), released_.end());
  released_.clear();
  ++counters_.plans;
  for (const auto& part : draft.parts) PublishBlocks(*part.first);
  in_flight_.push_back({.step = plan.step, .scheduled_micros = now_micros, .parts = std::move(draft.parts)});
  return std::move(draft.step);
}

void Scheduler::AddDecodes(Draft& draft) {
  std::vector<Sequence*> ready;
  int32_t population = 0;  // sequences that feed one token at a time, in flight or not
  for (Sequence* sequence : running_) {
    population += sequence->pending() <= 1;
    if (sequence->pending() == 1) ready.push_back(sequence);
  }
  // An equal share for each plan in flight keeps all stages busy. `stages_` shares hold everybody, so whoever is left
  // out now is in one of the next plans.
  const int32_t share = std::min(draft.budget, CeilDivide(population, stages_));
  int32_t taken = 0;
  for (Sequence* sequence : ready) {
    if (taken == share) break;
    if (sequence->phase != Phase::kRunning || sequence->preempt_when_idle) continue;  // a victim of this very loop
    const int32_t blocks = CeilDivide(sequence->token_count(), limits_.block_tokens);
    if (static_cast<int32_t>(sequence->blocks.size()) < blocks && !TakeOneBlock(*sequence)) continue;
    if (options_.block_ahead && stages_ == 1 && sequence->token_count() == blocks * limits_.block_tokens &&
        static_cast<int32_t>(sequence->blocks.size()) == blocks && cache_->available() > running_count()) {
      if (const std::optional<BlockList> next = cache_->Take(1)) sequence->blocks.push_back(next->front());
    }
    taken += AddSpan(*sequence, 1, draft);
  }
}

// Prompt tokens of one plan. Over S stages M plans take M + S - 1 turns: two plans a stage lose a third of the turns at most,
// so a prompt that could go in one plan goes in several, as far as that does not make the plans themselves slow.
int32_t Scheduler::PrefillShare() const {
  const int64_t most = limits_.max_batch_tokens;
  if (stages_ == 1) return limits_.max_batch_tokens;
  int64_t pending = 0;
  for (const Sequence* sequence : running_) pending += sequence->pending() > 1 ? sequence->pending() : 0;
  for (const Sequence* sequence : waiting_) pending += sequence->pending();
  const int64_t plans = 2 * int64_t{stages_};
  return static_cast<int32_t>(std::clamp((pending + plans - 1) / plans, std::min(kPrefillShareMin, most), most));
}

void Scheduler::AddPrefills(Draft& draft) {
  for (Sequence* sequence : std::vector<Sequence*>(running_)) {  // a copy: AddSpan may finish a sequence
    if (draft.budget == 0) return;
    if (sequence->pending() <= 1 || sequence->preempt_when_idle) continue;
    AddSpan(*sequence, std::min(sequence->pending(), draft.budget), draft);
  }
}

void Scheduler::AdmitWaiting(Draft& draft) {
  while (!waiting_.empty() && !free_slots_.empty() && draft.budget > 0) {
    Sequence& sequence = *waiting_.front();
    if (!Admit(sequence)) return;  // first come, first served: nobody overtakes
    if (sequence.queued_micros < 0) sequence.queued_micros = draft.now_micros - sequence.submitted_micros;
    AddSpan(sequence, std::min(sequence.pending(), draft.budget), draft);
  }
}

bool Scheduler::Admit(Sequence& sequence) {
  // Looking up a prompt of 2^18 tokens takes milliseconds: not again while the answer would be the same.
  const Refusal now{.arrival = sequence.arrival, .available = cache_->available(), .running = running_count()};
  if (refusal_ == now) return false;
  const int32_t total = CeilDivide(sequence.token_count(), limits_.block_tokens);
  // The last token is always computed: its logits are what the request is about.
  const int32_t limit = (sequence.token_count() - 1) / limits_.block_tokens;
  const PrefixCache::Match match =
      cache_->Lookup(limit, [&](int32_t index) { return sequence.BlockContent(index, limits_.block_tokens); });
  const auto hits = static_cast<int32_t>(match.blocks.size());
  if (hits < limit && SoonCached(sequence, match)) return false;
  // One block in reserve for each running sequence, its next need: else the newcomer would soon be preempted again.
  if (total - hits + match.idle + running_count() > cache_->available()) {
    refusal_ = now;
    return false;
  }
  cache_->Share(match.blocks);
  std::optional<BlockList> fresh = cache_->Take(total - hits);
  QP_CHECK(fresh.has_value());
  waiting_.erase(waiting_.begin());
  InsertByArrival(running_, &sequence);
  sequence.phase = Phase::kRunning;
  sequence.slot = free_slots_.back();
  free_slots_.pop_back();
  sequence.blocks = match.blocks;
  sequence.blocks.insert(sequence.blocks.end(), fresh->begin(), fresh->end());
  sequence.scheduled = hits * limits_.block_tokens;
  sequence.published = hits;
  sequence.node = match.tail;
  if (!std::exchange(sequence.admitted_before, true)) {
    sequence.cached_prompt_tokens = std::min(sequence.scheduled, sequence.prompt_tokens);
    counters_.prompt_tokens += static_cast<uint64_t>(sequence.prompt_tokens);
    counters_.cached_prompt_tokens += static_cast<uint64_t>(sequence.cached_prompt_tokens);
  }
  return true;
}

bool Scheduler::SoonCached(const Sequence& sequence, const PrefixCache::Match& match) const {
  if (!cache_->enabled()) return false;
  const auto hits = static_cast<int32_t>(match.blocks.size());
  std::string wanted;
  for (const Sequence* other : running_) {
    if (!other->publishing || other->preempt_when_idle || other->published != hits || !(other->node == match.tail))
      continue;
    if (other->token_count() / limits_.block_tokens <= hits) continue;
    if (wanted.empty()) wanted = sequence.BlockContent(hits, limits_.block_tokens);
    if (other->BlockContent(hits, limits_.block_tokens) == wanted) return true;
  }
  return false;
}

bool Scheduler::TakeOneBlock(Sequence& sequence) {
  while (true) {
    if (const std::optional<BlockList> block = cache_->Take(1)) {
      sequence.blocks.push_back(block->front());
      return true;
    }
    if (retiring_ > 0) return false;  // blocks come back with a result that is on its way
    Sequence* const youngest = running_.back();
    if (youngest == &sequence) return false;  // it keeps what it has until an older one finishes or needs it
    if (youngest->plans_in_flight > 0) {
      youngest->preempt_when_idle = true;
      ++retiring_;
      return false;
    }
    Preempt(*youngest);
  }
}

// Adds the next `count` tokens of the sequence. False when it cannot be in this plan: then nothing was added.
bool Scheduler::AddSpan(Sequence& sequence, int32_t count, Draft& draft) {
  const int32_t begin = sequence.scheduled, end = begin + count;
  step::StepPlan& plan = draft.step.plan;
  step::SequenceSpan span{.sequence = sequence.id(), .slot = sequence.slot, .begin = begin};
  span.sample = end == sequence.token_count();
  const bool start = span.sample && !sequence.started;
  if (start && !plan.starts.empty() && draft.start_tokens + end > kStartTokensMax) return false;
  if (span.sample && sequence.request.constraint != nullptr) {
    const size_t words = (static_cast<size_t>(limits_.vocab_size) + 31) / 32;
    span.allowed.assign(words, 0);
    sequence.request.constraint->FillMask(span.allowed);
    QP_CHECK_EQ(span.allowed.size(), words);
    if (std::all_of(span.allowed.begin(), span.allowed.end(), [](uint32_t word) { return word == 0; })) {
      Finish(sequence, {.reason = FinishReason::kStop});  // the grammar's text is complete: nothing may follow
      return false;
    }
  }
  if (start) {
    plan.starts.push_back({.sequence = sequence.id(),
                           .slot = sequence.slot,
                           .params = sequence.request.params,
                           .tokens = sequence.request.tokens,
                           .prompt_tokens = sequence.prompt_tokens});
    draft.start_tokens += end;
    sequence.started = true;
  }
  const auto& tokens = sequence.request.tokens;
  span.tokens.assign(tokens.begin() + begin, tokens.begin() + end);
  span.positions.reserve(static_cast<size_t>(count));
  for (int32_t i = begin; i < end; ++i) span.positions.push_back(sequence.PositionOf(i));
  const auto blocks = static_cast<size_t>(CeilDivide(end, limits_.block_tokens)) + (options_.block_ahead ? 1 : 0);
  span.blocks.assign(sequence.blocks.begin(), sequence.blocks.begin() + static_cast<std::ptrdiff_t>(std::min(blocks, sequence.blocks.size())));
  AddVision(sequence, span, draft);
  draft.parts.emplace_back(&sequence, span.sample);
  draft.budget -= count;
  sequence.scheduled = end;
  ++sequence.plans_in_flight;
  plan.spans.push_back(std::move(span));
  return true;
}

void Scheduler::AddVision(Sequence& sequence, step::SequenceSpan& span, Draft& draft) {
  if (sequence.runs.empty()) return;
  const int32_t end = span.begin + static_cast<int32_t>(span.tokens.size());
  for (const VisionRun& run : sequence.RunsIn(span.begin, end)) {
    const auto input = static_cast<size_t>(run.input);
    const auto& pixels = sequence.request.vision[input].input;
    if (!std::exchange(sequence.vision_sent[input], 1)) draft.step.vision.push_back(pixels);
    span.vision.push_back({.id = pixels->id,
                           .feature_begin = run.feature_begin,
                           .span_offset = run.first - span.begin,
                           .count = run.count});
  }
  for (size_t input = 0; input < sequence.vision_sent.size(); ++input) {
    if (!sequence.vision_sent[input] || sequence.VisionEnd(static_cast<int32_t>(input)) > end) continue;
    draft.step.plan.vision_released.push_back(sequence.request.vision[input].input->id);
    sequence.vision_sent[input] = 0;
  }
}

void Scheduler::PublishBlocks(Sequence& sequence) {
  if (!cache_->enabled()) return;
  while (sequence.publishing && sequence.published < sequence.scheduled / limits_.block_tokens) {
    const auto node = cache_->Publish(sequence.node, sequence.BlockContent(sequence.published, limits_.block_tokens),
                                      sequence.blocks[static_cast<size_t>(sequence.published)]);
    sequence.publishing = node.has_value();
    if (!node) return;
    sequence.node = *node;
    ++sequence.published;
  }
}

// ---- Commit ----

bool Scheduler::Commit(const step::StepResult& result) {
  if (result.epoch != epoch_ || in_flight_.empty() || in_flight_.front().step != result.step) return false;
  const PlanInFlight done = std::move(in_flight_.front());
  in_flight_.pop_front();
  committed_since_ = done.scheduled_micros;
  auto sample = result.samples.begin();
  for (const auto& [sequence, sampled] : done.parts) {
    --sequence->plans_in_flight;
    const step::SampledToken* token = nullptr;
    if (sampled && sample != result.samples.end()) token = &*sample++;
    if (sequence->phase == Phase::kRunning && sampled) {
      Accept(*sequence, token);  // may finish and delete the sequence
    } else if (sequence->phase == Phase::kRetired && sequence->plans_in_flight == 0) {
      FreeResources(*sequence);
      sequences_.erase(sequence->id());
    } else if (sequence->preempt_when_idle && sequence->plans_in_flight == 0) {
      Preempt(*sequence);
    }
  }
  return true;
}

void Scheduler::Accept(Sequence& sequence, const step::SampledToken* sample) {
  if (sample == nullptr || sample->sequence != sequence.id() || sample->token < 0 ||
      sample->token >= limits_.vocab_size) {
    Finish(sequence, {.reason = FinishReason::kError, .error = "the last stage gave no valid token for this sequence"});
    return;
  }
  Request& request = sequence.request;
  request.tokens.push_back(sample->token);
  ++counters_.generated_tokens;
  events_.push_back(
      {sequence.id(), TokenEvent{.token = sample->token, .logprob = sample->logprob, .top = sample->top}});
  const Status accepted = request.constraint != nullptr ? request.constraint->Accept(sample->token) : OkStatus();
  const auto& stops = request.params.stop_tokens;
  if (!request.ignore_stop_tokens && std::find(stops.begin(), stops.end(), sample->token) != stops.end()) {
    Finish(sequence, {.reason = FinishReason::kStop, .stop_token = sample->token});
  } else if (!accepted.ok()) {
    Finish(sequence, {.reason = FinishReason::kError, .error = accepted.message()});
  } else if (sequence.generated() == request.max_tokens) {
    Finish(sequence, {.reason = FinishReason::kLength});
  } else if (sequence.preempt_when_idle) {
    Preempt(sequence);  // a sampling span is its sequence's last in flight
  }
}

}  // namespace qwen::engine
