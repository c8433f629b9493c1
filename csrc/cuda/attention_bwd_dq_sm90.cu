// dq of attention for Hopper's warpgroups: what attention_bwd_dq.cu computes, for elements of 16
// bits without features.
//
// A block is a warpgroup: it takes 64 queries, keeps q and dout in registers, if it may and can,
// and walks the tiles of keys. The product dout v^T runs under the exponentials of q k^T, and ds k
// of one tile under the products of the next. Of heads of 256 two blocks fit with one stage of 48
// keys each: values are copied under ds k, which is waited for, and keys then, under the other
// block's products (not yet run on a GPU).
#include "csrc/cuda/attention_bwd.cuh"
#include "csrc/cuda/attention_warpgroup.cuh"

namespace fastgpt::cuda {
namespace {

template <int kD>
struct WarpgroupDq {
  static constexpr int kBlocks = kD <= 64 ? 3 : 2;  // of a multiprocessor, each at its own pace
  static constexpr int kKeys = kD == 256 ? 48 : 64;
  static constexpr int kStages = kD == 256 ? 1 : 3;
  // Else q and dout stay in shared memory. Of heads of 256 there are no registers for them; where
  // their factors have the shape of those of ds, nvcc 13.0 gives both the same registers, and what
  // is needed in every round is overwritten in the first (tests/test_cuda_resources.py looks for
  // it).
  static constexpr bool kInRegisters = kD != kKeys && kStages > 1;
  using Queries = PanelTile<kGroupRows, kD>;
  using Keys = PanelTile<kKeys, kD>;
  static_assert(!kInRegisters || Queries::kElements == Keys::kElements,
                "q and dout come in the place of a stage");
  static_assert(2 * kStages * Keys::kElements >= Queries::kElements,
                "results come in the place of the keys and values");
  static constexpr int kSharedBytes =
      2 * kStages * Keys::kBytes + (kInRegisters ? 0 : 2 * Queries::kBytes);
  static_assert(fits(kBlocks, kSharedBytes));
};

template <typename T, int kD>
__global__ void __launch_bounds__(kWarpgroup, WarpgroupDq<kD>::kBlocks)
    attention_bwd_dq_sm90_kernel(Bwd p) {
  using Tile = WarpgroupDq<kD>;
  using Queries = typename Tile::Queries;
  using Keys = typename Tile::Keys;
  constexpr int kKeys = Tile::kKeys, kN = kKeys / 8;
  FASTGPT_DYNAMIC_SHARED(shared);
  T* s_k = reinterpret_cast<T*>(shared);
  T* s_v = s_k + Tile::kStages * Keys::kElements;
  T* s_end = s_v + Tile::kStages * Keys::kElements;
  T* s_q = Tile::kInRegisters ? s_v - Keys::kElements : s_end;  // the last stage of k
  T* s_dout = Tile::kInRegisters ? s_end - Keys::kElements : s_end + Queries::kElements;
  const Lane at;
  const int own = static_cast<int>(threadIdx.x) / kWarp * 16;  // of the warp

  const AttentionProblem& problem = p.problem;
  const bool packed = problem.g_cu_seqlens_q != nullptr;
  const QueryBlock block(problem, kGroupRows);
  const int z = block.z, head = block.head, m0 = block.m0, sq = block.queries.count;
  const int first_query = block.queries.first, d = problem.d;
  if (z == problem.b) {  // tokens that no document has
    T* g_dq = rows_of<T>(p.dq, packed, z, head, first_query);
    for (int first = m0; first < sq; first += block.tiles * kGroupRows) {
      clear_rows(g_dq + first * p.dq.stride[2], p.dq.stride[2], min(sq - first, kGroupRows), d);
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
  const Walk walk = band.keys(m0, min(m0 + kGroupRows, sq), kKeys, false);
  const auto load_tiles = [&](int t, bool of_keys, bool of_values) {
    if (t < walk.count) {
      const int n0 = walk.at(t), stage = t % Tile::kStages * Keys::kElements;
      const auto alive = [&](int row) { return n0 + row < keys.count; };
      const bool whole = n0 + kKeys <= keys.count;
      const int64_t k_s = in.k.stride[2], v_s = in.v.stride[2];
      if (of_keys) Keys::load(s_k + stage, g_k + n0 * k_s, k_s, d, p.direct_k, whole, alive);
      if (of_values) Keys::load(s_v + stage, g_v + n0 * v_s, v_s, d, p.direct_v, whole, alive);
    }
    commit_copies();
  };

  float r_rows[1][kD / 8][4], r_s[kN][4], r_dp[kN][4], r_lse2[2], r_delta[2];
  float (&r_dq)[kD / 8][4] = r_rows[0];
  [[maybe_unused]] uint32_t r_q[kD / 16][4], r_dout[kD / 16][4];
  uint32_t r_ds[kKeys / 16][4];
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
    const bool whole = alive(0) && alive(kGroupRows - 1);
    Queries::load(s_q, rows_of<const T>(in.q, packed, z, head, first_query + m0), in.q.stride[2], d,
                  p.direct_q, whole, alive);
    Queries::load(s_dout, rows_of<const T>(p.dout, packed, z, head, first_query + m0),
                  p.dout.stride[2], d, p.direct_dout, whole, alive);
    load_tiles(0, true, true);
    wait_copies<0>();
    __syncthreads();
    if constexpr (Tile::kInRegisters) {
      Queries::factors(r_q, s_q, own);
      Queries::factors(r_dout, s_dout, own);
    }
    for (int t = 0; t < walk.count; ++t) {
      wait_copies<0>();
      fence_shared();
      __syncthreads();  // tile t is here, and tile t - 2, if another stage, has been read
      if constexpr (Tile::kStages > 1) load_tiles(t + 1, true, true);  // in the place of t - 2
      const T* s_own_k = s_k + t % Tile::kStages * Keys::kElements;
      const T* s_own_v = s_v + t % Tile::kStages * Keys::kElements;
      wgmma_begin();
      if constexpr (Tile::kInRegisters) {
        issue_transposed<kKeys, kD>(r_s, r_q, s_own_k);
        wgmma_commit();
        issue_transposed<kKeys, kD>(r_dp, r_dout, s_own_v);
      } else {
        issue_transposed<kGroupRows, kKeys, kD>(r_s, s_q, 0, s_own_k);
        wgmma_commit();
        issue_transposed<kGroupRows, kKeys, kD>(r_dp, s_dout, 0, s_own_v);
      }
      wgmma_commit();
      wgmma_wait<1>();
      hold(r_s);
      const bool edge = walk.edge(t);
      if (edge) {
        const int first = walk.at(t) + at.column(0, 0);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = m0 + own + at.row(0, 2 * i);
          const int low = band.low(row) - first, high = band.high(row) - first;
          hide_outside(r_s, i, low, high);
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
      if constexpr (Tile::kStages == 1) {
        __syncthreads();  // the values have been read
        load_tiles(t + 1, false, true);
      }
      if (edge) clear_hidden(r_dp, r_s);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) r_dp[n][e] = r_s[n][e] * (r_dp[n][e] - r_delta[e / 2]);
      }
      round_to_factors<T>(r_ds, r_dp);
      wgmma_begin();
      issue<kKeys, kD>(r_dq, r_ds, s_own_k);
      wgmma_commit();
      if constexpr (Tile::kStages == 1) {
        wgmma_wait<0>();
        hold(r_dq);
        __syncthreads();  // the keys have been read
        load_tiles(t + 1, true, false);
      }
    }
    if constexpr (Tile::kStages > 1) {
      wgmma_wait<0>();
      hold(r_dq);
    }
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
      using Tile = WarpgroupDq<kD>;
      const int64_t tiles = (p.problem.sq + kGroupRows - 1) / kGroupRows;
      launch(attention_bwd_dq_sm90_kernel<T, kD>,
             dim3(grid_size(tiles * elements_of(p.problem) * p.problem.h)), dim3(kWarpgroup),
             Tile::kSharedBytes, stream, p);
    });
  });
}

}  // namespace fastgpt::cuda
