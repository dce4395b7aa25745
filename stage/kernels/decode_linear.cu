#include "stage/kernels/common/launch.cuh"
#include "stage/kernels/common/limits.h"
#include "stage/kernels/common/ptx.cuh"
#include "stage/kernels/common/reduce.cuh"
#include "stage/kernels/decode_linear.h"

namespace qwen::kernels {
namespace {

constexpr int kWarps = 8;       // split k: each warp walks k/8 of 16 rows of W
constexpr int kRowPad = 32;     // bf16; makes the row stride 64 mod 128 bytes, so 16-byte reads of 2 rows cover all 32 banks

// One block: 16 rows of W, all tokens. kTiles = ceil(tokens / 8).
// With kNorm or kTiles == 1, x goes through shared memory (normalised on the way); else each thread reads its columns of x
// from L2 beside the weights: every element is used once per block, so shared memory would only add a copy.
// kUnroll divides the k steps of a warp (32 values each): so many are in flight, 2 rows * 16 B * kUnroll a thread.
template <int kTiles, bool kNorm, int kUnroll>
__global__ void __launch_bounds__(kWarps * 32, kTiles <= 2 ? 2 : 1) DecodeLinearKernel(const DecodeLinearArgs args) {
  // Shared memory: with kNorm x (tokens, k + kRowPad) bf16; then partial sums (kWarps, kTiles*8, 16) f32 over the same bytes.
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ float scratch[kWarps];
  auto* xs = reinterpret_cast<__nv_bfloat16*>(shared);
  const int stride = args.k + kRowPad;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int row = blockIdx.x * 16;
  const int k_begin = warp * (args.k / kWarps), steps = args.k / kWarps / 32;
  const __nv_bfloat16* w0 = args.w + static_cast<size_t>(row + g) * args.k + k_begin + t * 8;
  const __nv_bfloat16* w8 = w0 + static_cast<size_t>(8) * args.k;

  // Prefetch: the first weights do not depend on the previous kernel.
  uint4 a[kUnroll][2];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    a[u][0] = LoadStream(w0 + u * 32);
    a[u][1] = LoadStream(w8 + u * 32);
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
    xb[i] = kNorm ? xs + m * stride + k_begin + t * 8 : args.x + static_cast<size_t>(m) * args.k + k_begin + t * 8;
  }

  // Math: each step is two mma over 32 values of k, per 8 tokens. A block's loads are all in flight before its first mma;
  // other resident blocks fill the gap between batches.
  float acc[kTiles][4] = {};
  for (int base = 0; base < steps; base += kUnroll) {
    if (base > 0) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        a[u][0] = LoadStream(w0 + (base + u) * 32);
        a[u][1] = LoadStream(w8 + (base + u) * 32);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const uint4 b = kNorm ? *reinterpret_cast<const uint4*>(xb[i] + (base + u) * 32) : LoadActivation(xb[i] + (base + u) * 32);
        MmaK32(acc[i], a[u][0], a[u][1], b);
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

template <int kTiles, int kUnroll>
cudaError_t LaunchUnrolled(const DecodeLinearArgs& args, cudaStream_t stream) {
  const size_t x_bytes = args.norm_weight ? static_cast<size_t>(args.tokens) * (args.k + kRowPad) * sizeof(__nv_bfloat16) : 0;
  const size_t partial_bytes = static_cast<size_t>(kWarps) * 16 * kTiles * 8 * sizeof(float);
  const LaunchShape shape = {.grid = dim3(args.n / 16), .block = dim3(kWarps * 32), .shared_bytes = x_bytes > partial_bytes ? x_bytes : partial_bytes};
  return args.norm_weight ? Launch(DecodeLinearKernel<kTiles, true, kUnroll>, shape, stream, args)
                          : Launch(DecodeLinearKernel<kTiles, false, kUnroll>, shape, stream, args);
}

template <int kTiles>
cudaError_t LaunchTiles(const DecodeLinearArgs& args, cudaStream_t stream) {
  const int steps = args.k / kWarps / 32;
  if (steps % 8 == 0) return LaunchUnrolled<kTiles, 8>(args, stream);
  if (steps % 2 == 0) return LaunchUnrolled<kTiles, 2>(args, stream);
  return LaunchUnrolled<kTiles, 1>(args, stream);
}

}  // namespace

cudaError_t DecodeLinear(const DecodeLinearArgs& args, cudaStream_t stream) {
  if (args.tokens < 1 || args.tokens > kDecodeTokensMax || args.n % 16 != 0 || args.k % 256 != 0 || args.n <= 0 || args.k <= 0) return cudaErrorInvalidValue;
  // Shared memory of an SM holds 227 KiB.
  if (args.norm_weight && static_cast<size_t>(args.tokens) * (args.k + kRowPad) * 2 > 227 * 1024) return cudaErrorInvalidConfiguration;
  if (args.tokens <= 8) return LaunchTiles<1>(args, stream);
  if (args.tokens <= 16) return LaunchTiles<2>(args, stream);
  return LaunchTiles<4>(args, stream);
}

}  // namespace qwen::kernels
