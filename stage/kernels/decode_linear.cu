#include "stage/kernels/common/launch.cuh"
#include "stage/kernels/common/limits.h"
#include "stage/kernels/common/ptx.cuh"
#include "stage/kernels/common/reduce.cuh"
#include "stage/kernels/common/weight.cuh"
#include "stage/kernels/decode_linear.h"

namespace qwen::kernels {
namespace {

constexpr int kWarps = 8;       // split k: each warp walks k/8 of 16 rows of W
constexpr int kRowPad = 32;     // bf16; makes the row stride 64 mod 128 bytes, so 16-byte reads of 2 rows cover all 32 banks

template <typename W>
__device__ __forceinline__ const W* Weights(const DecodeLinearArgs& args) {
  if constexpr (sizeof(W) == 1) {
    return args.fp8.codes;
  } else {
    return args.w;
  }
}
template <typename W>
__device__ __forceinline__ float Scale(const DecodeLinearArgs& args, size_t row, int column, int stride) {
  if constexpr (sizeof(W) == 1) {
    return WeightTraits<W>::Scale(args.fp8, row, column, stride);
  } else {
    return 1.0f;
  }
}

// One block: 16 rows of W, all tokens. kTiles = ceil(tokens / 8).
// With kNorm or kTiles == 1, x goes through shared memory (normalised on the way); else each thread reads its columns of x
// from L2 beside the weights: every element is used once per block, so shared memory would only add a copy.
// kUnroll divides the k steps of a warp (32 values each, 64 in FP8): so many are in flight, 2 rows * 16 B * kUnroll a thread.
template <int kTiles, bool kNorm, int kUnroll, typename W = __nv_bfloat16>
__global__ void __launch_bounds__(kWarps * 32, kTiles <= 2 ? 2 : 1) DecodeLinearKernel(const DecodeLinearArgs args) {
  // Shared memory: with kNorm x (tokens, k + kRowPad) bf16; then partial sums (kWarps, kTiles*8, 16) f32 over the same bytes.
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ float scratch[kWarps];
  auto* xs = reinterpret_cast<__nv_bfloat16*>(shared);
  const int stride = args.k + kRowPad;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  using T = WeightTraits<W>;
  constexpr int kStep = T::kStepColumns, kLane = kStep / 4;  // columns of a step, and a lane's
  const int row = blockIdx.x * 16;
  const int k_begin = warp * (args.k / kWarps), steps = args.k / kWarps / kStep;
  const W* w0 = Weights<W>(args) + static_cast<size_t>(row + g) * args.k + k_begin + t * kLane;
  const W* w8 = w0 + static_cast<size_t>(8) * args.k;
  const int scale_stride = Fp8ScaleStride(args.k);

  // Prefetch: the first weights do not depend on the previous kernel.
  uint4 a[kUnroll][2];
  float scale[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    a[u][0] = LoadStream(w0 + u * kStep);
    a[u][1] = LoadStream(w8 + u * kStep);
    scale[u] = Scale<W>(args, row, k_begin + u * kStep, scale_stride);
  }
  GridDependencyWait();
  GridDependencyLaunch();

  // Prologue: x normalised into shared memory.
  if constexpr (kNorm) {
    const int vectors = args.k / 8;
    for (int m = 0; m < args.tokens; ++m) {
      uint4* to = reinterpret_cast<uint4*>(xs + m * stride);
      const uint4* from = reinterpret_cast<const uint4*>(args.x + static_cast<size_t>(m) * args.k);
      float sum = 0.0f;
      for (int v = threadIdx.x; v < vectors; v += blockDim.x) {
        const uint4 p = LoadActivation(from + v);
        to[v] = p;
        const uint32_t words[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 f = UnpackBf16(words[i]);
          sum += f.x * f.x + f.y * f.y;
        }
      }
      const float scale = rsqrtf(BlockSum<kWarps>(sum, scratch) / args.k + args.norm_eps);
      const uint4* weight = reinterpret_cast<const uint4*>(args.norm_weight);
      for (int v = threadIdx.x; v < vectors; v += blockDim.x) {
        uint4 p = to[v];
        const uint4 wv = __ldg(weight + v);
        uint32_t* words = reinterpret_cast<uint32_t*>(&p);
        const uint32_t* weights = reinterpret_cast<const uint32_t*>(&wv);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 f = UnpackBf16(words[i]), n = UnpackBf16(weights[i]);
          words[i] = PackBf16(RoundBf16(f.x * scale) * n.x, RoundBf16(f.y * scale) * n.y);
        }
        to[v] = p;
        if (args.normed && blockIdx.x == 0) reinterpret_cast<uint4*>(args.normed + static_cast<size_t>(m) * args.k)[v] = p;
      }
    }
    __syncthreads();
  }
  // Column g of each tile. Columns past `tokens` repeat the last one: mma columns are independent, and nobody reads theirs.
  const __nv_bfloat16* xb[kTiles];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int m = min(i * 8 + g, args.tokens - 1);
    xb[i] = kNorm ? xs + m * stride + k_begin + t * kLane : args.x + static_cast<size_t>(m) * args.k + k_begin + t * kLane;
  }

  // Math: each step is two mma over 32 values of k (FP8: four over 64), per 8 tokens. A block's loads are all in flight before its first mma;
  // other resident blocks fill the gap between batches.
  float acc[kTiles][4] = {};
  for (int base = 0; base < steps; base += kUnroll) {
    if (base > 0) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        a[u][0] = LoadStream(w0 + (base + u) * kStep);
        a[u][1] = LoadStream(w8 + (base + u) * kStep);
        scale[u] = Scale<W>(args, row, k_begin + (base + u) * kStep, scale_stride);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const auto operand = T::Prepare(a[u][0], a[u][1], scale[u]);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        uint4 b[T::kVectors];
#pragma unroll
        for (int v = 0; v < T::kVectors; ++v) {
          b[v] = kNorm ? *reinterpret_cast<const uint4*>(xb[i] + (base + u) * kStep + v * 8) : LoadActivation(xb[i] + (base + u) * kStep + v * 8);
        }
        T::Multiply(acc[i], operand, b);
      }
    }
  }

  // Epilogue: the eight warps' partial sums, always in warp order.
  if constexpr (kNorm) __syncthreads();
  auto* partial = reinterpret_cast<float*>(shared);  // (kWarps, kTiles*8 tokens, 16 rows)
  constexpr int kColumns = kTiles * 8;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    float* p = partial + (warp * kColumns + i * 8 + 2 * t) * 16;
    p[g] = acc[i][0];
    p[16 + g] = acc[i][1];
    p[g + 8] = acc[i][2];
    p[16 + g + 8] = acc[i][3];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < args.tokens * 16; i += blockDim.x) {
    float sum = 0.0f;
#pragma unroll
    for (int s = 0; s < kWarps; ++s) sum += partial[s * kColumns * 16 + i];
    const size_t at = static_cast<size_t>(i / 16) * args.n + row + i % 16;
    if (args.residual) sum = __bfloat162float(args.residual[at]) + RoundBf16(sum);
    args.y[at] = __float2bfloat16_rn(sum);
  }
}

template <int kTiles, int kUnroll, typename W>
cudaError_t LaunchUnrolled(const DecodeLinearArgs& args, cudaStream_t stream) {
  const size_t x_bytes = args.norm_weight ? static_cast<size_t>(args.tokens) * (args.k + kRowPad) * sizeof(__nv_bfloat16) : 0;
  const size_t partial_bytes = static_cast<size_t>(kWarps) * 16 * kTiles * 8 * sizeof(float);
  const LaunchShape shape = {.grid = dim3(args.n / 16), .block = dim3(kWarps * 32), .shared_bytes = x_bytes > partial_bytes ? x_bytes : partial_bytes};
  return args.norm_weight ? Launch(DecodeLinearKernel<kTiles, true, kUnroll, W>, shape, stream, args)
                          : Launch(DecodeLinearKernel<kTiles, false, kUnroll, W>, shape, stream, args);
}

template <int kTiles, typename W>
cudaError_t LaunchTiles(const DecodeLinearArgs& args, cudaStream_t stream) {
  const int steps = args.k / kWarps / WeightTraits<W>::kStepColumns;
  if (steps % 8 == 0) return LaunchUnrolled<kTiles, 8, W>(args, stream);
  if constexpr (sizeof(W) == 1) {  // 2,048 columns are four steps
    if (steps % 4 == 0) return LaunchUnrolled<kTiles, 4, W>(args, stream);
  }
  if (steps % 2 == 0) return LaunchUnrolled<kTiles, 2, W>(args, stream);
  return LaunchUnrolled<kTiles, 1, W>(args, stream);
}

template <typename W>
cudaError_t LaunchAny(const DecodeLinearArgs& args, cudaStream_t stream) {
  if (args.tokens <= 8) return LaunchTiles<1, W>(args, stream);
  if (args.tokens <= 16) return LaunchTiles<2, W>(args, stream);
  return LaunchTiles<4, W>(args, stream);
}

}  // namespace

cudaError_t DecodeLinear(const DecodeLinearArgs& args, cudaStream_t stream) {
  if (args.tokens < 1 || args.tokens > kDecodeTokensMax || args.n % 16 != 0 || args.k % 256 != 0 || args.n <= 0 || args.k <= 0) return cudaErrorInvalidValue;
  // Shared memory of an SM holds 227 KiB.
  if (args.norm_weight && static_cast<size_t>(args.tokens) * (args.k + kRowPad) * 2 > 227 * 1024) return cudaErrorInvalidConfiguration;
  if (args.fp8.codes == nullptr) return LaunchAny<__nv_bfloat16>(args, stream);
  if (args.n % kFp8Block != 0 || args.k % (kWarps * WeightTraits<Fp8>::kStepColumns) != 0) return cudaErrorInvalidValue;
  return LaunchAny<Fp8>(args, stream);
}

}  // namespace qwen::kernels
