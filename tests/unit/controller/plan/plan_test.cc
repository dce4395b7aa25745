// Goal: tables from a manifest to layers, KV blocks and command lines. Expected figures are worked out by hand beside each case.
#include <gtest/gtest.h>

#include "controller/plan/desired.h"
#include "controller/plan/sizing.h"

namespace qwen::plan {
namespace {

contract::ModelShape Shape235B() { return *contract::NamedModelShape("Qwen3-VL-235B-A22B"); }

api::Spec SpecOf(int stages, contract::BalancePolicy balance = contract::BalancePolicy::kTime) {
  api::Spec spec;
  spec.model.id = "m";
  spec.model.source.path = "/m";
  spec.stages.count = stages;
  spec.stages.balance = balance;
  return spec;
}

TEST(Sizing, The235BFitsFourGpusOf141GbButNotThree) {
  const int64_t h200 = 141'000'000'000;
  const auto four = SizePipeline(SpecOf(4), Shape235B(), h200);
  ASSERT_TRUE(four.ok()) << four.status().ToString();
  EXPECT_TRUE(four->fits());
  EXPECT_EQ(four->max_model_len, 32768);
  const auto three = SizePipeline(SpecOf(3), Shape235B(), h200);  // 471 / 3 = 157 GB
  ASSERT_TRUE(three.ok());
  EXPECT_FALSE(three->fits());
  EXPECT_LT(*three->stages[1].kv_capacity_tokens, 0);
  api::Spec fp8 = SpecOf(2);  // 238 / 2 = 119 GB
  EXPECT_TRUE(SizePipeline(fp8, *contract::NamedModelShape("Qwen3-VL-235B-A22B-FP8"), h200)->fits());
}

TEST(Sizing, TheSmallestStagesCapacityIsThePipelines) {
  // S = 4 even, 141 GB: 0.92 * 141 = 129.72 GB usable; work 2048 * 4096 * 64 = 0.537 GB.
  const auto size = SizePipeline(SpecOf(4, contract::BalancePolicy::kEvenLayers), Shape235B(), 141'000'000'000);
  ASSERT_TRUE(size.ok());
  int64_t smallest = INT64_MAX;
  for (const StageSize& stage : size->stages) {
    const double kv = 129.72e9 - 0.536870912e9 - stage.weights.total() - (&stage == &size->stages.back() ? 256.0 * 151936 * 12 : 0);
    const auto tokens = static_cast<int64_t>(kv / (2048.0 * stage.layers.count()));
    EXPECT_NEAR(*stage.kv_capacity_tokens, tokens, 16) << ToString(stage.layers);
    EXPECT_EQ(*stage.kv_capacity_tokens % 16, 0);
    smallest = std::min(smallest, *stage.kv_capacity_tokens);
  }
  EXPECT_EQ(size->kv_blocks * 16, smallest);
  EXPECT_EQ(size->stages[0].kv_bytes_per_token, 24 * 2048);
}

TEST(Sizing, KvBlocksFollowTheManifestTheDeviceAndTheUsefulMaximum) {
  api::Spec spec = SpecOf(2);
  spec.model.max_model_len = 1000;  // 63 blocks of 16
  EXPECT_EQ(SizePipeline(spec, Shape235B(), std::nullopt)->kv_blocks, 0) << "CUDA, memory unknown: each stage measures";
  spec.engine.kv_cache_tokens = 5000;
  EXPECT_EQ(SizePipeline(spec, Shape235B(), std::nullopt)->kv_blocks, 313);  // ceil(5000 / 16)
  spec.engine.kv_cache_tokens = 900;
  EXPECT_EQ(SizePipeline(spec, Shape235B(), std::nullopt).status().message(),
            "spec.engine.kvCacheTokens: one sequence of 1000 tokens (maxModelLen) does not fit into 900");
  spec.engine.kv_cache_tokens.reset();
  spec.engine.device = api::Device::kCpu;
  spec.engine.max_sequences = 3;
  EXPECT_EQ(SizePipeline(spec, Shape235B(), std::nullopt)->kv_blocks, 3 * 63) << "more could never be used";
  spec.engine.max_sequences = 256;
  // 512 MiB / (47 layers * 2048 bytes * 16 tokens) = 348 blocks
  EXPECT_EQ(SizePipeline(spec, Shape235B(), std::nullopt)->kv_blocks, 348);
  spec.model.max_model_len = 100000;  // one sequence must fit whatever it takes: 6250 blocks
  EXPECT_EQ(SizePipeline(spec, Shape235B(), std::nullopt)->kv_blocks, 6250);
}

TEST(Sizing, WhatDoesNotSuitTheModelIsNamedByItsField) {
  api::Spec spec = SpecOf(95);
  EXPECT_EQ(SizePipeline(spec, Shape235B(), std::nullopt).status().message(), "spec.stages.count: stages: must be in [1, 94] for 94 layers, found 95");
  spec = SpecOf(2);
  spec.model.max_model_len = 262145;
  EXPECT_EQ(SizePipeline(spec, Shape235B(), std::nullopt).status().message(), "spec.model.maxModelLen: the model has 262144 positions, found 262145");
  spec = SpecOf(2);
  spec.stages.count.reset();
  spec.stages.list = {{.name = "a", .layers = {0, 40}}, {.name = "b", .layers = {40, 93}}};
  EXPECT_EQ(SizePipeline(spec, Shape235B(), std::nullopt).status().message(), "spec.stages.list: stage 1: must end at layer 94, found 93");
}

TEST(Sizing, DtypeAutoIsTheCheckpoints) {
  EXPECT_EQ(SizePipeline(SpecOf(4), Shape235B(), std::nullopt)->weight_dtype, contract::Dtype::kBFloat16);
  EXPECT_EQ(SizePipeline(SpecOf(4), *contract::NamedModelShape("Qwen3-VL-30B-A3B-FP8"), std::nullopt)->weight_dtype, contract::Dtype::kFloat8E4M3);
  api::Spec spec = SpecOf(4);
  spec.model.dtype = api::DtypeChoice::kFloat32;
  const auto size = SizePipeline(spec, Shape235B(), std::nullopt);
  EXPECT_EQ(size->kv_dtype, contract::Dtype::kFloat32);
  EXPECT_EQ(size->stages[0].kv_bytes_per_token, 4096LL * size->stages[0].layers.count());
}

TEST(Sizing, TheOperatorSizesAModelWhoseNameItKnows) {
  api::Spec spec = SpecOf(4, contract::BalancePolicy::kEvenLayers);
  EXPECT_NE(ClusterSize(spec).status().message().find("spec.stages.balance"), std::string::npos) << "it sees no checkpoint";
  spec.model.shape = "Qwen3-VL-235B-A22B";
  const auto size = ClusterSize(spec);
  ASSERT_TRUE(size.ok()) << size.status().ToString();
  EXPECT_EQ(ToString(size->stages[1].layers), "24:48");
  EXPECT_EQ(size->kv_blocks, 0) << "each stage measures what is left";
  spec.stages.gpu_memory_gb = 141;
  EXPECT_TRUE(ClusterSize(spec).ok());
  spec.stages.count = 3;
  EXPECT_NE(ClusterSize(spec).status().message().find("spec.stages: stage 0 of 3 (layers 0:32) does not fit: weights and work are 16"), std::string::npos)
      << ClusterSize(spec).status().message();
  spec.model.shape = "Qwen9";
  EXPECT_EQ(ClusterSize(spec).status().message().find("spec.model.shape: "), 0u);
  spec.model.shape = "";
  EXPECT_EQ(ClusterSize(spec).status().message().find("spec.stages.gpuMemoryGB: needs spec.model.shape"), 0u);
}

TEST(Sizing, StartUpTimeFollowsTheBytesOfTheLargestShard) {
  api::Spec spec = SpecOf(4);
  EXPECT_EQ(StartupSeconds(spec), 7200) << "nobody knows how much is loaded";
  spec.model.shape = "Qwen3-VL-235B-A22B";  // 471 GB / 4 at 50 MB/s, and ten minutes
  EXPECT_NEAR(static_cast<double>(StartupSeconds(spec)), 600 + 471e9 / 4 / 50e6, 60);
  spec.model.shape = "Qwen3-VL-235B-A22B-FP8";
  EXPECT_LT(StartupSeconds(spec), 600 + 260e9 / 4 / 50e6);
  spec.restart.startup_timeout_seconds = 61;
  EXPECT_EQ(StartupSeconds(spec), 61);
}

// ---- desired

std::string Value(const Process& process, const std::string& flag) {
  std::string found;
  for (size_t i = 0; i + 1 < process.args.size(); i += 2)
    if (process.args[i] == flag) found += (found.empty() ? "" : ",") + process.args[i + 1];
  return found;
}
Placement Local(int stages) {
  Placement placement{.model_dir = "/models/m", .pipeline_uid = "u", .secret_file = "/s", .head_address = "127.0.0.1:7000", .control_listen = "127.0.0.1:7000",
                      .api_listen = "127.0.0.1:8000", .data_listen = "127.0.0.1:0", .data_advertise = "127.0.0.1", .cores = 8};
  for (int k = 0; k < stages; ++k) placement.metrics_ports.push_back(static_cast<uint16_t>(9400 + k));
  return placement;
}

TEST(Desired, OneHeadAndItsStagesAgreeOnEverySharedSize) {
  api::QwenPipeline pipeline;
  pipeline.spec = SpecOf(4, contract::BalancePolicy::kEvenLayers);
  pipeline.spec.engine.device = api::Device::kCpu;
  pipeline.spec.server.allowed_image_hosts = {"a", "b"};
  const auto size = SizePipeline(pipeline.spec, Shape235B(), std::nullopt);
  ASSERT_TRUE(size.ok());
  const auto processes = DesiredProcesses(pipeline, *size, Local(4));
  ASSERT_TRUE(processes.ok()) << processes.status().ToString();
  ASSERT_EQ(processes->size(), 5u);
  const Process& head = (*processes)[0];
  EXPECT_EQ(head.program, "qwen-head");
  EXPECT_EQ(Value(head, "--stages"), "4");
  EXPECT_EQ(Value(head, "--model-id"), "m");
  EXPECT_EQ(Value(head, "--queue"), "1024");
  EXPECT_EQ(Value(head, "--allow-image-host"), "a,b");
  EXPECT_EQ(Value(head, "--api-keys-file"), "");
  EXPECT_EQ(Value(head, "--stall-timeout"), "10");
  EXPECT_EQ(Value((*processes)[1], "--stall-timeout"), "10");
  std::string layers, ports;
  for (int k = 0; k < 4; ++k) {
    const Process& stage = (*processes)[k + 1];
    EXPECT_EQ(stage.name, "stage-" + std::to_string(k));
    EXPECT_EQ(stage.program, "qwen-stage");
    EXPECT_EQ(Value(stage, "--index"), std::to_string(k));
    EXPECT_EQ(Value(stage, "--device"), "cpu");
    EXPECT_EQ(Value(stage, "--dtype"), "auto");
    EXPECT_EQ(Value(stage, "--threads"), "2") << "8 cores over 4 stages";
    EXPECT_EQ(Value(stage, "--head"), Value(head, "--control-listen"));
    EXPECT_EQ(Value(stage, "--kv-blocks"), std::to_string(size->kv_blocks));
    for (const char* shared : {"--block-tokens", "--max-batch-tokens", "--max-sequences", "--max-model-len", "--pipeline-uid", "--secret-file", "--model", "--stages"}) {
      EXPECT_EQ(Value(stage, shared), Value(head, shared)) << shared;
      EXPECT_NE(Value(stage, shared), "") << shared;
    }
    layers += Value(stage, "--layers") + " ";
    ports += Value(stage, "--metrics-port") + " ";
  }
  EXPECT_EQ(layers, "0:24 24:48 48:71 71:94 ");
  EXPECT_EQ(ports, "9400 9401 9402 9403 ");
}

TEST(Desired, ListedStagesKeepTheirNamesLayersAndEnvironment) {
  api::QwenPipeline pipeline;
  pipeline.spec = SpecOf(1);
  pipeline.spec.stages.count.reset();
  pipeline.spec.stages.list = {{.name = "front", .layers = {0, 50}, .pod = {.env = {{"OMP_WAIT_POLICY", "passive"}}}}, {.name = "back", .layers = {50, 94}}};
  pipeline.spec.engine.threads = 6;
  pipeline.spec.model.dtype = api::DtypeChoice::kBFloat16;
  const auto size = SizePipeline(pipeline.spec, Shape235B(), std::nullopt);
  const auto processes = DesiredProcesses(pipeline, *size, Local(2));
  ASSERT_TRUE(processes.ok());
  EXPECT_EQ((*processes)[1].name, "front");
  EXPECT_EQ((*processes)[1].env, (std::map<std::string, std::string>{{"OMP_WAIT_POLICY", "passive"}}));
  EXPECT_TRUE((*processes)[2].env.empty());
  EXPECT_EQ(Value((*processes)[2], "--layers"), "50:94");
  EXPECT_EQ(Value((*processes)[2], "--threads"), "6");
  EXPECT_EQ(Value((*processes)[2], "--device"), "cuda");
  EXPECT_EQ(Value((*processes)[2], "--dtype"), "bfloat16");
  EXPECT_EQ(Value((*processes)[2], "--kv-blocks"), "0");
}

TEST(Desired, EdgesAreAsTheManifestSays) {
  api::QwenPipeline pipeline;
  pipeline.spec = SpecOf(2);
  const auto size = SizePipeline(pipeline.spec, Shape235B(), std::nullopt);
  const auto has_edges = [&] {
    const auto processes = DesiredProcesses(pipeline, *size, Local(2));
    const std::vector<std::string>& args = (*processes)[1].args;
    return std::find(args.begin(), args.end(), "--edges") != args.end() ? Value((*processes)[1], "--edges") : std::string("left to the stage");
  };
  EXPECT_EQ(has_edges(), "left to the stage");
  pipeline.spec.transport.type = api::TransportType::kNccl;
  EXPECT_EQ(has_edges(), "nccl");
  pipeline.spec.transport.type = api::TransportType::kTcp;
  EXPECT_EQ(has_edges(), "tcp");
  pipeline.spec.transport.type = api::TransportType::kNccl;
  pipeline.spec.engine.device = api::Device::kCpu;
  EXPECT_EQ(DesiredProcesses(pipeline, *size, Local(2)).status().code(), StatusCode::kInvalidArgument);
}

TEST(Desired, WhatThisBuildDoesNotOfferIsSaid) {
  api::QwenPipeline pipeline;
  pipeline.spec = SpecOf(2);
  const auto size = SizePipeline(pipeline.spec, Shape235B(), std::nullopt);
  pipeline.spec.stages.gpus_per_stage = 2;
  EXPECT_NE(DesiredProcesses(pipeline, *size, Local(2)).status().message().find("spec.stages.gpusPerStage"), std::string::npos);
}

}  // namespace
}  // namespace qwen::plan
