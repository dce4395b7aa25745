#include "stage/kernels/common/launch.cuh"
#include "stage/kernels/common/norm.cuh"
#include "stage/kernels/common/reduce.cuh"
#include "stage/kernels/rms_norm.h"

namespace qwen::kernels {
namespace {

constexpr int kWarps = 8;
constexpr int kVectorsMax = 8;  // 16-byte vectors a thread keeps in registers: hidden <= 8 * 256 * 8

// kVectors: enough for this width. More than are needed would cost registers, and with them rows in flight.
template <int kVectors, bool kAdd>
__global__ void __launch_bounds__(kWarps * 32) RmsNormKernel(const RmsNormArgs args) {
  __shared__ float scratch[kWarps];
  const int vectors = args.hidden / 8;
  uint4 weight[kVectors], kept[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int v = i * kWarps * 32 + threadIdx.x;
    if (v < vectors) weight[i] = __ldg(reinterpret_cast<const uint4*>(args.weight) + v);
  }
  GridDependencyWait();
  GridDependencyLaunch();
  const uint4* from = reinterpret_cast<const uint4*>(args.x + static_cast<size_t>(blockIdx.x) * args.hidden);
  uint4* to = reinterpret_cast<uint4*>(args.y + static_cast<size_t>(blockIdx.x) * args.hidden);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int v = i * kWarps * 32 + threadIdx.x;
    kept[i] = v < vectors ? LoadActivation(from + v) : make_uint4(0, 0, 0, 0);
    if constexpr (kAdd) {
      if (v < vectors) {
        const size_t at = static_cast<size_t>(blockIdx.x) * vectors + v;
        kept[i] = AddBf16(kept[i], LoadActivation(reinterpret_cast<const uint4*>(args.add) + at));
        reinterpret_cast<uint4*>(args.sum)[at] = kept[i];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) AddSquares(sum, kept[i]);
  const float scale = rsqrtf(BlockSum<kWarps>(sum, scratch) / args.hidden + args.eps);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int v = i * kWarps * 32 + threadIdx.x;
    if (v < vectors) to[v] = NormedBf16(kept[i], scale, weight[i]);
  }
}

template <int kVectors>
cudaError_t LaunchWidth(const RmsNormArgs& args, cudaStream_t stream) {
  const LaunchShape shape = {.grid = dim3(args.tokens), .block = dim3(kWarps * 32)};
  return args.add != nullptr ? Launch(RmsNormKernel<kVectors, true>, shape, stream, args) : Launch(RmsNormKernel<kVectors, false>, shape, stream, args);
}

}  // namespace

cudaError_t RmsNorm(const RmsNormArgs& args, cudaStream_t stream) {
  if (args.tokens < 1 || args.hidden < 8 || args.hidden % 8 != 0 || args.hidden > kVectorsMax * kWarps * 32 * 8 || (args.add == nullptr) != (args.sum == nullptr)) return cudaErrorInvalidValue;
  const int vectors = (args.hidden / 8 + kWarps * 32 - 1) / (kWarps * 32);
  if (vectors <= 1) return LaunchWidth<1>(args, stream);
  if (vectors <= 2) return LaunchWidth<2>(args, stream);
  if (vectors <= 4) return LaunchWidth<4>(args, stream);
  return LaunchWidth<kVectorsMax>(args, stream);
}

}  // namespace qwen::kernels
