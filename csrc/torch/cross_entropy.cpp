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
  require(on_device(x, target) && on_device(x, weight), "target, weight");
  const RowStates rows(x, x.size(0));
  if (x.numel() != 0) {
    const CrossEntropyAbsorb p{view_input(x, "x", 2), view(target), class_weights, 0, options,
                               rows.states()};
    run_on_device_of(
        x, [&] { cpu::cross_entropy_absorb(p); },
        [&](void* stream) { cuda::cross_entropy_absorb(p, stream); });
  }
  const CrossEntropyResult result = rows.finish(x, view(target), class_weights, options);
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
  require(on_device(x, target) && on_device(x, weight) && on_device(x, dloss) &&
              on_device(x, lse) && on_device(x, weight_sum),
          "x");
  if (x.numel() == 0) return dx;
  const CrossEntropyBwd p{view_dloss(dloss, r, options.reduction),
                          view_input(x, "x", 2),
                          view(target),
                          view_parameter(weights, "weight", options.classes),
                          view_flat(lse, "lse", DType::f64, {r}),
                          view_flat(weight_sum, "weight_sum", DType::f32, {}),
                          view(dx),
                          0,
                          options};
  run_on_device_of(
      x, [&] { cpu::cross_entropy_bwd(p); },
      [&](void* stream) {
        const Tensor workspace = empty(x, {1}, ScalarType::Double);
        cuda::cross_entropy_bwd(p, static_cast<double*>(view(workspace).data), stream);
      });
  return dx;
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("cross_entropy_fwd", FASTGPT_BOX(cross_entropy_fwd));
  m.impl("cross_entropy_bwd", FASTGPT_BOX(cross_entropy_bwd));
}

}  // namespace

FASTGPT_IMPLEMENT(implement)

}  // namespace fastgpt::binding
