#include "stage/ops/norm.h"

namespace qwen::ops {

at::Tensor RmsNorm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const at::Tensor wide = x.to(at::kFloat);
  at::Tensor scale = wide.pow(2).mean(-1, /*keepdim=*/true);
  scale.add_(eps).rsqrt_();
  return weight * (wide * scale).to(x.scalar_type());
}

}  // namespace qwen::ops
