#include "csrc/ops/layer_norm.h"

#include "csrc/torch/common.h"
#include "csrc/torch/cuda_stream.h"

namespace fastgpt::binding {
namespace {

LayerNormFwd forward_params(const Tensor& x, const std::optional<Tensor>& weight,
                            const std::optional<Tensor>& bias, double eps, const Tensor& y,
                            const Tensor& mean, const Tensor& rstd) {
  require(on_device(x, weight) && on_device(x, bias), "weight, bias");
  LayerNormFwd p;
  p.x = view_input(x, "x", 2);
  p.weight = view_parameter(weight, "weight", p.x.size[1]);
  p.bias = view_parameter(bias, "bias", p.x.size[1]);
  p.y = view(y);
  p.mean = view(mean);
  p.rstd = view(rstd);
  p.eps = static_cast<float>(eps);
  return p;
}

void run(const LayerNormFwd& p, const Tensor& x) {
  if (x.numel() == 0) return;
  run_on_device_of(
      x, [&] { cpu::layer_norm_fwd(p); }, [&](void* stream) { cuda::layer_norm_fwd(p, stream); });
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(Tensor x, std::optional<Tensor> weight,
                                                  std::optional<Tensor> bias, double eps,
                                                  bool float_out) {
  const int64_t r = x.size(0), n = x.size(1);
  Tensor y = empty(x, {r, n}, result_dtype(x, float_out));
  Tensor mean = empty(x, {r}, ScalarType::Float);
  Tensor rstd = empty(x, {r}, ScalarType::Float);
  run(forward_params(x, weight, bias, eps, y, mean, rstd), x);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_fwd(Tensor x, Tensor residual,
                                                              std::optional<Tensor> weight,
                                                              std::optional<Tensor> bias,
                                                              double eps, bool float_out) {
  const int64_t r = x.size(0), n = x.size(1);
  Tensor y = empty(x, {r, n}, result_dtype(x, float_out));
  Tensor s = empty(x, {r, n});
  Tensor mean = empty(x, {r}, ScalarType::Float);
  Tensor rstd = empty(x, {r}, ScalarType::Float);
  LayerNormFwd p = forward_params(x, weight, bias, eps, y, mean, rstd);
  require(on_device(x, residual), "residual");
  p.residual = view_rows(residual, "residual", p.x.dtype, {r, n});
  p.s = view(s);
  run(p, x);
  return {y, s, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(Tensor dy, Tensor x, std::optional<Tensor> weight,
                                                  Tensor mean, Tensor rstd,
                                                  std::optional<Tensor> ds, bool need_dweight,
                                                  bool need_dbias) {
  const int64_t r = x.size(0), n = x.size(1);
  Tensor dx = empty(x, {r, n});
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
  LayerNormBwd p;
  p.x = view_input(x, "x", 2);
  p.dy = view_rows(dy, "dy", dtype_of(dy) == DType::f32 ? DType::f32 : p.x.dtype, {r, n});
  p.weight = view_parameter(weight, "weight", n);
  p.mean = view_flat(mean, "mean", DType::f32, {r});
  p.rstd = view_flat(rstd, "rstd", DType::f32, {r});
  p.ds = view_rows(ds, "ds", p.x.dtype, {r, n});
  p.dx = view(dx);
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
