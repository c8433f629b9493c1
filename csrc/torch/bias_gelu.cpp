#include "csrc/ops/bias_gelu.h"

#include "csrc/torch/common.h"
#include "csrc/torch/cuda_stream.h"

namespace fastgpt::binding {
namespace {

Tensor bias_gelu_fwd(Tensor x, std::optional<Tensor> bias, bool tanh) {
  Tensor y = empty(x, {x.size(0), x.size(1)});
  if (x.numel() == 0) return y;
  require(on_device(x, bias), "bias");
  const TensorRef in = view_input(x, "x", 2);
  const BiasGeluFwd p{in, view_parameter(bias, "bias", in.size[1]), view(y), tanh};
  if (x.is_cpu()) {
    cpu::bias_gelu_fwd(p);
  } else {
#if defined(FASTGPT_CUDA)
    cuda::bias_gelu_fwd(p, CudaStream(x).get());
#endif
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
    return {dx, dbias};
  }
  require(on_device(x, dy) && on_device(x, bias), "dy, bias");
  const TensorRef in = view_input(x, "x", 2);
  const BiasGeluBwd p{view_rows(dy, "dy", in.dtype, {r, n}),
                      in,
                      view_parameter(bias, "bias", n),
                      view(dx),
                      view_unless_empty(dbias),
                      tanh};
  if (x.is_cpu()) {
    cpu::bias_gelu_bwd(p);
  } else {
#if defined(FASTGPT_CUDA)
    Tensor workspace =
        empty(x, {need_dbias ? cuda::bias_gelu_bwd_workspace(r, n) : 0}, ScalarType::Float);
    cuda::bias_gelu_bwd(p, static_cast<float*>(workspace.data_ptr()), CudaStream(x).get());
#endif
  }
  return {dx, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("bias_gelu_fwd", TORCH_BOX(&bias_gelu_fwd));
  m.impl("bias_gelu_bwd", TORCH_BOX(&bias_gelu_bwd));
}

#if defined(FASTGPT_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA, m) {
  m.impl("bias_gelu_fwd", TORCH_BOX(&bias_gelu_fwd));
  m.impl("bias_gelu_bwd", TORCH_BOX(&bias_gelu_bwd));
}
#endif

}  // namespace fastgpt::binding
