// Goal: the published figures of the 235B (docs/weights.md): layer 2.488 B parameters = 4.976 GB, 471 GB in all, KV 2,048 bytes per
// layer and token, and the shard tables for 2, 4 and 8 stages. The figures are written out, not computed by the code under test.
#include "stage/contract/layer_plan.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace qwen::contract {
namespace {

ModelShape Shape235B() { return *NamedModelShape("Qwen3-VL-235B-A22B"); }

std::string Joined(const std::vector<LayerRange>& ranges) {
  std::string out;
  for (const LayerRange& r : ranges) out.append("[").append(std::to_string(r.begin)).append(",").append(std::to_string(r.end)).append(")");
  return out;
}

TEST(LayerPlan, EvenLayersGivesTheShardTablesOfThe235B) {
  const auto even = [](int stages) { return Joined(*PlanLayers(Shape235B(), stages, BalancePolicy::kEvenLayers)); };
  EXPECT_EQ(even(1), "[0,94)");
  EXPECT_EQ(even(2), "[0,47)[47,94)");
  EXPECT_EQ(even(4), "[0,24)[24,48)[48,71)[71,94)");
  EXPECT_EQ(even(8), "[0,12)[12,24)[24,36)[36,48)[48,60)[60,72)[72,83)[83,94)");
}

TEST(LayerPlan, WeightsOfThe235BAreThePublishedOnes) {
  const ModelShape s = Shape235B();
  const auto gb = [&](int begin, int end) { return static_cast<double>(WeightBytes(s, {begin, end}, Dtype::kBFloat16).layer_bytes) / 1e9; };
  EXPECT_NEAR(gb(10, 11), 4.976, 0.001);
  EXPECT_NEAR(gb(0, 94), 467.7, 0.1);
  EXPECT_NEAR(gb(0, 47), 233.9, 0.1);
  EXPECT_NEAR(gb(0, 24), 119.4, 0.1);
  EXPECT_NEAR(gb(71, 94), 114.5, 0.1);
  EXPECT_NEAR(gb(0, 12), 59.7, 0.1);
  EXPECT_NEAR(gb(83, 94), 54.7, 0.1);

  const StageWeights all = WeightBytes(s, {0, 94}, Dtype::kBFloat16);
  EXPECT_NEAR(all.embedding_bytes / 1e9, 1.245, 0.001);
  EXPECT_NEAR(all.head_bytes / 1e9, 1.245, 0.001);
  EXPECT_NEAR(all.vision_bytes / 1e9, 1.15, 0.01);
  EXPECT_NEAR(all.total() / 1e9, 471, 0.5);
  EXPECT_NEAR(WeightBytes(s, {0, 94}, Dtype::kFloat8E4M3).total() / 1e9, 238, 1.0);
  EXPECT_EQ(WeightBytes(s, {0, 94}, Dtype::kFloat32).total(), 2 * all.total());

  const StageWeights middle = WeightBytes(s, {24, 48}, Dtype::kBFloat16);
  EXPECT_EQ(middle.embedding_bytes + middle.vision_bytes + middle.head_bytes, 0);
}

TEST(LayerPlan, OneLayerOfThe235BHasTheParametersOfItsTensors) {
  // q 8192*4096, k and v 512*4096, o 4096*8192, q_norm and k_norm 128, two norms 4096, router 128*4096,
  // gate_up 128*4096*3072, down 128*1536*4096.
  const int64_t parameters = 8192LL * 4096 * 2 + 2 * 512LL * 4096 + 2 * 128 + 2 * 4096 + 128LL * 4096 + 128LL * 4096 * 3072 + 128LL * 1536 * 4096;
  EXPECT_EQ(WeightBytes(Shape235B(), {5, 6}, Dtype::kBFloat16).layer_bytes, 2 * parameters);
}

TEST(LayerPlan, KvOfThe235BIs2048BytesALayerAndToken) {
  const ModelShape s = Shape235B();
  EXPECT_EQ(KvBytesPerToken(s, {0, 1}, Dtype::kBFloat16), 2048);
  EXPECT_EQ(KvBytesPerToken(s, {0, 94}, Dtype::kBFloat16), 192512);
  const double gib = 1024.0 * 1024 * 1024;
  EXPECT_NEAR(KvBytesPerToken(s, {0, 47}, Dtype::kBFloat16) * 262144.0 / gib, 23.5, 0.001);
  EXPECT_NEAR(KvBytesPerToken(s, {0, 24}, Dtype::kBFloat16) * 262144.0 / gib, 12.0, 0.001);
  EXPECT_NEAR(KvBytesPerToken(s, {83, 94}, Dtype::kBFloat16) * 262144.0 / gib, 5.5, 0.001);
}

TEST(LayerPlan, ATiedHeadIsCountedOnceOnALoneStageAndTwiceOnTwo) {
  ModelShape s = *NamedModelShape("Qwen3-VL-2B");
  const int64_t matrix = 151936LL * 2048 * 2, norm = 2048 * 2;
  EXPECT_EQ(WeightBytes(s, {0, 28}, Dtype::kBFloat16).head_bytes, norm);
  EXPECT_EQ(WeightBytes(s, {14, 28}, Dtype::kBFloat16).head_bytes, matrix + norm);
  EXPECT_EQ(WeightBytes(s, {0, 14}, Dtype::kBFloat16).embedding_bytes, matrix);
}

TEST(LayerPlan, TimeBalanceUnloadsTheStagesThatHoldVisionAndHead) {
  // 2B: a layer is 0.1 GB, ViT and mergers 0.8 GB, the head 0.6 GB. An even split would make the ends the slowest by far.
  const ModelShape s = *NamedModelShape("Qwen3-VL-2B");
  const auto ranges = PlanLayers(s, 4, BalancePolicy::kTime);
  ASSERT_TRUE(ranges.ok()) << ranges.status().ToString();
  EXPECT_LT((*ranges)[0].count(), 7);
  EXPECT_LT((*ranges)[3].count(), 7);
  EXPECT_GT((*ranges)[1].count(), 7);
  EXPECT_GT((*ranges)[2].count(), 7);
}

TEST(LayerPlan, TimeBalanceIsNoWorseThanAnyOtherSplit) {
  // Exhaustive over three stages of a small model; cost counted here from tensor sizes, apart from the code under test.
  ModelShape s;
  s.model_type = "qwen3";
  s.layers = 9, s.hidden = 64, s.heads = 4, s.kv_heads = 2, s.head_dim = 32, s.intermediate = 200, s.vocab = 3000;
  const double layer = 2.0 * (64 * 128 * 2 + 64 * 64 * 2 + 2 * 32 + 2 * 64 + 3 * 200 * 64), head = 2.0 * 3000 * 64;
  const auto worst = [&](int a, int b) { return std::max({a * layer, (b - a) * layer, (9 - b) * layer + head}); };
  double best = 1e30;
  for (int a = 1; a < 8; ++a)
    for (int b = a + 1; b < 9; ++b) best = std::min(best, worst(a, b));
  const auto ranges = PlanLayers(s, 3, BalancePolicy::kTime);
  ASSERT_TRUE(ranges.ok());
  EXPECT_DOUBLE_EQ(worst((*ranges)[0].end, (*ranges)[1].end), best) << Joined(*ranges);
}

TEST(LayerPlan, EveryPlanIsLegalForEveryStageCount) {
  for (const char* name : {"Qwen3-VL-235B-A22B", "Qwen3-VL-30B-A3B", "Qwen3-VL-2B", "Qwen3-VL-32B"}) {
    const ModelShape s = *NamedModelShape(name);
    for (int stages = 1; stages <= s.layers - 2; ++stages) {
      const auto ranges = PlanLayers(s, stages, BalancePolicy::kTime);
      ASSERT_TRUE(ranges.ok()) << name << " " << stages << ": " << ranges.status().ToString();
      ASSERT_EQ(ranges->size(), static_cast<size_t>(stages));
      ASSERT_TRUE(ValidateLayers(s, *ranges).ok());
      ASSERT_GE(ranges->front().count(), 3);
    }
    EXPECT_FALSE(PlanLayers(s, s.layers - 1, BalancePolicy::kTime).ok()) << "stage 0 needs three layers";
    EXPECT_FALSE(PlanLayers(s, 0, BalancePolicy::kTime).ok());
    EXPECT_FALSE(PlanLayers(s, s.layers + 1, BalancePolicy::kEvenLayers).ok());
  }
}

TEST(LayerPlan, BadRangesNameTheStage) {
  const ModelShape s = Shape235B();
  EXPECT_EQ(ValidateLayers(s, {{0, 40}, {41, 94}}).message(), "stage 1 [41:94): must begin at layer 40");
  EXPECT_EQ(ValidateLayers(s, {{0, 40}, {40, 95}}).message(), "stage 1 [40:95): the model has only 94 layers");
  EXPECT_EQ(ValidateLayers(s, {{0, 40}, {40, 93}}).message(), "stage 1: must end at layer 94, found 93");
  EXPECT_EQ(ValidateLayers(s, {{0, 40}, {40, 40}, {40, 94}}).message(), "stage 1 [40:40): holds no layer");
  EXPECT_NE(ValidateLayers(s, {{0, 2}, {2, 94}}).message().find("DeepStack"), std::string::npos);
  EXPECT_FALSE(ValidateLayers(s, {}).ok());
  EXPECT_TRUE(ValidateLayers(s, {{0, 3}, {3, 94}}).ok());
}

TEST(LayerPlan, RangesTravelAsText) {
  EXPECT_EQ(ToString(LayerRange{24, 48}), "24:48");
  EXPECT_EQ(*ParseLayerRange("24:48"), (LayerRange{24, 48}));
  for (const char* bad : {"", "24", "24:", ":48", "48:24", "24:24", "-1:4", "24:48x", "24-48", "24:99999999999"}) EXPECT_FALSE(ParseLayerRange(bad).ok()) << bad;
}

}  // namespace
}  // namespace qwen::contract
