// dq, dk, dv and dbias of dense and banded attention; the formulas are in attention_bwd_tile.cpp,
// the parallel plans in attention_bwd.h. Memory: dk and dv of one unit in float a thread, or the
// operands of every query tile when the tiles are split; both linear in s. No atomics.
// Flops: 10 sq sk d a head (14 split), half of it causal, 10 sq window d banded.
#include "csrc/cpu/attention_bwd.h"

#include "csrc/common/math.h"
#include "csrc/cpu/attention_dense.h"
#include "csrc/cpu/kernels.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {
namespace {

GradHead dense_grad_head(const AttentionBwd& p, int64_t b, int64_t h) {
  const int64_t first_row = (b * p.in.q.size[1] + h) * p.in.q.size[2];
  GradHead g;
  g.head = dense_head(p.in, b, h);
  g.dout = head_rows(p.dout, b, h);
  g.out = head_rows(p.out, b, h);
  g.lo = head_rows(p.out_lo, b, h);
  g.dq = head_rows(p.dq, b, h);
  g.lse = static_cast<const float*>(p.lse.data) + first_row;
  g.dlse = p.dlse ? static_cast<const float*>(p.dlse.data) + first_row : nullptr;
  return g;
}

struct Dense {
  const AttentionBwd& p;

  int d() const { return static_cast<int>(p.in.q.size[3]); }
  int64_t group() const { return p.in.q.size[1] / p.in.k.size[1]; }
  int64_t units() const { return p.in.k.size[0] * p.in.k.size[1]; }
  int64_t longest_keys() const { return p.in.k.size[2]; }
  int64_t cost(int64_t) const { return 1; }
  GradHead head(int64_t unit, int64_t h) const {
    const int64_t hk = p.in.k.size[1];
    return dense_grad_head(p, unit / hk, unit % hk * group() + h);
  }
  Rows dk(int64_t unit) const { return rows(p.dk, unit); }
  Rows dv(int64_t unit) const { return rows(p.dv, unit); }
  Rows rows(const TensorRef& t, int64_t unit) const {
    return head_rows(t, unit / t.size[1], unit % t.size[1]);
  }
};

// Adds the tile's ds (keys, lanes) to sums (rows|1, sk|1), whose first row is query `first`. In
// double: broadcast axes may add up millions of terms.
void add_bias_tile(const float* ds, const ScoreTile& tile, const TensorRef& dbias, int64_t first,
                   double* sums) {
  const int64_t row = dbias.size[2] == 1 ? 0 : dbias.size[3];
  const int64_t column = dbias.size[3] == 1 ? 0 : 1;
  for (int i = 0; i < tile.nq; ++i) {
    for (int j = 0; j < tile.nk; ++j) {
      sums[(tile.q0 + i - first) * row + (tile.k0 + j) * column] += ds[j * tile.lanes + i];
    }
  }
}

}  // namespace

void bias_gradient(const AttentionBwd& p) {
  const TensorRef& dbias = p.dbias;
  const int64_t b = p.in.q.size[0], h = p.in.q.size[1], sq = p.in.q.size[2];
  const int64_t row_tiles = dbias.size[2] == 1 ? 1 : ceil_div(sq, kQueryTile);
  const int64_t items = dbias.size[0] * dbias.size[1] * row_tiles;
  const int d = static_cast<int>(p.in.q.size[3]);
  const int workers = worker_count(items);
  const int64_t each = query_tile_floats(d) + bwd_scratch(d);
  const int64_t owned = (dbias.size[2] == 1 ? 1 : kQueryTile) * dbias.size[3];
  const WorkerScratch memory(workers, each * sizeof(float));
  const WorkerScratch all_sums(workers, owned * sizeof(double));
  parallel_items(items, workers, [&](int64_t item, int worker) {
    float* scratch = memory.of(worker);
    const int64_t row_tile = item % row_tiles, plane = item / row_tiles;
    const int64_t bias_b = plane / dbias.size[1], bias_h = plane % dbias.size[1];
    const int64_t first = row_tile * kQueryTile;
    const int64_t last = dbias.size[2] == 1 ? sq : clamp(first + kQueryTile, 0, sq);
    double* sums = all_sums.of<double>(worker);
    for (int64_t i = 0; i < owned; ++i) sums[i] = 0.0;
    for (int64_t at_b = 0; at_b < b; ++at_b) {
      if (dbias.size[0] != 1 && at_b != bias_b) continue;
      for (int64_t at_h = 0; at_h < h; ++at_h) {
        if (dbias.size[1] != 1 && at_h != bias_h) continue;
        GradHead g = dense_grad_head(p, at_b, at_h);
        for (int64_t q0 = first; q0 < last; q0 += kQueryTile) {
          const QueryTile tile = query_tile(g, q0, scratch + bwd_scratch(d));
          prepare_query_tile(g, tile);
          const KeyRange seen = keys_of_queries(g.head, q0, q0 + tile.nq - 1);
          for (int64_t block = seen.begin / kKeyTile; block * kKeyTile < seen.end; ++block) {
            const KeyRange keys = keys_of_block(g.head, q0, tile.nq, block);
            if (keys.begin >= keys.end) continue;
            const int nk = static_cast<int>(keys.end - keys.begin);
            const float* ds = score_gradient(g, tile, keys, 1.0f, scratch).ds;
            add_bias_tile(ds, {nullptr, tile.lanes, q0, tile.nq, keys.begin, nk}, dbias, first,
                          sums);
          }
        }
      }
    }
    float* to = static_cast<float*>(dbias.data) + bias_b * dbias.stride[0] +
                bias_h * dbias.stride[1] + first * dbias.stride[2];
    const int64_t rows = dbias.size[2] == 1 ? 1 : last - first;
    for (int64_t i = 0; i < rows * dbias.size[3]; ++i) to[i] = static_cast<float>(sums[i]);
  });
}

void attention_bwd_kernel(const AttentionBwd& p) {
  backward(Dense{p});
  if (p.dbias) bias_gradient(p);
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
