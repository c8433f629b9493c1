// What the kernels of attention's backward share.
//
//     delta = rowsum(dout * out) - dlse    dS = P * (dout v^T * keep / (1 - p) - delta)
//     dq = scale dS k    dk = scale dS^T q    dv = (P * keep / (1 - p))^T dout
//
// P is computed anew from q, k and lse. Source: Dao 2023, https://arxiv.org/abs/2307.08691.
#pragma once

#include "csrc/cuda/attention_tile.cuh"

namespace fastgpt::cuda {

struct Bwd {
  AttentionProblem problem;
  TensorRef dout, dq, dk, dv;
  const float* g_delta;  // (b, h, sq), or (h, tq)
  const float* g_lse2;   // lse in units of log2(e); inf where a query saw no key, so that P is 0
  const float* g_dlse;   // or nullptr
  float* g_exact;        // gets rowsum(P dP) - dlse; or nullptr
  float scale;           // in units of log2(e)
  float rescale;         // of what dropout keeps
  bool direct_q, direct_k, direct_v, direct_dout;
};

// The rounding of P and dS to 16 bits does not average out in so few terms, nor would they fill the
// tiles of a tensor core: these gradients are computed in floats.
static inline bool in_floats(const AttentionProblem& p) {
  return p.d < 16 || (p.sq < 16 && p.g_cu_seqlens_q == nullptr);
}

static inline bool gradients_for_warpgroups(const AttentionProblem& p) {
  return for_warpgroups(p) && !in_floats(p);
}

// f(Type<T>, Type<C>, Constant<width>, Constant<true>): tensors of T, tiles of C, float or T.
template <typename F>
void visit_feature_gradients(const AttentionProblem& problem, const F& f) {
  visit_dtype<__nv_bfloat16, __half>(problem.in.q.dtype, [&](auto type) {
    const auto in_tiles_of = [&](auto tile_type) {
      visit_feature_width(problem.d,
                          [&](auto width, auto features) { f(type, tile_type, width, features); });
    };
    in_floats(problem) ? in_tiles_of(Type<float>{}) : in_tiles_of(type);
  });
}

// Likewise, with Constant<false> where there are no features.
template <typename F>
void visit_gradients(const AttentionProblem& problem, const F& f) {
  if (has_features(problem.in) || in_floats(problem)) return visit_feature_gradients(problem, f);
  visit_dtype<__nv_bfloat16, __half>(problem.in.q.dtype, [&](auto type) {
    const auto run = [&](auto width, auto features) { f(type, type, width, features); };
    if constexpr (sizeof(typename decltype(type)::type) == 4) {
      visit_float_width(problem.d, false, run);
    } else {
      visit_width(problem.d, false, run);
    }
  });
}

// Everything that the backward reads and writes beside the inputs.
struct AttentionGradients {
  TensorRef dout, dlse, out, lse, out_lo, dq, dk, dv, dbias;
};

// attention_bwd.cu; the workspace is in floats.
int64_t workspace_of_attention_bwd(const AttentionProblem& problem, const TensorRef& dbias);
void run_attention_bwd(const AttentionProblem& problem, const AttentionGradients& r,
                       float* workspace, void* stream);

void attention_bwd_dkv(const Bwd& p, void* stream);
void attention_bwd_dq(const Bwd& p, void* stream);
// For warpgroups: attention_bwd_dkv_sm90.cu, attention_bwd_dq_sm90.cu.
void attention_bwd_dkv_sm90(const Bwd& p, void* stream);
void attention_bwd_dq_sm90(const Bwd& p, void* stream);
// dbias, of the shape of the bias, from a delta that did not come of rounded P.
int64_t attention_bwd_dbias_workspace(const AttentionProblem& problem, const TensorRef& dbias);
void attention_bwd_dbias(const Bwd& p, const TensorRef& dbias, float* workspace, void* stream);

}  // namespace fastgpt::cuda
