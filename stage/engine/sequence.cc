#include "stage/engine/sequence.h"

#include <algorithm>
#include <set>

#include "stage/base/bytes.h"
#include "stage/base/check.h"

namespace qwen::engine {
namespace {

// Keeps every sum of token indices and deltas inside int32_t; the largest real context is 2^20.
constexpr int64_t kTokensMax = int64_t{1} << 28;

std::string Number(int64_t value) { return std::to_string(value); }

Status ValidateVision(const Request& request) {
  const auto prompt = static_cast<int64_t>(request.tokens.size());
  std::set<step::VisionId> ids;
  std::vector<std::pair<int64_t, int64_t>> runs;
  for (size_t i = 0; i < request.vision.size(); ++i) {
    const VisionSpan& vision = request.vision[i];
    const std::string where = "vision[" + Number(static_cast<int64_t>(i)) + "]";
    if (vision.input == nullptr) return InvalidArgumentError(where + ".input: null");
    if (!ids.insert(vision.input->id).second) return InvalidArgumentError(where + ".input.id: used twice");
    int64_t tokens = 0;
    for (const auto& [first, count] : vision.runs) {
      if (first < 0 || count <= 0 || int64_t{first} + count > prompt)
        return InvalidArgumentError(where + ".runs: outside of the prompt");
      tokens += count;
      runs.emplace_back(first, count);
    }
    if (!std::is_sorted(vision.runs.begin(), vision.runs.end()))
      return InvalidArgumentError(where + ".runs: not in order");
    if (tokens == 0 || tokens != vision.input->token_count()) {
      return InvalidArgumentError(where + ".runs: " + Number(tokens) + " placeholder tokens for " +
                                  Number(vision.input->token_count()) + " visual tokens");
    }
  }
  std::sort(runs.begin(), runs.end());
  for (size_t i = 1; i < runs.size(); ++i) {
    if (runs[i - 1].first + runs[i - 1].second > runs[i].first) return InvalidArgumentError("vision: runs overlap");
  }
  return OkStatus();
}

Status ValidateIds(const std::vector<int32_t>& ids, int32_t vocab_size, const char* field) {
  for (const int32_t id : ids) {
    if (id < 0 || id >= vocab_size) {
      return InvalidArgumentError(std::string(field) + ": id " + Number(id) + " is not in the vocabulary of " +
                                  Number(vocab_size));
    }
  }
  return OkStatus();
}

}  // namespace

Status ValidateRequest(const Request& request) {
  const auto prompt = static_cast<int64_t>(request.tokens.size());
  if (prompt == 0) return InvalidArgumentError("tokens: the prompt is empty");
  if (request.max_tokens <= 0)
    return InvalidArgumentError("max_tokens: " + Number(request.max_tokens) + " is not positive");
  if (prompt + request.max_tokens > kTokensMax) {
    return InvalidArgumentError("max_tokens: prompt and max_tokens exceed " + Number(kTokensMax));
  }
  if (request.positions.size() != request.tokens.size())
    return InvalidArgumentError("positions: not as many as tokens");
  for (const step::Position& p : request.positions) {
    if (std::min({p.t, p.h, p.w}) < 0) return InvalidArgumentError("positions: negative");
  }
  if (request.position_delta + prompt < 0 || request.position_delta > kTokensMax) {
    return InvalidArgumentError("position_delta: " + Number(request.position_delta) + " is out of range");
  }
  if (!request.on_event) return InvalidArgumentError("on_event: not set");
  return ValidateVision(request);
}

Status ValidateRequestLimits(const Request& request, int32_t prompt_tokens, const step::PlanLimits& limits) {
  const int64_t asked = int64_t{prompt_tokens} + request.max_tokens;
  const int64_t capacity = int64_t{limits.block_count} * limits.block_tokens;
  const std::string sum = Number(prompt_tokens) + " prompt + " + Number(request.max_tokens) +
                          " max_tokens = " + Number(asked) + " tokens asked";
  if (asked > limits.max_sequence_tokens) {
    return InvalidArgumentError("max_tokens: " + sum + ", the model's limit is " + Number(limits.max_sequence_tokens));
  }
  if (asked > capacity) return InvalidArgumentError("max_tokens: " + sum + ", the KV cache holds " + Number(capacity));
  RETURN_IF_ERROR(ValidateIds(request.tokens, limits.vocab_size, "tokens"));
  RETURN_IF_ERROR(ValidateIds(request.params.stop_tokens, limits.vocab_size, "params.stop_tokens"));
  for (const auto& [token, bias] : request.params.logit_bias) {
    RETURN_IF_ERROR(ValidateIds({token}, limits.vocab_size, "params.logit_bias"));
  }
  return OkStatus();
}

Sequence::Sequence(Request&& from, uint64_t arrival_, int64_t now_micros)
    : arrival(arrival_),
      submitted_micros(now_micros),
      request(std::move(from)),
      prompt_tokens(static_cast<int32_t>(request.tokens.size())),
      vision_sent(request.vision.size(), 0) {
  for (size_t input = 0; input < request.vision.size(); ++input) {
    int32_t feature = 0;
    for (const auto& [first, count] : request.vision[input].runs) {
      runs.push_back({.first = first, .count = count, .feature_begin = feature, .input = static_cast<int32_t>(input)});
      feature += count;
    }
  }
  std::sort(runs.begin(), runs.end(), [](const VisionRun& a, const VisionRun& b) { return a.first < b.first; });
}

void Sequence::ForgetPlace() {
  phase = Phase::kWaiting;
  slot = -1;
  blocks.clear();
  scheduled = 0;
  plans_in_flight = 0;
  started = false;
  preempt_when_idle = false;
  published = 0;
  node = {};
  publishing = true;
}

step::Position Sequence::PositionOf(int32_t index) const {
  if (index < prompt_tokens) return request.positions[static_cast<size_t>(index)];
  const int32_t p = index + request.position_delta;
  return {p, p, p};
}

std::vector<VisionRun> Sequence::RunsIn(int32_t begin, int32_t end) const {
  std::vector<VisionRun> cut;
  auto run =
      std::partition_point(runs.begin(), runs.end(), [&](const VisionRun& r) { return r.first + r.count <= begin; });
  for (; run != runs.end() && run->first < end; ++run) {
    const int32_t first = std::max(run->first, begin);
    const int32_t last = std::min(run->first + run->count, end);
    cut.push_back({.first = first,
                   .count = last - first,
                   .feature_begin = run->feature_begin + first - run->first,
                   .input = run->input});
  }
  return cut;
}

int32_t Sequence::VisionEnd(int32_t input) const {
  const auto& last = request.vision[static_cast<size_t>(input)].runs.back();
  return last.first + last.second;
}

std::string Sequence::BlockContent(int32_t index, int32_t block_tokens) const {
  const int32_t begin = index * block_tokens, end = begin + block_tokens;
  QP_CHECK_LE(end, token_count());
  std::string content;
  content.reserve(static_cast<size_t>(block_tokens) * sizeof(int32_t) + 1);
  content.append(reinterpret_cast<const char*>(request.tokens.data() + begin),
                 static_cast<size_t>(block_tokens) * sizeof(int32_t));
  bool plain = true;
  for (int32_t i = begin; i < end && plain; ++i) plain = PositionOf(i) == step::Position{i, i, i};
  if (!plain) {
    content += 'p';
    for (int32_t i = begin; i < end; ++i) AppendBytes(content, PositionOf(i));
  }
  for (const VisionRun& run : RunsIn(begin, end)) {
    const VisionSpan& vision = request.vision[static_cast<size_t>(run.input)];
    // Without a hash an input is like no other: its id tells it apart.
    content += vision.content_hash.empty() ? 'i' : 'v';
    AppendBytes(content, run.first - begin);
    AppendBytes(content, run.count);
    AppendBytes(content, run.feature_begin);
    if (vision.content_hash.empty()) {
      AppendBytes(content, vision.input->id);
    } else {
      AppendBytes(content, static_cast<uint32_t>(vision.content_hash.size()));
      content += vision.content_hash;
    }
  }
  return content;
}

}  // namespace qwen::engine
