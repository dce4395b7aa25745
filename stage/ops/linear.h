// stage/ops/linear.h — matrix products whose rows may be kept apart by sequence.
//
// A BLAS library is free to sum in another order when the number of rows changes (one row is a matrix-vector product,
// many rows are blocked differently). RowGroups say which rows are multiplied in one call, so that the caller chooses:
// one group per sequence gives every sequence the bits that it would have alone, one group in all streams the weights once.
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

}  // namespace qwen::ops
