// stage/ops/linear.h — matrix products and activations whose rows may be kept apart by sequence.
//
// A BLAS library is free to sum in another order when the number of rows changes (one row is a matrix-vector product,
// many rows are blocked differently), and ATen's transcendental functions take vector code for most of a tensor but scalar
// code, with other last bits, for what is left at its end. RowGroups say which rows share a call, so that the caller
// chooses: one group per sequence gives every sequence the bits that it would have alone, one group in all reads the
// weights once.
// Thread safety: pure functions.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace qwen::ops {

struct RowGroup {
  int64_t begin = 0, count = 0;
};
using RowGroups = std::vector<RowGroup>;  // ascending, adjacent, covering every row exactly once; never empty

// x (rows, in) * weight (out, in)^T [+ bias (out)] -> (rows, out), in x's dtype (one rounding per element).
// `bias` may be undefined.
at::Tensor Linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const RowGroups& groups);

// x * sigmoid(x), elementwise, in x's dtype. x (rows, n), rows may be strided.
at::Tensor Silu(const at::Tensor& x, const RowGroups& groups);

}  // namespace qwen::ops
