#include "csrc/ops/softmax.h"

#include "csrc/torch/common.h"

namespace fastgpt::binding {
namespace {

Tensor softmax_fwd(Tensor x, ScalarType out_dtype) {
  Tensor y = empty(x, {x.size(0), x.size(1)}, out_dtype);
  if (x.numel() != 0) cpu::softmax_fwd({view(x), view(y)});
  return y;
}

Tensor softmax_bwd(Tensor dy, Tensor y, ScalarType in_dtype) {
  Tensor dx = empty(y, {y.size(0), y.size(1)}, in_dtype);
  if (y.numel() != 0) cpu::softmax_bwd({view(dy), view(y), view(dx)});
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("softmax_fwd", TORCH_BOX(&softmax_fwd));
  m.impl("softmax_bwd", TORCH_BOX(&softmax_bwd));
}

}  // namespace fastgpt::binding
