#include "stage/kernels/common/head.cuh"
#include "stage/kernels/common/launch.cuh"
#include "stage/kernels/rope.h"

namespace qwen::kernels {
namespace {

constexpr int kWarps = 4;

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

// One warp a head: q and k heads are normalised and rotated, v heads only copied.
__global__ void __launch_bounds__(kWarps * 32) RopeKvWriteKernel(const RopeKvWriteArgs args) {
  GridDependencyWait();
  GridDependencyLaunch();
  const int token = blockIdx.x, lane = threadIdx.x & 31, heads = args.heads + 2 * args.kv_heads;
  const int head = static_cast<int>(blockIdx.y) * kWarps + (threadIdx.x >> 5);
  if (head >= heads) return;
  __nv_bfloat16* at = args.qkv + (static_cast<size_t>(token) * heads + head) * kHeadDim;
  if (head < args.heads + args.kv_heads) {
    NormRope(LoadHead(at), LoadHead(head < args.heads ? args.q_norm : args.k_norm), LoadHead(args.cos_sin + static_cast<size_t>(token) * kHeadDim),
             args.norm_eps, at);
    if (head < args.heads) return;
  }
  const int kv_head = (head - args.heads) % args.kv_heads;
  __nv_bfloat16* cache = (head < args.heads + args.kv_heads ? args.k_cache : args.v_cache) + (args.slot[token] * args.kv_heads + kv_head) * kHeadDim;
  const HeadPart part = LoadHead(at);  // what this lane wrote itself
  *reinterpret_cast<uint32_t*>(cache + 2 * lane) = part.low;
  *reinterpret_cast<uint32_t*>(cache + kHalf + 2 * lane) = part.high;
}

}  // namespace

cudaError_t RotaryTable(const RotaryTableArgs& args, cudaStream_t stream) {
  if (args.tokens < 1) return cudaErrorInvalidValue;
  return Launch(RotaryTableKernel, {.grid = dim3(args.tokens), .block = dim3(kHalf)}, stream, args);
}

cudaError_t RopeKvWrite(const RopeKvWriteArgs& args, cudaStream_t stream) {
  if (args.tokens < 1 || args.heads < 1 || args.kv_heads < 1) return cudaErrorInvalidValue;
  const int heads = args.heads + 2 * args.kv_heads;
  return Launch(RopeKvWriteKernel, {.grid = dim3(args.tokens, (heads + kWarps - 1) / kWarps), .block = dim3(kWarps * 32)}, stream, args);
}

}  // namespace qwen::kernels
