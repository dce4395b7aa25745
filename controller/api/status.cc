#include "controller/api/status.h"

#include <time.h>

#include <array>
#include <nlohmann/json.hpp>

namespace qwen::api {
namespace {
using Json = nlohmann::json;

constexpr std::array<std::pair<std::string_view, GroupPhase>, 5> kPhases = {
    {{"Forming", GroupPhase::kForming}, {"Formed", GroupPhase::kFormed}, {"Down", GroupPhase::kDown}, {"Failed", GroupPhase::kFailed}, {"Leaving", GroupPhase::kLeaving}}};

std::string TimeText(int64_t seconds) {
  const time_t time = seconds;
  struct tm parts;
  gmtime_r(&time, &parts);
  std::array<char, 32> text;
  return std::string(text.data(), strftime(text.data(), text.size(), "%Y-%m-%dT%H:%M:%SZ", &parts));
}

int64_t TimeOf(const std::string& text) {
  struct tm parts {};
  return strptime(text.c_str(), "%Y-%m-%dT%H:%M:%SZ", &parts) == nullptr ? 0 : timegm(&parts);
}

template <typename T>
T Get(const Json& object, const char* key, T fallback = {}) {
  const auto found = object.find(key);
  if (found == object.end()) return fallback;
  if constexpr (std::is_same_v<T, std::string>) {
    return found->is_string() ? found->get<T>() : fallback;
  } else {
    return found->is_number_integer() ? found->get<T>() : fallback;
  }
}

GroupPhase PhaseOf(const Json& item) {
  const std::string phase = Get<std::string>(item, "phase");
  for (const auto& [name, value] : kPhases)
    if (name == phase) return value;
  return GroupPhase::kForming;
}

template <typename Each>
void ForEachObject(const Json& object, const char* key, const Each& each) {
  const auto found = object.find(key);
  if (found == object.end() || !found->is_array()) return;
  for (const Json& item : *found)
    if (item.is_object()) each(item);
}

}  // namespace

std::string_view GroupPhaseName(GroupPhase phase) { return kPhases[static_cast<size_t>(phase)].first; }

PipelineStatus ParseStatus(std::string_view text) {
  PipelineStatus status;
  const Json json = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return status;
  status.observed_generation = Get<int64_t>(json, "observedGeneration");
  status.replicas = Get<int32_t>(json, "replicas");
  status.ready_replicas = Get<int32_t>(json, "readyReplicas");
  status.selector = Get<std::string>(json, "selector");
  status.stages = Get<std::string>(json, "stages");
  status.epoch = Get<int64_t>(json, "epoch");
  status.restarts = Get<int32_t>(json, "restarts");
  ForEachObject(json, "groups", [&](const Json& item) {
    GroupRecord group{.replica = Get<int32_t>(item, "replica"), .epoch = Get<int64_t>(item, "epoch"), .revision = Get<std::string>(item, "revision")};
    group.phase = PhaseOf(item);
    group.failures = Get<int32_t>(item, "failures");
    group.last_failure_seconds = TimeOf(Get<std::string>(item, "lastFailureTime"));
    group.last_failure_message = Get<std::string>(item, "lastFailureMessage");
    if (const auto served = item.find("served"); served != item.end()) group.served = *served == true;
    if (const auto next = item.find("next"); next != item.end() && next->is_object())
      group.next = IncomingGroup{Get<int64_t>(*next, "epoch"), Get<std::string>(*next, "revision"), PhaseOf(*next), TimeOf(Get<std::string>(*next, "since"))};
    ForEachObject(item, "replaced", [&](const Json& one) { group.replaced.push_back({Get<int32_t>(one, "stage"), Get<int64_t>(one, "epoch")}); });
    ForEachObject(item, "loading", [&](const Json& one) { group.loading.push_back({Get<int32_t>(one, "stage"), Get<int32_t>(one, "percent")}); });
    group.mending_epoch = Get<int64_t>(item, "mendingEpoch");
    group.unready_since_seconds = TimeOf(Get<std::string>(item, "unreadySince"));
    group.retiring_epoch = Get<int64_t>(item, "retiringEpoch");
    group.refused_revision = Get<std::string>(item, "refusedRevision");
    status.groups.push_back(std::move(group));
  });
  ForEachObject(json, "conditions", [&](const Json& item) {
    status.conditions.push_back({.type = Get<std::string>(item, "type"), .value = Get<std::string>(item, "status") == "True",
                                 .reason = Get<std::string>(item, "reason"), .message = Get<std::string>(item, "message"),
                                 .observed_generation = Get<int64_t>(item, "observedGeneration"),
                                 .last_transition_seconds = TimeOf(Get<std::string>(item, "lastTransitionTime"))});
  });
  return status;
}

std::string StatusToJson(const PipelineStatus& s) {
  Json json = {{"observedGeneration", s.observed_generation}, {"replicas", s.replicas}, {"readyReplicas", s.ready_replicas}, {"selector", s.selector},
               {"stages", s.stages}, {"epoch", s.epoch}, {"restarts", s.restarts}, {"groups", Json::array()}, {"conditions", Json::array()}};
  for (const GroupRecord& group : s.groups) {
    Json item = {{"replica", group.replica}, {"epoch", group.epoch}, {"revision", group.revision}, {"phase", GroupPhaseName(group.phase)},
                 {"failures", group.failures}};
    if (group.last_failure_seconds != 0) item["lastFailureTime"] = TimeText(group.last_failure_seconds);
    if (!group.last_failure_message.empty()) item["lastFailureMessage"] = group.last_failure_message;
    if (group.served) item["served"] = true;
    if (group.unready_since_seconds != 0) item["unreadySince"] = TimeText(group.unready_since_seconds);
    if (group.next)
      item["next"] = {{"epoch", group.next->epoch}, {"revision", group.next->revision}, {"phase", GroupPhaseName(group.next->phase)},
                      {"since", TimeText(group.next->since_seconds)}};
    for (const Replacement& one : group.replaced) item["replaced"].push_back({{"stage", one.stage}, {"epoch", one.epoch}});
    for (const StageLoad& one : group.loading) item["loading"].push_back({{"stage", one.stage}, {"percent", one.percent}});
    if (group.mending_epoch != 0) item["mendingEpoch"] = group.mending_epoch;
    if (group.retiring_epoch != 0) item["retiringEpoch"] = group.retiring_epoch;
    if (!group.refused_revision.empty()) item["refusedRevision"] = group.refused_revision;
    json["groups"].push_back(std::move(item));
  }
  for (const Condition& condition : s.conditions)
    json["conditions"].push_back({{"type", condition.type}, {"status", condition.value ? "True" : "False"}, {"reason", condition.reason},
                                  {"message", condition.message}, {"observedGeneration", condition.observed_generation},
                                  {"lastTransitionTime", TimeText(condition.last_transition_seconds)}});
  return json.dump();
}

}  // namespace qwen::api
