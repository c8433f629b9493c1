#include "csrc/ops/attention.h"
#include "csrc/torch/attention_common.h"
#include "csrc/torch/cuda_stream.h"

namespace fastgpt::binding {
namespace {

VarlenAttentionInputs inputs(const Tensor& q, const Tensor& k, const Tensor& v,
                             const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                             int64_t max_seqlen_q, int64_t max_seqlen_k, double scale, bool causal,
                             std::optional<int64_t> window) {
  require(on_device(q, k) && on_device(q, v) && on_device(q, cu_seqlens_q) &&
              on_device(q, cu_seqlens_k),
          "k, v");
  VarlenAttentionInputs in;
  in.q = view_input(q, "q", 3);
  const int64_t tk = k.size(0), hk = k.size(1), d = in.q.size[2], offsets = cu_seqlens_q.numel();
  in.k = view_rows(k, "k", in.q.dtype, {tk, hk, d});
  in.v = view_rows(v, "v", in.q.dtype, {tk, hk, d});
  require_groups(in.q.size[1], hk);
  require(offsets > 0, "cu_seqlens_q");
  in.cu_seqlens_q = view_flat(cu_seqlens_q, "cu_seqlens_q", DType::i32, {offsets});
  in.cu_seqlens_k = view_flat(cu_seqlens_k, "cu_seqlens_k", DType::i32, {offsets});
  in.max_seqlen_q = max_seqlen_q;
  in.max_seqlen_k = max_seqlen_k;
  in.scale = static_cast<float>(scale);
  in.causal = causal;
  in.window = window.value_or(0);
  return in;
}

std::tuple<Tensor, Tensor, Tensor> varlen_attention_fwd(Tensor q, Tensor k, Tensor v,
                                                        Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                                                        int64_t max_seqlen_q, int64_t max_seqlen_k,
                                                        double scale, bool causal,
                                                        std::optional<int64_t> window,
                                                        bool need_out_lo) {
  const int64_t tq = q.size(0), h = q.size(1), d = q.size(2);
  Tensor out = empty(q, {tq, h, d});
  Tensor lse = empty(q, {h, tq}, ScalarType::Float);
  Tensor out_lo = stores_out_lo(q, need_out_lo) ? empty(q, {tq, h, d}) : empty(q, {0});
  const VarlenAttentionFwd p{inputs(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                                    scale, causal, window),
                             view(out), view(lse), view_unless_empty(out_lo)};
  run_on_device_of(
      q, [&] { check_contents(cpu::varlen_attention_fwd(p)); },
      [&](void* stream) { cuda::varlen_attention_fwd(p, stream); });
  return {out, lse, out_lo};
}

std::tuple<Tensor, Tensor, Tensor> varlen_attention_bwd(
    Tensor dout, std::optional<Tensor> dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    Tensor out_lo, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t max_seqlen_q,
    int64_t max_seqlen_k, double scale, bool causal, std::optional<int64_t> window) {
  const int64_t tq = q.size(0), h = q.size(1), d = q.size(2);
  Tensor dq = empty(q, {tq, h, d});
  Tensor dk = empty(k, {k.size(0), k.size(1), k.size(2)});
  Tensor dv = empty(v, {v.size(0), v.size(1), v.size(2)});
  if (q.numel() == 0) {
    for (Tensor* gradient : {&dk, &dv}) torch::stable::zero_(*gradient);
    return {dq, dk, dv};
  }
  const DType dtype = dtype_of(q);
  require(on_device(q, dout) && on_device(q, dlse) && on_device(q, out) && on_device(q, lse) &&
              on_device(q, out_lo),
          "dout");
  const VarlenAttentionBwd p{
      inputs(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal,
             window),
      view_rows(dout, "dout", dtype, {tq, h, d}),
      view_flat(dlse, "dlse", DType::f32, {h, tq}),
      view_rows(out, "out", dtype, {tq, h, d}),
      view_flat(lse, "lse", DType::f32, {h, tq}),
      out_lo.numel() == 0 ? TensorRef{} : view_rows(out_lo, "out_lo", dtype, {tq, h, d}),
      view(dq),
      view(dk),
      view(dv)};
  run_on_device_of(
      q, [&] { check_contents(cpu::varlen_attention_bwd(p)); },
      [&](void* stream) {
        const int64_t floats = cuda::varlen_attention_bwd_workspace(p);
        const Tensor workspace = empty(q, {floats}, ScalarType::Float);
        cuda::varlen_attention_bwd(p, static_cast<float*>(view(workspace).data), stream);
      });
  return {dq, dk, dv};
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("varlen_attention_fwd", FASTGPT_BOX(varlen_attention_fwd));
  m.impl("varlen_attention_bwd", FASTGPT_BOX(varlen_attention_bwd));
}

}  // namespace

FASTGPT_IMPLEMENT(implement)

}  // namespace fastgpt::binding
