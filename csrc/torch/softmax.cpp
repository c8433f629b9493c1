#include "csrc/ops/softmax.h"

#include "csrc/torch/common.h"
#include "csrc/torch/cuda_stream.h"

namespace fastgpt::binding {
namespace {

Tensor softmax_fwd(Tensor x, bool float_out) {
  Tensor y = empty(x, {x.size(0), x.size(1)}, result_dtype(x, float_out));
  if (x.numel() == 0) return y;
  const SoftmaxFwd p{view_input(x, "x", 2), view(y)};
  run_on_device_of(
      x, [&] { cpu::softmax_fwd(p); }, [&](void* stream) { cuda::softmax_fwd(p, stream); });
  return y;
}

Tensor softmax_bwd(Tensor dy, Tensor y, ScalarType in_dtype) {
  Tensor dx = empty(y, {y.size(0), y.size(1)}, in_dtype);
  if (y.numel() == 0) return dx;
  const TensorRef in = view_input(y, "y", 2), out = view(dx);
  require(is_float(out) && (in.dtype == DType::f32 || in.dtype == out.dtype), "in_dtype");
  require(on_device(y, dy), "dy");
  const SoftmaxBwd p{view_rows(dy, "dy", in.dtype, {y.size(0), y.size(1)}), in, out};
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
