// Attention within packed documents: the kernels of attention_fwd.cu and attention_bwd_*.cu, told
// where each document lies.
#include "csrc/cuda/attention_bwd.cuh"

namespace fastgpt::cuda {
namespace {

// (t, h, d), packed, as (1, h, t, d).
TensorRef as_batch(const TensorRef& t) {
  TensorRef r = t;
  if (!t) return r;
  r.ndim = 4;
  const int64_t size[] = {1, t.size[1], t.size[0], t.size[2]};
  const int64_t stride[] = {0, t.stride[1], t.stride[0], 1};
  for (int i = 0; i < 4; ++i) {
    r.size[i] = size[i];
    r.stride[i] = stride[i];
  }
  return r;
}

AttentionProblem packed_problem_of(const VarlenAttentionInputs& v) {
  AttentionInputs in{};
  in.q = as_batch(v.q);
  in.k = as_batch(v.k);
  in.v = as_batch(v.v);
  in.scale = v.scale;
  in.causal = v.causal;
  in.window = v.window;
  check_at_most(v.cu_seqlens_q.size[0], kMostRows, "documents");
  AttentionProblem p = problem_of(in);
  p.g_cu_seqlens_q = static_cast<const int32_t*>(v.cu_seqlens_q.data);
  p.g_cu_seqlens_k = static_cast<const int32_t*>(v.cu_seqlens_k.data);
  p.b = static_cast<int>(v.cu_seqlens_q.size[0] - 1);
  // At least one row, so that there are blocks for the tokens that no document has.
  const auto longest = [](int64_t s) {
    return static_cast<int>(s < 1 ? 1 : s < kMostRows ? s : kMostRows);
  };
  p.sq = longest(v.max_seqlen_q);
  p.sk = longest(v.max_seqlen_k);
  return p;
}

}  // namespace

void varlen_attention_fwd(const VarlenAttentionFwd& p, void* stream) {
  run_attention_fwd(packed_problem_of(p.in), as_batch(p.out), as_batch(p.out_lo), p.lse, stream);
}

int64_t varlen_attention_bwd_workspace(const VarlenAttentionBwd& p) {
  return workspace_of_attention_bwd(packed_problem_of(p.in), TensorRef{});
}

void varlen_attention_bwd(const VarlenAttentionBwd& p, float* workspace, void* stream) {
  run_attention_bwd(packed_problem_of(p.in),
                    {as_batch(p.dout), p.dlse, as_batch(p.out), p.lse, as_batch(p.out_lo),
                     as_batch(p.dq), as_batch(p.dk), as_batch(p.dv), TensorRef{}},
                    workspace, stream);
}

}  // namespace fastgpt::cuda
