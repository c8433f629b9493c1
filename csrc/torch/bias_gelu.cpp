#include "csrc/ops/bias_gelu.h"

#include "csrc/torch/common.h"
#include "csrc/torch/cuda_stream.h"

namespace fastgpt::binding {
namespace {

Tensor bias_gelu_fwd(Tensor x, std::optional<Tensor> bias, bool tanh) {
  Tensor y = empty(x, x.sizes());
  if (x.numel() == 0) return y;
  require(on_device(x, bias), "bias");
  const TensorRef in = view_input_stack(x, "x", 2);
  const BiasGeluFwd p{in, view_parameter(bias, "bias", in.size[1]), view_stack(y, "y", 2), tanh};
  run_on_device_of(
      x, [&] { cpu::bias_gelu_fwd(p); }, [&](void* stream) { cuda::bias_gelu_fwd(p, stream); });
  return y;
}

std::tuple<Tensor, Tensor> bias_gelu_bwd(Tensor dy, Tensor x, std::optional<Tensor> bias, bool tanh,
                                         bool need_dbias) {
  const TensorRef in = view_input_stack(x, "x", 2);
  const int64_t r = in.size[0], n = in.size[1];
  Tensor dx = empty(x, x.sizes());
  Tensor dbias = empty(x, {need_dbias ? n : 0}, ScalarType::Float);
  if (x.numel() == 0) {
    torch::stable::zero_(dbias);
    return {dx, dbias};
  }
  require(on_device(x, dy) && on_device(x, bias), "dy, bias");
  const BiasGeluBwd p{view_stack(dy, "dy", in.dtype, in), in,
                      view_parameter(bias, "bias", n),    view_stack(dx, "dx", 2),
                      view_unless_empty(dbias),           tanh};
  run_on_device_of(
      x, [&] { cpu::bias_gelu_bwd(p); },
      [&](void* stream) {
        const int64_t floats = need_dbias ? cuda::bias_gelu_bwd_workspace(r, n) : 0;
        const Tensor workspace = empty(x, {floats}, ScalarType::Float);
        cuda::bias_gelu_bwd(p, static_cast<float*>(view(workspace).data), stream);
      });
  return {dx, dbias};
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("bias_gelu_fwd", FASTGPT_BOX(bias_gelu_fwd));
  m.impl("bias_gelu_bwd", FASTGPT_BOX(bias_gelu_bwd));
}

}  // namespace

FASTGPT_IMPLEMENT(implement)

}  // namespace fastgpt::binding
