#include "csrc/ops/bias_gelu.h"

#include "csrc/torch/common.h"

namespace fastgpt::binding {
namespace {

Tensor bias_gelu_fwd(Tensor x, std::optional<Tensor> bias, bool tanh) {
  Tensor y = empty(x, {x.size(0), x.size(1)});
  if (x.numel() != 0) {
    const TensorRef in = view_input(x, "x", 2);
    cpu::bias_gelu_fwd({in, view_parameter(bias, "bias", in.size[1]), view(y), tanh});
  }
  return y;
}

std::tuple<Tensor, Tensor> bias_gelu_bwd(Tensor dy, Tensor x, std::optional<Tensor> bias, bool tanh,
                                         bool need_dbias) {
  const int64_t r = x.size(0), n = x.size(1);
  Tensor dx = empty(x, {r, n});
  Tensor dbias = empty(x, {need_dbias ? n : 0}, ScalarType::Float);
  if (x.numel() == 0) {
    torch::stable::zero_(dbias);
  } else {
    const TensorRef in = view_input(x, "x", 2);
    cpu::bias_gelu_bwd({view_rows(dy, "dy", in.dtype, {r, n}), in, view_parameter(bias, "bias", n),
                        view(dx), view_unless_empty(dbias), tanh});
  }
  return {dx, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("bias_gelu_fwd", TORCH_BOX(&bias_gelu_fwd));
  m.impl("bias_gelu_bwd", TORCH_BOX(&bias_gelu_bwd));
}

}  // namespace fastgpt::binding
