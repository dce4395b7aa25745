// stage/fused/launch.h — what the backend's files share: from tensors to the kernels' pointers and sizes. Private to this folder.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/util/Exception.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <string>

#include "stage/contract/model_shape.h"
#include "stage/kernels/common/fp8.h"
#include "stage/kernels/common/limits.h"
#include "stage/kernels/moe_decode.h"

namespace qwen::fused {

inline constexpr int64_t kDim = kernels::kHeadDim;
inline constexpr int64_t kTableStrideMin = 16;

// A kernel's pointer to a tensor. The sizes were checked once (Unfit, and the shapes that Bind gives).
inline __nv_bfloat16* Bf16(const at::Tensor& tensor) { return static_cast<__nv_bfloat16*>(tensor.data_ptr()); }
inline int32_t* Int32(const at::Tensor& tensor) { return static_cast<int32_t*>(tensor.data_ptr()); }
inline kernels::Fp8Matrix Fp8Of(const at::Tensor& codes, const at::Tensor& scales) {
  return {static_cast<const kernels::Fp8*>(codes.data_ptr()), static_cast<const float*>(scales.data_ptr())};
}
inline void Must(cudaError_t error, const char* what) { TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error)); }
// A kernel's launch; throws what LibTorch throws.
#define KERNEL(call) Must(kernels::call, #call)

// What every part of the backend wants of device and dtype: the first thing that stands in the way, empty when nothing does.
inline std::string UnfitDevice(const at::Device& device, at::ScalarType dtype) {
  if (!device.is_cuda()) return "device";
  if (dtype != at::kBFloat16) return "dtype";
  int major = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.has_index() ? device.index() : 0) != cudaSuccess || major != 9) {
    return "GPU architecture";  // the kernels are sm_90a
  }
  return "";
}

inline kernels::MoeShapeArgs MoeArgs(const contract::ModelShape& shape, int64_t tokens) {
  return {.tokens = static_cast<int>(tokens),
          .hidden = shape.hidden,
          .inter = shape.moe->intermediate,
          .experts = shape.moe->experts,
          .top_k = shape.moe->experts_per_token};
}

}  // namespace qwen::fused
