// stage/kernels/common/weight.cuh — what a product of few tokens (mma.m16n8k16, weights straight to registers) needs to know of
// its weights' type: bf16, or block FP8 (fp8.h) multiplied out on the way.
//
// A lane loads 16 bytes of row g and of row g+8, a quad as many columns as that is: kStepColumns.
#pragma once
#include "stage/kernels/common/fp8.h"
#include "stage/kernels/common/ptx.cuh"

namespace qwen::kernels {

template <typename W>
struct WeightTraits;

template <>
struct WeightTraits<__nv_bfloat16> {
  using Matrix = const __nv_bfloat16*;
  static constexpr int kStepColumns = 32;                 // of k that a quad's loads cover
  static constexpr int kVectors = 1;                      // uint4 of activations that go with a lane's 16 bytes of weights
  struct Operand {
    uint4 row_g, row_g8;
  };
  static __device__ __forceinline__ const __nv_bfloat16* Values(Matrix matrix) { return matrix; }
  static __device__ __forceinline__ Operand Prepare(const uint4& row_g, const uint4& row_g8, float /*scale*/) { return {row_g, row_g8}; }
  static __device__ __forceinline__ void Multiply(float (&d)[4], const Operand& a, const uint4 (&column_g)[kVectors]) { MmaK32(d, a.row_g, a.row_g8, column_g[0]); }
  static __device__ __forceinline__ float Scale(Matrix /*matrix*/, size_t /*row*/, int /*column*/, int /*stride*/) { return 1.0f; }
};

template <>
struct WeightTraits<Fp8> {
  using Matrix = Fp8Matrix;
  static constexpr int kStepColumns = 64;
  static constexpr int kVectors = 2;
  struct Operand {
    uint32_t a[4][4];  // of each k16: rows g and g+8 of the lower columns, then of the upper ones
  };
  static __device__ __forceinline__ const Fp8* Values(const Matrix& matrix) { return matrix.codes; }
  static __device__ __forceinline__ Operand Prepare(const uint4& row_g, const uint4& row_g8, float scale) {
    const uint32_t words_g[4] = {row_g.x, row_g.y, row_g.z, row_g.w}, words_g8[4] = {row_g8.x, row_g8.y, row_g8.z, row_g8.w};
    Operand operand;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Bf16Pairs g = MultiplyOut(words_g[i], scale), g8 = MultiplyOut(words_g8[i], scale);
      operand.a[i][0] = g.low;
      operand.a[i][1] = g8.low;
      operand.a[i][2] = g.high;
      operand.a[i][3] = g8.high;
    }
    return operand;
  }
  // The lane's 16 columns: word i of the weights holds 2i, 2i+1 (word i of the first vector) and 2i+8, 2i+9 (of the second).
  static __device__ __forceinline__ void Multiply(float (&d)[4], const Operand& a, const uint4 (&column_g)[kVectors]) {
    const uint32_t low[4] = {column_g[0].x, column_g[0].y, column_g[0].z, column_g[0].w}, high[4] = {column_g[1].x, column_g[1].y, column_g[1].z, column_g[1].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) Mma16816(d, a.a[i][0], a.a[i][1], a.a[i][2], a.a[i][3], low[i], high[i]);
  }
  // Of the block that holds (row, column); `stride` of the scales.
  static __device__ __forceinline__ float Scale(const Matrix& matrix, size_t row, int column, int stride) {
    return __ldg(matrix.scales + row / kFp8Block * stride + column / kFp8Block);
  }
};

}  // namespace qwen::kernels
