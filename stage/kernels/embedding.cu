#include "stage/kernels/common/launch.cuh"
#include "stage/kernels/common/ptx.cuh"
#include "stage/kernels/embedding.h"

namespace qwen::kernels {
namespace {

__global__ void __launch_bounds__(256) GatherRowsKernel(const __nv_bfloat16* table, const int32_t* ids, __nv_bfloat16* out, int width) {
  GridDependencyWait();
  GridDependencyLaunch();
  const uint4* from = reinterpret_cast<const uint4*>(table + static_cast<size_t>(ids[blockIdx.x]) * width);
  uint4* to = reinterpret_cast<uint4*>(out + static_cast<size_t>(blockIdx.x) * width);
  for (int i = threadIdx.x; i < width / 8; i += blockDim.x) to[i] = LoadActivation(from + i);
}

}  // namespace

cudaError_t GatherRows(const __nv_bfloat16* table, const int32_t* ids, __nv_bfloat16* out, int count, int width, cudaStream_t stream) {
  if (count < 1 || width < 8 || width % 8 != 0) return cudaErrorInvalidValue;
  return Launch(GatherRowsKernel, {.grid = dim3(count), .block = dim3(256)}, stream, table, ids, out, width);
}

}  // namespace qwen::kernels
