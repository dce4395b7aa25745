// stage/server/api.h — the OpenAI API and the head's own endpoints over one engine: routes, checks, hands over.
//
// Threads: I/O threads call Precheck and Handle, which only route; parsing and preprocessing run on the worker pool, the
// rest in Generation. Thread safety: all members from any thread.
// Lifetime: everything in Dependencies outlives it; the HttpServer that calls it and the engine thread stop before it goes.
#pragma once
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "stage/base/clock.h"
#include "stage/engine/engine.h"
#include "stage/server/admission.h"
#include "stage/server/api_keys.h"
#include "stage/server/generation.h"
#include "stage/server/http_types.h"
#include "stage/server/metrics.h"
#include "stage/server/model_assets.h"
#include "stage/server/prompt_builder.h"
#include "stage/server/worker_pool.h"

namespace qwen::server {

class Api {
 public:
  struct Options {
    int workers = 4;
    size_t worker_queue = 256;  // requests that wait for a worker; one more is a 429
    int64_t vision_bytes_max = 8ll << 30;
    std::string version;
    // For so long after it lost its group a head that has served says that it is ready: requests wait in its queue until the stage that
    // was lost is replaced, where without a ready head a load balancer would refuse them.
    std::chrono::microseconds recovery_hold{0};
  };
  struct Dependencies {
    const ModelAssets& assets;
    engine::Engine& engine;
    Metrics& metrics;
    const Clock& clock;
    const UrlFetcher& fetcher;
    const ApiKeys& keys;
  };
  // What only main's other rooms know; called from any thread. Unset: no connections, alive, no detail.
  struct StageProgress {
    int32_t stage = 0;
    bool connected = false;
    bool loaded = false;  // its weights
    int32_t load_percent = 0;
  };
  struct Probes {
    std::function<int()> connections;
    std::function<bool()> alive;              // false: /healthz is 500 and the process should be restarted
    std::function<std::string()> waiting_for;  // while not ready: "stage 2 (loading 41 %)"
    std::function<std::vector<StageProgress>()> stages;
  };
  Api(const Options& options, const Dependencies& dependencies);
  ~Api();  // stops the workers
  Api(const Api&) = delete;
  Api& operator=(const Api&) = delete;

  // Refuses by header alone: unknown path, wrong method, missing key, wrong content type, not serving.
  std::optional<HttpResponse> Precheck(const HttpRequest& request) const;
  void Handle(HttpRequest request, std::shared_ptr<ResponseWriter> writer);

  void StartDraining();             // not ready; new completions are 503
  void CutAll() { shared_->live.CutAll(); }  // what still runs ends with an error event
  bool idle() const { return shared_->live.size() == 0 && queued_ == 0; }
  // Why not ready, or empty.
  std::string NotReadyReason() const;
  void set_probes(Probes probes) { probes_ = std::move(probes); }  // before serving starts

 private:
  struct Route;
  static const Route* FindRoute(const std::string& path);
  GenerationContext Context();
  void Work(HttpRequest request, std::shared_ptr<ResponseWriter> writer, const Route& route);
  void Chat(const HttpRequest& request, const Json& body, std::shared_ptr<ResponseWriter> writer, int64_t arrival_micros);
  void Completion(const HttpRequest& request, const Json& body, std::shared_ptr<ResponseWriter> writer, int64_t arrival_micros);
  HttpResponse Tokenize(const Json& body) const;
  HttpResponse Detokenize(const Json& body) const;
  HttpResponse Models(const std::string& path) const;
  HttpResponse Health() const;
  HttpResponse Ready() const;
  HttpResponse MetricsText();
  HttpResponse Load() const;
  std::optional<ApiError> CheckModel(const std::string& model) const;
  void Refuse(const HttpRequest& request, ResponseWriter& writer, const ApiError& error) const;  // answers and logs
  GenerationPlan MakePlan(const HttpRequest& request, int64_t arrival_micros, AnswerHeader::Kind kind, GenerationOptions options) const;

  const Options options_;
  const Dependencies deps_;
  const PromptBuilder builder_;
  const std::shared_ptr<GenerationShared> shared_;
  std::atomic<int> queued_{0};  // waiting for or on a worker
  Probes probes_;
  WorkerPool workers_;  // last: stops before what its tasks use goes
};

}  // namespace qwen::server
