// The FP8 half of decode_layers.h. Has not run on a GPU yet.
#include "stage/kernels/decode_layers/step.cuh"

namespace qwen::kernels::decode {

cudaError_t LaunchFp8(const DecodeLayersArgs& args, bool next, cudaStream_t stream) {
  return next ? LaunchShape<Fp8, true>(args, stream) : LaunchShape<Fp8, false>(args, stream);
}

}  // namespace qwen::kernels::decode
