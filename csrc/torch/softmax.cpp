#include "csrc/ops/softmax.h"

#include "csrc/torch/common.h"
#include "csrc/torch/cuda_stream.h"

namespace fastgpt::binding {
namespace {

Tensor softmax_fwd(Tensor x, bool float_out) {
  Tensor y = empty(x, {x.size(0), x.size(1)}, result_dtype(x, float_out));
  if (x.numel() == 0) return y;
  const SoftmaxFwd p{view_input(x, "x", 2), view(y)};
  if (x.is_cpu()) {
    cpu::softmax_fwd(p);
  } else {
#if defined(FASTGPT_CUDA)
    cuda::softmax_fwd(p, CudaStream(x).get());
#endif
  }
  return y;
}

Tensor softmax_bwd(Tensor dy, Tensor y, ScalarType in_dtype) {
  Tensor dx = empty(y, {y.size(0), y.size(1)}, in_dtype);
  if (y.numel() == 0) return dx;
  const TensorRef in = view_input(y, "y", 2), out = view(dx);
  require(is_float(out) && (in.dtype == DType::f32 || in.dtype == out.dtype), "in_dtype");
  require(on_device(y, dy), "dy");
  const SoftmaxBwd p{view_rows(dy, "dy", in.dtype, {y.size(0), y.size(1)}), in, out};
  if (y.is_cpu()) {
    cpu::softmax_bwd(p);
  } else {
#if defined(FASTGPT_CUDA)
    cuda::softmax_bwd(p, CudaStream(y).get());
#endif
  }
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("softmax_fwd", TORCH_BOX(&softmax_fwd));
  m.impl("softmax_bwd", TORCH_BOX(&softmax_bwd));
}

#if defined(FASTGPT_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastgpt, CUDA, m) {
  m.impl("softmax_fwd", TORCH_BOX(&softmax_fwd));
  m.impl("softmax_bwd", TORCH_BOX(&softmax_bwd));
}
#endif

}  // namespace fastgpt::binding
