#include "stage/kernels/decode_layers.h"

#include "stage/kernels/decode_layers/step.cuh"

namespace qwen::kernels {
namespace decode {

cudaError_t LaunchBf16(const DecodeLayersArgs& args, cudaStream_t stream) {
  return LaunchShape<__nv_bfloat16>(args, stream);
}

namespace {

template <class P>
bool Is(const DecodeLayersShape& s) {
  return s.hidden == P::kHidden && s.heads == P::kHeads && s.kv_heads == P::kKvHeads && s.inter == P::kInter;
}
// Beyond that the kernels of one product each are as fast: an expert's weights take most of the time.
int TokensMax(const DecodeLayersShape& s) { return Is<Small<1>>(s) ? 4 : 1; }
bool Fits(const DecodeLayersShape& s) {
  return s.experts >= 32 && s.experts <= kExpertsMax && s.experts % 32 == 0 && s.top_k >= 2 && s.top_k <= kTopKMax && (Is<Small<1>>(s) || Is<Large<1>>(s));
}

}  // namespace
}  // namespace decode

int DecodeLayersTokens(const DecodeLayersShape& shape) {
  using namespace decode;
  int device = 0, multiprocessors = 0, cooperative = 0, shared = 0;
  if (!Fits(shape) || cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
    return 0;
  }
  if (multiprocessors < kGrid || cooperative == 0 || shared < 227 * 1024) return 0;
  return TokensMax(shape);
}

size_t DecodeLayersWorkspace(const DecodeLayersShape& shape) {
  using namespace decode;
  return Is<Small<1>>(shape) ? sizeof(Workspace<Small<1>>) : sizeof(Workspace<Large<1>>);
}

cudaError_t DecodeLayers(const DecodeLayersArgs& args, cudaStream_t stream, bool fp8) {
  using namespace decode;
  const DecodeLayersShape& s = args.shape;
  if (!Fits(s) || args.tokens < 1 || args.tokens > TokensMax(s) || args.layer_count < 1 || args.layer_count > kDecodeLayersMax ||
      args.block_tokens < kTileTokens || (args.block_tokens & (args.block_tokens - 1)) != 0) {
    return cudaErrorInvalidValue;
  }
  return fp8 ? LaunchFp8(args, stream) : LaunchBf16(args, stream);
}

}  // namespace qwen::kernels
