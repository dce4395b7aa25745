// Integer weights: how far from exp they are, that the vector code has the bits of the scalar code, and that the tokens they draw are
// those of sums in double precision.
#include "stage/sampling/weights.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "stage/kernels/common/sampling_weight.h"
#include "stage/sampling/logits_pipeline.h"
#include "stage/sampling/philox.h"

namespace qwen::sampling {
namespace {

using kernels::DrawnUnit;
using kernels::SamplingWeight;
using kernels::WantedMass;

TEST(SamplingWeight, IsTheNearestIntegerToTheScaledExponential) {
  std::mt19937_64 random(1);
  std::uniform_real_distribution<float> place(-30.0f, 0.0f);
  for (int i = 0; i < 200000; ++i) {
    const float maximum = place(random) + 15.0f, scaled = maximum + place(random);
    const long double exact = std::exp(static_cast<long double>(scaled) - static_cast<long double>(maximum)) * 0x1p40L;
    // Half a unit of rounding, and 2^-49 of the value.
    ASSERT_NEAR(static_cast<double>(SamplingWeight(scaled, maximum)), static_cast<double>(exact), 0.5 + static_cast<double>(exact) * 0x1p-49) << scaled << " " << maximum;
  }
}

TEST(SamplingWeight, OfTheMaximumIsOneAndOfWhatIsFarBelowNothing) {
  for (float maximum : {0.0f, -0.0f, 17.5f, -3e30f, 3e38f, 1e-40f}) EXPECT_EQ(SamplingWeight(maximum, maximum), kernels::kWeightOne) << maximum;
  EXPECT_EQ(SamplingWeight(-28.41f, 0), 1u);
  EXPECT_EQ(SamplingWeight(-28.43f, 0), 0u);
  EXPECT_EQ(SamplingWeight(-std::numeric_limits<float>::infinity(), 0), 0u);
  EXPECT_EQ(SamplingWeight(-3e38f, 3e38f), 0u);
  EXPECT_EQ(SamplingWeight(-1e-10f, 0), kernels::kWeightOne - 110);  // 2^40 * 1e-10
}

TEST(SamplingWeight, OfARowHasTheBitsOfEachAlone) {
  std::mt19937 random(2);
  std::normal_distribution<float> normal(0.0f, 8.0f);
  std::vector<float> row(10007);
  for (float& value : row) value = normal(random);
  row[5] = row[77] = -std::numeric_limits<float>::infinity();
  const float maximum = *std::max_element(row.begin(), row.end());
  std::vector<uint64_t> weights(row.size());
  WeighRow(row, maximum, weights);
  for (size_t i = 0; i < row.size(); ++i) ASSERT_EQ(weights[i], SamplingWeight(row[i], maximum)) << i;
}

TEST(Shares, AreThoseOfLongDivision) {
  std::mt19937_64 random(3);
  for (int i = 0; i < 100000; ++i) {
    const uint64_t fraction = random() >> 11 >> random() % 53, total = random() >> 6 >> random() % 57;
    const uint64_t drawn = DrawnUnit(fraction, total), wanted = WantedMass(fraction, total);
    // drawn <= fraction * total / 2^53 < drawn + 1, checked by products alone
    const auto product = static_cast<unsigned __int128>(fraction) * total, unit = static_cast<unsigned __int128>(1) << 53;
    ASSERT_TRUE(drawn * unit <= product && product < (drawn + static_cast<unsigned __int128>(1)) * unit);
    ASSERT_TRUE(wanted == std::max<uint64_t>(1, product % unit == 0 ? drawn : drawn + 1));
    ASSERT_TRUE(total == 0 || drawn < total);
  }
  EXPECT_EQ(WantedMass(0, 1000), 1u);
  EXPECT_EQ(WantedMass(uint64_t{1} << 52, 7), 4u);
}

TEST(Parameters, BecomeFractionsAndWeightsWithTheirEdges) {
  EXPECT_EQ(kernels::TopPFraction(1.0f), kernels::kNoTopP);
  EXPECT_EQ(kernels::TopPFraction(0.5f), uint64_t{1} << 52);
  EXPECT_EQ(kernels::TopPFraction(0.0f), 0u);
  EXPECT_EQ(kernels::MinPWeight(0.0f), 0u);
  EXPECT_EQ(kernels::MinPWeight(0.25f), kernels::kWeightOne / 4);
  EXPECT_EQ(kernels::MinPWeight(2.0f), kernels::kWeightOne);  // the best always stays
}

// The pipeline as it was with sums in double, and how near (as a share of the total) the draw or top-p came to a boundary.
struct Drawn {
  int32_t token;
  double margin;
};
Drawn DoublePrecision(const std::vector<float>& logits, const step::SamplingParams& params, int64_t index) {
  struct Entry {
    int32_t token;
    float logit;
    double weight;
  };
  const float maximum = *std::max_element(logits.begin(), logits.end()) / params.temperature;
  std::vector<Entry> entries;
  for (size_t i = 0; i < logits.size(); ++i) {
    const float scaled = logits[i] / params.temperature;
    entries.push_back({static_cast<int32_t>(i), scaled, std::exp(static_cast<double>(scaled) - maximum)});
  }
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.logit != b.logit ? a.logit > b.logit : a.token < b.token; });
  const auto total = [&] { return std::accumulate(entries.begin(), entries.end(), 0.0, [](double sum, const Entry& e) { return sum + e.weight; }); };
  double margin = 1;
  if (params.top_k > 0 && static_cast<size_t>(params.top_k) < entries.size()) {
    const float threshold = entries[static_cast<size_t>(params.top_k) - 1].logit;
    std::erase_if(entries, [&](const Entry& e) { return e.logit < threshold; });
  }
  if (params.top_p < 1) {
    const double all = total(), wanted = params.top_p * all;
    double before = 0;
    size_t keep = 0;
    while (keep < entries.size() && (keep == 0 || before < wanted)) {
      before += entries[keep++].weight;
      margin = std::min(margin, std::abs(before - wanted) / all);
    }
    entries.resize(keep);
  }
  if (params.min_p > 0) std::erase_if(entries, [&](const Entry& e) { return e.weight < static_cast<double>(params.min_p); });
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.token < b.token; });
  const double all = total(), target = UniformDraw(params.seed, static_cast<uint64_t>(index)) * all;
  double sum = 0;
  Drawn drawn{-1, margin};
  for (const Entry& entry : entries) {
    sum += entry.weight;
    drawn.margin = std::min(drawn.margin, std::abs(sum - target) / all);
    if (drawn.token < 0 && sum > target) drawn.token = entry.token;
  }
  return drawn;
}

TEST(Choose, DrawsTheTokenOfDoublePrecisionWhereverTheDrawIsNotOnABoundary) {
  std::mt19937 random(4);
  int compared = 0, near = 0;
  for (float deviation : {0.5f, 2.0f, 6.0f}) {
    for (int row = 0; row < 6; ++row) {
      std::normal_distribution<float> normal(0.0f, deviation);
      std::vector<float> logits(row % 2 == 0 ? 6000 : 300);
      for (float& logit : logits) logit = row < 4 ? normal(random) : std::round(normal(random) * 8) / 8;  // the latter with ties
      for (const step::SamplingParams& params :
           {step::SamplingParams{.temperature = 1.0f}, {.temperature = 0.7f, .top_k = 20, .top_p = 0.8f}, {.temperature = 1.3f, .top_p = 0.95f},
            {.temperature = 1.0f, .min_p = 0.05f}, {.temperature = 0.6f, .top_k = 1000, .top_p = 0.5f, .min_p = 0.01f}, {.temperature = 2.0f, .top_p = 1e-6f}}) {
        for (int index = 0; index < 25; ++index) {
          step::SamplingParams drawn = params;
          drawn.seed = random();
          const Drawn expected = DoublePrecision(logits, drawn, index);
          if (expected.margin < 1e-9) {
            ++near;
            continue;
          }
          std::vector<float> changed = logits;
          ASSERT_EQ(Choose(changed, drawn, index).value(), expected.token) << deviation << " " << row << " " << index;
          ++compared;
        }
      }
    }
  }
  EXPECT_GT(compared, 2500);
  EXPECT_LT(near, 27);  // a boundary is met by chance in one row of a thousand, or where the test compares nothing
}

}  // namespace
}  // namespace qwen::sampling
