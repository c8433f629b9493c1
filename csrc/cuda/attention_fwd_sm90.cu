// The forward of attention for Hopper's warpgroups: what attention_fwd.cu computes, for elements of
// 16 bits without features.
//
// A block is a warpgroup: it takes 64 queries, keeps them in registers and walks the tiles of keys,
// edges first. The product p v of one tile runs under the softmax of the next; copies are a tile or
// two ahead. Of heads of 256 two blocks fit with one stage each: their queries stay in shared
// memory, keys are copied under the softmax, values under the next scores, both under the other
// block's products (not yet run on a GPU).
// On an H200, causal, d = 128, bf16: 399 TFLOP/s at S = 2048, 490 at 8192 (of 780).
// Learnt there: what costs is the way from tile to tile, so more keys at once gave 1.11x; a second
// buffer of scores gave 1.05x, two warpgroups that share their keys 0.82x, as they wait for each
// other.
// Source: Shah et al. 2024, https://arxiv.org/abs/2407.08608 (the overlap within a warpgroup).
#include "csrc/cuda/attention_fwd.cuh"
#include "csrc/cuda/attention_warpgroup.cuh"

namespace fastgpt::cuda {
namespace {

// Keys that are taken at once in long walks: as many as the registers and the shared memory hold.
template <int kD>
constexpr int kMostKeys = kD == 64    ? 96
                          : kD == 128 ? 112
                                      : 64;

// Blocks of a multiprocessor run at their own pace: one computes its softmax while another
// multiplies. How many, and how far ahead they copy, as measured on an H100 and an H200.
template <int kD, int kKeys>
struct WarpgroupFwd {
  static constexpr int kBlocks = kD >= 128 ? 2 : kD == 64 && kKeys == 64 ? 4 : 3;
  static constexpr int kStages = kD == 256 ? 1 : kD == 128 && kKeys == 64 ? 3 : 2;
  static constexpr bool kInRegisters = kStages > 1;  // the queries
  using Queries = PanelTile<kGroupRows, kD>;
  using Keys = PanelTile<kKeys, kD>;
  static_assert(Queries::kElements <= Keys::kElements,
                "queries come in the place of a stage, results in that of the keys");
  static constexpr int kSharedBytes =
      2 * kStages * Keys::kBytes + (kInRegisters ? 0 : Queries::kBytes);
  static_assert(fits(kBlocks, kSharedBytes));
};

template <typename T, int kD, int kKeys>
__global__ void __launch_bounds__(kWarpgroup, (WarpgroupFwd<kD, kKeys>::kBlocks))
    attention_fwd_sm90_kernel(Fwd p) {
  using Tile = WarpgroupFwd<kD, kKeys>;
  using Keys = typename Tile::Keys;
  constexpr int kN = kKeys / 8;
  FASTGPT_DYNAMIC_SHARED(shared);
  T* s_k = reinterpret_cast<T*>(shared);
  T* s_v = s_k + Tile::kStages * Keys::kElements;
  // Read before the last stage is used, or behind all stages.
  T* s_q = s_v + (Tile::kStages - (Tile::kInRegisters ? 1 : 0)) * Keys::kElements;
  const Lane at;
  const int own = static_cast<int>(threadIdx.x) / kWarp * 16;  // of the warp

  const FwdRows<T> rows(p, kGroupRows);
  if (!rows.any) return;
  const AttentionInputs& in = p.problem.in;
  const int m0 = rows.m0, sq = rows.queries, d = p.problem.d;
  const Band band(p.problem, sq, rows.keys);
  const Walk walk = band.keys(m0, min(m0 + kGroupRows, sq), kKeys, false);
  const auto load_keys = [&](T* s_tiles, const T* g_rows, int64_t stride, int t, bool direct) {
    if (t >= walk.count) return;
    const int n0 = walk.at(t);
    Keys::load(s_tiles + t % Tile::kStages * Keys::kElements, g_rows + n0 * stride, stride, d,
               direct, n0 + kKeys <= rows.keys, [&](int row) { return n0 + row < rows.keys; });
  };
  // Group t: the keys of tile t, the values of the tile before it; where there is one stage, a
  // group each.
  const auto load_group_keys = [&](int t) {
    load_keys(s_k, rows.g_k, in.k.stride[2], t, p.direct_k);
    if (Tile::kStages == 1) commit_copies();
  };
  const auto load_group_values = [&](int t) {
    if (t > 0) load_keys(s_v, rows.g_v, in.v.stride[2], t - 1, p.direct_v);
    commit_copies();
  };
  const auto load_group = [&](int t) {
    load_group_keys(t);
    load_group_values(t);
  };

  float r_rows[1][kD / 8][4], r_s[kN][4], r_top[2], r_sum[2], r_decay[2];
  float (&r_out)[kD / 8][4] = r_rows[0];
  [[maybe_unused]] uint32_t r_q[kD / 16][4];
  uint32_t r_p[kKeys / 16][4];
  clear(r_rows);
  r_top[0] = r_top[1] = -INFINITY;
  r_sum[0] = r_sum[1] = 0.0f;

  const auto issue_scores = [&](int t) {
    const T* s_tile = s_k + t % Tile::kStages * Keys::kElements;
    if constexpr (Tile::kInRegisters) {
      issue_transposed<kKeys, kD>(r_s, r_q, s_tile);
    } else {
      issue_transposed<kGroupRows, kKeys, kD>(r_s, s_q, 0, s_tile);
    }
  };
  // Scores become probabilities; r_decay is what the sums before them are multiplied by.
  const auto softmax = [&](int t) {
    if (walk.edge(t)) {
      const int first = walk.at(t) + at.column(0, 0);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = m0 + own + at.row(0, 2 * i);
        const int low = band.low(row) - first, high = band.high(row) - first;
        hide_outside(r_s, i, low, high);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float r_tops[2] = {-INFINITY, -INFINITY}, r_sums[2] = {0.0f, 0.0f};  // of alternate columns
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) r_tops[j] = fmaxf(r_tops[j], r_s[n][2 * i + j]);
      }
      const float top = fmaxf(r_top[i], warp_max<4>(fmaxf(r_tops[0], r_tops[1])) * p.scale);
      const float base = top == -INFINITY ? 0.0f : top;
      r_decay[i] = exp2_approx(r_top[i] - base);
      r_top[i] = top;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& s = r_s[n][2 * i + j];
          s = exp2_approx(fmaf(s, p.scale, -base));
          r_sums[j] += s;
        }
      }
      r_sum[i] = fmaf(r_sum[i], r_decay[i], r_sums[0] + r_sums[1]);
    }
  };

  if (walk.count > 0) {
    Tile::Queries::load(s_q, rows.g_q, in.q.stride[2], d, p.direct_q, m0 + kGroupRows <= sq,
                        [&](int row) { return m0 + row < sq; });
    for (int t = 0; t < Tile::kStages; ++t) load_group(t);
    wait_copies<Tile::kStages - 1>();
    fence_shared();
    __syncthreads();
    if constexpr (Tile::kInRegisters) Tile::Queries::factors(r_q, s_q, own);
    wgmma_begin();
    issue_scores(0);
    wgmma_commit();
    wgmma_wait<0>();
    hold(r_s);
    if constexpr (Tile::kStages == 1) {
      __syncthreads();  // the keys have been read
      load_group(1);
    }
    softmax(0);
    round_to_factors<T>(r_p, r_s);
    for (int t = 1; t < walk.count; ++t) {
      wait_copies<Tile::kStages == 1 ? 1 : Tile::kStages - 2>();
      fence_shared();
      __syncthreads();  // group t (its keys, if of one stage) is here, the last round's was read
      if constexpr (Tile::kStages > 1) load_group(t + Tile::kStages - 1);
      hold(r_out);
      wgmma_begin();
      issue_scores(t);
      wgmma_commit();
      if constexpr (Tile::kStages == 1) {
        wait_copies<0>();
        fence_shared();
        __syncthreads();  // the values of group t too
      }
      issue<kKeys, kD>(r_out, r_p, s_v + (t - 1) % Tile::kStages * Keys::kElements);
      wgmma_commit();
      wgmma_wait<1>();
      hold(r_s);
      if constexpr (Tile::kStages == 1) {
        __syncthreads();  // the keys have been read
        load_group_keys(t + 1);
      }
      softmax(t);
      wgmma_wait<0>();
      hold(r_out);
      // Beyond the first tiles maxima seldom rise.
      if (__any_sync(kFullWarp, r_decay[0] != 1.0f || r_decay[1] != 1.0f)) {
#pragma unroll
        for (int n = 0; n < kD / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) r_out[n][e] *= r_decay[e / 2];
        }
      }
      round_to_factors<T>(r_p, r_s);
      if constexpr (Tile::kStages == 1) {
        __syncthreads();  // the values have been read
        load_group_values(t + 1);
      }
    }
    wait_copies<0>();
    fence_shared();
    __syncthreads();
    hold(r_out);
    wgmma_begin();
    issue<kKeys, kD>(r_out, r_p, s_v + (walk.count - 1) % Tile::kStages * Keys::kElements);
    wgmma_commit();
    wgmma_wait<0>();
    hold(r_out);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float sum = warp_sum<4>(r_sum[i]);
    const float all = sum == 0.0f ? 1.0f : sum;  // no key was seen: the output is 0
    const int row = m0 + own + at.row(0, 2 * i);
    if (at.pair == 0 && row < sq) *rows.lse_rows(p, row) = (r_top[i] + log2f(all)) * kLn2;
    const float inverse = 1.0f / all;
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
      r_out[n][2 * i] *= inverse;
      r_out[n][2 * i + 1] *= inverse;
    }
  }
  rows.template store<kD>(r_rows, s_k + own * kD, own, p);
}

}  // namespace

void attention_fwd_sm90(const Fwd& p, void* stream) {
  visit_warpgroup_type(p.problem, [&](auto type) {
    visit_warpgroup_width(p.problem.d, [&](auto width) {
      using T = typename decltype(type)::type;
      constexpr int kD = decltype(width)::kValue;
      visit_bool(has_long_walks(p.problem, p.problem.sk), [&](auto many) {
        constexpr int kKeys = decltype(many)::kValue ? kMostKeys<kD> : 64;
        const int64_t tiles = (p.problem.sq + kGroupRows - 1) / kGroupRows;
        launch(attention_fwd_sm90_kernel<T, kD, kKeys>,
               dim3(grid_size(tiles * elements_of(p.problem) * p.problem.h)), dim3(kWarpgroup),
               WarpgroupFwd<kD, kKeys>::kSharedBytes, stream, p);
      });
    });
  });
}

}  // namespace fastgpt::cuda
