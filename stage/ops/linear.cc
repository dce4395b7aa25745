#include "stage/ops/linear.h"

#include "stage/base/check.h"

namespace qwen::ops {

at::Tensor Linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const RowGroups& groups) {
  QP_CHECK(!groups.empty() && groups.back().begin + groups.back().count == x.size(0));
  if (groups.size() == 1) {
    return bias.defined() ? at::addmm(bias, x, weight.t()) : at::mm(x, weight.t());
  }
  const at::Tensor transposed = weight.t();
  at::Tensor out = at::empty({x.size(0), weight.size(0)}, x.options());
  for (const RowGroup& group : groups) {
    at::Tensor rows = out.narrow(0, group.begin, group.count);
    if (bias.defined()) {
      at::addmm_out(rows, bias, x.narrow(0, group.begin, group.count), transposed);
    } else {
      at::mm_out(rows, x.narrow(0, group.begin, group.count), transposed);
    }
  }
  return out;
}

at::Tensor Silu(const at::Tensor& x, const RowGroups& groups) {
  if (groups.size() == 1) return at::silu(x);
  at::Tensor out = at::empty(x.sizes(), x.options());
  for (const RowGroup& group : groups) {
    at::Tensor rows = out.narrow(0, group.begin, group.count);
    at::silu_out(rows, x.narrow(0, group.begin, group.count));
  }
  return out;
}

}  // namespace qwen::ops
