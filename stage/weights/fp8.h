// stage/weights/fp8.h — block-FP8 weights as tensors: E4M3 codes (..., R, C) and one scale a block, weight ~= code * scale.
// Part of the target qp_loader. Thread safety: pure functions.
#pragma once
#include <ATen/core/Tensor.h>

#include "stage/contract/model_shape.h"

namespace qwen::weights {

struct Fp8Tensor {
  at::Tensor codes;   // float8_e4m3fn, (..., R, C)
  at::Tensor scales;  // float32, (..., ceil(R / block_rows), ceil(C / block_columns))
};

// float32(code) * scale, in float32 (docs/numerics.md: the reference rounds that to its dtype).
at::Tensor MultiplyOut(const at::Tensor& codes, const at::Tensor& scales, const contract::QuantizationShape& block);

// As `python_export quantize`: scale = largest value of the block / 448, a bf16 number, rounded up so that nothing is clipped; codes
// rounded to nearest even. One leading index after another, so that the float32 copies are of one matrix.
Fp8Tensor Quantize(const at::Tensor& weight, const contract::QuantizationShape& block);

}  // namespace qwen::weights
