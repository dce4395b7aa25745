// stage/kernels/common/launch.cuh — launches with programmatic dependent launch, safe in graph capture.
#pragma once
#include <cuda_runtime.h>

namespace qwen::kernels {

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;
  int cluster_x = 1;
};

// Raises the dynamic shared memory limit once per kernel (the attribute call is cheap but not free) and launches.
template <typename... P, typename... A>
cudaError_t Launch(void (*kernel)(P...), const LaunchShape& shape, cudaStream_t stream, A&&... arguments) {
  if (shape.shared_bytes > 48 * 1024) {
    if (cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes)); e != cudaSuccess) return e;
  }
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  if (shape.cluster_x > 1) {
    if (shape.cluster_x > 8) {
      if (cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1); e != cudaSuccess) return e;
    }
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = static_cast<unsigned>(shape.cluster_x);
    attributes[count].val.clusterDim.y = 1;
    attributes[count++].val.clusterDim.z = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
}

}  // namespace qwen::kernels
