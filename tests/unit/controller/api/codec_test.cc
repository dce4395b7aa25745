// Goal: a manifest becomes the right struct with the documented defaults, round-trips, and every wrong field is named by its path.
#include "controller/api/codec.h"

#include <gtest/gtest.h>

namespace qwen::api {
namespace {

const char kSmall[] = R"({"apiVersion": "qwenpipeline.dev/v1alpha1", "kind": "QwenPipeline", "metadata": {"name": "demo"},
  "spec": {"model": {"id": "m", "source": {"path": "/models/m"}}, "stages": {"count": 4}}})";

const char kFull[] = R"({"apiVersion": "qwenpipeline.dev/v1alpha1", "kind": "QwenPipeline",
  "metadata": {"name": "full", "namespace": "ai", "uid": "u-1", "labels": {"a": "b"}, "generation": 3},
  "spec": {"model": {"id": "m", "source": {"persistentVolumeClaim": {"claimName": "c", "subPath": "x/y"}}, "dtype": "BFloat16", "maxModelLen": 4096, "shape": "Qwen3-VL-8B"},
    "stages": {"list": [{"name": "front", "layers": {"begin": 0, "end": 40}, "env": [{"name": "A", "value": "1"}], "image": "i:2", "resources": {"limits": {"memory": "1Gi"}},
                         "volumes": [{"name": "v", "emptyDir": {}}], "volumeMounts": [{"name": "v", "mountPath": "/v"}]},
                        {"name": "back", "layers": {"begin": 40, "end": 94}}], "balance": "EvenLayers", "gpusPerStage": 2,
               "gpuMemoryGB": 141, "template": {"nodeSelector": {"k": "v"}, "tolerations": [{"key": "t"}], "annotations": {"n": "o"},
                                                "imagePullSecrets": [{"name": "r"}], "priorityClassName": "p"}},
    "weights": {"mode": "Export", "claimPrefix": "w", "size": "10Gi", "storageClassName": "", "accessMode": "ReadWriteMany", "template": {"image": "e:1"}},
    "head": {"env": [{"name": "H"}]}, "rollout": {"strategy": "Replace", "surgeTimeoutSeconds": 5},
    "transport": {"type": "TCP", "rdma": {"resource": "rdma/hca", "count": 2}},
    "scheduling": {"gang": "Kueue", "queueName": "lq", "schedulerName": "s", "topologyKey": "rack", "topologyPolicy": "Required"},
    "engine": {"device": "Cpu", "blockTokens": 32, "maxBatchTokens": 512, "maxSequences": 8, "queueLimit": 5, "kvCacheTokens": 100000, "threads": 3},
    "server": {"port": 0, "apiKeys": {"secretName": "s", "file": "keys.txt"}, "allowedImageHosts": ["a.example"], "drainTimeoutSeconds": 0, "preStopSeconds": 7},
    "restart": {"budget": 2, "backoffSeconds": 30, "stallTimeoutSeconds": 20, "startupTimeoutSeconds": 100}, "networkPolicy": "None", "replicas": 2, "suspend": true}, "status": {"anything": 1}})";

std::string Replaced(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

TEST(Codec, AShortManifestHasTheDocumentedDefaults) {
  const auto p = ParsePipeline(kSmall);
  ASSERT_TRUE(p.ok()) << p.status().ToString();
  EXPECT_EQ(p->metadata.name, "demo");
  EXPECT_EQ(p->metadata.namespace_name, "default");
  EXPECT_EQ(p->spec.model.source.path, "/models/m");
  EXPECT_EQ(p->spec.model.dtype, DtypeChoice::kAuto);
  EXPECT_FALSE(p->spec.model.max_model_len);
  EXPECT_EQ(p->spec.stages.size(), 4);
  EXPECT_EQ(p->spec.stages.balance, contract::BalancePolicy::kTime);
  EXPECT_EQ(p->spec.transport.type, TransportType::kAuto);
  EXPECT_EQ(p->spec.engine.device, Device::kCuda);
  EXPECT_EQ(p->spec.engine.block_tokens, 16);
  EXPECT_EQ(p->spec.engine.max_batch_tokens, 2048);
  EXPECT_EQ(p->spec.engine.max_sequences, 256);
  EXPECT_EQ(p->spec.engine.queue_limit, 1024);
  EXPECT_EQ(p->spec.server.port, 8000);
  EXPECT_EQ(p->spec.server.drain_timeout_seconds, 60);
  EXPECT_EQ(p->spec.server.pre_stop_seconds, 5);
  EXPECT_EQ(p->spec.weights.mode, WeightsMode::kShared);
  EXPECT_FALSE(p->spec.weights.storage_class);
  EXPECT_EQ(p->spec.rollout.strategy, RolloutStrategy::kSurge);
  EXPECT_EQ(p->spec.rollout.surge_timeout_seconds, 120);
  EXPECT_EQ(p->spec.restart.stall_timeout_seconds, 10);
  EXPECT_EQ(p->spec.network_policy, NetworkPolicyMode::kManaged);
  EXPECT_EQ(p->spec.replicas, 1);
  EXPECT_FALSE(p->spec.suspend);
}

TEST(Codec, EveryFieldIsRead) {
  const auto p = ParsePipeline(kFull);
  ASSERT_TRUE(p.ok()) << p.status().ToString();
  const Spec& s = p->spec;
  EXPECT_EQ(p->metadata.namespace_name + p->metadata.uid, "aiu-1");
  ASSERT_TRUE(s.model.source.claim);
  EXPECT_EQ(s.model.source.claim->claim_name + ":" + s.model.source.claim->sub_path, "c:x/y");
  EXPECT_EQ(s.model.dtype, DtypeChoice::kBFloat16);
  EXPECT_EQ(s.model.max_model_len, 4096);
  ASSERT_EQ(s.stages.list.size(), 2u);
  EXPECT_EQ(s.stages.list[0].name, "front");
  EXPECT_EQ(s.stages.list[1].layers, (contract::LayerRange{40, 94}));
  ASSERT_EQ(s.stages.list[0].pod.env.size(), 1u);
  EXPECT_EQ(s.stages.list[0].pod.env[0].name + "=" + s.stages.list[0].pod.env[0].value, "A=1");
  EXPECT_EQ(s.stages.balance, contract::BalancePolicy::kEvenLayers);
  EXPECT_EQ(s.stages.gpus_per_stage, 2);
  EXPECT_EQ(s.transport.type, TransportType::kTcp);
  ASSERT_TRUE(s.transport.rdma);
  EXPECT_EQ(s.transport.rdma->resource + std::to_string(s.transport.rdma->count), "rdma/hca2");
  EXPECT_EQ(s.scheduling.gang, Gang::kKueue);
  EXPECT_EQ(s.scheduling.queue_name + s.scheduling.scheduler_name + s.scheduling.topology_key, "lqsrack");
  EXPECT_EQ(s.scheduling.topology_policy, TopologyPolicy::kRequired);
  EXPECT_EQ(s.engine.device, Device::kCpu);
  EXPECT_EQ(s.engine.kv_cache_tokens, 100000);
  EXPECT_EQ(s.engine.threads, 3);
  EXPECT_EQ(s.server.port, 0);
  EXPECT_EQ(s.server.api_keys.secret_name, "s");
  EXPECT_EQ(s.server.api_keys.file, "keys.txt");
  EXPECT_EQ(s.server.allowed_image_hosts, (std::vector<std::string>{"a.example"}));
  EXPECT_EQ(s.model.shape, "Qwen3-VL-8B");
  EXPECT_EQ(s.stages.gpu_memory_gb, 141);
  const PodTemplate &front = s.stages.list[0].pod, &every = s.stages.pod;
  EXPECT_EQ(front.image + front.resources + front.volumes + front.volume_mounts,
            R"(i:2{"limits":{"memory":"1Gi"}}[{"emptyDir":{},"name":"v"}][{"mountPath":"/v","name":"v"}])");
  EXPECT_EQ(every.node_selector.at("k") + every.annotations.at("n") + every.priority_class_name + every.tolerations + every.image_pull_secrets,
            R"(vop[{"key":"t"}][{"name":"r"}])");
  EXPECT_EQ(s.head.env.at(0).name, "H");
  EXPECT_EQ(s.weights.mode, WeightsMode::kExport);
  EXPECT_EQ(s.weights.claim_prefix + s.weights.size + s.weights.access_mode + s.weights.pod.image, "w10GiReadWriteManye:1");
  EXPECT_EQ(s.weights.storage_class, "") << "no class is not the default class";
  EXPECT_EQ(s.rollout.strategy, RolloutStrategy::kReplace);
  EXPECT_EQ(s.rollout.surge_timeout_seconds, 5);
  EXPECT_EQ(s.restart.stall_timeout_seconds, 20);
  EXPECT_EQ(s.restart.startup_timeout_seconds, 100);
  EXPECT_EQ(s.server.pre_stop_seconds, 7);
  EXPECT_EQ(s.network_policy, NetworkPolicyMode::kNone);
  EXPECT_EQ(s.restart.budget, 2);
  EXPECT_EQ(s.restart.backoff_seconds, 30);
  EXPECT_EQ(s.replicas, 2);
  EXPECT_TRUE(s.suspend);
}

TEST(Codec, WritingAndReadingAgainChangesNothing) {
  for (const char* text : {kSmall, kFull}) {
    const std::string once = PipelineToJson(*ParsePipeline(text));
    const auto again = ParsePipeline(once);
    ASSERT_TRUE(again.ok()) << again.status().ToString();
    EXPECT_EQ(PipelineToJson(*again), once);
  }
  const std::string full = PipelineToJson(*ParsePipeline(kFull));
  for (const char* part : {"\"front\"", "\"EvenLayers\"", "\"kvCacheTokens\": 100000", "\"claimName\": \"c\"", "\"a.example\"", "\"suspend\": true", "\"uid\": \"u-1\""})
    EXPECT_NE(full.find(part), std::string::npos) << part;
}

TEST(Codec, WhatIsWrongIsNamedByItsPath) {
  struct Case {
    const char *from, *to, *message;
  };
  const Case cases[] = {
      {"qwenpipeline.dev/v1alpha1", "v1", "apiVersion: must be qwenpipeline.dev/v1alpha1"},
      {"\"QwenPipeline\"", "\"Pod\"", "kind: must be QwenPipeline"},
      {"\"name\": \"full\"", "\"name\": \"Full\"", "metadata.name: must be at most 40 lower-case letters, digits and '-'"},
      {"\"name\": \"full\"", "\"name\": \"a2345678901234567890123456789012345678901\"", "metadata.name: must be at most 40 lower-case letters, digits and '-'"},
      {"\"name\": \"full\"", "\"name\": \"235b\"", "metadata.name: must begin with a letter, as the Service of that name must"},
      {"\"id\": \"m\", ", "", "spec.model.id: required"},
      {"\"id\": \"m\"", "\"id\": 5", "spec.model.id: must be a string"},
      {"{\"persistentVolumeClaim\": {", "{\"path\": \"/p\", \"persistentVolumeClaim\": {", "spec.model.source: exactly one of path and persistentVolumeClaim is required"},
      {"\"claimName\": \"c\", ", "", "spec.model.source.persistentVolumeClaim.claimName: required"},
      {"\"dtype\": \"BFloat16\"", "\"dtype\": \"Int8\"", "spec.model.dtype: must be one of Auto, Float32, BFloat16, found \"Int8\""},
      {"\"maxModelLen\": 4096", "\"maxModelLen\": 0", "spec.model.maxModelLen: must be an integer in [1, 16777216], found 0"},
      {"\"maxModelLen\": 4096", "\"maxModelLen\": 40.5", "spec.model.maxModelLen: must be an integer in [1, 16777216], found 40.5"},
      {"\"maxModelLen\": 4096", "\"maxmodellen\": 4096", "spec.model.maxmodellen: unknown field"},
      {"{\"list\"", "{\"count\": 2, \"list\"", "spec.stages: exactly one of count and list is required"},
      {"\"name\": \"back\"", "\"name\": \"front\"", "spec.stages.list[1].name: \"front\" is used twice"},
      {"\"begin\": 40", "\"begin\": 41", "spec.stages.list[1].layers.begin: must be 40, found 41"},
      {"\"end\": 94", "\"end\": 40", "spec.stages.list[1].layers.end: must be greater than begin"},
      {"\"begin\": 0, ", "", "spec.stages.list[0].layers.begin: required"},
      {"\"name\": \"A\"", "\"name\": \"A=\"", "spec.stages.list[0].env[0].name: must not contain '='"},
      {"\"image\": \"i:2\"", "\"image\": 2", "spec.stages.list[0].image: must be a string"},
      {"\"volumes\": [{\"name\": \"v\"", "\"volumes\": [{\"name\": \"model\"", "spec.stages.list[0].volumes: \"model\" is the operator's own"},
      {"\"tolerations\": [{\"key\": \"t\"}]", "\"tolerations\": [\"t\"]", "spec.stages.template.tolerations: must be a list of at most 16 objects"},
      {"\"nodeSelector\": {\"k\": \"v\"}", "\"nodeSelector\": {\"k\": 1}", "spec.stages.template.nodeSelector: must hold strings of at most 63 characters"},
      {"\"head\": {\"env\"", "\"head\": {\"envs\"", "spec.head.envs: unknown field"},
      {"\"size\": \"10Gi\", ", "", "spec.weights.size: required with mode Export"},
      {"\"mode\": \"Export\", \"claimPrefix\": \"w\", ", "\"mode\": \"PerStage\", ", "spec.weights.claimPrefix: required with mode PerStage"},
      {"\"accessMode\": \"ReadWriteMany\"", "\"accessMode\": \"ReadOnlyMany\"", "spec.weights.accessMode: must be one of ReadWriteOnce, ReadWriteMany, found \"ReadOnlyMany\""},
      {"\"strategy\": \"Replace\"", "\"strategy\": \"Canary\"", "spec.rollout.strategy: must be one of Surge, Replace, found \"Canary\""},
      {"\"startupTimeoutSeconds\": 100", "\"startupTimeoutSeconds\": 59", "spec.restart.startupTimeoutSeconds: must be an integer in [60, 604800], found 59"},
      {"\"gpusPerStage\": 2", "\"gpusPerStage\": 17", "spec.stages.gpusPerStage: must be an integer in [1, 16], found 17"},
      {"\"type\": \"TCP\"", "\"type\": \"NCCL\"", "spec.transport: type NCCL needs spec.engine.device Cuda"},
      {"\"blockTokens\": 32", "\"blockTokens\": 257", "spec.engine.blockTokens: must be an integer in [1, 256], found 257"},
      {"\"maxSequences\": 8", "\"maxSequences\": 513", "spec.engine.maxBatchTokens: must be at least maxSequences (513): every running sequence needs one token a step"},
      {"\"engine\": {", "\"engine\": {\"gpu\": 1, ", "spec.engine.gpu: unknown field"},
      {"\"port\": 0", "\"port\": 65536", "spec.server.port: must be an integer in [0, 65535], found 65536"},
      {"[\"a.example\"]", "\"a.example\"", "spec.server.allowedImageHosts: must be a list of at most 64 strings"},
      {"[\"a.example\"]", "[\"\"]", "spec.server.allowedImageHosts: must hold strings of 1 to 253 characters"},
      {"\"suspend\": true", "\"suspend\": \"yes\"", "spec.suspend: must be true or false"},
      {"\"replicas\": 2", "\"replicas\": 18446744073709551615", "spec.replicas: must be an integer in [0, 1000], found 18446744073709551615"},
      {"\"status\":", "\"state\":", "state: unknown field"},
      {"\"queueName\": \"lq\", ", "", "spec.scheduling.queueName: required with gang Kueue"},
      {"\"gang\": \"Kueue\"", "\"gang\": \"Slurm\"", "spec.scheduling.gang: must be one of None, Kueue, Coscheduling, Volcano, found \"Slurm\""},
      {"\"resource\": \"rdma/hca\", ", "", "spec.transport.rdma.resource: required"},
      {"\"transport\": {", "\"transport\": [], \"transports\": {", "spec.transport: must be an object"},
  };
  for (const Case& c : cases) {
    const auto p = ParsePipeline(Replaced(kFull, c.from, c.to));
    ASSERT_FALSE(p.ok()) << c.message;
    EXPECT_EQ(p.status().code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(p.status().message(), c.message);
  }
  EXPECT_EQ(ParsePipeline("[]").status().message(), "manifest: must be an object");
  EXPECT_EQ(ParsePipeline("{").status().message(), "manifest: not JSON");
}

TEST(Codec, WhatTheServerHoldsMayHaveMoreFieldsButNoWrongOnes) {
  const std::string newer = Replaced(kSmall, "\"stages\": {", "\"engine\": {\"gpu\": 1}, \"stages\": {");
  EXPECT_FALSE(ParsePipeline(newer).ok());
  const auto p = ParsePipeline(newer, UnknownFields::kIgnore);
  ASSERT_TRUE(p.ok()) << p.status().ToString();
  EXPECT_EQ(p->spec.stages.count, 4);
  EXPECT_EQ(ParsePipeline(Replaced(newer, "\"gpu\": 1", "\"blockTokens\": \"many\""), UnknownFields::kIgnore).status().message().substr(0, 23), "spec.engine.blockTokens");
}

TEST(Codec, NullCountsAsAbsent) {
  const auto p = ParsePipeline(Replaced(kSmall, "\"stages\": {\"count\": 4}", "\"stages\": {\"count\": 4, \"list\": null}, \"engine\": null"));
  ASSERT_TRUE(p.ok()) << p.status().ToString();
  EXPECT_EQ(p->spec.engine.block_tokens, 16);
}

}  // namespace
}  // namespace qwen::api
