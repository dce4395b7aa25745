// stage/sampling/philox.h — counter-based random numbers: the draw of output token i of a request depends on (seed, i) alone.
//
// Philox4x32-10 of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC'11), Random123's constants. No state:
// a replay after a fault, another slot, another batch or another device gives the same number. Pure functions.
#pragma once
#include <array>
#include <cstdint>

namespace qwen::sampling {

std::array<uint32_t, 4> Philox4x32(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key);

// Uniform integer of 53 bits: counter (i low, i high, 0, 0), key (seed low, seed high), the first two words.
uint64_t UniformBits(uint64_t seed, uint64_t output_index);
// The same as a number in [0, 1).
double UniformDraw(uint64_t seed, uint64_t output_index);

}  // namespace qwen::sampling
