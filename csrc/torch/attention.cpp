#include "csrc/ops/attention.h"

#include "csrc/torch/attention_common.h"
#include "csrc/torch/cuda_stream.h"

namespace fastgpt::binding {
namespace {

// A (b|1, h|1, sq|1, sk|1) plane of scores, or none.
TensorRef view_plane(const std::optional<Tensor>& t, const char* argument, const TensorRef& q,
                     const TensorRef& k) {
  const TensorRef r = view(t);
  const int64_t full[] = {q.size[0], q.size[1], q.size[2], k.size[2]};
  bool broadcasts = !r || r.ndim == 4;
  for (int i = 0; broadcasts && i < r.ndim; ++i) {
    broadcasts = r.size[i] == 1 || r.size[i] == full[i];
  }
  require(broadcasts, argument);
  return r;
}

AttentionInputs inputs(const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool causal,
                       std::optional<int64_t> window, int64_t query_offset,
                       const std::optional<Tensor>& key_padding_mask,
                       const std::optional<Tensor>& bias, const std::optional<Tensor>& mask,
                       const std::optional<Tensor>& alibi_slopes, double dropout_p,
                       const std::optional<Tensor>& dropout_seed) {
  require(on_device(q, k) && on_device(q, v) && on_device(q, key_padding_mask) &&
              on_device(q, bias) && on_device(q, mask) && on_device(q, alibi_slopes) &&
              on_device(q, dropout_seed),
          "k, v");
  AttentionInputs in;
  in.q = view_input(q, "q", 4);
  const int64_t b = in.q.size[0], h = in.q.size[1], d = in.q.size[3];
  const int64_t hk = k.size(1), sk = k.size(2);
  in.k = view_rows(k, "k", in.q.dtype, {b, hk, sk, d});
  in.v = view_rows(v, "v", in.q.dtype, {b, hk, sk, d});
  require_groups(h, hk);
  in.key_padding_mask = view(key_padding_mask);
  require(!in.key_padding_mask ||
              (in.key_padding_mask.dtype == DType::u8 && has_size(in.key_padding_mask, {b, sk})),
          "key_padding_mask");
  in.bias = view_plane(bias, "bias", in.q, in.k);
  require(!in.bias || is_float(in.bias), "bias");
  in.mask = view_plane(mask, "mask", in.q, in.k);
  require(!in.mask || in.mask.dtype == DType::u8, "mask");
  in.alibi_slopes = view(alibi_slopes);
  require(
      !in.alibi_slopes || (in.alibi_slopes.dtype == DType::f32 &&
                           (has_size(in.alibi_slopes, {h}) || has_size(in.alibi_slopes, {b, h}))),
      "alibi_slopes");
  in.dropout_seed = view(dropout_seed);
  require(!in.dropout_seed || in.dropout_seed.dtype == DType::i64, "dropout_seed");
  in.scale = static_cast<float>(scale);
  in.dropout_p = dropout_p;
  in.causal = causal;
  in.window = window.value_or(0);
  in.query_offset = query_offset;
  return in;
}

std::tuple<Tensor, Tensor, Tensor> attention_fwd(
    Tensor q, Tensor k, Tensor v, double scale, bool causal, std::optional<int64_t> window,
    int64_t query_offset, std::optional<Tensor> key_padding_mask, std::optional<Tensor> bias,
    std::optional<Tensor> mask, std::optional<Tensor> alibi_slopes, double dropout_p,
    std::optional<Tensor> dropout_seed, bool need_out_lo) {
  const int64_t b = q.size(0), h = q.size(1), sq = q.size(2), d = q.size(3);
  Tensor out = token_major(q, b, h, sq, d);
  Tensor lse = empty(q, {b, h, sq}, ScalarType::Float);
  Tensor out_lo = stores_out_lo(q, need_out_lo) ? token_major(q, b, h, sq, d) : empty(q, {0});
  if (q.numel() != 0) {
    const AttentionFwd p{inputs(q, k, v, scale, causal, window, query_offset, key_padding_mask,
                                bias, mask, alibi_slopes, dropout_p, dropout_seed),
                         view(out), view(lse), view_unless_empty(out_lo)};
    run_on_device_of(
        q, [&] { cpu::attention_fwd(p); }, [&](void* stream) { cuda::attention_fwd(p, stream); });
  }
  return {out, lse, out_lo};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_bwd(
    Tensor dout, std::optional<Tensor> dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    Tensor out_lo, double scale, bool causal, std::optional<int64_t> window, int64_t query_offset,
    std::optional<Tensor> key_padding_mask, std::optional<Tensor> bias, std::optional<Tensor> mask,
    std::optional<Tensor> alibi_slopes, double dropout_p, std::optional<Tensor> dropout_seed,
    bool need_dbias) {
  const int64_t b = q.size(0), h = q.size(1), sq = q.size(2), d = q.size(3);
  const int64_t hk = k.size(1), sk = k.size(2);
  Tensor dq = token_major(q, b, h, sq, d);
  Tensor dk = token_major(k, b, hk, sk, d);
  Tensor dv = token_major(v, b, hk, sk, d);
  const bool has_dbias = need_dbias && bias.has_value();
  Tensor dbias = has_dbias ? empty(q, {bias->size(0), bias->size(1), bias->size(2), bias->size(3)},
                                   ScalarType::Float)
                           : empty(q, {0}, ScalarType::Float);
  if (q.numel() == 0) {
    for (Tensor* gradient : {&dk, &dv, &dbias}) torch::stable::zero_(*gradient);
    return {dq, dk, dv, dbias};
  }
  const DType dtype = dtype_of(q);
  require(on_device(q, dout) && on_device(q, dlse) && on_device(q, out) && on_device(q, lse) &&
              on_device(q, out_lo),
          "dout");
  const AttentionBwd p{
      inputs(q, k, v, scale, causal, window, query_offset, key_padding_mask, bias, mask,
             alibi_slopes, dropout_p, dropout_seed),
      view_rows(dout, "dout", dtype, {b, h, sq, d}),
      view_flat(dlse, "dlse", DType::f32, {b, h, sq}),
      view_rows(out, "out", dtype, {b, h, sq, d}),
      view_flat(lse, "lse", DType::f32, {b, h, sq}),
      out_lo.numel() == 0 ? TensorRef{} : view_rows(out_lo, "out_lo", dtype, {b, h, sq, d}),
      view(dq),
      view(dk),
      view(dv),
      view_unless_empty(dbias)};
  run_on_device_of(
      q, [&] { cpu::attention_bwd(p); },
      [&](void* stream) {
        const Tensor workspace = empty(q, {cuda::attention_bwd_workspace(p)}, ScalarType::Float);
        cuda::attention_bwd(p, static_cast<float*>(view(workspace).data), stream);
      });
  return {dq, dk, dv, dbias};
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("attention_fwd", FASTGPT_BOX(attention_fwd));
  m.impl("attention_bwd", FASTGPT_BOX(attention_bwd));
}

}  // namespace

FASTGPT_IMPLEMENT(implement)

}  // namespace fastgpt::binding
