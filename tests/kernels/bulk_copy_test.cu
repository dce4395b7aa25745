// Goal: one correct use of a bulk copy that completes on an mbarrier, as small as can be. Under `compute-sanitizer --tool racecheck`
// it answers whether that tool knows such copies: when it calls this a hazard, its reports on decode_layers say nothing.
#include "stage/kernels/common/async.cuh"
#include "tests/kernels/harness.h"

namespace qwen::kernels::testing {
namespace {

__global__ void BulkCopyKernel(const int* from, int* to) {
  __shared__ __align__(128) int values[32];
  __shared__ uint64_t landed;
  if (threadIdx.x == 0) {
    BarrierInit(&landed, 1);
    FenceBarrierInit();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    BarrierArriveExpect(&landed, sizeof(values));
    BulkCopy(values, from, sizeof(values), &landed);
  }
  BarrierWait(&landed, 0);
  to[threadIdx.x] = values[threadIdx.x ^ 1];
}

TEST(BulkCopy, WhatLandsOnABarrierIsReadAfterIt) {
  std::vector<int> values(32);
  for (int i = 0; i < 32; ++i) values[i] = 1000 + i;
  DeviceBuffer from(values);
  DeviceBuffer<int> to(32);
  BulkCopyKernel<<<1, 32>>>(from.get(), to.get());
  CUDA_OK(cudaDeviceSynchronize());
  const auto got = to.Download();
  for (int i = 0; i < 32; ++i) EXPECT_EQ(got[i], 1000 + (i ^ 1));
}

}  // namespace
}  // namespace qwen::kernels::testing
