// The backward of attention, dense or packed, in three passes or four: delta and the lse in units
// of log2(e); dk and dv, by blocks of keys; dq, by blocks of queries; dbias. 14 d flops per visible
// pair, or 16 to 18 d of heads of more than 128, whose dk and dv no registers hold together,
// instead of the 10 d of a pass that adds dq by atomics: so no order is left to chance.
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

constexpr int kDeltaThreads = 128;

// kLanes neighbouring lanes to a row, in packs of kPack elements.
template <typename T, int kPack, int kLanes>
__global__ void __launch_bounds__(kDeltaThreads) attention_bwd_delta_kernel(Delta p) {
  const int64_t h = p.dout.size[1], s = p.dout.size[2];
  const int64_t row = blockIdx.x * int64_t{kDeltaThreads / kLanes} + threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes, d = static_cast<int>(p.dout.size[3]);
  const bool inside = row < p.dout.size[0] * h * s;
  const float lse = inside ? p.g_lse[row] : -INFINITY;
  const bool some = lse > kLeastLse;
  float delta = 0.0f;
  if (some) {  // the gradient of a row that saw no key is not read: it may hold anything
    const int z = static_cast<int>(row / (h * s)), head = static_cast<int>(row / s % h);
    const int at = static_cast<int>(row % s);
    const T* g_dout = rows_of<const T>(p.dout, false, z, head, at);
    const T* g_out = rows_of<const T>(p.out, false, z, head, at);
    const T* g_out_lo =
        p.out_lo.data != nullptr ? rows_of<const T>(p.out_lo, false, z, head, at) : nullptr;
    for (int i = lane * kPack; i < d; i += kLanes * kPack) {
      float r_dout[kPack], r_out[kPack], r_lo[kPack] = {};
      load<kPack>(g_dout + i, r_dout);
      load<kPack>(g_out + i, r_out);
      if (g_out_lo != nullptr) load<kPack>(g_out_lo + i, r_lo);
#pragma unroll
      for (int e = 0; e < kPack; ++e) delta = fmaf(r_dout[e], r_out[e] + r_lo[e], delta);
    }
  }
  delta = warp_sum<kLanes>(delta);
  if (lane != 0 || !inside) return;
  if (some && p.g_dlse != nullptr) delta -= p.g_dlse[row];
  p.g_delta[row] = delta;
  p.g_lse2[row] = some ? lse * kLog2E : INFINITY;
}

template <typename T>
void launch_delta(const Delta& p, int64_t rows, void* stream) {
  const auto run = [&](auto pack, auto lanes) {
    constexpr int kPack = decltype(pack)::kValue, kLanes = decltype(lanes)::kValue;
    constexpr int kRows = kDeltaThreads / kLanes;
    launch(attention_bwd_delta_kernel<T, kPack, kLanes>,
           dim3(grid_size((rows + kRows - 1) / kRows)), dim3(kDeltaThreads), 0, stream, p);
  };
  constexpr int kWide = kPerChunk<T>;
  const int64_t d = p.dout.size[3];
  const bool packs = d % kWide == 0 && direct_rows(p.dout, false) && direct_rows(p.out, false) &&
                     (p.out_lo.data == nullptr || direct_rows(p.out_lo, false));
  if (!packs) return run(Constant<1>{}, Constant<32>{});
  if (d <= 8 * kWide) return run(Constant<kWide>{}, Constant<8>{});
  if (d <= 16 * kWide) return run(Constant<kWide>{}, Constant<16>{});
  run(Constant<kWide>{}, Constant<32>{});
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
    launch_delta<typename decltype(type)::type>(delta, rows, stream);
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
