#include "csrc/ops/masked_softmax.h"

#include "csrc/torch/common.h"
#include "csrc/torch/cuda_stream.h"

namespace fastgpt::binding {
namespace {

Tensor masked_softmax_fwd(Tensor scores, double scale, bool causal, std::optional<int64_t> window,
                          bool float_out) {
  Tensor y = empty(scores, scores.sizes(), result_dtype(scores, float_out));
  if (scores.numel() == 0) return y;
  const MaskedSoftmaxFwd p{view_input_stack(scores, "scores", 3), view_stack(y, "y", 3),
                           static_cast<float>(scale), Band{causal, window.value_or(0)}};
  run_on_device_of(
      scores, [&] { cpu::masked_softmax_fwd(p); },
      [&](void* stream) { cuda::masked_softmax_fwd(p, stream); });
  return y;
}

Tensor masked_softmax_bwd(Tensor dy, Tensor y, double scale, bool causal,
                          std::optional<int64_t> window, ScalarType in_dtype) {
  Tensor dscores = empty(y, y.sizes(), in_dtype);
  if (y.numel() == 0) return dscores;
  const TensorRef in = view_input_stack(y, "y", 3), out = view_stack(dscores, "dscores", 3);
  require(is_float(out) && (in.dtype == DType::f32 || in.dtype == out.dtype), "in_dtype");
  require(on_device(y, dy), "dy");
  const MaskedSoftmaxBwd p{view_stack(dy, "dy", in.dtype, in), in, out, static_cast<float>(scale),
                           Band{causal, window.value_or(0)}};
  run_on_device_of(
      y, [&] { cpu::masked_softmax_bwd(p); },
      [&](void* stream) { cuda::masked_softmax_bwd(p, stream); });
  return dscores;
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("masked_softmax_fwd", FASTGPT_BOX(masked_softmax_fwd));
  m.impl("masked_softmax_bwd", FASTGPT_BOX(masked_softmax_bwd));
}

}  // namespace

FASTGPT_IMPLEMENT(implement)

}  // namespace fastgpt::binding
