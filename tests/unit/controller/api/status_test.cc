// Goal: a status survives being written and read; JSON has the CRD's names; a fresh or damaged one reads as fresh.
#include "controller/api/status.h"

#include <gtest/gtest.h>

namespace qwen::api {
namespace {

TEST(PipelineStatus, ReadsWhatItWrote) {
  const PipelineStatus status{.observed_generation = 3, .replicas = 2, .ready_replicas = 1, .selector = "a=b", .stages = "4/8", .epoch = 7, .restarts = 2,
                              .groups = {{.replica = 0, .epoch = 7, .revision = "r", .phase = GroupPhase::kDown, .failures = 2,
                                          .last_failure_seconds = 1767225600, .last_failure_message = "pod x ended"},
                                         {.replica = 1, .epoch = 6, .revision = "r", .phase = GroupPhase::kFormed, .served = true, .unready_since_seconds = 1767225603,
                                          .next = IncomingGroup{.epoch = 7, .revision = "s", .phase = GroupPhase::kFormed, .since_seconds = 1767225602}},
                                         {.replica = 2, .epoch = 5, .revision = "r", .phase = GroupPhase::kLeaving,
                                          .replaced = {{.stage = -1, .epoch = 6}, {.stage = 2, .epoch = 7}}, .mending_epoch = 7, .loading = {{.stage = 2, .percent = 40}}, .retiring_epoch = 4, .refused_revision = "t"}},
                              .conditions = {{.type = "Ready", .value = true, .reason = "R", .message = "m", .observed_generation = 3, .last_transition_seconds = 1767225601}}};
  const std::string json = StatusToJson(status);
  EXPECT_EQ(ParseStatus(json), status) << json;
  for (const char* part : {"\"lastFailureTime\":\"2026-01-01T00:00:00Z\"", "\"lastTransitionTime\":\"2026-01-01T00:00:01Z\"", "\"status\":\"True\"",
                           "\"phase\":\"Down\"", "\"observedGeneration\":3", "\"readyReplicas\":1"})
    EXPECT_NE(json.find(part), std::string::npos) << part << " in " << json;
}

TEST(PipelineStatus, WhatIsMissingOrMistypedIsAsInAFreshObject) {
  for (const char* text : {"", "null", "[]", "{}", R"({"epoch": "7", "groups": 5, "conditions": [1, null]})", "{\"epoch\":"})
    EXPECT_EQ(ParseStatus(text), PipelineStatus{}) << text;
}

}  // namespace
}  // namespace qwen::api
