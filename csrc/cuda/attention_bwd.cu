// The backward of attention, dense or packed, in three passes or four: delta and the lse in units
// of log2(e); dk and dv, by blocks of keys; dq, by blocks of queries; dbias. 14 d flops per visible
// pair instead of the 10 d of a pass that adds dq by atomics: so no order is left to chance.
#include "csrc/cuda/attention_bwd.cuh"

namespace fastgpt::cuda {
namespace {

struct Delta {
  TensorRef dout, out, out_lo;  // (b, h, s, d)
  const float* g_lse;
  const float* g_dlse;  // or nullptr
  float* g_delta;
  float* g_lse2;
};

constexpr int kDeltaWarps = 4;  // a row each

template <typename T>
__global__ void __launch_bounds__(kDeltaWarps* kWarp) attention_bwd_delta_kernel(Delta p) {
  const int64_t h = p.dout.size[1], s = p.dout.size[2], d = p.dout.size[3];
  const int64_t row = blockIdx.x * int64_t{kDeltaWarps} + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (row >= p.dout.size[0] * h * s) return;
  const int z = static_cast<int>(row / (h * s)), head = static_cast<int>(row / s % h);
  const int at = static_cast<int>(row % s);
  const float lse = p.g_lse[row];
  const bool some = lse > -INFINITY;
  float delta = 0.0f;
  if (some) {  // the gradient of a row that saw no key is not read: it may hold anything
    const T* g_dout = rows_of<const T>(p.dout, false, z, head, at);
    const T* g_out = rows_of<const T>(p.out, false, z, head, at);
    const T* g_out_lo =
        p.out_lo.data != nullptr ? rows_of<const T>(p.out_lo, false, z, head, at) : nullptr;
    for (int64_t i = lane; i < d; i += kWarp) {
      const float out = to_float(g_out[i]) + (g_out_lo != nullptr ? to_float(g_out_lo[i]) : 0.0f);
      delta = fmaf(to_float(g_dout[i]), out, delta);
    }
  }
  delta = warp_sum(delta);
  if (lane != 0) return;
  if (some && p.g_dlse != nullptr) delta -= p.g_dlse[row];
  p.g_delta[row] = delta;
  p.g_lse2[row] = some ? lse * kLog2E : INFINITY;
}

int64_t statistics_of(const AttentionProblem& p) {
  return p.in.q.size[0] * p.in.q.size[1] * p.in.q.size[2];
}

}  // namespace

int64_t workspace_of_attention_bwd(const AttentionProblem& problem, const TensorRef& dbias) {
  const int64_t rows = statistics_of(problem);
  return dbias ? 3 * rows + attention_bwd_dbias_workspace(problem, dbias) : 2 * rows;
}

void run_attention_bwd(const AttentionProblem& problem, const AttentionGradients& r,
                       float* workspace, void* stream) {
  const AttentionInputs& in = problem.in;
  const bool packed = problem.g_cu_seqlens_q != nullptr;
  const int64_t rows = statistics_of(problem);
  float *g_delta = workspace, *g_lse2 = workspace + rows, *g_exact = workspace + 2 * rows;
  const float* g_dlse = static_cast<const float*>(r.dlse.data);
  const Delta delta{r.dout, r.out,   r.out_lo, static_cast<const float*>(r.lse.data),
                    g_dlse, g_delta, g_lse2};
  visit_dtype<__nv_bfloat16, __half>(in.q.dtype, [&](auto type) {
    launch(attention_bwd_delta_kernel<typename decltype(type)::type>,
           dim3(grid_size((rows + kDeltaWarps - 1) / kDeltaWarps)), dim3(kDeltaWarps * kWarp), 0,
           stream, delta);
  });
  const Bwd p{problem,
              r.dout,
              r.dq,
              r.dk,
              r.dv,
              g_delta,
              g_lse2,
              g_dlse,
              r.dbias ? g_exact : nullptr,
              in.scale * kLog2E,
              dropout_rescale(in),
              direct_rows(in.q, packed),
              direct_rows(in.k, packed),
              direct_rows(in.v, packed),
              direct_rows(r.dout, packed)};
  attention_bwd_dkv(p, stream);
  attention_bwd_dq(p, stream);
  if (r.dbias) attention_bwd_dbias(p, r.dbias, workspace + 3 * rows, stream);
}

int64_t attention_bwd_workspace(const AttentionBwd& p) {
  return workspace_of_attention_bwd(problem_of(p.in), p.dbias);
}

void attention_bwd(const AttentionBwd& p, float* workspace, void* stream) {
  run_attention_bwd(problem_of(p.in),
                    {p.dout, p.dlse, p.out, p.lse, p.out_lo, p.dq, p.dk, p.dv, p.dbias}, workspace,
                    stream);
}

}  // namespace fastgpt::cuda
