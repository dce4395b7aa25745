#include "stage/weights/fp8.h"

#include <ATen/ATen.h>

namespace qwen::weights {
namespace {

constexpr double kLargestCode = 448.0;

// A value for every block -> one for every element of (..., rows, columns).
at::Tensor Spread(const at::Tensor& blocks, const contract::QuantizationShape& block, int64_t rows, int64_t columns) {
  return blocks.repeat_interleave(block.block_rows, -2).narrow(-2, 0, rows).repeat_interleave(block.block_columns, -1).narrow(-1, 0, columns);
}

Fp8Tensor QuantizeMatrix(const at::Tensor& weight, const contract::QuantizationShape& block) {
  const int64_t rows = weight.size(0), columns = weight.size(1);
  const int64_t down = (rows + block.block_rows - 1) / block.block_rows, across = (columns + block.block_columns - 1) / block.block_columns;
  const at::Tensor wide = at::zeros({down * block.block_rows, across * block.block_columns}, weight.options().dtype(at::kFloat));
  wide.narrow(0, 0, rows).narrow(1, 0, columns).copy_(weight);
  const at::Tensor largest = wide.view({down, block.block_rows, across, block.block_columns}).abs().amax({1, 3});
  const at::Tensor nearest = at::where(largest > 0, largest / kLargestCode, 1.0).to(at::kBFloat16);
  const at::Tensor above = (nearest.view(at::kShort) + 1).view(at::kBFloat16);  // the next number up: bf16 of one sign ascend as integers
  const at::Tensor scales = at::where(nearest.to(at::kFloat) * kLargestCode < largest, above, nearest).to(at::kFloat);
  const at::Tensor codes = (weight.to(at::kFloat) / Spread(scales, block, rows, columns)).clamp(-kLargestCode, kLargestCode).to(at::kFloat8_e4m3fn);
  return {codes, scales};
}

}  // namespace

at::Tensor MultiplyOut(const at::Tensor& codes, const at::Tensor& scales, const contract::QuantizationShape& block) {
  return codes.to(at::kFloat) * Spread(scales.to(at::kFloat), block, codes.size(-2), codes.size(-1));
}

Fp8Tensor Quantize(const at::Tensor& weight, const contract::QuantizationShape& block) {
  if (weight.dim() == 2) return QuantizeMatrix(weight, block);
  std::vector<at::Tensor> codes, scales;
  for (const at::Tensor& part : weight.unbind(0)) {
    Fp8Tensor each = Quantize(part, block);
    codes.push_back(each.codes.view(at::kByte));  // not every operator knows float8
    scales.push_back(std::move(each.scales));
  }
  return {at::stack(codes).view(at::kFloat8_e4m3fn), at::stack(scales)};
}

}  // namespace qwen::weights
