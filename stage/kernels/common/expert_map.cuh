// stage/kernels/common/expert_map.cuh — how the tensor memory accelerator finds boxes of an expert's weights. Host code.
#pragma once
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "stage/kernels/common/fp8.h"

namespace qwen::kernels {

constexpr int kExpertMapColumns = 64;  // of a box: 128 bytes, the width of the swizzle

// A matrix (experts, halves, rows, columns) in boxes of box_columns columns and box_rows rows, taken evenly from all halves. The
// swizzle is as wide as a box's row: 128 bytes, or 64.
inline cudaError_t MakeExpertBoxes(CUtensorMapDataType type, int element_bytes, const void* weights, int columns, int rows, int halves, int experts, int box_columns,
                                   int box_rows, CUtensorMap* out) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (cudaError_t e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found); e != cudaSuccess) return e;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  const auto encode = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
  const cuuint64_t row_bytes = static_cast<cuuint64_t>(columns) * element_bytes;
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(halves), static_cast<cuuint64_t>(experts)};
  const cuuint64_t strides[3] = {row_bytes, row_bytes * rows, row_bytes * rows * halves};
  const cuuint32_t box[4] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows / halves), static_cast<cuuint32_t>(halves), 1}, steps[4] = {1, 1, 1, 1};
  const CUtensorMapSwizzle swizzle = box_columns * element_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  const CUresult result = encode(out, type, 4, const_cast<void*>(weights), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// bf16, boxes of kExpertMapColumns columns.
inline cudaError_t MakeExpertMap(const __nv_bfloat16* weights, int columns, int rows, int halves, int experts, int box_rows, CUtensorMap* out) {
  return MakeExpertBoxes(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, weights, columns, rows, halves, experts, kExpertMapColumns, box_rows, out);
}
// Packed FP8 codes (fp8.h); box_columns 64 or 128.
inline cudaError_t MakeExpertMap(const Fp8* codes, int columns, int rows, int halves, int experts, int box_columns, int box_rows, CUtensorMap* out) {
  return MakeExpertBoxes(CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, codes, columns, rows, halves, experts, box_columns, box_rows, out);
}

}  // namespace qwen::kernels
