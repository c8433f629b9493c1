// dq of attention, dense or packed. A block takes kWarps * kM * 16 queries and walks the tiles of
// kKeys keys that they see, as the forward does; dS stays in registers. While a tile is computed
// the next one is copied. 6 d flops per visible pair; reads k and v once for each tile of queries,
// as far as they are not in the L2 cache.
#include "csrc/cuda/attention_bwd.cuh"

namespace fastgpt::cuda {
namespace {

template <typename C, int kD, bool kFeatures>
struct DqTile {
  static constexpr bool kTensorCores = sizeof(C) == 2;
  static constexpr int kWarps = !kTensorCores && kD > 128 ? 2 : 4;
  static constexpr int kM = kTensorCores && kD <= 128 && !kFeatures ? 2 : 1;  // of 16 rows, a warp
  static constexpr int kKeys = kTensorCores && !kFeatures && (kD <= 64 || kD > 128) ? 32 : 16;
  // Warps without rows compute nothing, where the test costs no register that is needed.
  static constexpr bool kAlwaysBusy = kM == 2;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kQueries = kWarps * kM * 16;
  static constexpr int kScratch = kWarps * kScratchFloats<C, kM, kKeys / 8>;
  static constexpr int kStage = 2 * kKeys * kD;  // k and v
  static constexpr int kSharedBytes =
      (2 * kQueries * kD + 2 * kStage) * static_cast<int>(sizeof(C)) +
      (2 * kQueries + kScratch) * 4;
};

// One block a multiprocessor is asked for, or ptxas would spill to fit three.
template <typename T, typename C, int kD, bool kFeatures>
__global__ void __launch_bounds__(DqTile<C, kD, kFeatures>::kThreads, 1)
    attention_bwd_dq_kernel(Bwd p) {
  using Tile = DqTile<C, kD, kFeatures>;
  constexpr int kM = Tile::kM, kKeys = Tile::kKeys, kN = kKeys / 8, kThreads = Tile::kThreads;
  FASTGPT_DYNAMIC_SHARED(shared);
  C* s_q = reinterpret_cast<C*>(shared);
  C* s_dout = s_q + Tile::kQueries * kD;
  C* s_stages = s_dout + Tile::kQueries * kD;
  const Lane at;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, own = warp * kM * 16;
  float* s_lse2 = reinterpret_cast<float*>(s_stages + 2 * Tile::kStage);
  float* s_delta = s_lse2 + Tile::kQueries;
  float* s_scratch = s_delta + Tile::kQueries + warp * kScratchFloats<C, kM, kN>;

  const AttentionProblem& problem = p.problem;
  const AttentionInputs& in = problem.in;
  const bool packed = problem.g_cu_seqlens_q != nullptr;
  const int d = problem.d;
  const QueryBlock block(problem, Tile::kQueries);
  const Sequence queries = block.queries;
  const int z = block.z, head = block.head, key_head = block.key_head;
  const int m0 = block.m0, sq = queries.count;
  const int64_t dq_s = p.dq.stride[2];
  T* g_dq = rows_of<T>(p.dq, packed, z, head, queries.first);
  if (z == problem.b) {  // tokens that no document has
    for (int first = m0; first < sq; first += block.tiles * Tile::kQueries) {
      clear_rows(g_dq + first * dq_s, dq_s, min(sq - first, Tile::kQueries), d);
    }
    return;
  }
  if (m0 >= sq) return;
  const Sequence keys = sequence_of(problem.g_cu_seqlens_k, z, problem.b, in.k.size[2], problem.sk);
  const int64_t k_s = in.k.stride[2], v_s = in.v.stride[2];
  const T* g_k = rows_of<const T>(in.k, packed, z, key_head, keys.first);
  const T* g_v = rows_of<const T>(in.v, packed, z, key_head, keys.first);
  const int64_t statistics = statistics_at(problem, z, head, queries.first) + m0;

  const Band band(problem, sq, keys.count);
  Features features;
  if (kFeatures) features = Features(in, z, problem.h, head);
  const Walk walk =
      band.keys(m0, min(m0 + Tile::kQueries, sq), kKeys, kFeatures && features.selective());
  const auto load_keys = [&](int t) {
    C* s_k = s_stages + t % 2 * Tile::kStage;
    const int n0 = walk.at(t);
    const auto alive = [&](int row) {
      return n0 + row < keys.count && !(kFeatures && features.pads(n0 + row));
    };
    load_rows<C, kD, kKeys, kThreads>(s_k, g_k + n0 * k_s, k_s, d, p.direct_k, alive);
    load_rows<C, kD, kKeys, kThreads>(s_k + kKeys * kD, g_v + n0 * v_s, v_s, d, p.direct_v, alive);
    commit_copies();
  };

  float r_dq[kM][kD / 8][4], r_exact[kM][2] = {};
  clear(r_dq);
  for (int row = static_cast<int>(threadIdx.x); row < Tile::kQueries; row += kThreads) {
    const bool inside = m0 + row < sq;
    s_lse2[row] = inside ? p.g_lse2[statistics + row] : INFINITY;
    s_delta[row] = inside ? p.g_delta[statistics + row] : 0.0f;
  }
  if (walk.count > 0) {
    // What a query that sees no key holds must not be met.
    const auto alive = [&](int row) {
      return m0 + row < sq && p.g_lse2[statistics + row] < INFINITY;
    };
    load_rows<C, kD, Tile::kQueries, kThreads>(
        s_q, rows_of<const T>(in.q, packed, z, head, queries.first + m0), in.q.stride[2], d,
        p.direct_q, alive);
    load_rows<C, kD, Tile::kQueries, kThreads>(
        s_dout, rows_of<const T>(p.dout, packed, z, head, queries.first + m0), p.dout.stride[2], d,
        p.direct_dout, alive);
    load_keys(0);
  }
  for (int t = 0; t < walk.count; ++t) {
    wait_copies<0>();
    __syncthreads();  // this tile is here, and the last one has been read
    if (t + 1 < walk.count) load_keys(t + 1);
    if (!Tile::kAlwaysBusy && m0 + own >= sq) continue;
    const C* s_k = s_stages + t % 2 * Tile::kStage;
    const int n0 = walk.at(t);

    float r_p[kM][kN][4], r_ds[kM][kN][4];
    clear(r_p);
    clear(r_ds);
    multiply_transposed<kD, 4>(r_p, s_q, own, s_k, d);
    multiply_transposed<kD, 4>(r_ds, s_dout, own, s_k + kKeys * kD, d);
    const bool edge = kFeatures || walk.edge(t);
    uint32_t seen = 0;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = m0 + own + at.row(m, 2 * i);
        const float lse2 = s_lse2[row - m0], delta = s_delta[row - m0];
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float s = r_p[m][n][2 * i + j];
            float& ds = r_ds[m][n][2 * i + j];
            const int column = n0 + at.column(n, j);
            float exponent = fmaf(s, p.scale, -lse2);
            if (edge) {
              bool visible = band.sees(row, column);
              if (kFeatures) {
                visible = visible && row < sq && !features.pads(column);
                if (visible) {
                  exponent = features.score(s * p.scale, row, column, band.offset) - lse2;
                }
              }
              if (!visible) exponent = -INFINITY;
            }
            const float probability = exp2_approx(exponent);
            float dp = ds;
            if (kFeatures) {
              if (features.dropout) dp = features.keeps(row, column) ? dp * p.rescale : 0.0f;
              // A hidden key or value may hold NaN.
              if (probability == 0.0f) {
                dp = 0.0f;
              } else {
                seen |= 1u << (2 * n + j);
              }
              r_exact[m][i] += probability * dp;
            }
            ds = probability * (dp - delta);
            // The dp of a hidden key may have overflowed.
            if (edge && probability == 0.0f) ds = 0.0f;
          }
        }
      }
    }
    if constexpr (kFeatures) {
      multiply<kD>(r_dq, r_ds, s_k, 0, d, s_scratch, SeesSome(seen));
    } else {
      multiply<kD>(r_dq, r_ds, s_k, 0, d, s_scratch, SeesAll());
    }
  }

  scale_by(r_dq, in.scale);
  const int first = m0 + own;
  store_rows<kD>(r_dq, 0, s_q + own * kD, g_dq + first * dq_s, dq_s, sq - first, d);
  if constexpr (kFeatures) {
    if (p.g_exact == nullptr) return;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = own + at.row(m, 2 * i);
        float exact = warp_sum<4>(r_exact[m][i]);
        if (at.pair != 0 || m0 + row >= sq) continue;
        if (p.g_dlse != nullptr && p.g_lse2[statistics + row] < INFINITY)
          exact -= p.g_dlse[statistics + row];
        p.g_exact[statistics + row] = exact;
      }
    }
  }
}

template <typename T, typename C, int kD, bool kFeatures>
void launch_dq(const Bwd& p, void* stream) {
  using Tile = DqTile<C, kD, kFeatures>;
  const int64_t tiles = (p.problem.sq + Tile::kQueries - 1) / Tile::kQueries;
  launch(attention_bwd_dq_kernel<T, C, kD, kFeatures>,
         dim3(grid_size(tiles * elements_of(p.problem) * p.problem.h)), dim3(Tile::kThreads),
         Tile::kSharedBytes, stream, p);
}

}  // namespace

void attention_bwd_dq(const Bwd& p, void* stream) {
  if (gradients_for_warpgroups(p.problem)) return attention_bwd_dq_sm90(p, stream);
  visit_gradients(p.problem, [&](auto type, auto tile_type, auto width, auto features) {
    launch_dq<typename decltype(type)::type, typename decltype(tile_type)::type,
              decltype(width)::kValue, decltype(features)::kValue>(p, stream);
  });
}

}  // namespace fastgpt::cuda
