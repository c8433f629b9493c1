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

// Runs the kernel; returns mean and rstd (r).
std::tuple<Tensor, Tensor> run(LayerNormFwd& p, const Tensor& x) {
  Tensor mean = empty(x, {p.x.size[0]}, ScalarType::Float);
  Tensor rstd = empty(x, {p.x.size[0]}, ScalarType::Float);
  p.mean = view(mean);
  p.rstd = view(rstd);
  if (x.numel() > 0) {
    run_on_device_of(
        x, [&] { cpu::layer_norm_fwd(p); }, [&](void* stream) { cuda::layer_norm_fwd(p, stream); });
  }
  return {mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(Tensor x, std::optional<Tensor> weight,
                                                  std::optional<Tensor> bias, double eps,
                                                  bool float_out) {
  Tensor y = empty(x, x.sizes(), result_dtype(x, float_out));
  LayerNormFwd p = forward_params(x, weight, bias, eps, y);
  auto [mean, rstd] = run(p, x);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_fwd(Tensor x, Tensor residual,
                                                              std::optional<Tensor> weight,
                                                              std::optional<Tensor> bias,
                                                              double eps, bool float_out) {
  Tensor y = empty(x, x.sizes(), result_dtype(x, float_out));
  Tensor s = empty(x, x.sizes());
  LayerNormFwd p = forward_params(x, weight, bias, eps, y);
  require(on_device(x, residual), "residual");
  p.residual = view_stack(residual, "residual", p.x.dtype, p.x);
  p.s = view_stack(s, "s", 2);
  auto [mean, rstd] = run(p, x);
  return {y, s, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(Tensor dy, Tensor x, std::optional<Tensor> weight,
                                                  Tensor mean, Tensor rstd,
                                                  std::optional<Tensor> ds, bool need_dweight,
                                                  bool need_dbias) {
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
  require(on_device(x, dy) && on_device(x, weight) && on_device(x, mean) && on_device(x, rstd) &&
              on_device(x, ds),
          "x");
  p.dy = view_stack(dy, "dy", dtype_of(dy) == DType::f32 ? DType::f32 : p.x.dtype, p.x);
  p.weight = view_parameter(weight, "weight", n);
  p.mean = view_flat(mean, "mean", DType::f32, {r});
  p.rstd = view_flat(rstd, "rstd", DType::f32, {r});
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
