// stage/kernels/fp8_weights.h — block-FP8 weights on their way into the order of the kernels, and back out as bf16.
// Neither has run on a GPU yet. Both enqueue one kernel, allocate nothing, never synchronise, may be captured.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstddef>

#include "stage/kernels/common/fp8.h"

namespace qwen::kernels {

// E4M3 codes in the order of columns -> packed (common/fp8.h). `count` codes, a multiple of 16; out may be in. Once, after loading.
cudaError_t PackFp8Weights(const Fp8* in, Fp8* out, size_t count, cudaStream_t stream);

// out (rows, columns) bf16, in the order of columns: the reference's weights, for a product of a library.
// bytes moved: 3 * rows * columns. REQUIRES: rows % 128 == 0, columns % 128 == 0.
cudaError_t MultiplyOutFp8(const Fp8Matrix& matrix, __nv_bfloat16* out, int rows, int columns, cudaStream_t stream);

}  // namespace qwen::kernels
