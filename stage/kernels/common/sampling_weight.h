// stage/kernels/common/sampling_weight.h — what a token weighs in the draw, as an integer, and shares of integer totals. Host and
// device, the same bits on both: only IEEE operations that are named (explicit fma's, no contraction possible elsewhere),
// integers, and no library's exp. No CUDA header: the CPU's sampler (stage/sampling) is built without one.
//
//   weight = round(2^40 exp(l - max)), l the logit over the temperature
//
// Sums of weights are exact, so any order, tree or number of threads gives the same total, and the token that is drawn does not
// depend on the device. 2^18 tokens of weight 2^40 stay below 2^58. A token lighter than 2^-41 of the best weighs nothing.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "stage/kernels/common/host_device.h"

namespace qwen::kernels {

constexpr int kWeightBits = 40;
constexpr uint64_t kWeightOne = uint64_t{1} << kWeightBits;  // of the most likely token
constexpr float kWeightlessBelow = -29.0f;                   // l - max; 2^40 exp(-28.42) is one half

namespace sampling_weight {
QP_HOST_DEVICE double FusedMultiplyAdd(double a, double b, double c) {
#ifdef __CUDA_ARCH__
  return __fma_rn(a, b, c);
#else
  return std::fma(a, b, c);  // one instruction where the caller is compiled for it (stage/sampling/weights.cc)
#endif
}
QP_HOST_DEVICE uint64_t Bits(double v) {
#ifdef __CUDA_ARCH__
  return static_cast<uint64_t>(__double_as_longlong(v));
#else
  uint64_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
#endif
}
QP_HOST_DEVICE double FromBits(uint64_t bits) {
#ifdef __CUDA_ARCH__
  return __longlong_as_double(static_cast<long long>(bits));
#else
  double v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
#endif
}

// 2^shift exp(x) + addend, rounded once after a relative error of 2^-49; x in [-690, 0].
// exp(x) = 2^n exp(r), |r| <= ln 2 / 2; exp(r) = 1 + r q(r), q of degree 9 through the Chebyshev nodes (error 2^-50.5).
QP_HOST_DEVICE double ScaledExp(double x, int shift, double addend) {
  constexpr double kLog2E = 0x1.71547652b82fep+0, kMinusLn2 = -0x1.62e42fefa39efp-1;
  constexpr double kRound = 0x1.8p52;  // adding it leaves the nearest integer in the low bits
  const double shifted = FusedMultiplyAdd(x, kLog2E, kRound);
  const double n = shifted - kRound;
  const double r = FusedMultiplyAdd(n, kMinusLn2, x);
  double q = 0x1.28917c8be7ad6p-22;
  q = FusedMultiplyAdd(q, r, 0x1.72e107cbda5a8p-19);
  q = FusedMultiplyAdd(q, r, 0x1.a019b914985a9p-16);
  q = FusedMultiplyAdd(q, r, 0x1.a01994c8467d1p-13);
  q = FusedMultiplyAdd(q, r, 0x1.6c16c17889ef9p-10);
  q = FusedMultiplyAdd(q, r, 0x1.11111123bf160p-7);
  q = FusedMultiplyAdd(q, r, 0x1.5555555553d68p-5);
  q = FusedMultiplyAdd(q, r, 0x1.5555555550d88p-3);
  q = FusedMultiplyAdd(q, r, 0x1.0000000000001p-1);
  q = FusedMultiplyAdd(q, r, 0x1.0000000000006p+0);
  q = FusedMultiplyAdd(q, r, 1.0);
  // n in two's complement, moved to where an exponent lies; what is above it falls off.
  const double scale = FromBits((Bits(shifted) << 52) + (static_cast<uint64_t>(1023 + shift) << 52));
  return FusedMultiplyAdd(q, scale, addend);
}
}  // namespace sampling_weight

// Of a token whose logit over the temperature is `scaled`, -inf included. REQUIRES: scaled <= maximum, maximum finite, no NaN.
QP_HOST_DEVICE uint64_t SamplingWeight(float scaled, float maximum) {
  const double x = static_cast<double>(scaled) - static_cast<double>(maximum);
  constexpr double kInteger = 0x1p52;  // 2^52 + w, w < 2^52, has w in its low bits, rounded to the nearest
  const double sum = sampling_weight::ScaledExp(x < kWeightlessBelow ? static_cast<double>(kWeightlessBelow) : x, kWeightBits, kInteger);
  return sampling_weight::Bits(sum) - sampling_weight::Bits(kInteger);
}

struct Product128 {
  uint64_t high, low;
};
QP_HOST_DEVICE Product128 Multiply(uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
  return {__umul64hi(a, b), a * b};
#else
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return {static_cast<uint64_t>(product >> 64), static_cast<uint64_t>(product)};
#endif
}

// floor(fraction / 2^53 * total): which of `total` units of mass a draw of 53 bits falls on. REQUIRES: fraction < 2^53.
QP_HOST_DEVICE uint64_t DrawnUnit(uint64_t fraction, uint64_t total) {
  const Product128 p = Multiply(fraction, total);
  return p.high << 11 | p.low >> 53;
}

// The mass that top-p wants of `total`: ceil(fraction / 2^53 * total), at least one unit, so that the best token stays.
QP_HOST_DEVICE uint64_t WantedMass(uint64_t fraction, uint64_t total) {
  const Product128 p = Multiply(fraction, total);
  const uint64_t wanted = (p.high << 11 | p.low >> 53) + ((p.low & ((uint64_t{1} << 53) - 1)) != 0 ? 1 : 0);
  return wanted > 0 ? wanted : 1;
}

// Parameters as the functions above take them, made on the host. top_p in (0, 1); 1 and more is kNoTopP: nothing is cut.
constexpr uint64_t kNoTopP = uint64_t{1} << 53;
inline uint64_t TopPFraction(float top_p) { return top_p < 1.0f ? static_cast<uint64_t>(static_cast<double>(top_p > 0.0f ? top_p : 0.0f) * 0x1p53) : kNoTopP; }
// p >= min_p * max p is weight >= this; 0 when min_p is off. Never more than the best token weighs.
inline uint64_t MinPWeight(float min_p) {
  if (!(min_p > 0.0f)) return 0;
  return min_p < 1.0f ? static_cast<uint64_t>(std::ceil(static_cast<double>(min_p) * static_cast<double>(kWeightOne))) : kWeightOne;
}

}  // namespace qwen::kernels
