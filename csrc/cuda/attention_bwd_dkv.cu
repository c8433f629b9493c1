// dk and dv of attention, dense or packed. A block takes kWarps * kM * 16 keys and walks the query
// heads that share them and the tiles of kQueries queries that see them; the tile of scores is
// (keys, queries), so that P^T and dS^T stay in registers. While a tile is computed the next one is
// copied. Nothing is added by two blocks. 8 d flops per visible pair; reads q and dout once for
// each tile of keys, as far as they are not in the L2 cache.
#include "csrc/cuda/attention_bwd.cuh"

namespace fastgpt::cuda {
namespace {

template <typename C, int kD, bool kFeatures>
struct DkvTile {
  static constexpr bool kTensorCores = sizeof(C) == 2;
  static constexpr int kWarps = !kTensorCores && kD > 128 ? 2 : 4;
  static constexpr int kM = kTensorCores && kD <= 64 && !kFeatures ? 2 : 1;  // of 16 keys, a warp
  static constexpr int kQueries = !kTensorCores || kFeatures || kM == 2 ? 16 : 32;
  // Warps without rows compute nothing, where the test costs no register that is needed.
  static constexpr bool kAlwaysBusy = kTensorCores && !kFeatures;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kKeys = kWarps * kM * 16;
  static constexpr int kColumns = kD <= 128 ? kD : 128;  // of dk and dv, that a block computes
  static constexpr int kParts = kD / kColumns;
  static constexpr int kScratch = kWarps * kScratchFloats<C, kM, kQueries / 8>;
  static constexpr int kStage = 2 * kQueries * kD;  // q and dout
  static constexpr int kSharedBytes =
      (2 * kKeys * kD + 2 * kStage) * static_cast<int>(sizeof(C)) + (4 * kQueries + kScratch) * 4;
};

template <typename T, typename C, int kD, bool kFeatures>
__global__ void __launch_bounds__(DkvTile<C, kD, kFeatures>::kThreads)
    attention_bwd_dkv_kernel(Bwd p) {
  using Tile = DkvTile<C, kD, kFeatures>;
  constexpr int kM = Tile::kM, kQueries = Tile::kQueries, kN = kQueries / 8;
  constexpr int kThreads = Tile::kThreads;
  FASTGPT_DYNAMIC_SHARED(shared);
  C* s_k = reinterpret_cast<C*>(shared);
  C* s_v = s_k + Tile::kKeys * kD;
  C* s_stages = s_v + Tile::kKeys * kD;
  float* s_statistics = reinterpret_cast<float*>(s_stages + 2 * Tile::kStage);  // lse2 and delta
  const Lane at;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, own = warp * kM * 16;
  float* s_scratch = s_statistics + 4 * kQueries + warp * kScratchFloats<C, kM, kN>;

  const AttentionProblem& problem = p.problem;
  const AttentionInputs& in = problem.in;
  const bool packed = problem.g_cu_seqlens_q != nullptr;
  const int d = problem.d, hk = problem.hk, group = problem.h / hk;
  const int tiles = (problem.sk + Tile::kKeys - 1) / Tile::kKeys;
  const int heads = static_cast<int>(gridDim.x) / (tiles * Tile::kParts);
  // The first keys are seen by the most queries.
  const Place place = place_of(tiles, heads * Tile::kParts, problem.sq, d, problem.window > 0);
  const int first_column = place.y % Tile::kParts * (Tile::kColumns / 8);
  const int z = place.y / Tile::kParts / hk, key_head = place.y / Tile::kParts % hk;
  const int n0 = place.tile * Tile::kKeys;

  const Sequence keys = sequence_of(problem.g_cu_seqlens_k, z, problem.b, in.k.size[2], problem.sk);
  T* g_dk = rows_of<T>(p.dk, packed, z, key_head, keys.first);
  T* g_dv = rows_of<T>(p.dv, packed, z, key_head, keys.first);
  const int64_t dk_s = p.dk.stride[2], dv_s = p.dv.stride[2];
  if (z == problem.b) {  // tokens that no document has
    for (int first = n0; first < keys.count; first += tiles * Tile::kKeys) {
      const int count = min(keys.count - first, Tile::kKeys);
      clear_rows(g_dk + first * dk_s, dk_s, count, d);
      clear_rows(g_dv + first * dv_s, dv_s, count, d);
    }
    return;
  }
  if (n0 >= keys.count) return;
  const Sequence queries =
      sequence_of(problem.g_cu_seqlens_q, z, problem.b, in.q.size[2], problem.sq);
  const int sq = queries.count;
  const int64_t q_s = in.q.stride[2], dout_s = p.dout.stride[2];
  const T* g_k = rows_of<const T>(in.k, packed, z, key_head, keys.first + n0);
  const T* g_v = rows_of<const T>(in.v, packed, z, key_head, keys.first + n0);

  const Band band(problem, sq, keys.count);
  Features features;
  if (kFeatures) features = Features(in, z, problem.h, key_head * group);
  const Walk walk = band.queries(n0, min(n0 + Tile::kKeys, keys.count), sq, kQueries,
                                 kFeatures && features.selective());
  const auto load_queries = [&](int step) {
    C* s_q = s_stages + step % 2 * Tile::kStage;
    const int head = key_head * group + step / walk.count, m0 = walk.at(step % walk.count);
    const int64_t statistics = statistics_at(problem, z, head, queries.first) + m0;
    // What a query that sees no key holds must not be met.
    const auto alive = [&](int row) {
      return m0 + row < sq && band.sees_any(m0 + row) &&
             !(kFeatures && p.g_lse2[statistics + row] == INFINITY);
    };
    load_rows<C, kD, kQueries, kThreads>(
        s_q, rows_of<const T>(in.q, packed, z, head, queries.first) + m0 * q_s, q_s, d, p.direct_q,
        alive);
    load_rows<C, kD, kQueries, kThreads>(
        s_q + kQueries * kD, rows_of<const T>(p.dout, packed, z, head, queries.first) + m0 * dout_s,
        dout_s, d, p.direct_dout, alive);
    commit_copies();
    float* s_lse2 = s_statistics + step % 2 * 2 * kQueries;
    for (int row = static_cast<int>(threadIdx.x); row < kQueries; row += kThreads) {
      const bool inside = m0 + row < sq;
      s_lse2[row] = inside ? p.g_lse2[statistics + row] : INFINITY;
      s_lse2[kQueries + row] = inside ? p.g_delta[statistics + row] : 0.0f;
    }
  };

  float r_dk[kM][Tile::kColumns / 8][4], r_dv[kM][Tile::kColumns / 8][4];
  clear(r_dk);
  clear(r_dv);
  const int steps = walk.count * group;
  if (steps > 0) {
    const auto alive = [&](int row) {
      return n0 + row < keys.count && !(kFeatures && features.pads(n0 + row));
    };
    load_rows<C, kD, Tile::kKeys, kThreads>(s_k, g_k, in.k.stride[2], d, p.direct_k, alive);
    load_rows<C, kD, Tile::kKeys, kThreads>(s_v, g_v, in.v.stride[2], d, p.direct_v, alive);
    load_queries(0);
  }
  for (int step = 0; step < steps; ++step) {
    wait_copies<0>();
    __syncthreads();  // this tile is here, and the last one has been read
    if (step + 1 < steps) load_queries(step + 1);
    if (!Tile::kAlwaysBusy && n0 + own >= keys.count) continue;
    const C* s_q = s_stages + step % 2 * Tile::kStage;
    const C* s_dout = s_q + kQueries * kD;
    const float* s_lse2 = s_statistics + step % 2 * 2 * kQueries;
    const int m0 = walk.at(step % walk.count);
    if (kFeatures && step % walk.count == 0) {
      features = Features(in, z, problem.h, key_head * group + step / walk.count);
    }

    float r_p[kM][kN][4], r_ds[kM][kN][4];
    clear(r_p);
    clear(r_ds);
    multiply_transposed<kD>(r_p, s_k, own, s_q, d);
    multiply_transposed<kD>(r_ds, s_v, own, s_dout, d);
    const bool edge = kFeatures || walk.edge(step % walk.count);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = m0 + at.column(n, j);
        const float lse2 = s_lse2[at.column(n, j)], delta = s_lse2[kQueries + at.column(n, j)];
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& p_or_s = r_p[m][n][2 * i + j];
            float& dp_or_ds = r_ds[m][n][2 * i + j];
            const int column = n0 + own + at.row(m, 2 * i);
            float exponent = fmaf(p_or_s, p.scale, -lse2);
            if (edge) {
              bool visible = band.sees(row, column);
              if (kFeatures) {
                visible = visible && row < sq && !features.pads(column);
                if (visible) {
                  exponent = features.score(p_or_s * p.scale, row, column, band.offset) - lse2;
                }
              }
              if (!visible) exponent = -INFINITY;
            }
            float probability = exp2_approx(exponent), dp = dp_or_ds, kept = probability;
            if (kFeatures && features.dropout) {
              const bool keep = features.keeps(row, column);
              kept = keep ? probability : 0.0f;
              dp = keep ? dp * p.rescale : 0.0f;
            }
            p_or_s = kept;
            dp_or_ds = probability * (dp - delta);
            // A hidden key or value may hold NaN, and its dp may have overflowed.
            if (edge && probability == 0.0f) dp_or_ds = 0.0f;
          }
        }
      }
    }
    multiply<kD>(r_dv, r_p, s_dout, first_column, d, s_scratch, SeesAll());
    multiply<kD>(r_dk, r_ds, s_q, first_column, d, s_scratch, SeesAll());
  }

  scale_by(r_dk, in.scale);
  scale_by(r_dv, p.rescale);
  const int first = n0 + own, count = keys.count - first;
  store_rows<kD>(r_dk, first_column, s_k + own * kD, g_dk + first * dk_s, dk_s, count, d);
  store_rows<kD>(r_dv, first_column, s_v + own * kD, g_dv + first * dv_s, dv_s, count, d);
}

template <typename T, typename C, int kD, bool kFeatures>
void launch_dkv(const Bwd& p, void* stream) {
  using Tile = DkvTile<C, kD, kFeatures>;
  const int64_t tiles = (p.problem.sk + Tile::kKeys - 1) / Tile::kKeys;
  launch(attention_bwd_dkv_kernel<T, C, kD, kFeatures>,
         dim3(grid_size(tiles * elements_of(p.problem) * p.problem.hk * Tile::kParts)),
         dim3(Tile::kThreads), Tile::kSharedBytes, stream, p);
}

}  // namespace

void attention_bwd_dkv(const Bwd& p, void* stream) {
  if (p.problem.sk == 0) return;
  if (gradients_for_warpgroups(p.problem)) return attention_bwd_dkv_sm90(p, stream);
  visit_gradients(p.problem, [&](auto type, auto tile_type, auto width, auto features) {
    launch_dkv<typename decltype(type)::type, typename decltype(tile_type)::type,
               decltype(width)::kValue, decltype(features)::kValue>(p, stream);
  });
}

}  // namespace fastgpt::cuda
