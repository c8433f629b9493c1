#include "csrc/ops/masked_softmax.h"

#include "csrc/torch/common.h"

namespace fastgpt::binding {
namespace {

Tensor masked_softmax_fwd(Tensor scores, double scale, bool causal, std::optional<int64_t> window,
                          ScalarType out_dtype) {
  Tensor y = empty(scores, {scores.size(0), scores.size(1), scores.size(2)}, out_dtype);
  if (scores.numel() != 0) {
    const Band band{causal, window.value_or(0)};
    cpu::masked_softmax_fwd({view(scores), view(y), static_cast<float>(scale), band});
  }
  return y;
}

Tensor masked_softmax_bwd(Tensor dy, Tensor y, double scale, bool causal,
                          std::optional<int64_t> window, ScalarType in_dtype) {
  Tensor dscores = empty(y, {y.size(0), y.size(1), y.size(2)}, in_dtype);
  if (y.numel() != 0) {
    const Band band{causal, window.value_or(0)};
    cpu::masked_softmax_bwd({view(dy), view(y), view(dscores), static_cast<float>(scale), band});
  }
  return dscores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("masked_softmax_fwd", TORCH_BOX(&masked_softmax_fwd));
  m.impl("masked_softmax_bwd", TORCH_BOX(&masked_softmax_bwd));
}

}  // namespace fastgpt::binding
