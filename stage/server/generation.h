// stage/server/generation.h — one completion request from the engine's inbox to the last byte of its answer: n choices over
// one or more prompts, streamed or whole.
//
// Threads: Start on a worker, OnEvent on the engine thread, everything else on the exchange's strand. A token passes from
// the engine thread to the strand through `events_`, with one posted task for however many events are there.
// Lifetime: shared by the engine's callbacks, posted tasks and the connection, until the last FinishEvent.
#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "stage/base/clock.h"
#include "stage/engine/engine.h"
#include "stage/server/admission.h"
#include "stage/server/choice_stream.h"
#include "stage/server/generation_options.h"
#include "stage/server/http_types.h"
#include "stage/server/metrics.h"
#include "stage/server/model_assets.h"
#include "stage/server/openai_format.h"
#include "stage/server/prompt_builder.h"

namespace qwen::server {

class Generation;

// Generations that are under way, so that a drain can cut them.
class LiveGenerations {
 public:
  void Add(const std::shared_ptr<Generation>& generation);
  void Remove(Generation* generation);
  void CutAll();
  size_t size() const;

 private:
  mutable std::mutex mutex_;
  std::unordered_map<Generation*, std::weak_ptr<Generation>> live_;  // guarded by mutex_
};

// What all generations of a process share. In a shared_ptr, because a generation that the engine still holds when the
// process ends may be destroyed after the Api.
struct GenerationShared {
  explicit GenerationShared(int64_t vision_bytes_max) : admission(vision_bytes_max) {}
  Admission admission;
  LiveGenerations live;
  std::atomic<uint64_t> next_id{1};  // for sequences and vision inputs; unique for the life of the process
};

// What generations use of the rest of the process; it outlives their last event.
struct GenerationContext {
  const ModelAssets& assets;
  engine::Engine& engine;
  Metrics& metrics;
  const Clock& clock;
  std::shared_ptr<GenerationShared> shared;
};

// A request that is ready to run.
struct GenerationPlan {
  std::string method, path, request_id;  // for the log line
  int64_t arrival_micros = 0;
  AnswerHeader header;
  GenerationOptions options;
  OutputForm form;
  std::vector<BuiltPrompt> prompts;   // choice i belongs to prompt i / options.n
  std::vector<std::string> echoes;    // one per prompt, or none
};

class Generation : public std::enable_shared_from_this<Generation> {
 public:
  Generation(const GenerationContext& context, GenerationPlan plan, std::shared_ptr<ResponseWriter> writer);
  ~Generation();
  Generation(const Generation&) = delete;
  Generation& operator=(const Generation&) = delete;

  // Hands the sequences to the engine and answers; a refusal is answered as well. Once.
  void Start();
  // Any thread: ends it with an error towards the client (the drain's time is over).
  void Cut();

 private:
  struct Choice {
    step::SequenceId id = 0;
    int32_t prompt = 0;
    ChoiceStream stream;
    Collected collected;      // not streaming
    int32_t calls_sent = 0;   // streaming
    bool begun = false;       // its first chunk was sent
    bool done = false;
    int64_t last_token_micros = 0;
  };
  struct Event {
    int32_t choice = 0;
    engine::RequestEvent event;
    int64_t at_micros = 0;
  };

  OrError<engine::Request> MakeRequest(int32_t index, std::vector<BuiltPrompt>& prompts);
  void OnEvent(int32_t choice, engine::RequestEvent event);
  void Begin();
  void DrainEvents();
  void OnToken(Choice& choice, int32_t index, engine::TokenEvent event, int64_t at_micros);
  void OnFinish(Choice& choice, int32_t index, const engine::FinishEvent& event);
  void BeginChoice(Choice& choice, int32_t index);
  void Abandon();  // the client has gone
  void CancelAll();
  void Complete();
  void SendChunk(Json chunk);
  Usage CurrentUsage() const;
  void Fail(ApiError error);
  void Log(int status, const std::string& reason) const;

  const GenerationContext context_;
  GenerationPlan plan_;
  const std::shared_ptr<ResponseWriter> writer_;
  const OpenAiFormat format_;
  ByteReservation vision_bytes_;
  std::vector<std::vector<int32_t>> prompt_token_ids_;  // when asked for
  int64_t prompt_tokens_ = 0;

  // Strand only, after Start has posted Begin.
  std::vector<Choice> choices_;
  size_t remaining_ = 0;
  bool begun_ = false;
  bool abandoned_ = false;
  bool ended_ = false;
  int64_t cached_tokens_ = 0;
  int64_t first_token_micros_ = 0;
  std::string error_;

  std::mutex mutex_;
  std::vector<Event> events_;  // guarded by mutex_; bounded by max_tokens of all choices
  bool posted_ = false;        // guarded by mutex_: a DrainEvents is on its way
};

}  // namespace qwen::server
