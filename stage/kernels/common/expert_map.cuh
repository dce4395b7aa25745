// stage/kernels/common/expert_map.cuh — how the tensor memory accelerator finds boxes of an expert's weights. Host code.
#pragma once
#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace qwen::kernels {

constexpr int kExpertMapColumns = 64;  // of a box: 128 bytes, the width of the swizzle

// A matrix (experts, halves, rows, columns) in boxes of kExpertMapColumns columns and box_rows rows, taken evenly from all halves.
inline cudaError_t MakeExpertMap(const __nv_bfloat16* weights, int columns, int rows, int halves, int experts, int box_rows, CUtensorMap* out) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (cudaError_t e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found); e != cudaSuccess) return e;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  const auto encode = reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
  const cuuint64_t row_bytes = static_cast<cuuint64_t>(columns) * 2;
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(halves), static_cast<cuuint64_t>(experts)};
  const cuuint64_t strides[3] = {row_bytes, row_bytes * rows, row_bytes * rows * halves};
  const cuuint32_t box[4] = {kExpertMapColumns, static_cast<cuuint32_t>(box_rows / halves), static_cast<cuuint32_t>(halves), 1}, steps[4] = {1, 1, 1, 1};
  const CUresult result = encode(out, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<__nv_bfloat16*>(weights), sizes, strides, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace qwen::kernels
