#include "stage/kernels/common/head.cuh"
#include "stage/kernels/common/launch.cuh"
#include "stage/kernels/rope.h"

namespace qwen::kernels {
namespace {

constexpr int kWarps = 8;

// cosf and sinf are the accurate ones (no fast math): angles reach a context length of radians.
__global__ void __launch_bounds__(kHalf) RotaryTableKernel(const RotaryTableArgs args) {
  GridDependencyWait();
  GridDependencyLaunch();
  const int token = blockIdx.x, i = threadIdx.x;
  const float angle = static_cast<float>(args.positions[static_cast<size_t>(args.axis[i]) * args.tokens + token]) * args.inverse[i];
  __nv_bfloat16* out = args.cos_sin + static_cast<size_t>(token) * kHeadDim;
  out[i] = __float2bfloat16_rn(cosf(angle) * args.scaling);
  out[kHalf + i] = __float2bfloat16_rn(sinf(angle) * args.scaling);
}

// One block a token, its warps take the heads in turn. A warp asks for kAhead heads before it uses the first: what this
// kernel costs is bytes, and one head of 256 bytes in flight per warp would leave most of the bandwidth idle.
__global__ void __launch_bounds__(kWarps * 32) RopeKvWriteKernel(const RopeKvWriteArgs args) {
  constexpr int kAhead = 5;
  const int token = blockIdx.x, warp = threadIdx.x >> 5, heads = args.heads + 2 * args.kv_heads;
  const HeadPart q_weight = LoadHead(args.q_norm), k_weight = LoadHead(args.k_norm);
  GridDependencyWait();
  GridDependencyLaunch();
  const HeadPart cos_sin = LoadHead(args.cos_sin + static_cast<size_t>(token) * kHeadDim);
  const int64_t slot = args.slot[token];
  __nv_bfloat16* row = args.qkv + static_cast<size_t>(token) * heads * kHeadDim;
  for (int first = warp; first < heads; first += kWarps * kAhead) {
    HeadPart part[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int head = first + i * kWarps;
      if (head < heads) part[i] = LoadHead(row + static_cast<size_t>(head) * kHeadDim);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int head = first + i * kWarps;
      if (head >= heads) continue;
      const bool is_v = head >= args.heads + args.kv_heads;
      if (!is_v) part[i] = NormRope(part[i], head < args.heads ? q_weight : k_weight, cos_sin, args.norm_eps);
      if (!is_v) StoreHead(row + static_cast<size_t>(head) * kHeadDim, part[i]);
      if (head >= args.heads) {
        const int kv_head = (head - args.heads) % args.kv_heads;
        StoreHead((is_v ? args.v_cache : args.k_cache) + (slot * args.kv_heads + kv_head) * kHeadDim, part[i]);
      }
    }
  }
}

}  // namespace

cudaError_t RotaryTable(const RotaryTableArgs& args, cudaStream_t stream) {
  if (args.tokens < 1) return cudaErrorInvalidValue;
  return Launch(RotaryTableKernel, {.grid = dim3(args.tokens), .block = dim3(kHalf)}, stream, args);
}

cudaError_t RopeKvWrite(const RopeKvWriteArgs& args, cudaStream_t stream) {
  if (args.tokens < 1 || args.heads < 1 || args.kv_heads < 1) return cudaErrorInvalidValue;
  return Launch(RopeKvWriteKernel, {.grid = dim3(args.tokens), .block = dim3(kWarps * 32)}, stream, args);
}

}  // namespace qwen::kernels
