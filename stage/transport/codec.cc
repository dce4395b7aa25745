#include "stage/transport/codec.h"

#include <cmath>

#include "stage/contract/wire.pb.h"
#include "stage/transport/frame.h"

namespace qwen::transport {
namespace {

// Bounds of fields whose size the group's limits do not give. A name, an address or a reason is never longer than this.
constexpr size_t kTextBytesMax = 4096;
constexpr size_t kSecretFieldBytesMax = 64;  // nonces and HMACs are 32
constexpr int kTopLogprobsMax = 1024;

Status Bad(const std::string& what) { return InvalidArgumentError(what); }

Status CheckText(const std::string& text, const char* field, size_t bytes_max = kTextBytesMax) {
  if (text.size() > bytes_max) return Bad(std::string(field) + ": longer than " + std::to_string(bytes_max) + " bytes");
  return OkStatus();
}

Status CheckNotNegative(int64_t value, const char* field) {
  if (value < 0) return Bad(std::string(field) + ": negative");
  return OkStatus();
}

// ---- StepPlan

void Encode(const step::SamplingParams& in, wire::SamplingParams& out) {
  out.set_temperature(in.temperature);
  out.set_top_k(in.top_k);
  out.set_top_p(in.top_p);
  out.set_min_p(in.min_p);
  out.set_repetition_penalty(in.repetition_penalty);
  out.set_presence_penalty(in.presence_penalty);
  out.set_frequency_penalty(in.frequency_penalty);
  out.set_no_repeat_ngram_size(in.no_repeat_ngram_size);
  out.set_seed(in.seed);
  out.set_logprobs(in.logprobs);
  out.set_min_tokens(in.min_tokens);
  out.set_token_limit(in.token_limit);
  out.mutable_stop_tokens()->Add(in.stop_tokens.begin(), in.stop_tokens.end());
  for (const auto& [token, bias] : in.logit_bias) {
    auto* entry = out.add_logit_bias();
    entry->set_token(token);
    entry->set_bias(bias);
  }
}

Status CheckFloat(float value, float low, float high, const char* field) {
  if (!std::isfinite(value) || value < low || value > high) return Bad(std::string("params.") + field + ": out of range");
  return OkStatus();
}

Result<step::SamplingParams> Decode(const wire::SamplingParams& in) {
  step::SamplingParams out;
  out.temperature = in.temperature();
  out.top_k = in.top_k();
  out.top_p = in.top_p();
  out.min_p = in.min_p();
  out.repetition_penalty = in.repetition_penalty();
  out.presence_penalty = in.presence_penalty();
  out.frequency_penalty = in.frequency_penalty();
  out.no_repeat_ngram_size = in.no_repeat_ngram_size();
  out.seed = in.seed();
  out.logprobs = in.logprobs();
  out.min_tokens = in.min_tokens();
  out.token_limit = in.token_limit();
  out.stop_tokens.assign(in.stop_tokens().begin(), in.stop_tokens().end());
  out.logit_bias.reserve(static_cast<size_t>(in.logit_bias_size()));
  for (const auto& entry : in.logit_bias()) {
    if (!std::isfinite(entry.bias())) return Bad("params.logit_bias: not finite");
    out.logit_bias.emplace_back(entry.token(), entry.bias());
  }
  constexpr float kAnyPositive = 1e30f;
  RETURN_IF_ERROR(CheckFloat(out.temperature, 0.0f, kAnyPositive, "temperature"));
  RETURN_IF_ERROR(CheckFloat(out.top_p, 0.0f, 1.0f, "top_p"));
  RETURN_IF_ERROR(CheckFloat(out.min_p, 0.0f, 1.0f, "min_p"));
  RETURN_IF_ERROR(CheckFloat(out.repetition_penalty, 0.0f, kAnyPositive, "repetition_penalty"));
  RETURN_IF_ERROR(CheckFloat(out.presence_penalty, -kAnyPositive, kAnyPositive, "presence_penalty"));
  RETURN_IF_ERROR(CheckFloat(out.frequency_penalty, -kAnyPositive, kAnyPositive, "frequency_penalty"));
  if (out.top_p == 0.0f || out.repetition_penalty == 0.0f) return Bad("params: top_p and repetition_penalty must be positive");
  RETURN_IF_ERROR(CheckNotNegative(out.top_k, "params.top_k"));
  RETURN_IF_ERROR(CheckNotNegative(out.no_repeat_ngram_size, "params.no_repeat_ngram_size"));
  RETURN_IF_ERROR(CheckNotNegative(out.min_tokens, "params.min_tokens"));
  RETURN_IF_ERROR(CheckNotNegative(out.token_limit, "params.token_limit"));
  if (out.logprobs < -1 || out.logprobs > kTopLogprobsMax) return Bad("params.logprobs: out of range");
  return out;
}

void Encode(const step::StepPlan& in, wire::StepPlan& out) {
  out.set_epoch(in.epoch);
  out.set_step(in.step);
  for (const step::SequenceStart& start : in.starts) {
    auto* s = out.add_starts();
    s->set_sequence(start.sequence);
    s->set_slot(start.slot);
    Encode(start.params, *s->mutable_params());
    s->mutable_tokens()->Add(start.tokens.begin(), start.tokens.end());
    s->set_prompt_tokens(start.prompt_tokens);
  }
  out.mutable_vision_released()->Add(in.vision_released.begin(), in.vision_released.end());
  for (const step::SequenceSpan& span : in.spans) {
    auto* s = out.add_spans();
    s->set_sequence(span.sequence);
    s->set_slot(span.slot);
    s->set_begin(span.begin);
    s->mutable_tokens()->Add(span.tokens.begin(), span.tokens.end());
    s->mutable_positions()->Reserve(static_cast<int>(span.positions.size() * 3));
    for (const step::Position& p : span.positions) {
      s->add_positions(p.t);
      s->add_positions(p.h);
      s->add_positions(p.w);
    }
    s->mutable_blocks()->Add(span.blocks.begin(), span.blocks.end());
    for (const step::VisionSlice& slice : span.vision) {
      auto* v = s->add_vision();
      v->set_id(slice.id);
      v->set_feature_begin(slice.feature_begin);
      v->set_span_offset(slice.span_offset);
      v->set_count(slice.count);
    }
    s->set_sample(span.sample);
    s->mutable_allowed()->Add(span.allowed.begin(), span.allowed.end());
  }
}

Result<step::StepPlan> Decode(const wire::StepPlan& in) {
  step::StepPlan out;
  out.epoch = in.epoch();
  out.step = in.step();
  out.starts.reserve(static_cast<size_t>(in.starts_size()));
  for (const auto& s : in.starts()) {
    step::SequenceStart start;
    start.sequence = s.sequence();
    start.slot = s.slot();
    ASSIGN_OR_RETURN(start.params, Decode(s.params()));
    start.tokens.assign(s.tokens().begin(), s.tokens().end());
    start.prompt_tokens = s.prompt_tokens();
    out.starts.push_back(std::move(start));
  }
  out.vision_released.assign(in.vision_released().begin(), in.vision_released().end());
  out.spans.reserve(static_cast<size_t>(in.spans_size()));
  for (const auto& s : in.spans()) {
    if (s.positions_size() != 3 * int64_t{s.tokens_size()}) return Bad("plan.spans.positions: not three per token");
    step::SequenceSpan span;
    span.sequence = s.sequence();
    span.slot = s.slot();
    span.begin = s.begin();
    span.tokens.assign(s.tokens().begin(), s.tokens().end());
    span.positions.reserve(span.tokens.size());
    for (int i = 0; i < s.positions_size(); i += 3) {
      span.positions.push_back({s.positions(i), s.positions(i + 1), s.positions(i + 2)});
    }
    span.blocks.assign(s.blocks().begin(), s.blocks().end());
    for (const auto& v : s.vision()) span.vision.push_back({v.id(), v.feature_begin(), v.span_offset(), v.count()});
    span.sample = s.sample();
    span.allowed.assign(s.allowed().begin(), s.allowed().end());
    out.spans.push_back(std::move(span));
  }
  return out;
}

// ---- StepResult

void Encode(const step::StepResult& in, wire::StepResult& out) {
  out.set_epoch(in.epoch);
  out.set_step(in.step);
  for (const step::SampledToken& sample : in.samples) {
    auto* s = out.add_samples();
    s->set_sequence(sample.sequence);
    s->set_token(sample.token);
    s->set_logprob(sample.logprob);
    for (const step::TokenLogprob& top : sample.top) {
      auto* t = s->add_top();
      t->set_token(top.token);
      t->set_logprob(top.logprob);
    }
  }
}

Result<step::StepResult> Decode(const wire::StepResult& in) {
  step::StepResult out;
  out.epoch = in.epoch();
  out.step = in.step();
  for (const auto& s : in.samples()) {
    RETURN_IF_ERROR(CheckNotNegative(s.token(), "result.samples.token"));
    if (s.top_size() > kTopLogprobsMax) return Bad("result.samples.top: too many");
    step::SampledToken sample{.sequence = s.sequence(), .token = s.token(), .logprob = s.logprob(), .top = {}};
    for (const auto& t : s.top()) sample.top.push_back({t.token(), t.logprob()});
    out.samples.push_back(std::move(sample));
  }
  return out;
}

// ---- Membership

template <typename Wire>
void EncodeCapacity(const StageCapacity& in, Wire& out) {
  out.set_block_tokens(in.block_tokens);
  out.set_block_count(in.block_count);
  out.set_max_slots(in.max_slots);
  out.set_max_batch_tokens(in.max_batch_tokens);
  out.set_max_sequence_tokens(in.max_sequence_tokens);
  out.set_weight_bytes(in.weight_bytes);
}

template <typename Wire>
Result<StageCapacity> DecodeCapacity(const Wire& in, bool complete) {
  StageCapacity out{.block_tokens = in.block_tokens(),
                    .block_count = in.block_count(),
                    .max_slots = in.max_slots(),
                    .max_batch_tokens = in.max_batch_tokens(),
                    .max_sequence_tokens = in.max_sequence_tokens(),
                    .weight_bytes = in.weight_bytes()};
  const int32_t least = complete ? 1 : 0;
  if (out.block_tokens < least || out.block_count < least || out.max_slots < least || out.max_batch_tokens < least ||
      out.max_sequence_tokens < least || out.weight_bytes < 0) {
    return Bad("capacity: a size is not positive");
  }
  return out;
}

void Encode(const Hello& in, wire::Hello& out) {
  out.set_protocol_version(in.protocol_version);
  out.set_pipeline_uid(in.pipeline_uid);
  out.set_stage(static_cast<uint32_t>(in.stage));
  out.set_stages(static_cast<uint32_t>(in.stages));
  out.set_layer_begin(in.layer_begin);
  out.set_layer_end(in.layer_end);
  out.set_config_hash(in.config_hash);
  out.set_data_address(in.data_address);
  EncodeCapacity(in.capacity, out);
  out.set_nonce(in.nonce);
  out.set_hmac(in.hmac);
  out.set_epoch(in.epoch);
  out.set_loading(in.loading);
  out.set_pod_epoch(in.pod_epoch);
  out.set_instance(in.instance);
}

Result<Hello> Decode(const wire::Hello& in) {
  Hello out;
  out.protocol_version = in.protocol_version();
  out.pipeline_uid = in.pipeline_uid();
  if (in.stage() > INT32_MAX || in.stages() > INT32_MAX) return Bad("hello.stage: out of range");
  out.stage = static_cast<int32_t>(in.stage());
  out.stages = static_cast<int32_t>(in.stages());
  out.layer_begin = in.layer_begin();
  out.layer_end = in.layer_end();
  out.config_hash = in.config_hash();
  out.data_address = in.data_address();
  ASSIGN_OR_RETURN(out.capacity, DecodeCapacity(in, !in.loading()));
  out.nonce = in.nonce();
  out.hmac = in.hmac();
  out.epoch = in.epoch();
  out.loading = in.loading();
  out.pod_epoch = in.pod_epoch();
  out.instance = in.instance();
  RETURN_IF_ERROR(CheckText(out.pipeline_uid, "hello.pipeline_uid"));
  RETURN_IF_ERROR(CheckText(out.config_hash, "hello.config_hash"));
  RETURN_IF_ERROR(CheckText(out.data_address, "hello.data_address"));
  RETURN_IF_ERROR(CheckText(out.instance, "hello.instance"));
  RETURN_IF_ERROR(CheckText(out.nonce, "hello.nonce", kSecretFieldBytesMax));
  RETURN_IF_ERROR(CheckText(out.hmac, "hello.hmac", kSecretFieldBytesMax));
  return out;
}

Result<VisionChunk> Decode(const wire::VisionChunk& in) {
  if (in.patches().empty() || in.patches().size() > kVisionChunkBytes) return Bad("vision.patches: size out of range");
  return VisionChunk{.id = in.id(),
                     .grid = {in.grid_t(), in.grid_h(), in.grid_w()},
                     .total_bytes = in.total_bytes(),
                     .offset = in.offset(),
                     .patches = in.patches()};
}

Result<Failure> Decode(const wire::Failure& in) {
  RETURN_IF_ERROR(CheckText(in.reason(), "failure.reason"));
  RETURN_IF_ERROR(CheckText(in.hmac(), "failure.hmac", kSecretFieldBytesMax));
  Failure out{.epoch = in.epoch(), .code = FailureCode::kUnspecified, .reason = in.reason(), .fatal = in.fatal(), .hmac = in.hmac()};
  if (in.code() <= static_cast<uint32_t>(FailureCode::kLeaving)) out.code = static_cast<FailureCode>(in.code());
  return out;
}

struct Encoder {
  wire::ControlMessage& out;
  void operator()(const Challenge& m) {
    out.mutable_challenge()->set_protocol_version(m.protocol_version);
    out.mutable_challenge()->set_nonce(m.nonce);
  }
  void operator()(const Hello& m) { Encode(m, *out.mutable_hello()); }
  void operator()(const Welcome& m) {
    out.mutable_welcome()->set_epoch(m.epoch);
    out.mutable_welcome()->set_hmac(m.hmac);
  }
  void operator()(const Assemble& m) {
    out.mutable_assemble()->set_epoch(m.epoch);
    out.mutable_assemble()->set_next_address(m.next_address);
    out.mutable_assemble()->set_block_count(m.block_count);
  }
  void operator()(const Assembled& m) { out.mutable_assembled()->set_epoch(m.epoch); }
  void operator()(const step::StepPlan& m) { Encode(m, *out.mutable_plan()); }
  void operator()(const step::StepResult& m) { Encode(m, *out.mutable_result()); }
  void operator()(const VisionChunk& m) {
    auto* v = out.mutable_vision();
    v->set_id(m.id);
    v->set_grid_t(m.grid[0]);
    v->set_grid_h(m.grid[1]);
    v->set_grid_w(m.grid[2]);
    v->set_total_bytes(m.total_bytes);
    v->set_offset(m.offset);
    v->set_patches(m.patches);
  }
  void operator()(const Heartbeat& m) {
    out.mutable_heartbeat()->set_sent_micros(m.sent_micros);
    out.mutable_heartbeat()->set_steps_done(m.steps_done);
  }
  void operator()(const Shutdown&) { out.mutable_shutdown(); }
  void operator()(const Failure& m) {
    auto* f = out.mutable_failure();
    f->set_epoch(m.epoch);
    f->set_reason(m.reason.substr(0, kTextBytesMax));
    f->set_fatal(m.fatal);
    f->set_code(static_cast<uint32_t>(m.code));
    f->set_hmac(m.hmac);
  }
  void operator()(const Loading& m) {
    out.mutable_loading()->set_bytes_done(m.bytes_done);
    out.mutable_loading()->set_bytes_total(m.bytes_total);
  }
  void operator()(const Loaded& m) { EncodeCapacity(m.capacity, *out.mutable_loaded()); }
};

// Result<T> -> Result<Message>
template <typename T>
Result<Message> Wrap(Result<T> result) {
  if (!result.ok()) return result.status();
  return Message(std::move(result).value());
}

}  // namespace

std::string_view FailureCodeName(FailureCode code) {
  switch (code) {
    case FailureCode::kUnspecified: return "unspecified";
    case FailureCode::kAuth: return "authentication failed";
    case FailureCode::kProtocol: return "protocol error";
    case FailureCode::kConfig: return "configuration differs";
    case FailureCode::kStale: return "stale";
    case FailureCode::kBusy: return "stage index taken";
    case FailureCode::kEpochLost: return "epoch lost";
    case FailureCode::kLeaving: return "leaving";
  }
  return "unspecified";
}

std::string_view MessageName(const Message& message) {
  static constexpr std::string_view kNames[] = {"Challenge",  "Hello",       "Welcome",   "Assemble", "Assembled", "StepPlan", "StepResult",
                                                "VisionChunk", "Heartbeat", "Shutdown", "Failure",   "Loading",  "Loaded"};
  static_assert(std::size(kNames) == std::variant_size_v<Message>);
  return kNames[message.index()];
}

std::string EncodeMessage(const Message& message) {
  wire::ControlMessage out;
  std::visit(Encoder{out}, message);
  return out.SerializeAsString();
}

Result<Message> DecodeMessage(const std::string& payload) {
  wire::ControlMessage in;
  if (!in.ParseFromString(payload)) return DataLossError("message: not a ControlMessage");
  switch (in.body_case()) {
    case wire::ControlMessage::kChallenge: {
      RETURN_IF_ERROR(CheckText(in.challenge().nonce(), "challenge.nonce", kSecretFieldBytesMax));
      return Message(Challenge{in.challenge().protocol_version(), in.challenge().nonce()});
    }
    case wire::ControlMessage::kHello: return Wrap(Decode(in.hello()));
    case wire::ControlMessage::kWelcome: {
      RETURN_IF_ERROR(CheckText(in.welcome().hmac(), "welcome.hmac", kSecretFieldBytesMax));
      return Message(Welcome{in.welcome().epoch(), in.welcome().hmac()});
    }
    case wire::ControlMessage::kAssemble: {
      RETURN_IF_ERROR(CheckText(in.assemble().next_address(), "assemble.next_address"));
      if (in.assemble().block_count() <= 0) return Bad("assemble.block_count: not positive");
      return Message(Assemble{in.assemble().epoch(), in.assemble().next_address(), in.assemble().block_count()});
    }
    case wire::ControlMessage::kAssembled: return Message(Assembled{in.assembled().epoch()});
    case wire::ControlMessage::kPlan: return Wrap(Decode(in.plan()));
    case wire::ControlMessage::kResult: return Wrap(Decode(in.result()));
    case wire::ControlMessage::kVision: return Wrap(Decode(in.vision()));
    case wire::ControlMessage::kHeartbeat: return Message(Heartbeat{in.heartbeat().sent_micros(), in.heartbeat().steps_done()});
    case wire::ControlMessage::kShutdown: return Message(Shutdown{});
    case wire::ControlMessage::kFailure: return Wrap(Decode(in.failure()));
    case wire::ControlMessage::kLoading: {
      if (in.loading().bytes_done() < 0 || in.loading().bytes_total() < 0) return Bad("loading: negative");
      return Message(Loading{in.loading().bytes_done(), in.loading().bytes_total()});
    }
    case wire::ControlMessage::kLoaded: {
      auto capacity = DecodeCapacity(in.loaded(), /*complete=*/true);
      if (!capacity.ok()) return capacity.status();
      return Message(Loaded{*capacity});
    }
    case wire::ControlMessage::BODY_NOT_SET: break;
  }
  return DataLossError("message: empty or of an unknown kind");
}

Result<std::string> EncodeFramedMessage(const Message& message) {
  std::string payload = EncodeMessage(message);
  if (payload.size() > kFrameBytesMax) {
    return ResourceExhaustedError(std::string(MessageName(message)) + " has " + std::to_string(payload.size()) + " bytes, at most " +
                                  std::to_string(kFrameBytesMax));
  }
  return EncodeFrame(payload);
}

std::optional<std::string> EncodeVisionChunk(const step::VisionInput& input, size_t index) {
  const size_t offset = index * kVisionChunkBytes;
  if (offset >= input.patches.size()) return std::nullopt;
  const size_t count = std::min(kVisionChunkBytes, input.patches.size() - offset);
  VisionChunk chunk{.id = input.id, .grid = input.grid, .total_bytes = input.patches.size(), .offset = offset, .patches = {}};
  chunk.patches.assign(reinterpret_cast<const char*>(input.patches.data()) + offset, count);
  return EncodeFrame(EncodeMessage(Message(std::move(chunk))));
}

Result<std::optional<step::VisionInput>> VisionAssembler::Add(VisionChunk chunk) {
  if (!current_) {
    if (chunk.offset != 0) return Bad("vision.offset: the first piece must be at 0");
    for (int32_t side : chunk.grid) {
      // 2^20 patches a side is beyond any limit of the model; it keeps the product below from overflowing.
      if (side <= 0 || side > (1 << 20)) return Bad("vision.grid: out of range");
    }
    if (chunk.grid[1] % 2 != 0 || chunk.grid[2] % 2 != 0) return Bad("vision.grid: h and w must be even");
    step::VisionInput input;
    input.id = chunk.id;
    input.grid = chunk.grid;
    if (static_cast<uint64_t>(input.patch_count()) > input_bytes_max_ / kPatchBytes) return Bad("vision.grid: larger than an input may be");
    if (chunk.total_bytes != static_cast<uint64_t>(input.patch_count()) * kPatchBytes) return Bad("vision.total_bytes: does not fit the grid");
    total_bytes_ = chunk.total_bytes;
    current_ = std::move(input);
  } else if (chunk.id != current_->id || chunk.grid != current_->grid || chunk.total_bytes != total_bytes_) {
    return Bad("vision: a piece of another input in between");
  } else if (chunk.offset != current_->patches.size()) {
    return Bad("vision.offset: out of order");
  }
  if (chunk.patches.size() > total_bytes_ - current_->patches.size()) return Bad("vision.patches: past the input's end");
  current_->patches.insert(current_->patches.end(), chunk.patches.begin(), chunk.patches.end());
  if (current_->patches.size() < total_bytes_) return std::optional<step::VisionInput>();
  std::optional<step::VisionInput> done(std::move(*current_));
  current_.reset();
  return done;
}

}  // namespace qwen::transport
