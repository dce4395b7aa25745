// The random numbers: known answers of the published generator, and independence of seed and index.
#include "stage/sampling/philox.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

namespace qwen::sampling {
namespace {

using Words = std::array<uint32_t, 4>;

// Random123's kat_vectors for philox4x32-10.
TEST(Philox, GivesTheKnownAnswersOfRandom123) {
  EXPECT_EQ(Philox4x32({0, 0, 0, 0}, {0, 0}), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(Philox4x32({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}),
            (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(Philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Philox, UniformDrawIsTheUpper53BitsOfTheFirstTwoWords) {
  const uint64_t bits = (uint64_t{0x6627e8d5} << 32 | 0xe169c58d) >> 11;
  EXPECT_EQ(UniformDraw(0, 0), std::ldexp(static_cast<double>(bits), -53));
}

TEST(Philox, DrawsOfOneSeedSpreadEvenly) {
  constexpr int kDraws = 20000, kBins = 20;
  std::array<int, kBins> bins{};
  std::set<double> distinct;
  for (int i = 0; i < kDraws; ++i) {
    const double u = UniformDraw(12345, i);
    ASSERT_GE(u, 0.0);
    ASSERT_LT(u, 1.0);
    ++bins[static_cast<int>(u * kBins)];
    distinct.insert(u);
  }
  EXPECT_EQ(distinct.size(), static_cast<size_t>(kDraws));
  double chi2 = 0;
  for (int count : bins) chi2 += std::pow(count - kDraws / double{kBins}, 2) / (kDraws / double{kBins});
  EXPECT_LT(chi2, 43.8);  // 19 degrees of freedom, p = 0.001
}

TEST(Philox, HighBitsOfSeedAndIndexMatter) {
  EXPECT_NE(UniformDraw(1, 0), UniformDraw(uint64_t{1} << 32 | 1, 0));
  EXPECT_NE(UniformDraw(1, 0), UniformDraw(1, uint64_t{1} << 32));
}

}  // namespace
}  // namespace qwen::sampling
