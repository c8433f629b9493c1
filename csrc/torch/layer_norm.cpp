#include "csrc/ops/layer_norm.h"

#include "csrc/torch/common.h"
#include "csrc/torch/cuda_stream.h"

namespace fastgpt::binding {
namespace {

LayerNormFwd forward_params(const Tensor& x, const std::optional<Tensor>& weight,
                            const std::optional<Tensor>& bias, double eps, const Tensor& y) {
  require(on_device(x, weight) && on_device(x, bias), "weight, bias");
  LayerNormFwd p;
  p.x = view_input_stack(x, "x", 2);
  p.weight = view_parameter(weight, "weight", p.x.size[1]);
  p.bias = view_parameter(bias, "bias", p.x.size[1]);
  p.y = view_stack(y, "y", 2);
  p.eps = static_cast<float>(eps);
  return p;
}

// Row i of `statistics` (2, r): the means, then the reciprocal deviations.
TensorRef row(const TensorRef& statistics, int i) {
  TensorRef r = statistics;
  r.data = static_cast<float*>(statistics.data) + i * statistics.stride[0];
  r.ndim = 1;
  r.size[0] = statistics.size[1];
  r.stride[0] = 1;
  return r;
}

// Runs the kernel; returns the statistics (2, r) of the rows: one allocation less than two tensors.
Tensor run(LayerNormFwd& p, const Tensor& x) {
  Tensor statistics = empty(x, {2, p.x.size[0]}, ScalarType::Float);
  p.mean = row(view(statistics), 0);
  p.rstd = row(view(statistics), 1);
  if (x.numel() > 0) {
    run_on_device_of(
        x, [&] { cpu::layer_norm_fwd(p); }, [&](void* stream) { cuda::layer_norm_fwd(p, stream); });
  }
  return statistics;
}

std::tuple<Tensor, Tensor> layer_norm_fwd(Tensor x, std::optional<Tensor> weight,
                                          std::optional<Tensor> bias, double eps, bool float_out) {
  Tensor y = empty(x, x.sizes(), result_dtype(x, float_out));
  LayerNormFwd p = forward_params(x, weight, bias, eps, y);
  return {y, run(p, x)};
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_fwd(Tensor x, Tensor residual,
                                                      std::optional<Tensor> weight,
                                                      std::optional<Tensor> bias, double eps,
                                                      bool float_out) {
  Tensor y = empty(x, x.sizes(), result_dtype(x, float_out));
  Tensor s = empty(x, x.sizes());
  LayerNormFwd p = forward_params(x, weight, bias, eps, y);
  require(on_device(x, residual), "residual");
  p.residual = view_stack(residual, "residual", p.x.dtype, p.x);
  p.s = view_stack(s, "s", 2);
  return {y, s, run(p, x)};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(Tensor dy, Tensor x, std::optional<Tensor> weight,
                                                  Tensor statistics, std::optional<Tensor> ds,
                                                  bool need_dweight, bool need_dbias) {
  LayerNormBwd p;
  p.x = view_input_stack(x, "x", 2);
  const int64_t r = p.x.size[0], n = p.x.size[1];
  Tensor dx = empty(x, x.sizes());
  Tensor dweight = empty(x, {need_dweight ? n : 0}, ScalarType::Float);
  Tensor dbias = empty(x, {need_dbias ? n : 0}, ScalarType::Float);
  if (x.numel() == 0) {
    torch::stable::zero_(dweight);
    torch::stable::zero_(dbias);
    return {dx, dweight, dbias};
  }
  require(on_device(x, dy) && on_device(x, weight) && on_device(x, statistics) && on_device(x, ds),
          "x");
  p.dy = view_stack(dy, "dy", dtype_of(dy) == DType::f32 ? DType::f32 : p.x.dtype, p.x);
  p.weight = view_parameter(weight, "weight", n);
  const TensorRef both = view_flat(statistics, "statistics", DType::f32, {2, r});
  p.mean = row(both, 0);
  p.rstd = row(both, 1);
  p.ds = view_stack(ds, "ds", p.x.dtype, p.x);
  p.dx = view_stack(dx, "dx", 2);
  p.dweight = view_unless_empty(dweight);
  p.dbias = view_unless_empty(dbias);
  run_on_device_of(
      x, [&] { cpu::layer_norm_bwd(p); },
      [&](void* stream) {
        Tensor workspace = empty(x, {cuda::layer_norm_bwd_workspace(r, n)}, ScalarType::Float);
        cuda::layer_norm_bwd(p, static_cast<float*>(view(workspace).data), stream);
      });
  return {dx, dweight, dbias};
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("layer_norm_fwd", FASTGPT_BOX(layer_norm_fwd));
  m.impl("add_layer_norm_fwd", FASTGPT_BOX(add_layer_norm_fwd));
  m.impl("layer_norm_bwd", FASTGPT_BOX(layer_norm_bwd));
}

}  // namespace

FASTGPT_IMPLEMENT(implement)

}  // namespace fastgpt::binding
