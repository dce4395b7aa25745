// Goal: a manifest becomes the right struct with the documented defaults, round-trips, and every wrong field is named by its path.
#include "controller/api/codec.h"

#include <gtest/gtest.h>

namespace qwen::api {
namespace {

const char kSmall[] = R"({"apiVersion": "qwenpipeline.dev/v1alpha1", "kind": "QwenPipeline", "metadata": {"name": "demo"},
  "spec": {"model": {"id": "m", "source": {"path": "/models/m"}}, "stages": {"count": 4}}})";

const char kFull[] = R"({"apiVersion": "qwenpipeline.dev/v1alpha1", "kind": "QwenPipeline",
  "metadata": {"name": "full", "namespace": "ai", "uid": "u-1", "labels": {"a": "b"}, "generation": 3},
  "spec": {"model": {"id": "m", "source": {"persistentVolumeClaim": {"claimName": "c", "subPath": "x/y"}}, "dtype": "BFloat16", "maxModelLen": 4096},
    "stages": {"list": [{"name": "front", "layers": {"begin": 0, "end": 40}, "env": [{"name": "A", "value": "1"}]},
                        {"name": "back", "layers": {"begin": 40, "end": 94}}], "balance": "EvenLayers", "gpusPerStage": 2},
    "transport": {"type": "TCP"},
    "engine": {"device": "Cpu", "blockTokens": 32, "maxBatchTokens": 512, "maxSequences": 8, "queueLimit": 5, "kvCacheTokens": 100000, "threads": 3},
    "server": {"port": 0, "apiKeys": {"secretName": "s", "file": "keys.txt"}, "allowedImageHosts": ["a.example"], "drainTimeoutSeconds": 0, "preStopSeconds": 7},
    "restart": {"budget": 2, "backoffSeconds": 30}, "networkPolicy": "None", "replicas": 2, "suspend": true}, "status": {"anything": 1}})";

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
  ASSERT_EQ(s.stages.list[0].env.size(), 1u);
  EXPECT_EQ(s.stages.list[0].env[0].name + "=" + s.stages.list[0].env[0].value, "A=1");
  EXPECT_EQ(s.stages.balance, contract::BalancePolicy::kEvenLayers);
  EXPECT_EQ(s.stages.gpus_per_stage, 2);
  EXPECT_EQ(s.transport.type, TransportType::kTcp);
  EXPECT_EQ(s.engine.device, Device::kCpu);
  EXPECT_EQ(s.engine.kv_cache_tokens, 100000);
  EXPECT_EQ(s.engine.threads, 3);
  EXPECT_EQ(s.server.port, 0);
  EXPECT_EQ(s.server.api_keys.secret_name, "s");
  EXPECT_EQ(s.server.api_keys.file, "keys.txt");
  EXPECT_EQ(s.server.allowed_image_hosts, (std::vector<std::string>{"a.example"}));
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
      {"\"transport\": {\"type\": \"TCP\"}", "\"transport\": []", "spec.transport: must be an object"},
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

TEST(Codec, NullCountsAsAbsent) {
  const auto p = ParsePipeline(Replaced(kSmall, "\"stages\": {\"count\": 4}", "\"stages\": {\"count\": 4, \"list\": null}, \"engine\": null"));
  ASSERT_TRUE(p.ok()) << p.status().ToString();
  EXPECT_EQ(p->spec.engine.block_tokens, 16);
}

}  // namespace
}  // namespace qwen::api
