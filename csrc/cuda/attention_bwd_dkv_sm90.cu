// dk and dv of attention for Hopper's warpgroups: what attention_bwd_dkv.cu computes, for elements
// of 16 bits without features.
//
// A block is a warpgroup: it takes 64 keys and walks the query heads that share them and the tiles
// of queries; scores are (keys, queries), so that P^T and dS^T are factors in registers. The
// product v dout^T runs under the exponentials of k q^T, p^T dout under dS, ds^T q under the
// products of the next tile. Of heads of 256 the registers hold one gradient: dk and dv are kernels
// of their own, 5 products instead of 4, with one stage each. dk copies the next dout once dp is
// computed and q at the end, dv the next q once the scores are and dout at the end: under its own
// exponentials and the products of the other block (not yet run on a GPU).
#include "csrc/cuda/attention_bwd.cuh"
#include "csrc/cuda/attention_warpgroup.cuh"

namespace fastgpt::cuda {
namespace {

// Queries that are taken at once in long walks: as many as the registers hold.
template <int kD>
constexpr int kMostQueries = kD == 64 ? 96 : 64;

// kDk, kDv: the gradients that it computes.
template <int kD, int kQueries, bool kDk, bool kDv>
struct WarpgroupDkv {
  static constexpr int kBlocks = 2;  // of a multiprocessor, each at its own pace
  static constexpr int kStages = kDk && kDv ? 2 : 1;
  static constexpr int kKeys = kGroupRows;
  using Keys = PanelTile<kKeys, kD>;
  using Queries = PanelTile<kQueries, kD>;
  static constexpr int kKeyTiles = kDk ? 2 : 1;  // dv needs no values
  // lse and delta of two tiles at any rate: the next ones come while these are read.
  static constexpr int kSharedBytes =
      kKeyTiles * Keys::kBytes + kStages * 2 * Queries::kBytes + 2 * 2 * kQueries * 4;
  static_assert(fits(kBlocks, kSharedBytes));
};

template <typename T, int kD, int kQueries, bool kDk, bool kDv>
__global__ void __launch_bounds__(kWarpgroup, (WarpgroupDkv<kD, kQueries, kDk, kDv>::kBlocks))
    attention_bwd_dkv_sm90_kernel(Bwd p) {
  using Tile = WarpgroupDkv<kD, kQueries, kDk, kDv>;
  using Queries = typename Tile::Queries;
  constexpr int kN = kQueries / 8;
  FASTGPT_DYNAMIC_SHARED(shared);
  T* s_k = reinterpret_cast<T*>(shared);
  T* s_v = s_k + Tile::Keys::kElements;
  T* s_q = s_k + Tile::kKeyTiles * Tile::Keys::kElements;
  T* s_dout = s_q + Tile::kStages * Queries::kElements;
  float* s_statistics = reinterpret_cast<float*>(s_dout + Tile::kStages * Queries::kElements);
  const Lane at;
  const int own = static_cast<int>(threadIdx.x) / kWarp * 16;  // of the warp
  const int group_row = own / kGroupRows * kGroupRows;         // of the warpgroup

  const AttentionProblem& problem = p.problem;
  const AttentionInputs& in = problem.in;
  const bool packed = problem.g_cu_seqlens_q != nullptr;
  const int d = problem.d, hk = problem.hk, group = problem.h / hk;
  const int tiles = (problem.sk + Tile::kKeys - 1) / Tile::kKeys;
  // The first keys are seen by the most queries.
  const Place place =
      place_of(tiles, static_cast<int>(gridDim.x) / tiles, problem.sq, d, problem.window > 0);
  const int z = place.y / hk, key_head = place.y % hk, n0 = place.tile * Tile::kKeys;
  const Sequence keys = sequence_of(problem.g_cu_seqlens_k, z, problem.b, in.k.size[2], problem.sk);
  T* g_dk = rows_of<T>(p.dk, packed, z, key_head, keys.first);
  T* g_dv = rows_of<T>(p.dv, packed, z, key_head, keys.first);
  const int64_t dk_s = p.dk.stride[2], dv_s = p.dv.stride[2];
  if (z == problem.b) {  // tokens that no document has
    for (int first = n0; first < keys.count; first += tiles * Tile::kKeys) {
      const int count = min(keys.count - first, Tile::kKeys);
      if (kDk) clear_rows(g_dk + first * dk_s, dk_s, count, d);
      if (kDv) clear_rows(g_dv + first * dv_s, dv_s, count, d);
    }
    return;
  }
  if (n0 >= keys.count) return;
  const Sequence queries =
      sequence_of(problem.g_cu_seqlens_q, z, problem.b, in.q.size[2], problem.sq);
  const int sq = queries.count;

  const Band band(problem, sq, keys.count);
  const Walk walk = band.queries(n0, min(n0 + Tile::kKeys, keys.count), sq, kQueries, false);
  const int steps = walk.count * group;
  // Where the next tile comes from: a query head of the group, and the tile of its walk.
  int next_head = key_head * group, next_tile = 0;
  const auto load_tiles = [&](int step, bool of_q, bool of_dout) {
    if (step < steps) {
      const int stage = step % Tile::kStages, m0 = walk.at(next_tile);
      const int64_t q_s = in.q.stride[2], dout_s = p.dout.stride[2];
      // What a query that sees no key holds must not be met.
      const auto alive = [&](int row) { return m0 + row < sq && band.sees_any(m0 + row); };
      const bool whole = alive(0) && alive(kQueries - 1);
      if (of_q) {
        Queries::load(s_q + stage * Queries::kElements,
                      rows_of<const T>(in.q, packed, z, next_head, queries.first + m0), q_s, d,
                      p.direct_q, whole, alive);
      }
      if (of_dout) {
        Queries::load(s_dout + stage * Queries::kElements,
                      rows_of<const T>(p.dout, packed, z, next_head, queries.first + m0), dout_s, d,
                      p.direct_dout, whole, alive);
      }
      const int row = static_cast<int>(threadIdx.x);
      if (of_q && row < kQueries) {
        const int64_t at_row = statistics_at(problem, z, next_head, queries.first + m0) + row;
        float* s_lse2 = s_statistics + step % 2 * 2 * kQueries;
        const bool inside = m0 + row < sq;
        s_lse2[row] = inside ? p.g_lse2[at_row] : INFINITY;
        if (kDk) s_lse2[kQueries + row] = inside ? p.g_delta[at_row] : 0.0f;
      }
      if ((kDk ? of_q : of_dout) && ++next_tile == walk.count) {  // the later of the two
        next_tile = 0;
        ++next_head;
      }
    }
    commit_copies();
  };

  [[maybe_unused]] float r_dk[1][kD / 8][4], r_dv[1][kD / 8][4], r_dp[kN][4];
  float r_s[kN][4];
  uint32_t r_factors[kQueries / 16][4];  // P^T, then dS^T
  if constexpr (kDk) clear(r_dk);
  if constexpr (kDv) clear(r_dv);
  if (steps > 0) {
    const auto alive = [&](int row) { return n0 + row < keys.count; };
    const bool whole = alive(Tile::kKeys - 1);
    Tile::Keys::load(s_k, rows_of<const T>(in.k, packed, z, key_head, keys.first + n0),
                     in.k.stride[2], d, p.direct_k, whole, alive);
    if constexpr (kDk) {
      Tile::Keys::load(s_v, rows_of<const T>(in.v, packed, z, key_head, keys.first + n0),
                       in.v.stride[2], d, p.direct_v, whole, alive);
      load_tiles(0, true, true);
    } else {
      load_tiles(0, true, false);
      load_tiles(0, false, true);
    }
    for (int step = 0; step < steps; ++step) {
      wait_copies<kDk ? 0 : 1>();
      fence_shared();
      __syncthreads();  // this tile is here, of dv alone its queries
      const int stage = step % Tile::kStages;
      const T* s_own_q = s_q + stage * Queries::kElements;
      const T* s_own_dout = s_dout + stage * Queries::kElements;
      const float* s_lse2 = s_statistics + step % 2 * 2 * kQueries;
      wgmma_begin();
      issue_transposed<Tile::kKeys, kQueries, kD>(r_s, s_k, group_row, s_own_q);
      wgmma_commit();
      if constexpr (kDk) {
        issue_transposed<Tile::kKeys, kQueries, kD>(r_dp, s_v, group_row, s_own_dout);
        wgmma_commit();
      }
      wgmma_wait<kDk ? 1 : 0>();
      hold(r_s);
      if constexpr (kDk) hold(r_dk[0]);
      if constexpr (kDv) {
        __syncthreads();  // the last tile has been read, of dv alone the queries of this one
        load_tiles(step + 1, true, kDk);
      }
      const bool edge = walk.edge(step % walk.count);
      if (edge) {
        const int m0 = walk.at(step % walk.count) + at.column(0, 0);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = n0 + own + at.row(0, 2 * i);
          const int first = band.first_row(column) - m0, last = band.last_row(column) - m0;
          hide_outside(r_s, i, first, last);
        }
      }
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const float2 lse2 = *reinterpret_cast<const float2*>(s_lse2 + at.column(n, 0));
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& s = r_s[n][e];
          s = exp2_approx(fmaf(s, p.scale, e % 2 == 0 ? -lse2.x : -lse2.y));
        }
      }
      if constexpr (kDv) {
        round_to_factors<T>(r_factors, r_s);
        if constexpr (!kDk) {
          wait_copies<1>();
          fence_shared();
          __syncthreads();  // dout is here
        }
        hold(r_dv[0]);
        wgmma_begin();
        issue<kQueries, kD>(r_dv[0], r_factors, s_own_dout);
        wgmma_commit();
      }
      if constexpr (kDk) {
        wgmma_wait<kDv ? 1 : 0>();
        hold(r_dp);
        if constexpr (!kDv) {
          __syncthreads();  // dout has been read
          load_tiles(step + 1, false, true);
        }
        if (edge) clear_hidden(r_dp, r_s);
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          const float2 delta =
              *reinterpret_cast<const float2*>(s_lse2 + kQueries + at.column(n, 0));
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            r_dp[n][e] = r_s[n][e] * (r_dp[n][e] - (e % 2 == 0 ? delta.x : delta.y));
          }
        }
        if constexpr (kDv) {
          wgmma_wait<0>();
          hold(r_dv[0]);
        }
        round_to_factors<T>(r_factors, r_dp);
        wgmma_begin();
        issue<kQueries, kD>(r_dk[0], r_factors, s_own_q);
        wgmma_commit();
      }
      if constexpr (Tile::kStages == 1) {
        wgmma_wait<0>();
        hold(kDk ? r_dk[0] : r_dv[0]);
        __syncthreads();  // this tile has been read
        load_tiles(step + 1, kDk, kDv);
      }
    }
    if constexpr (Tile::kStages > 1) {
      wgmma_wait<0>();
      hold(r_dk[0]);
      __syncthreads();  // the keys and values have been read
    }
  }
  if constexpr (kDk) scale_by(r_dk, in.scale);
  if constexpr (kDv) scale_by(r_dv, p.rescale);
  const int first = n0 + own, count = keys.count - first;
  if constexpr (kDk) {
    store_rows<kD>(r_dk, 0, s_k + own * kD, g_dk + first * dk_s, dk_s, count, d);
  }
  if constexpr (kDv) {
    store_rows<kD>(r_dv, 0, (kDk ? s_v : s_k) + own * kD, g_dv + first * dv_s, dv_s, count, d);
  }
}

template <typename T, int kD, int kQueries, bool kDk, bool kDv>
void launch_dkv(const Bwd& p, void* stream) {
  using Tile = WarpgroupDkv<kD, kQueries, kDk, kDv>;
  const int64_t tiles = (p.problem.sk + Tile::kKeys - 1) / Tile::kKeys;
  launch(attention_bwd_dkv_sm90_kernel<T, kD, kQueries, kDk, kDv>,
         dim3(grid_size(tiles * elements_of(p.problem) * p.problem.hk)), dim3(kWarpgroup),
         Tile::kSharedBytes, stream, p);
}

}  // namespace

void attention_bwd_dkv_sm90(const Bwd& p, void* stream) {
  visit_warpgroup_type(p.problem, [&](auto type) {
    visit_warpgroup_width(p.problem.d, [&](auto width) {
      using T = typename decltype(type)::type;
      constexpr int kD = decltype(width)::kValue;
      if constexpr (kD == 256) {
        launch_dkv<T, kD, 48, true, false>(p, stream);
        launch_dkv<T, kD, 64, false, true>(p, stream);
      } else {
        visit_bool(has_long_walks(p.problem, p.problem.sq), [&](auto many) {
          constexpr int kQueries = decltype(many)::kValue ? kMostQueries<kD> : 64;
          launch_dkv<T, kD, kQueries, true, true>(p, stream);
        });
      }
    });
  });
}

}  // namespace fastgpt::cuda
