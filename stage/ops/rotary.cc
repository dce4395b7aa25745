#include "stage/ops/rotary.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "stage/base/check.h"

namespace qwen::ops {
namespace {

// The (fractional) dimension that turns `rotations` times over the original context.
double YarnDimension(double rotations, const RotaryOptions& options) {
  const double dim = static_cast<double>(options.head_dim);
  return dim * std::log(static_cast<double>(options.yarn.original_max_positions) / (rotations * 2.0 * M_PI)) /
         (2.0 * std::log(options.theta));
}

// Blends interpolated and extrapolated frequencies with a linear ramp over the dimensions.
at::Tensor YarnInverse(const RotaryOptions& options, const at::Tensor& position_frequencies) {
  const double low = std::max(std::floor(YarnDimension(options.yarn.beta_fast, options)), 0.0);
  double high = std::min(std::ceil(YarnDimension(options.yarn.beta_slow, options)),
                         static_cast<double>(options.head_dim - 1));
  if (low == high) high += 0.001;  // as the reference does, against a division by zero
  const at::Tensor ramp =
      at::arange(options.head_dim / 2, at::TensorOptions().dtype(at::kFloat)).sub(low).div(high - low).clamp(0, 1);
  const at::Tensor extrapolated_share = 1 - ramp;
  const at::Tensor extrapolated = position_frequencies.reciprocal();
  const at::Tensor interpolated = (options.yarn.factor * position_frequencies).reciprocal();
  return interpolated * (1 - extrapolated_share) + extrapolated * extrapolated_share;
}

}  // namespace

RotaryFrequencies MakeRotaryFrequencies(const RotaryOptions& options, at::Device device) {
  QP_CHECK(options.head_dim > 0 && options.head_dim % 2 == 0);
  const int64_t half = options.head_dim / 2;
  const at::Tensor exponent = at::arange(0, options.head_dim, 2, at::TensorOptions().dtype(at::kFloat)) /
                              static_cast<double>(options.head_dim);
  const at::Tensor position_frequencies = at::pow(at::Scalar(options.theta), exponent);
  RotaryFrequencies result;
  if (options.yarn.original_max_positions > 0) {
    result.inverse = YarnInverse(options, position_frequencies).to(device);
    const double factor = options.yarn.factor;
    const double derived = factor <= 1.0 ? 1.0 : 0.1 * std::log(factor) + 1.0;
    result.scaling = options.yarn.attention_factor != 0.0 ? options.yarn.attention_factor : derived;
  } else {
    result.inverse = position_frequencies.reciprocal().to(device);
  }
  // T everywhere, then every third frequency from 1 (h) and from 2 (w) up to three times the section's length.
  std::vector<int64_t> axis(half, 0);
  for (int64_t dimension = 1; dimension <= 2; ++dimension) {
    const int64_t end = std::min<int64_t>(half, int64_t{options.mrope_section[dimension]} * 3);
    for (int64_t i = dimension; i < end; i += 3) {
      axis[i] = dimension;
      result.plain = false;
    }
  }
  result.axis = at::tensor(axis, at::TensorOptions().dtype(at::kLong)).to(device);
  return result;
}

RotaryTable MakeRotaryTable(const RotaryFrequencies& frequencies, const at::Tensor& positions, at::ScalarType dtype,
                            const RowGroups& groups) {
  // (tokens, head_dim/2): the one product of the reference's outer-product matmul, so the same bits.
  const at::Tensor selected = frequencies.plain ? positions[0].unsqueeze(1)
                                                : positions.index_select(0, frequencies.axis).t();
  const at::Tensor angle = (selected * frequencies.inverse).contiguous();
  at::Tensor cos = at::empty(angle.sizes(), angle.options()), sin = at::empty(angle.sizes(), angle.options());
  for (const RowGroup& group : groups) {
    const at::Tensor rows = angle.narrow(0, group.begin, group.count);
    at::Tensor cos_rows = cos.narrow(0, group.begin, group.count), sin_rows = sin.narrow(0, group.begin, group.count);
    at::cos_out(cos_rows, rows);
    at::sin_out(sin_rows, rows);
  }
  if (frequencies.scaling != 1.0) {
    cos.mul_(frequencies.scaling);
    sin.mul_(frequencies.scaling);
  }
  return {at::cat({cos, cos}, -1).to(dtype), at::cat({sin, sin}, -1).to(dtype)};
}

at::Tensor ApplyRotary(const at::Tensor& x, const RotaryTable& table) {
  const int64_t half = x.size(-1) / 2;
  const at::Tensor rotated = at::cat({x.narrow(-1, half, half).neg(), x.narrow(-1, 0, half)}, -1);
  at::Tensor out = x * table.cos.unsqueeze(1);
  return out.add_(rotated.mul_(table.sin.unsqueeze(1)));
}

}  // namespace qwen::ops
