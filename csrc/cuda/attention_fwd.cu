// out = softmax(scale q k^T + bias - slope |i' - j|, band) v and lse, dense or packed.
//
// A block takes the kWarps * kM * 16 queries of one tile of a head and walks the tiles of kKeys
// keys that any of them sees, with running maximum and sum: the tiles at the edges of the band
// first, which need a mask, then the others. Scores and probabilities stay in registers. The copy
// of V runs under the product q k^T, that of the next K under softmax and the product with V;
// blocks with many keys start first. Reads q, k, v and writes out once as far as the heads in
// flight stay in the L2 cache; 4 d flops per visible pair. Tiles and order are functions of the
// shape of a head, so its bits do not depend on the batch. Source: Dao 2023,
// https://arxiv.org/abs/2307.08691; the band as in Child et al. 2019.
#include "csrc/cuda/attention_fwd.cuh"

namespace fastgpt::cuda {
namespace {

// As large as the registers of a thread allow; features need some of their own.
template <typename C, int kD, bool kFeatures>
struct FwdTile {
  static constexpr bool kTensorCores = sizeof(C) == 2;
  static constexpr int kWarps = 4;
  static constexpr int kM = kTensorCores && kD <= 128 && !kFeatures ? 2 : 1;  // of 16 rows, a warp
  static constexpr int kKeys = kD > 128               ? (kFeatures ? 16 : 32)
                               : kFeatures || kD > 80 ? 32
                               : kD > 64              ? 48
                                                      : 64;
  // Warps without rows compute nothing, where the test costs no register that is needed.
  static constexpr bool kAlwaysBusy = kM == 2;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kQueries = kWarps * kM * 16;
  static constexpr int kScratch = kWarps * kScratchFloats<C, kM, kKeys / 8>;
  static constexpr int kSharedBytes =
      (kQueries + 2 * kKeys) * kD * static_cast<int>(sizeof(C)) + kScratch * 4;
};

template <typename T, int kD, bool kFeatures>
__global__ void __launch_bounds__(FwdTile<T, kD, kFeatures>::kThreads) attention_fwd_kernel(Fwd p) {
  using Tile = FwdTile<T, kD, kFeatures>;
  constexpr int kM = Tile::kM, kN = Tile::kKeys / 8, kThreads = Tile::kThreads;
  FASTGPT_DYNAMIC_SHARED(shared);
  T* s_q = reinterpret_cast<T*>(shared);
  T* s_k = s_q + Tile::kQueries * kD;
  T* s_v = s_k + Tile::kKeys * kD;
  const Lane at;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, own = warp * kM * 16;
  float* s_scratch =
      reinterpret_cast<float*>(s_v + Tile::kKeys * kD) + warp * kScratchFloats<T, kM, kN>;

  const FwdRows<T> rows(p, Tile::kQueries);
  if (!rows.any) return;
  const AttentionProblem& problem = p.problem;
  const AttentionInputs& in = problem.in;
  const int m0 = rows.m0, sq = rows.queries, d = problem.d;
  const int64_t k_s = in.k.stride[2], v_s = in.v.stride[2];

  const Band band(problem, sq, rows.keys);
  Features features;
  if (kFeatures) features = Features(in, rows.z, problem.h, rows.head);
  const Walk walk =
      band.keys(m0, min(m0 + Tile::kQueries, sq), Tile::kKeys, kFeatures && features.selective());
  const auto load_keys = [&](T* s_tile, const T* g_rows, int64_t stride, int n0, bool direct) {
    load_rows<T, kD, Tile::kKeys, kThreads>(
        s_tile, g_rows + n0 * stride, stride, d, direct,
        [&](int row) { return n0 + row < rows.keys && !(kFeatures && features.pads(n0 + row)); });
    commit_copies();
  };

  float r_out[kM][kD / 8][4], r_top[kM][2], r_sum[kM][2];
  clear(r_out);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    r_top[m][0] = r_top[m][1] = -INFINITY;
    r_sum[m][0] = r_sum[m][1] = 0.0f;
  }
  if (walk.count > 0) {
    load_rows<T, kD, Tile::kQueries, kThreads>(s_q, rows.g_q, in.q.stride[2], d, p.direct_q,
                                               [&](int row) { return m0 + row < sq; });
    load_keys(s_k, rows.g_k, k_s, walk.at(0), p.direct_k);
  }
  const bool busy = Tile::kAlwaysBusy || m0 + own < sq;
  for (int t = 0; t < walk.count; ++t) {
    const int n0 = walk.at(t);
    wait_copies<0>();
    __syncthreads();  // K is here, and V has been read
    load_keys(s_v, rows.g_v, v_s, n0, p.direct_v);
    float r_s[kM][kN][4];
    clear(r_s);
    if (busy) multiply_transposed<kD>(r_s, s_q, own, s_k, d);
    wait_copies<0>();
    __syncthreads();  // V is here, and K has been read
    if (t + 1 < walk.count) load_keys(s_k, rows.g_k, k_s, walk.at(t + 1), p.direct_k);
    if (!busy) continue;

    // Scores in units of log2(e); without features still to be multiplied by the scale, which is
    // positive, so that the largest stays the largest and exp2 takes one multiply-add.
    const float factor = kFeatures ? 1.0f : p.scale;
    uint32_t seen = 0;
    if (kFeatures || walk.edge(t)) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = m0 + own + at.row(m, 2 * i), low = band.low(row), high = band.high(row);
#pragma unroll
          for (int n = 0; n < kN; ++n) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const int column = n0 + at.column(n, j);
              float& s = r_s[m][n][2 * i + j];
              bool visible = column >= low && column <= high;
              if (kFeatures) {
                visible = visible && row < sq && !features.pads(column);
                if (visible) s = features.score(s * p.scale, row, column, band.offset);
                visible = visible && s != -INFINITY;
                if (visible) seen |= 1u << (2 * n + j);
              }
              if (!visible) s = -INFINITY;
            }
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float top = -INFINITY;
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          top = fmaxf(top, fmaxf(r_s[m][n][2 * i], r_s[m][n][2 * i + 1]));
        }
        top = fmaxf(r_top[m][i], warp_max<4>(top) * factor);
        const float base = top == -INFINITY ? 0.0f : top;
        const float decay = exp2_approx(r_top[m][i] - base);
        r_top[m][i] = top;
        float sum = r_sum[m][i] * decay;
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float& s = r_s[m][n][2 * i + j];
            s = exp2_approx(fmaf(s, factor, -base));
            sum += s;
          }
        }
        r_sum[m][i] = sum;
#pragma unroll
        for (int n = 0; n < kD / 8; ++n) {
          r_out[m][n][2 * i] *= decay;
          r_out[m][n][2 * i + 1] *= decay;
        }
      }
    }
    if (kFeatures && features.dropout) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int row = m0 + own + at.row(m, 2 * i);
            features.drop(row, n0 + at.column(n, 0), r_s[m][n][2 * i], r_s[m][n][2 * i + 1]);
          }
        }
      }
    }
    if constexpr (kFeatures) {
      multiply<kD>(r_out, r_s, s_v, 0, d, s_scratch, SeesSome(seen));
    } else {
      multiply<kD>(r_out, r_s, s_v, 0, d, s_scratch, SeesAll());
    }
  }

#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = warp_sum<4>(r_sum[m][i]);
      const float all = sum == 0.0f ? 1.0f : sum;  // no key was seen: the output is 0
      const int row = m0 + own + at.row(m, 2 * i);
      if (at.pair == 0 && row < sq) *rows.lse_rows(p, row) = (r_top[m][i] + log2f(all)) * kLn2;
      const float inverse = p.rescale / all;
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) {
        r_out[m][n][2 * i] *= inverse;
        r_out[m][n][2 * i + 1] *= inverse;
      }
    }
  }
  rows.template store<kD>(r_out, s_q + own * kD, own, p);
}

template <typename T, int kD, bool kFeatures>
void launch_fwd(const Fwd& p, void* stream) {
  using Tile = FwdTile<T, kD, kFeatures>;
  const int64_t tiles = (p.problem.sq + Tile::kQueries - 1) / Tile::kQueries;
  launch(attention_fwd_kernel<T, kD, kFeatures>,
         dim3(grid_size(tiles * elements_of(p.problem) * p.problem.h)), dim3(Tile::kThreads),
         Tile::kSharedBytes, stream, p);
}

}  // namespace

void run_attention_fwd(const AttentionProblem& problem, const TensorRef& out,
                       const TensorRef& out_lo, const TensorRef& lse, void* stream) {
  if (problem.h == 0 || problem.d == 0 || elements_of(problem) == 0 || problem.sq == 0) return;
  const AttentionInputs& in = problem.in;
  const bool packed = problem.g_cu_seqlens_q != nullptr;
  const Fwd p{problem,
              out,
              out_lo,
              static_cast<float*>(lse.data),
              in.scale * kLog2E,
              dropout_rescale(in),
              direct_rows(in.q, packed),
              direct_rows(in.k, packed),
              direct_rows(in.v, packed)};
  if (for_warpgroups(problem)) return attention_fwd_sm90(p, stream);
  visit_dtype<__nv_bfloat16, __half>(in.q.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto run = [&](auto width, auto features) {
      launch_fwd<T, decltype(width)::kValue, decltype(features)::kValue>(p, stream);
    };
    if constexpr (sizeof(T) == 2) {
      visit_width(problem.d, has_features(in), run);
    } else {
      visit_float_width(problem.d, has_features(in), run);
    }
  });
}

void attention_fwd(const AttentionFwd& p, void* stream) {
  run_attention_fwd(problem_of(p.in), p.out, p.out_lo, p.lse, stream);
}

}  // namespace fastgpt::cuda
