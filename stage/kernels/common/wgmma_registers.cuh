// stage/kernels/common/wgmma_registers.cuh — wgmma whose A comes from registers: weights that were multiplied out on the way (fp8.h).
#pragma once
#include <cstdint>

#include "stage/kernels/common/async.cuh"
#include "stage/kernels/common/fp8.h"

namespace qwen::kernels {

// clang-format off
#define QP_ACC8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
// D (64 x kN, f32) += A (64 x 16, bf16) * B (kN x 16, bf16)^T. Thread 4g+t of warp w holds of A: rows 16w+g (a[0], a[2]) and 16w+g+8
// (a[1], a[3]), columns 2t, 2t+1 (a[0], a[1]) and 2t+8, 2t+9 (a[2], a[3]). D and B as in Wgmma (async.cuh). The registers of A may be
// written again after WgmmaWait has seen this product's group.
template <int kN>
__device__ __forceinline__ void WgmmaRegisters(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (kN == 8) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {"
                 "%0,%1,%2,%3"
                 "}, {%4,%5,%6,%7}, %8, 1, 1, 1, 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else if constexpr (kN == 16) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {"
                 "%0,%1,%2,%3,%4,%5,%6,%7"
                 "}, {%8,%9,%10,%11}, %12, 1, 1, 1, 0;"
                 : QP_ACC8(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else if constexpr (kN == 32) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
                 "}, {%16,%17,%18,%19}, %20, 1, 1, 1, 0;"
                 : QP_ACC8(d, 0), QP_ACC8(d, 8)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else if constexpr (kN == 64) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
                 "%24,%25,%26,%27,%28,%29,%30,%31"
                 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 0;"
                 : QP_ACC8(d, 0), QP_ACC8(d, 8), QP_ACC8(d, 16), QP_ACC8(d, 24)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else if constexpr (kN == 128) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
                 "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
                 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
                 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 0;"
                 : QP_ACC8(d, 0), QP_ACC8(d, 8), QP_ACC8(d, 16), QP_ACC8(d, 24), QP_ACC8(d, 32), QP_ACC8(d, 40),
                   QP_ACC8(d, 48), QP_ACC8(d, 56)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    static_assert(kN == 8, "no such width");
  }
}
#undef QP_ACC8
// clang-format on

// This warp's 16 rows from `row` on (of a swizzled tile of packed codes, rows of kRowBytes) and 64 columns (four groups from `group` on) as
// operands of four products.
template <int kRowBytes>
__device__ __forceinline__ void LoadOperands(uint32_t (&a)[4][4], const unsigned char* tile, int row, int group, float scale) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int two = 0; two < 2; ++two) {
    uint32_t words[4];
    LoadMatrix4(words, SharedAddress(tile) + SwizzledAt<kRowBytes>(row + OperandRow(lane), group + 2 * two + OperandPiece(lane)));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Bf16Pairs g = MultiplyOut(words[2 * i], scale), g8 = MultiplyOut(words[2 * i + 1], scale);
      uint32_t(&to)[4] = a[2 * two + i];
      to[0] = g.low;
      to[1] = g8.low;
      to[2] = g.high;
      to[3] = g8.high;
    }
  }
}

}  // namespace qwen::kernels
