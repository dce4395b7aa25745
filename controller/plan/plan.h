// controller/plan/plan.h — the operator's whole decision: a snapshot in, actions out. Pure: reconcile/ acts on it.
// The same snapshot gives the same actions, and a snapshot of what was done gives none (a test drives it to rest).
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "controller/plan/objects.h"
#include "controller/plan/observed.h"

namespace qwen::plan {

struct Notice {  // an event for people
  bool warning = false;
  std::string reason;
  std::string action;
  std::string note;
};
struct PodRef {
  std::string name;
  std::string uid;
  bool force = false;  // its node is gone: nobody is there to confirm the end
};
// In the order in which it is to be done. When `status` cannot be written nothing else may be.
struct Actions {
  api::PipelineStatus status;  // to be written when it differs from the snapshot's
  std::string revision;        // that the spec asks for; empty: none was worked out
  bool add_finalizer = false;  // before anything serves
  bool create_secret = false;
  std::vector<nlohmann::json> apply;           // children, by server-side apply
  std::vector<nlohmann::json> create_weights;  // claims and Jobs
  std::vector<std::string> delete_children;    // "Kind/name": children that the spec no longer wants
  std::vector<PodRef> delete_pods;
  std::vector<nlohmann::json> create_pods;
  bool remove_finalizer = false;  // nothing is left to wait for
  std::vector<nlohmann::json> pod_groups;  // that should be there (scheduling.h): whoever acts remembers what it applied
  std::vector<Notice> notices;
  std::optional<int64_t> wake_seconds;  // absolute, as `now_seconds`

  size_t writes(const Observed& observed) const {
    return (status != observed.previous) + add_finalizer + create_secret + apply.size() + delete_children.size() + create_weights.size() + delete_pods.size() + create_pods.size() +
           remove_finalizer;
  }
};
Actions MakePlan(const Observed& observed, const Images& images, int64_t now_seconds);

}  // namespace qwen::plan
