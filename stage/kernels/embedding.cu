#include "stage/kernels/common/launch.cuh"
#include "stage/kernels/common/ptx.cuh"
#include "stage/kernels/embedding.h"

namespace qwen::kernels {
namespace {

constexpr int kWarps = 4, kAhead = 8;

// One warp a row, kAhead vectors of 16 bytes a lane in flight: one load a thread leaves half of the bandwidth idle.
__global__ void __launch_bounds__(kWarps * 32) GatherRowsKernel(const __nv_bfloat16* table, const int32_t* ids, __nv_bfloat16* out, int count, int vectors) {
  GridDependencyWait();
  GridDependencyLaunch();
  const int row = static_cast<int>(blockIdx.x) * kWarps + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (row >= count) return;
  const uint4* from = reinterpret_cast<const uint4*>(table) + static_cast<size_t>(ids[row]) * vectors;
  uint4* to = reinterpret_cast<uint4*>(out) + static_cast<size_t>(row) * vectors;
  for (int first = lane; first < vectors; first += 32 * kAhead) {
    uint4 v[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i * 32 < vectors) v[i] = LoadActivation(from + first + i * 32);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i * 32 < vectors) to[first + i * 32] = v[i];
    }
  }
}

}  // namespace

cudaError_t GatherRows(const __nv_bfloat16* table, const int32_t* ids, __nv_bfloat16* out, int count, int width, cudaStream_t stream) {
  if (count < 1 || width < 8 || width % 8 != 0) return cudaErrorInvalidValue;
  return Launch(GatherRowsKernel, {.grid = dim3((count + kWarps - 1) / kWarps), .block = dim3(kWarps * 32)}, stream, table, ids, out, count, width / 8);
}

}  // namespace qwen::kernels
