// The FP8 half of decode_layers.h.
#include "stage/kernels/decode_layers/step.cuh"

namespace qwen::kernels::decode {

cudaError_t LaunchFp8(const DecodeLayersArgs& args, cudaStream_t stream) {
  return LaunchShape<Fp8>(args, stream);
}

}  // namespace qwen::kernels::decode
