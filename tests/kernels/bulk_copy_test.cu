// Goal: correct uses of bulk copies that complete on an mbarrier, as small as can be. Under `compute-sanitizer --tool racecheck` they
// answer whether that tool knows such copies: when it calls one a hazard, its reports on decode_layers say nothing.
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

// The ring of decode_layers: one warp fills two slots in turn, four read them; of each reader lane 0 says so, after the warp has met.
__global__ void RingKernel(const int* from, int* to, int rounds) {
  __shared__ __align__(128) int slots[2][32];
  __shared__ uint64_t full[2], empty[2];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < 2; ++s) {
      BarrierInit(&full[s], 1);
      BarrierInit(&empty[s], 4);
    }
    FenceBarrierInit();
  }
  __syncthreads();
  int sum = 0;
  for (int round = 0; round < rounds; ++round) {
    const int slot = round % 2;
    const uint32_t parity = round / 2 % 2;
    if (warp == 4) {
      BarrierWait(&empty[slot], parity ^ 1);
      if (lane == 0) {
        BarrierArriveExpect(&full[slot], sizeof(slots[0]));
        BulkCopy(slots[slot], from + round * 32, sizeof(slots[0]), &full[slot]);
      }
    } else {
      BarrierWait(&full[slot], parity);
      sum += slots[slot][(lane + warp) % 32];
      __syncwarp();
      if (lane == 0) BarrierArrive(&empty[slot]);
    }
  }
  if (warp < 4) to[warp * 32 + lane] = sum;
}

TEST(BulkCopy, ASlotThatWasReadIsFilledAgain) {
  constexpr int kRounds = 9;
  std::vector<int> values(kRounds * 32);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<int>(i * i % 997);
  DeviceBuffer from(values);
  DeviceBuffer<int> to(128);
  RingKernel<<<1, 160>>>(from.get(), to.get(), kRounds);
  CUDA_OK(cudaDeviceSynchronize());
  const auto got = to.Download();
  for (int warp = 0; warp < 4; ++warp) {
    for (int lane = 0; lane < 32; ++lane) {
      int want = 0;
      for (int round = 0; round < kRounds; ++round) want += values[round * 32 + (lane + warp) % 32];
      EXPECT_EQ(got[warp * 32 + lane], want) << warp << " " << lane;
    }
  }
}

}  // namespace
}  // namespace qwen::kernels::testing
