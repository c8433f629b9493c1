// dq of attention for Hopper's warpgroups: what attention_bwd_dq.cu computes, for heads of up to
// 128 elements of 16 bits without features.
//
// A block is a warpgroup: it takes 64 queries, keeps q and dout in registers and walks the tiles of
// keys. The product dout v^T runs under the exponentials of q k^T, and ds k of one tile
// under the products of the next.
#include <cstdlib>

#include "csrc/cuda/attention_bwd.cuh"
#include "csrc/cuda/attention_warpgroup.cuh"

namespace fastgpt::cuda {
namespace {

template <int kD, int kG, int kB>
struct WarpgroupDq {
  static constexpr int kGroups = kG;
  static constexpr int kKeys = 64;
  static constexpr int kStages = 3;
  static constexpr int kThreads = kGroups * kWarpgroup;
  static constexpr int kQueries = kGroups * kGroupRows;
  using Queries = PanelTile<kQueries, kD>;
  using Keys = PanelTile<kKeys, kD>;
  // q and dout come in the place of the last stage, if they fit.
  static constexpr bool kInStage = Queries::kElements <= Keys::kElements;
  static constexpr int kSharedBytes =
      2 * kStages * Keys::kBytes + (kInStage ? 0 : 2 * Queries::kBytes);
};

template <typename T, int kD, int kG, int kB>
__global__ void __launch_bounds__(kG* kWarpgroup, kB) attention_bwd_dq_sm90_kernel(Bwd p) {
  using Tile = WarpgroupDq<kD, kG, kB>;
  using Keys = typename Tile::Keys;
  constexpr int kKeys = Tile::kKeys, kN = kKeys / 8;
  FASTGPT_DYNAMIC_SHARED(shared);
  T* s_k = reinterpret_cast<T*>(shared);
  T* s_v = s_k + Tile::kStages * Keys::kElements;
  T* s_q = Tile::kInStage ? s_k + (Tile::kStages - 1) * Keys::kElements
                          : s_v + Tile::kStages * Keys::kElements;
  T* s_dout =
      Tile::kInStage ? s_v + (Tile::kStages - 1) * Keys::kElements : s_q + Tile::Queries::kElements;
  const Lane at;
  const int own = static_cast<int>(threadIdx.x) / kWarp * 16;  // of the warp

  const AttentionProblem& problem = p.problem;
  const bool packed = problem.g_cu_seqlens_q != nullptr;
  const QueryBlock block(problem, Tile::kQueries);
  const int z = block.z, head = block.head, m0 = block.m0, sq = block.queries.count;
  const int first_query = block.queries.first, d = problem.d;
  if (z == problem.b) {  // tokens that no document has
    T* g_dq = rows_of<T>(p.dq, packed, z, head, first_query);
    for (int first = m0; first < sq; first += block.tiles * Tile::kQueries) {
      clear_rows(g_dq + first * p.dq.stride[2], p.dq.stride[2], min(sq - first, Tile::kQueries), d);
    }
    return;
  }
  if (m0 >= sq) return;
  const AttentionInputs& in = problem.in;
  const Sequence keys = sequence_of(problem.g_cu_seqlens_k, z, problem.b, in.k.size[2], problem.sk);
  const T* g_k = rows_of<const T>(in.k, packed, z, block.key_head, keys.first);
  const T* g_v = rows_of<const T>(in.v, packed, z, block.key_head, keys.first);
  const int64_t statistics = statistics_at(problem, z, head, first_query) + m0;
  const Band band(problem, sq, keys.count);
  const Walk walk = band.keys(m0, min(m0 + Tile::kQueries, sq), kKeys, false);
  const auto load_keys = [&](int t) {
    if (t < walk.count) {
      const int n0 = walk.at(t), stage = t % Tile::kStages * Keys::kElements;
      const auto alive = [&](int row) { return n0 + row < keys.count; };
      const bool whole = n0 + kKeys <= keys.count;
      const int64_t k_s = in.k.stride[2], v_s = in.v.stride[2];
      Keys::template load<Tile::kThreads>(s_k + stage, g_k + n0 * k_s, k_s, d, p.direct_k, whole,
                                          alive);
      Keys::template load<Tile::kThreads>(s_v + stage, g_v + n0 * v_s, v_s, d, p.direct_v, whole,
                                          alive);
    }
    commit_copies();
  };

  float r_rows[1][kD / 8][4], r_s[kN][4], r_dp[kN][4], r_lse2[2], r_delta[2];
  float (&r_dq)[kD / 8][4] = r_rows[0];
  uint32_t r_q[kD / 16][4], r_dout[kD / 16][4], r_ds[kKeys / 16][4];
  clear(r_rows);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = own + at.row(0, 2 * i);
    r_lse2[i] = m0 + row < sq ? p.g_lse2[statistics + row] : INFINITY;
    r_delta[i] = m0 + row < sq ? p.g_delta[statistics + row] : 0.0f;
  }
  if (walk.count > 0) {
    // What a query that sees no key holds must not be met.
    const auto alive = [&](int row) { return m0 + row < sq && band.sees_any(m0 + row); };
    const bool whole = alive(0) && alive(Tile::kQueries - 1);
    Tile::Queries::template load<Tile::kThreads>(
        s_q, rows_of<const T>(in.q, packed, z, head, first_query + m0), in.q.stride[2], d,
        p.direct_q, whole, alive);
    Tile::Queries::template load<Tile::kThreads>(
        s_dout, rows_of<const T>(p.dout, packed, z, head, first_query + m0), p.dout.stride[2], d,
        p.direct_dout, whole, alive);
    load_keys(0);
    wait_copies<0>();
    __syncthreads();
    Tile::Queries::factors(r_q, s_q, own);
    Tile::Queries::factors(r_dout, s_dout, own);
    for (int t = 0; t < walk.count; ++t) {
      wait_copies<0>();
      fence_shared();
      __syncthreads();   // tile t is here, and tile t - 2 has been read
      load_keys(t + 1);  // in the place of tile t - 2
      const T* s_own_k = s_k + t % Tile::kStages * Keys::kElements;
      const T* s_own_v = s_v + t % Tile::kStages * Keys::kElements;
      wgmma_begin();
      issue_transposed<kKeys, kD>(r_s, r_q, s_own_k);
      wgmma_commit();
      issue_transposed<kKeys, kD>(r_dp, r_dout, s_own_v);
      wgmma_commit();
      wgmma_wait<1>();
      hold(r_s);
      if (walk.edge(t)) {
        const int n0 = walk.at(t);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = m0 + own + at.row(0, 2 * i);
          const int low = band.low(row) - n0, high = band.high(row) - n0;
#pragma unroll
          for (int n = 0; n < kN; ++n) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const int column = at.column(n, j);
              if (column < low || column > high) r_s[n][2 * i + j] = -INFINITY;
            }
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          r_s[n][e] = exp2_approx(fmaf(r_s[n][e], p.scale, -r_lse2[e / 2]));
        }
      }
      wgmma_wait<0>();
      hold(r_dp);
      hold(r_dq);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) r_dp[n][e] = r_s[n][e] * (r_dp[n][e] - r_delta[e / 2]);
      }
      round_to_factors<T>(r_ds, r_dp);
      wgmma_begin();
      issue<kKeys, kD>(r_dq, r_ds, s_own_k);
      wgmma_commit();
    }
    wgmma_wait<0>();
    hold(r_dq);
  }
  scale_by(r_rows, in.scale);
  const int first = m0 + own;
  T* g_dq = rows_of<T>(p.dq, packed, z, head, first_query);
  __syncthreads();  // the last tiles have been read
  store_rows<kD>(r_rows, 0, s_k + own * kD, g_dq + first * p.dq.stride[2], p.dq.stride[2],
                 sq - first, d);
}

}  // namespace

void attention_bwd_dq_sm90(const Bwd& p, void* stream) {
  visit_warpgroup_type(p.problem, [&](auto type) {
    visit_warpgroup_width(p.problem.d, [&](auto width) {
      using T = typename decltype(type)::type;
      constexpr int kD = decltype(width)::kValue;
      const auto run = [&](auto groups, auto blocks) {
        using Tile = WarpgroupDq<kD, decltype(groups)::kValue, decltype(blocks)::kValue>;
        const int64_t tiles = (p.problem.sq + Tile::kQueries - 1) / Tile::kQueries;
        launch(
            attention_bwd_dq_sm90_kernel<T, kD, decltype(groups)::kValue, decltype(blocks)::kValue>,
            dim3(grid_size(tiles * elements_of(p.problem) * p.problem.h)), dim3(Tile::kThreads),
            Tile::kSharedBytes, stream, p);
      };
      constexpr int kAt = kD == 64 ? 0 : kD == 80 ? 1 : kD == 96 ? 2 : 3;
      const char* variant = getenv("W");
      const char c = variant != nullptr ? variant[kAt] : '1';
      if (c == '2') return run(Constant<2>{}, Constant<1>{});
      if (c == '3' && kD == 64) return run(Constant<1>{}, Constant<kD == 64 ? 3 : 2>{});
      run(Constant<1>{}, Constant<2>{});
    });
  });
}

}  // namespace fastgpt::cuda
