#include "csrc/ops/softmax.h"

#include "csrc/torch/common.h"
#include "csrc/torch/cuda_stream.h"

namespace fastgpt::binding {
namespace {

Tensor softmax_fwd(Tensor x, bool float_out) {
  Tensor y = empty(x, x.sizes(), result_dtype(x, float_out));
  if (x.numel() == 0) return y;
  const SoftmaxFwd p{view_input_stack(x, "x", 2), view_stack(y, "y", 2)};
  run_on_device_of(
      x, [&] { cpu::softmax_fwd(p); }, [&](void* stream) { cuda::softmax_fwd(p, stream); });
  return y;
}

Tensor softmax_bwd(Tensor dy, Tensor y, ScalarType in_dtype) {
  Tensor dx = empty(y, y.sizes(), in_dtype);
  if (y.numel() == 0) return dx;
  const TensorRef in = view_input_stack(y, "y", 2), out = view_stack(dx, "dx", 2);
  require(is_float(out) && (in.dtype == DType::f32 || in.dtype == out.dtype), "in_dtype");
  require(on_device(y, dy), "dy");
  const SoftmaxBwd p{view_stack(dy, "dy", in.dtype, in), in, out};
  run_on_device_of(
      y, [&] { cpu::softmax_bwd(p); }, [&](void* stream) { cuda::softmax_bwd(p, stream); });
  return dx;
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("softmax_fwd", FASTGPT_BOX(softmax_fwd));
  m.impl("softmax_bwd", FASTGPT_BOX(softmax_bwd));
}

}  // namespace

FASTGPT_IMPLEMENT(implement)

}  // namespace fastgpt::binding
