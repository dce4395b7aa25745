// stage/ops/norm.h — RMSNorm with the reference's two roundings. Thread safety: pure functions.
// Source: transformers 5.17.0 Qwen3VLMoeTextRMSNorm.forward.
#pragma once
#include <ATen/core/Tensor.h>

namespace qwen::ops {

// y = weight * dtype(float(x) * rsqrt(mean(float(x)^2) + eps)) over the last dimension: normalised in float32, rounded to
// x's dtype, then multiplied in that dtype. x (..., n), weight (n) -> (..., n). Rows do not influence each other.
at::Tensor RmsNorm(const at::Tensor& x, const at::Tensor& weight, double eps);

}  // namespace qwen::ops
