#include "stage/kernels/common/launch.cuh"
#include "stage/kernels/common/ptx.cuh"
#include "stage/kernels/fp8_weights.h"

namespace qwen::kernels {
namespace {

constexpr int kThreads = 256;

// One thread: 16 codes.
__global__ void __launch_bounds__(kThreads) PackKernel(const Fp8Words* in, Fp8Words* out, size_t groups) {
  GridDependencyWait();
  GridDependencyLaunch();
  const size_t i = static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= groups) return;
  const uint4 plain = *(reinterpret_cast<const uint4*>(in) + i);
  const Fp8Words packed = PackFp8({{plain.x, plain.y, plain.z, plain.w}});
  *(reinterpret_cast<uint4*>(out) + i) = make_uint4(packed.word[0], packed.word[1], packed.word[2], packed.word[3]);
}

// One thread: 16 weights; a block of threads walks along one row.
__global__ void __launch_bounds__(kThreads) MultiplyOutKernel(const Fp8Matrix matrix, __nv_bfloat16* out, int columns, int stride) {
  const size_t row = blockIdx.x;
  const Fp8* codes = matrix.codes + row * columns;
  const float* scales = matrix.scales + row / kFp8Block * stride;
  // `out` may still be read by the product before; weights are nobody's output.
  GridDependencyWait();
  GridDependencyLaunch();
  for (int column = static_cast<int>(threadIdx.x) * kFp8Group; column < columns; column += kThreads * kFp8Group) {
    const uint4 packed = LoadStream(codes + column);
    const float scale = __ldg(scales + column / kFp8Block);
    const Bf16Pairs a = MultiplyOut(packed.x, scale), b = MultiplyOut(packed.y, scale), c = MultiplyOut(packed.z, scale), d = MultiplyOut(packed.w, scale);
    uint4* to = reinterpret_cast<uint4*>(out + row * columns + column);
    to[0] = make_uint4(a.low, b.low, c.low, d.low);
    to[1] = make_uint4(a.high, b.high, c.high, d.high);
  }
}

}  // namespace

cudaError_t PackFp8Weights(const Fp8* in, Fp8* out, size_t count, cudaStream_t stream) {
  if (count == 0 || count % kFp8Group != 0) return cudaErrorInvalidValue;
  const size_t groups = count / kFp8Group;
  return Launch(PackKernel, {.grid = dim3(static_cast<unsigned>((groups + kThreads - 1) / kThreads)), .block = dim3(kThreads)}, stream,
                reinterpret_cast<const Fp8Words*>(in), reinterpret_cast<Fp8Words*>(out), groups);
}

cudaError_t MultiplyOutFp8(const Fp8Matrix& matrix, __nv_bfloat16* out, int rows, int columns, cudaStream_t stream) {
  if (rows < 1 || rows % kFp8Block != 0 || columns < 1 || columns % kFp8Block != 0) return cudaErrorInvalidValue;
  return Launch(MultiplyOutKernel, {.grid = dim3(static_cast<unsigned>(rows)), .block = dim3(kThreads)}, stream, matrix, out, columns, Fp8ScaleStride(columns));
}

}  // namespace qwen::kernels
