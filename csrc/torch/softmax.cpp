#include "csrc/ops/softmax.h"

#include "csrc/torch/common.h"

namespace fastgpt::binding {
namespace {

Tensor softmax_fwd(Tensor x, bool float_out) {
  Tensor y = empty(x, {x.size(0), x.size(1)}, result_dtype(x, float_out));
  if (x.numel() == 0) return y;
  const TensorRef in = view_input(x, "x", 2);
  cpu::softmax_fwd({in, view(y)});
  return y;
}

Tensor softmax_bwd(Tensor dy, Tensor y, ScalarType in_dtype) {
  Tensor dx = empty(y, {y.size(0), y.size(1)}, in_dtype);
  if (y.numel() == 0) return dx;
  const TensorRef in = view_input(y, "y", 2), out = view(dx);
  require(is_float(out) && (in.dtype == DType::f32 || in.dtype == out.dtype), "in_dtype");
  cpu::softmax_bwd({view_rows(dy, "dy", in.dtype, {y.size(0), y.size(1)}), in, out});
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("softmax_fwd", TORCH_BOX(&softmax_fwd));
  m.impl("softmax_bwd", TORCH_BOX(&softmax_bwd));
}

}  // namespace fastgpt::binding
