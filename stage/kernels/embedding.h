// stage/kernels/embedding.h — rows of a table: token embeddings, and rows of any bf16 matrix by index.
//   table: (rows, width) bf16     ids: (count) int32, each in [0, rows)     out: (count, width) bf16
//   bytes moved: 4 * count * width      REQUIRES: width % 8 == 0; ids are checked by whoever made them
// Enqueues one kernel on `stream`, never synchronises, safe in graph capture.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace qwen::kernels {

cudaError_t GatherRows(const __nv_bfloat16* table, const int32_t* ids, __nv_bfloat16* out, int count, int width, cudaStream_t stream);

}  // namespace qwen::kernels
