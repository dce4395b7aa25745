// stage/kernels/common/wgmma_wide.cuh — wgmma for the products of a prompt: up to 192 columns (PTX ISA 9.0, sm_90a). The
// instruction names each accumulator register, so each width is spelled out; layout and meaning are those of Wgmma (async.cuh).
#pragma once
#include <cstdint>

#include "stage/kernels/common/async.cuh"

namespace qwen::kernels {

// Registers of a warpgroup that only loads go to those that multiply (all four warps call it).
template <int kRegisters>
__device__ __forceinline__ void ReleaseRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void ClaimRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
// A barrier of the 128 threads of one warpgroup; `id` 1..15.
__device__ __forceinline__ void WarpgroupSync(int id) { asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory"); }
// Four 8x8 blocks of bf16 pairs, each written transposed: what a product holds as (row, two columns) lies as (column, rows).
__device__ __forceinline__ void StoreMatrix4Transposed(uint32_t shared_address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared_address), "r"(r0), "r"(r1), "r"(r2), "r"(r3) : "memory");
}

// clang-format off
#define QP_ACC8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
template <int kN>
__device__ __forceinline__ void WgmmaWide(float (&d)[kN / 2], uint64_t a, uint64_t b) {
  if constexpr (kN == 16 || kN == 32 || kN == 64) {
    Wgmma<kN>(d, a, b);
  } else if constexpr (kN == 48) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n48k16.f32.bf16.bf16 {"
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23"
                 "}, %24, %25, 1, 1, 1, 0, 0;"
                 : QP_ACC8(d, 0), QP_ACC8(d, 8), QP_ACC8(d, 16)
                 : "l"(a), "l"(b));
  } else if constexpr (kN == 80) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {"
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
                 "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39"
                 "}, %40, %41, 1, 1, 1, 0, 0;"
                 : QP_ACC8(d, 0), QP_ACC8(d, 8), QP_ACC8(d, 16), QP_ACC8(d, 24), QP_ACC8(d, 32)
                 : "l"(a), "l"(b));
  } else if constexpr (kN == 96) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 {"
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
                 "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
                 "}, %48, %49, 1, 1, 1, 0, 0;"
                 : QP_ACC8(d, 0), QP_ACC8(d, 8), QP_ACC8(d, 16), QP_ACC8(d, 24), QP_ACC8(d, 32), QP_ACC8(d, 40)
                 : "l"(a), "l"(b));
  } else if constexpr (kN == 112) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n112k16.f32.bf16.bf16 {"
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
                 "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
                 "%48,%49,%50,%51,%52,%53,%54,%55"
                 "}, %56, %57, 1, 1, 1, 0, 0;"
                 : QP_ACC8(d, 0), QP_ACC8(d, 8), QP_ACC8(d, 16), QP_ACC8(d, 24), QP_ACC8(d, 32), QP_ACC8(d, 40),
                   QP_ACC8(d, 48)
                 : "l"(a), "l"(b));
  } else if constexpr (kN == 128) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
                 "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
                 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
                 "}, %64, %65, 1, 1, 1, 0, 0;"
                 : QP_ACC8(d, 0), QP_ACC8(d, 8), QP_ACC8(d, 16), QP_ACC8(d, 24), QP_ACC8(d, 32), QP_ACC8(d, 40),
                   QP_ACC8(d, 48), QP_ACC8(d, 56)
                 : "l"(a), "l"(b));
  } else if constexpr (kN == 144) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n144k16.f32.bf16.bf16 {"
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
                 "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
                 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71"
                 "}, %72, %73, 1, 1, 1, 0, 0;"
                 : QP_ACC8(d, 0), QP_ACC8(d, 8), QP_ACC8(d, 16), QP_ACC8(d, 24), QP_ACC8(d, 32), QP_ACC8(d, 40),
                   QP_ACC8(d, 48), QP_ACC8(d, 56), QP_ACC8(d, 64)
                 : "l"(a), "l"(b));
  } else if constexpr (kN == 160) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n160k16.f32.bf16.bf16 {"
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
                 "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
                 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,"
                 "%72,%73,%74,%75,%76,%77,%78,%79"
                 "}, %80, %81, 1, 1, 1, 0, 0;"
                 : QP_ACC8(d, 0), QP_ACC8(d, 8), QP_ACC8(d, 16), QP_ACC8(d, 24), QP_ACC8(d, 32), QP_ACC8(d, 40),
                   QP_ACC8(d, 48), QP_ACC8(d, 56), QP_ACC8(d, 64), QP_ACC8(d, 72)
                 : "l"(a), "l"(b));
  } else if constexpr (kN == 176) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n176k16.f32.bf16.bf16 {"
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
                 "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
                 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,"
                 "%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87"
                 "}, %88, %89, 1, 1, 1, 0, 0;"
                 : QP_ACC8(d, 0), QP_ACC8(d, 8), QP_ACC8(d, 16), QP_ACC8(d, 24), QP_ACC8(d, 32), QP_ACC8(d, 40),
                   QP_ACC8(d, 48), QP_ACC8(d, 56), QP_ACC8(d, 64), QP_ACC8(d, 72), QP_ACC8(d, 80)
                 : "l"(a), "l"(b));
  } else if constexpr (kN == 192) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {"
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
                 "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
                 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,"
                 "%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
                 "}, %96, %97, 1, 1, 1, 0, 0;"
                 : QP_ACC8(d, 0), QP_ACC8(d, 8), QP_ACC8(d, 16), QP_ACC8(d, 24), QP_ACC8(d, 32), QP_ACC8(d, 40),
                   QP_ACC8(d, 48), QP_ACC8(d, 56), QP_ACC8(d, 64), QP_ACC8(d, 72), QP_ACC8(d, 80), QP_ACC8(d, 88)
                 : "l"(a), "l"(b));
  } else {
    static_assert(kN == 16, "no such width");
  }
}
#undef QP_ACC8
// clang-format on

}  // namespace qwen::kernels
