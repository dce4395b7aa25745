// Goal: each pod reads the volume that spec.weights means, and with mode Export nothing begins before every shard is written. The
// world is played by hand; expected objects are written out.
#include "controller/plan/weights.h"

#include <gtest/gtest.h>

#include "controller/plan/plan.h"
#include "controller/plan/status.h"

namespace qwen::plan {
namespace {
using nlohmann::json;
const Images kImages{.head = "h:1", .stage = "s:1", .exporter = "e:1"};

Observed World(api::WeightsMode mode) {
  Observed observed;
  observed.pipeline.metadata = {.name = "q", .namespace_name = "ns", .uid = "u-1"};
  observed.pipeline.spec.model = {.id = "m", .source = {.claim = api::PersistentVolumeClaimSource{.claim_name = "checkpoint", .sub_path = "a"}}};
  observed.pipeline.spec.stages.list = {{.name = "front", .layers = {0, 10}}, {.name = "back", .layers = {10, 20}}};
  observed.pipeline.spec.weights.mode = mode;
  observed.generation = 1;
  return observed;
}
std::string ModelClaim(const json& pod) { return pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]; }

TEST(Weights, SharedIsTheModelsOwnSourceForEverybody) {
  Observed observed = World(api::WeightsMode::kShared);
  const Actions actions = MakePlan(observed, kImages, 1000);
  ASSERT_EQ(actions.create_pods.size(), 3u);
  EXPECT_TRUE(actions.create_weights.empty());
  for (const json& pod : actions.create_pods) {
    EXPECT_EQ(ModelClaim(pod), "checkpoint");
    EXPECT_EQ(pod["spec"]["containers"][0]["volumeMounts"][0]["subPath"], "a");
  }
  const api::Condition* condition = FindCondition(actions.status, "WeightsReady");
  ASSERT_NE(condition, nullptr);
  EXPECT_TRUE(condition->value);
  EXPECT_EQ(condition->message, "claim checkpoint is read as it is");
}

TEST(Weights, PerStageIsOneClaimAStageAndTheHeadReadsTheModels) {
  Observed observed = World(api::WeightsMode::kPerStage);
  EXPECT_NE(MakePlan(observed, kImages, 1000).status.conditions.at(0).message.find("spec.weights.claimPrefix"), std::string::npos);
  observed.pipeline.spec.weights.claim_prefix = "shard";
  const Actions actions = MakePlan(observed, kImages, 1000);
  ASSERT_EQ(actions.create_pods.size(), 3u);
  EXPECT_EQ(ModelClaim(actions.create_pods[0]), "checkpoint");
  EXPECT_EQ(ModelClaim(actions.create_pods[1]), "shard-0");
  EXPECT_EQ(ModelClaim(actions.create_pods[2]), "shard-1");
  EXPECT_FALSE(actions.create_pods[2]["spec"]["containers"][0]["volumeMounts"][0].contains("subPath"));
}

class Export : public ::testing::Test {
 protected:
  Export() {
    observed_.pipeline.spec.weights.size = "60Gi";
    observed_.pipeline.spec.weights.storage_class = "fast";
  }
  Actions Step() {
    Actions actions = MakePlan(observed_, kImages, 1000);
    observed_.previous = actions.status;
    observed_.has_finalizer |= actions.add_finalizer;
    observed_.has_secret |= actions.create_secret;
    for (const json& child : actions.apply) observed_.children[ChildName(child)] = Fingerprint(child);
    for (const json& object : actions.create_weights) {
      const std::string name = object["metadata"]["name"];
      if (object["kind"] == "Job") {
        EXPECT_TRUE(observed_.jobs.emplace(name, ObservedJob{}).second) << name;
        jobs_.push_back(object);
      } else {
        EXPECT_TRUE(observed_.claims.insert(name).second) << name;
        claims_.push_back(object);
      }
    }
    for (const json& pod : actions.create_pods) {
      const json& labels = pod["metadata"]["labels"];
      observed_.pods.push_back({.name = pod["metadata"]["name"], .uid = "u", .stage = labels.contains("qwenpipeline.dev/stage") ? std::stoi(labels["qwenpipeline.dev/stage"].get<std::string>()) : -1,
                                .epoch = std::stoi(labels["qwenpipeline.dev/epoch"].get<std::string>()),
                                .group_epoch = std::stoi(labels["qwenpipeline.dev/group"].get<std::string>()), .revision = labels["qwenpipeline.dev/revision"],
                                .phase = PodPhase::kRunning, .ready = true, .node = "n"});
    }
    return actions;
  }
  const api::Condition& Is(const char* type) { return *FindCondition(observed_.previous, type); }

  Observed observed_ = World(api::WeightsMode::kExport);
  std::vector<json> jobs_, claims_;
};

TEST_F(Export, NoGroupBeginsBeforeEveryShardIsWritten) {
  const Actions first = Step();
  EXPECT_EQ(claims_.size(), 2u);
  EXPECT_EQ(jobs_.size(), 2u);
  EXPECT_TRUE(first.create_pods.empty());
  EXPECT_EQ(Is("Ready").reason, "Exporting");
  EXPECT_FALSE(Is("WeightsReady").value);
  EXPECT_TRUE(Is("Progressing").value);
  EXPECT_EQ(Step().writes(observed_), 0u) << "at rest while the Jobs work";
  observed_.jobs.begin()->second.complete = true;
  Step();
  EXPECT_EQ(Is("WeightsReady").message.find("1 of 2 shards are exported; job q-export-"), 0u) << Is("WeightsReady").message;
  for (auto& [name, job] : observed_.jobs) job.complete = true;
  const Actions begun = Step();
  ASSERT_EQ(begun.create_pods.size(), 3u);
  EXPECT_EQ(ModelClaim(begun.create_pods[0]), "checkpoint");
  EXPECT_EQ(ModelClaim(begun.create_pods[1]), claims_[0]["metadata"]["name"]);
  EXPECT_EQ(ModelClaim(begun.create_pods[2]), claims_[1]["metadata"]["name"]);
  EXPECT_TRUE(Is("WeightsReady").value);
  EXPECT_EQ(Is("WeightsReady").reason, "Exported");
}

TEST_F(Export, AJobWritesItsStagesLayersIntoItsClaim) {
  Step();
  const json& job = jobs_[1];
  const json& pod = job["spec"]["template"]["spec"];
  const json& container = pod["containers"][0];
  EXPECT_EQ(container["image"], "e:1");
  EXPECT_EQ(container["args"], json::parse(R"(["export", "/model", "--out", "/weights", "--layers", "0:10,10:20", "--stage", "1"])"));
  EXPECT_EQ(container["securityContext"]["capabilities"]["drop"], json::array({"ALL"}));
  EXPECT_EQ(pod["securityContext"]["runAsNonRoot"], true);
  EXPECT_EQ(pod["restartPolicy"], "Never");
  EXPECT_EQ(pod["volumes"][0]["persistentVolumeClaim"], json::parse(R"({"claimName": "checkpoint", "readOnly": true})"));
  EXPECT_EQ(container["volumeMounts"][0], json::parse(R"({"name": "model", "mountPath": "/model", "readOnly": true, "subPath": "a"})"));
  EXPECT_EQ(pod["volumes"][1]["persistentVolumeClaim"]["claimName"], claims_[1]["metadata"]["name"]);
  EXPECT_EQ(container["volumeMounts"][1], json::parse(R"({"name": "weights", "mountPath": "/weights"})"));
  EXPECT_FALSE(job["spec"]["template"]["metadata"]["labels"].contains("qwenpipeline.dev/pipeline")) << "or it would be counted as a pod of a group";
  EXPECT_EQ(claims_[1]["spec"], json::parse(R"({"accessModes": ["ReadWriteOnce"], "storageClassName": "fast", "resources": {"requests": {"storage": "60Gi"}}})"));
  for (const json& object : {jobs_[0], claims_[0]}) {
    EXPECT_EQ(object["metadata"]["ownerReferences"][0]["uid"], "u-1");
    EXPECT_EQ(object["metadata"]["labels"]["qwenpipeline.dev/pipeline"], "q");
    EXPECT_LE(object["metadata"]["name"].get<std::string>().size(), 63u);
  }
}

TEST_F(Export, AJobThatFailedIsNamed) {
  Step();
  observed_.jobs.begin()->second = {.failed = true, .message = "Job has reached the specified backoff limit"};
  Step();
  EXPECT_EQ(Is("Ready").reason, "ExportFailed");
  EXPECT_NE(Is("Ready").message.find(observed_.jobs.begin()->first + " failed: Job has reached the specified backoff limit"), std::string::npos);
  observed_.jobs.erase(observed_.jobs.begin());  // somebody deletes it
  Step();
  EXPECT_EQ(jobs_.size(), 3u) << "and it is tried again";
}

TEST_F(Export, OtherLayersAreOtherClaimsAndWhatServesWaitsForThem) {
  Step();
  for (auto& [name, job] : observed_.jobs) job.complete = true;
  Step();
  Step();
  EXPECT_TRUE(Is("Ready").value);
  observed_.pipeline.spec.stages.list = {{.name = "front", .layers = {0, 12}}, {.name = "back", .layers = {12, 20}}};
  ++observed_.generation;
  Step();
  EXPECT_EQ(claims_.size(), 4u);
  EXPECT_NE(claims_[2]["metadata"]["name"], claims_[0]["metadata"]["name"]);
  EXPECT_EQ(Step().writes(observed_), 0u);
  EXPECT_EQ(observed_.pods.size(), 3u) << "what serves is left alone";
  EXPECT_EQ(Is("Ready").reason, "Exporting");
  for (auto& [name, job] : observed_.jobs) job.complete = true;
  EXPECT_EQ(Step().create_pods.size(), 3u);
}

TEST(Weights, ExportNeedsLayersASizeAndAnImage) {
  const auto refusal = [](auto change, const Images& images) {
    Observed observed = World(api::WeightsMode::kExport);
    observed.pipeline.spec.weights.size = "1Gi";
    change(observed.pipeline.spec);
    return FindCondition(MakePlan(observed, images, 1000).status, "Ready")->message;
  };
  EXPECT_NE(refusal([](api::Spec& s) { s.stages = {.count = 2}; }, kImages).find("Export needs model.shape or stages.list"), std::string::npos);
  EXPECT_NE(refusal([](api::Spec& s) { s.weights.size = ""; }, kImages).find("spec.weights.size"), std::string::npos);
  EXPECT_NE(refusal([](api::Spec&) {}, {.head = "h", .stage = "s"}).find("--image-export"), std::string::npos);
  EXPECT_EQ(refusal([](api::Spec& s) { s.weights.pod.image = "own"; }, {.head = "h", .stage = "s"}).find("spec."), std::string::npos);
  EXPECT_EQ(refusal([](api::Spec& s) { s.stages = {.count = 2}, s.model.shape = "Qwen3-VL-8B"; }, kImages).find("spec."), std::string::npos);
}

}  // namespace
}  // namespace qwen::plan
