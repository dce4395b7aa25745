// Goal: what a person reads of a cluster is what is there: conditions, groups, pods with the reason why they do not serve, and of a
// change the fields that would change and no other.
#include "controller/ctl/status_command.h"

#include <gtest/gtest.h>

namespace qwen::ctl {
namespace {
using nlohmann::json;

plan::Observed Fresh() {
  plan::Observed observed;
  observed.pipeline.metadata = {.name = "q", .namespace_name = "ns", .uid = "u-1"};
  observed.pipeline.spec.model = {.id = "m", .source = {.claim = api::PersistentVolumeClaimSource{.claim_name = "weights"}}};
  observed.pipeline.spec.stages.count = 1;
  observed.generation = 3;
  return observed;
}
const plan::Images kImages{.head = "h:1", .stage = "s:1"};

TEST(StatusText, NamesWhatBlocks) {
  plan::Observed observed = Fresh();
  observed.previous = {.observed_generation = 2, .ready_replicas = 0, .stages = "0/1", .restarts = 4,
                       .groups = {{.replica = 0, .epoch = 7, .phase = api::GroupPhase::kFormed, .failures = 1, .last_failure_message = "pod x ended",
                                   .next = api::IncomingGroup{.epoch = 8}}},
                       .conditions = {{.type = "Ready", .value = false, .reason = "PodsNotReady", .message = "why"}}};
  observed.pods = {{.name = "q-0-stage-0-7", .stage = 0, .epoch = 7, .waiting_reason = "ImagePullBackOff", .message = "no such tag", .node = "n1"},
                   {.name = "q-0-head-7", .epoch = 7, .phase = plan::PodPhase::kRunning, .ready = true, .node = "n2"}};
  const std::string text = StatusText(observed);
  for (const char* part : {"ns/q  0/1 stages, 0 of 1 replicas, 4 restarts\n", "has not seen the latest change", "Ready=False  PodsNotReady: why\n", "pod x ended",
                           "Formed", "beside it", "ImagePullBackOff: no such tag\n"})
    EXPECT_NE(text.find(part), std::string::npos) << part << " in\n" << text;
  EXPECT_LT(text.find("q-0-head-7"), text.find("q-0-stage-0-7")) << "head first";
  observed.previous.observed_generation = 3;
  EXPECT_EQ(StatusText(observed).find("latest change"), std::string::npos);
}

TEST(DiffText, SaysWhatWouldBeMade) {
  const plan::Observed observed = Fresh();
  const std::string text = DiffText(observed, plan::MakePlan(observed, kImages, 1000), {});
  for (const char* part : {"+ Service/q\n", "+ Service/q-group\n", "+ NetworkPolicy/q\n", "+ PodDisruptionBudget/q\n", "+   minAvailable: 1\n", "+ Pod/q-0-head-1\n",
                           "+ Pod/q-0-stage-0-1\n", "+   containers[0].image: \"s:1\"\n", "Ready=False  Creating: "})
    EXPECT_NE(text.find(part), std::string::npos) << part << " in\n" << text;
}

TEST(DiffText, OfWhatIsThereOnlyTheFieldsThatChange) {
  plan::Observed observed = Fresh();
  std::map<std::string, json> live;
  for (json& child : plan::Children(observed.pipeline)) {
    observed.children[plan::ChildName(child)] = plan::Fingerprint(child);
    live[plan::ChildName(child)] = child;
  }
  live["Service/q"]["spec"]["clusterIP"] = "10.0.0.1";
  observed.pipeline.spec.server.port = 80;
  const std::string text = DiffText(observed, plan::MakePlan(observed, kImages, 1000), live);
  EXPECT_NE(text.find("~ Service/q\n~   ports[0].port: 8000 -> 80\n"), std::string::npos) << text;
  EXPECT_EQ(text.find("clusterIP"), std::string::npos) << text;
  EXPECT_EQ(text.find("NetworkPolicy"), std::string::npos) << text;
}

TEST(DiffText, SaysWhatIsWrongWithASpecAndThatNothingIsToBeDone) {
  plan::Observed observed = Fresh();
  observed.pipeline.spec.stages.balance = contract::BalancePolicy::kEvenLayers;
  const std::string wrong = DiffText(observed, plan::MakePlan(observed, kImages, 1000), {});
  EXPECT_EQ(wrong.find("Ready=False  InvalidSpec: spec.stages.balance"), 0u) << wrong;
  plan::Observed idle = Fresh();
  idle.deleting = true;
  EXPECT_EQ(DiffText(idle, plan::MakePlan(idle, kImages, 1000), {}), "nothing to do\n");
}

}  // namespace
}  // namespace qwen::ctl
