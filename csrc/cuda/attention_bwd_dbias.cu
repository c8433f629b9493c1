// dbias = dS, summed over the axes along which the bias is broadcast. A block takes one tile of
// scores and walks the elements of the batch and the heads that share a bias. A tile of a bias
// without rows (or without columns) is summed to one row (or column), and these partial sums are
// added by a second kernel, tile after tile: no order is left to chance. 4 d flops a score of the
// tiles that the band meets.
#include "csrc/cuda/attention_bwd.cuh"

namespace fastgpt::cuda {
namespace {

template <typename C, int kD>
struct DbiasTile {
  static constexpr int kWarps = sizeof(C) == 4 && kD > 128 ? 2 : 4;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kQueries = kWarps * 16, kKeys = 32;
  static constexpr int kSharedBytes =
      2 * (kQueries + kKeys) * kD * static_cast<int>(sizeof(C)) + kWarps * kKeys * 4;
};

// The tiles of a bias, and where their sums go: (counts of b and h, rows, columns).
struct Dbias {
  Bwd bwd;
  int count_b, count_h;
  bool of_rows, of_columns;
  int m_tiles, n_tiles;
  float* g_partial;

  __host__ __device__ int64_t rows() const { return of_rows ? bwd.problem.sq : m_tiles; }
  __host__ __device__ int64_t columns() const { return of_columns ? bwd.problem.sk : n_tiles; }
};

template <typename T, typename C, int kD>
__global__ void __launch_bounds__(DbiasTile<C, kD>::kThreads) attention_bwd_dbias_kernel(Dbias p) {
  using Tile = DbiasTile<C, kD>;
  constexpr int kN = Tile::kKeys / 8, kThreads = Tile::kThreads;
  FASTGPT_DYNAMIC_SHARED(shared);
  C* s_q = reinterpret_cast<C*>(shared);
  C* s_dout = s_q + Tile::kQueries * kD;
  C* s_k = s_dout + Tile::kQueries * kD;
  C* s_v = s_k + Tile::kKeys * kD;
  float* s_sums = reinterpret_cast<float*>(s_v + Tile::kKeys * kD);
  const Lane at;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, own = warp * 16;

  const AttentionProblem& problem = p.bwd.problem;
  const AttentionInputs& in = problem.in;
  const int d = problem.d, h = problem.h, sq = problem.sq, sk = problem.sk;
  const int n_tile = static_cast<int>(blockIdx.x) % p.n_tiles;
  const int m_tile = static_cast<int>(blockIdx.x) / p.n_tiles % p.m_tiles;
  const int shared_by = static_cast<int>(blockIdx.x) / p.n_tiles / p.m_tiles;
  const int m0 = m_tile * Tile::kQueries, n0 = n_tile * Tile::kKeys;
  const Band band(problem, sq, sk);
  const Walk walk = band.keys(m0, min(m0 + Tile::kQueries, sq), Tile::kKeys, true);

  float r_total[1][kN][4];
  clear(r_total);
  // Elements and heads that share this bias: all if it has one, else one.
  const int heads = h / p.count_h;
  const int members = n0 >= walk.first && n0 < walk.first + walk.count * Tile::kKeys
                          ? problem.b / p.count_b * heads
                          : 0;
  for (int member = 0; member < members; ++member) {
    const int z = shared_by / p.count_h + member / heads;
    const int head = shared_by % p.count_h + member % heads, key_head = head / (h / problem.hk);
    const Features features(in, z, h, head);
    const int64_t statistics = statistics_at(problem, z, head, m0);
    const auto some = [&](int row) {
      return m0 + row < sq && p.bwd.g_lse2[statistics + row] < INFINITY;
    };
    const auto alive = [&](int row) { return n0 + row < sk && !features.pads(n0 + row); };
    __syncthreads();  // the last tiles have been read
    load_rows<C, kD, Tile::kQueries, kThreads>(s_q, rows_of<const T>(in.q, false, z, head, m0),
                                               in.q.stride[2], d, p.bwd.direct_q, some);
    load_rows<C, kD, Tile::kQueries, kThreads>(s_dout,
                                               rows_of<const T>(p.bwd.dout, false, z, head, m0),
                                               p.bwd.dout.stride[2], d, p.bwd.direct_dout, some);
    load_rows<C, kD, Tile::kKeys, kThreads>(s_k, rows_of<const T>(in.k, false, z, key_head, n0),
                                            in.k.stride[2], d, p.bwd.direct_k, alive);
    load_rows<C, kD, Tile::kKeys, kThreads>(s_v, rows_of<const T>(in.v, false, z, key_head, n0),
                                            in.v.stride[2], d, p.bwd.direct_v, alive);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    float r_s[1][kN][4], r_dp[1][kN][4];
    clear(r_s);
    clear(r_dp);
    multiply_transposed<kD>(r_s, s_q, own, s_k, d);
    multiply_transposed<kD>(r_dp, s_dout, own, s_v, d);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = own + at.row(0, 2 * i);
      if (!some(row)) continue;
      const float lse2 = p.bwd.g_lse2[statistics + row], delta = p.bwd.g_exact[statistics + row];
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int column = n0 + at.column(n, j);
          if (!band.sees(m0 + row, column) || features.pads(column)) continue;
          const float score =
              features.score(r_s[0][n][2 * i + j] * p.bwd.scale, m0 + row, column, band.offset);
          const float probability = exp2_approx(score - lse2);
          if (probability == 0.0f) continue;  // a hidden key or value may hold NaN
          float dp = r_dp[0][n][2 * i + j];
          if (features.dropout) dp = features.keeps(m0 + row, column) ? dp * p.bwd.rescale : 0.0f;
          r_total[0][n][2 * i + j] += probability * (dp - delta);
        }
      }
    }
  }

  float* g_partial = p.g_partial + shared_by * p.rows() * p.columns();
  if (p.of_rows) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = m0 + own + at.row(0, 2 * i);
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int column = n0 + at.column(n, j);
          sum += r_total[0][n][2 * i + j];
          if (p.of_columns && row < sq && column < sk) {
            g_partial[row * p.columns() + column] = r_total[0][n][2 * i + j];
          }
        }
      }
      sum = warp_sum<4>(sum);
      if (!p.of_columns && row < sq && at.pair == 0) g_partial[row * p.columns() + n_tile] = sum;
    }
    return;
  }
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float sum = r_total[0][n][j] + r_total[0][n][2 + j];
#pragma unroll
      for (int offset = 4; offset < kWarp; offset *= 2) {
        sum += __shfl_xor_sync(kFullWarp, sum, offset);
      }
      if (at.group == 0) s_sums[warp * Tile::kKeys + at.column(n, j)] = sum;
    }
  }
  __syncthreads();
  if (warp > 0) return;
  static_assert(Tile::kKeys == kWarp, "a lane for each column");
  float sum = 0.0f;
  for (int i = 0; i < Tile::kWarps; ++i) sum += s_sums[i * Tile::kKeys + at.lane];
  if (p.of_columns) {
    if (n0 + at.lane < sk) g_partial[m_tile * p.columns() + n0 + at.lane] = sum;
    return;
  }
  sum = warp_sum(sum);
  if (at.lane == 0) g_partial[m_tile * p.columns() + n_tile] = sum;
}

// g_dbias (n / inner, inner) = the sum over the middle axis of g_partial (n / inner, count, inner).
__global__ void attention_bwd_dbias_sum_kernel(const float* g_partial, float* g_dbias, int64_t n,
                                               int64_t count, int64_t inner) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i >= n) return;
  g_partial += i / inner * count * inner + i % inner;
  float sum = 0.0f;
  for (int64_t k = 0; k < count; ++k) sum += g_partial[k * inner];
  g_dbias[i] = sum;
}

template <typename C, int kD>
void plan(Dbias& p) {
  using Tile = DbiasTile<C, kD>;
  p.m_tiles = (p.bwd.problem.sq + Tile::kQueries - 1) / Tile::kQueries;
  p.n_tiles = (p.bwd.problem.sk + Tile::kKeys - 1) / Tile::kKeys;
}

Dbias plan_of(const Bwd& bwd, const TensorRef& dbias) {
  const auto size = [&](int i) { return static_cast<int>(dbias.size[i]); };
  Dbias p{bwd, size(0), size(1), size(2) != 1, size(3) != 1, 0, 0, nullptr};
  visit_feature_gradients(bwd.problem, [&](auto, auto tile_type, auto width, auto) {
    plan<typename decltype(tile_type)::type, decltype(width)::kValue>(p);
  });
  return p;
}

bool is_whole(const Dbias& p) {
  return p.of_rows && p.of_columns;
}

template <typename T, typename C, int kD>
void launch_dbias(const Dbias& p, void* stream) {
  using Tile = DbiasTile<C, kD>;
  const int64_t tiles = static_cast<int64_t>(p.m_tiles) * p.n_tiles;
  launch(attention_bwd_dbias_kernel<T, C, kD>, dim3(grid_size(tiles * p.count_b * p.count_h)),
         dim3(Tile::kThreads), Tile::kSharedBytes, stream, p);
}

}  // namespace

int64_t attention_bwd_dbias_workspace(const AttentionProblem& problem, const TensorRef& dbias) {
  Bwd bwd{};
  bwd.problem = problem;
  const Dbias p = plan_of(bwd, dbias);
  return is_whole(p) ? 0 : p.count_b * p.count_h * p.rows() * p.columns();
}

void attention_bwd_dbias(const Bwd& bwd, const TensorRef& dbias, float* workspace, void* stream) {
  Dbias p = plan_of(bwd, dbias);
  float* g_dbias = static_cast<float*>(dbias.data);
  p.g_partial = is_whole(p) ? g_dbias : workspace;
  if (p.m_tiles > 0 && p.n_tiles > 0) {
    visit_feature_gradients(bwd.problem, [&](auto type, auto tile_type, auto width, auto) {
      launch_dbias<typename decltype(type)::type, typename decltype(tile_type)::type,
                   decltype(width)::kValue>(p, stream);
    });
  }
  if (is_whole(p)) return;
  const int64_t inner = p.of_columns ? p.columns() : 1;
  const int64_t n = p.count_b * p.count_h * (p.of_rows ? p.rows() : 1) * inner;
  const int64_t count = (p.of_rows ? 1 : p.m_tiles) * int64_t{p.of_columns ? 1 : p.n_tiles};
  constexpr int kThreads = 128;
  if (n == 0) return;
  launch(attention_bwd_dbias_sum_kernel, dim3(grid_size((n + kThreads - 1) / kThreads)),
         dim3(kThreads), 0, stream, p.g_partial, g_dbias, n, count, inner);
}

}  // namespace fastgpt::cuda
