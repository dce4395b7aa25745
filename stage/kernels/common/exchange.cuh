// stage/kernels/common/exchange.cuh — values that one block of a running kernel gives to others.
//
// A word is 8 bytes: 4 of payload, 4 of a flag that says which step and layer it belongs to. One store writes both and one load
// reads both (8 aligned bytes are single-copy atomic), so a reader who sees the flag has the value: no fence, no counter, and
// the first read that succeeds has brought the data already.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace qwen::kernels {

using Word = unsigned long long;
constexpr int kAwaitTries = 1 << 24;  // of about half a microsecond and more

__device__ __forceinline__ Word MakeWord(uint32_t payload, uint32_t flag) { return static_cast<Word>(flag) << 32 | payload; }
__device__ __forceinline__ void Publish(Word* at, uint32_t payload, uint32_t flag) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(at), "l"(MakeWord(payload, flag)) : "memory");
}
// Two neighbours; `at` is 16-byte aligned.
__device__ __forceinline__ void Publish2(Word* at, uint32_t first, uint32_t second, uint32_t flag) {
  asm volatile("st.relaxed.gpu.global.v2.u64 [%0], {%1, %2};" ::"l"(at), "l"(MakeWord(first, flag)), "l"(MakeWord(second, flag)) : "memory");
}

// The whole warp waits until every lane's words have come: lane's pair i at address(i), 16-byte aligned; null: none wanted. What has
// come is not asked for again: blocks that wait should not keep the L2 cache from those that work.
template <int kCount, typename Address>
__device__ __forceinline__ void Await2(uint32_t flag, uint2 (&payload)[kCount], Address address) {
  bool here[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    here[i] = address(i) == nullptr;
    payload[i] = make_uint2(0, 0);
  }
  for (int tries = 0;; ++tries) {
    Word first[kCount], second[kCount];
    bool all = true;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      first[i] = second[i] = 0;
      if (!here[i]) asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(first[i]), "=l"(second[i]) : "l"(address(i)) : "memory");
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!here[i]) {
        here[i] = static_cast<uint32_t>(first[i] >> 32) == flag && static_cast<uint32_t>(second[i] >> 32) == flag;
        payload[i] = make_uint2(static_cast<uint32_t>(first[i]), static_cast<uint32_t>(second[i]));
      }
      all &= here[i];
    }
    if (__all_sync(0xffffffffu, all)) return;
    if (tries > kAwaitTries) __trap();
  }
}
// As Await2 for single words.
template <int kCount, typename Address>
__device__ __forceinline__ void Await1(uint32_t flag, uint32_t (&payload)[kCount], Address address) {
  for (int tries = 0;; ++tries) {
    Word word[kCount];
    bool here = true;
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word[i]) : "l"(address(i)) : "memory");
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      here &= static_cast<uint32_t>(word[i] >> 32) == flag;
      payload[i] = static_cast<uint32_t>(word[i]);
    }
    if (__all_sync(0xffffffffu, here)) return;
    if (tries > kAwaitTries) __trap();
  }
}

}  // namespace qwen::kernels
