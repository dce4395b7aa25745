// stage/kernels/common/ptx.cuh — each instruction that has no C++ spelling, as a named function (PTX ISA 9.0, sm_90a).
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace qwen::kernels {

// Programmatic dependent launch: everything before Wait may run while the previous kernel of the stream still does, so
// it must not read what that kernel writes. Weights may be read: nothing in a step writes them.
__device__ __forceinline__ void GridDependencyWait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void GridDependencyLaunch() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// 16 bytes that are read once: past L1, and DRAM is asked for 256 bytes at a time.
__device__ __forceinline__ uint4 LoadStream(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
// 16 bytes of an activation that an earlier kernel wrote (not .nc: it may still be written when this kernel starts).
__device__ __forceinline__ uint4 LoadActivation(const void* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}

// D(16x8, f32) += A(16x16, bf16, row) * B(16x8, bf16, col). Thread 4g+t of the warp holds A rows g and g+8, B column g,
// D rows g and g+8 columns 2t, 2t+1.
__device__ __forceinline__ void Mma16816(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Two mma steps over 32 values of k. A dot product does not care in which order k is walked, so thread t of a quad takes
// the 8 consecutive values k = 8t .. 8t+7 of its rows: every load is 16 contiguous bytes and needs no shared memory.
__device__ __forceinline__ void MmaK32(float (&d)[4], const uint4& row_g, const uint4& row_g8, const uint4& column_g) {
  Mma16816(d, row_g.x, row_g8.x, row_g.y, row_g8.y, column_g.x, column_g.y);
  Mma16816(d, row_g.z, row_g8.z, row_g.w, row_g8.w, column_g.z, column_g.w);
}

__device__ __forceinline__ uint32_t SharedAddress(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ __forceinline__ void LoadMatrix4(uint32_t (&r)[4], uint32_t shared_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address));
}
__device__ __forceinline__ void LoadMatrix4Transposed(uint32_t (&r)[4], uint32_t shared_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address));
}
// 16 bytes global -> shared without registers; zeros when `valid` is false.
__device__ __forceinline__ void CopyAsync16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SharedAddress(shared)), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
// 4 bytes, each a multiple of 4.
__device__ __forceinline__ void CopyAsync4(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(SharedAddress(shared)), "l"(global) : "memory");
}
__device__ __forceinline__ void CopyAsyncCommit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void CopyAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ uint32_t PackBf16(float low, float high) {
  __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&v);
}
__device__ __forceinline__ float2 UnpackBf16(uint32_t v) { return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&v)); }
// Eight sums, each rounded once.
__device__ __forceinline__ uint4 AddBf16(const uint4& a, const uint4& b) {
  const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
  uint32_t sum[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 l = UnpackBf16(left[i]), r = UnpackBf16(right[i]);
    sum[i] = PackBf16(l.x + r.x, l.y + r.y);
  }
  return make_uint4(sum[0], sum[1], sum[2], sum[3]);
}
__device__ __forceinline__ float RoundBf16(float v) { return __bfloat162float(__float2bfloat16_rn(v)); }

}  // namespace qwen::kernels
