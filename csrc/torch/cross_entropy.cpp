#include "csrc/ops/cross_entropy.h"

#include "csrc/torch/common.h"
#include "csrc/torch/losses.h"

namespace fastgpt::binding {
namespace {

std::optional<Tensor> widened(const std::optional<Tensor>& weight) {
  if (!weight.has_value() || weight->scalar_type() == ScalarType::Float) return weight;
  return torch::stable::to(*weight, ScalarType::Float);
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_fwd(Tensor x, Tensor target,
                                                     std::optional<Tensor> weight,
                                                     int64_t ignore_index, int64_t reduction,
                                                     double label_smoothing) {
  const CrossEntropyOptions options{x.size(1), ignore_index, static_cast<Reduction>(reduction),
                                    label_smoothing};
  check_targets(target, x.size(0), options);
  const std::optional<Tensor> weights = widened(weight);
  const TensorRef class_weights = view_parameter(weights, "weight", options.classes);
  std::vector<CrossEntropyRow> rows(x.size(0));
  if (x.numel() != 0) {
    cpu::cross_entropy_absorb(
        {view_input(x, "x", 2), view(target), class_weights, 0, options, rows.data()});
  }
  const CrossEntropyResult result = finish(target, class_weights, options, rows.data());
  return {result.loss, result.lse, result.weight_sum};
}

Tensor cross_entropy_bwd(Tensor dloss, Tensor x, Tensor target, std::optional<Tensor> weight,
                         Tensor lse, Tensor weight_sum, int64_t ignore_index, int64_t reduction,
                         double label_smoothing) {
  const CrossEntropyOptions options{x.size(1), ignore_index, static_cast<Reduction>(reduction),
                                    label_smoothing};
  const int64_t r = x.size(0);
  check_targets(target, r, options);
  const std::optional<Tensor> weights = widened(weight);
  Tensor dx = empty(x, {r, x.size(1)});
  if (x.numel() != 0) {
    cpu::cross_entropy_bwd(
        {view_dloss(dloss, r, options.reduction), view_input(x, "x", 2), view(target),
         view_parameter(weights, "weight", options.classes), view_flat(lse, "lse", DType::f64, {r}),
         view_flat(weight_sum, "weight_sum", DType::f32, {}), view(dx), 0, options});
  }
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastgpt, CPU, m) {
  m.impl("cross_entropy_fwd", TORCH_BOX(&cross_entropy_fwd));
  m.impl("cross_entropy_bwd", TORCH_BOX(&cross_entropy_bwd));
}

}  // namespace fastgpt::binding
