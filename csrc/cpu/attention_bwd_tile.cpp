// One tile of the backward: with p = 2^(s - lse) and dp = v dout^T (times the dropout factor),
// ds = scale * p (dp - delta), delta = rowsum(dout * out) - dlse:
// dv += p^T dout, dk += ds^T q, dq += ds k. Scores are recomputed, held (keys, queries).
//
// Flops: 10 nq nk d for all three gradients. Bytes: k, v and the accumulators once a tile.
// Source: Dao et al. 2022, https://arxiv.org/abs/2205.14135
#include "csrc/common/math.h"
#include "csrc/cpu/attention_bwd.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {
namespace {

// scores -> p (times the dropout factor), dp -> ds.
__attribute__((noinline)) void differentiate(float* scores, float* dp, const float* factor, int nk,
                                             const QueryTile& tile, float scale) {
  const Vec outer = set1(scale);
  for (int j = 0; j < nk; ++j) {
    for (int i = 0; i < tile.lanes; i += kLanes) {
      const int64_t at = int64_t{j} * tile.lanes + i;
      Vec p = exp2_flushed(load(scores + at) - load(tile.lse + i));
      Vec upstream = load(dp + at);
      const Vec weight = p * outer;
      if (factor != nullptr) {
        p = p * load(factor + at);
        upstream = upstream * load(factor + at);
      }
      store(scores + at, p);
      // The dp of a hidden key may have overflowed.
      const Vec ds = weight * (upstream - load(tile.delta + i));
      store(dp + at, select(weight == zero(), zero(), ds));
    }
  }
}

// Pairs need the keys packed; the gradient of a bias, which does without, has floats anyway.
FASTGPT_INLINE bool multiplies_pairs(const Head& head) {
  return uses_pairs(head) && head.packed;
}

// Rows of floats that hold bf16 values, to the pairs of the products. Each matrix of rows has room
// for kQueryTile of them: pairs of rows fill its first half, and the second is free.
void pair_rows(float* rows, int nq, int lanes, int d, float* transposed) {
  const int row = padded(d);
  float* narrow = rows + kQueryTile / 2 * row;  // (nq, row / 2)
  float* copy = transposed;                     // free until the end
  round_column_pairs(rows, nq, row, copy);
  if (nq % 2 != 0) std::memset(rows + nq * row, 0, row * sizeof(float));
  round_row_pairs(rows, pairs_of(nq), row, rows);
  std::memcpy(narrow, copy, sizeof(float) * nq * (row / 2));
  transpose_rows(Rows{narrow, row / 2, 0}, DType::f32, 0, nq, pairs_of(d), transposed, lanes);
}

void pair_query_tile(const QueryTile& tile, int d) {
  pair_rows(tile.q_rows, tile.nq, tile.lanes, d, tile.q_t);
  pair_rows(tile.dout_rows, tile.nq, tile.lanes, d, tile.dout_t);
}

// p and dp of a tile before the derivative of the softmax; see score_gradient.
template <typename Op>
void score_products(const GradHead& g, const QueryTile& tile, const ScoreTile& scores, float* dp,
                    const FloatRows& k, const FloatRows& v) {
  const Head& head = g.head;
  const int vecs = tile.lanes / kLanes, lanes = tile.lanes;
  const int depth = Op::kPaired ? pairs_of(head.d) : head.d;
  tile_product<Op>({scores.nk, vecs, depth, k.data, k.step, 1, tile.q_t, lanes, scores.scores,
                    lanes, Into::kStore, head.scale * kLog2E, nullptr});
  if (has_features(head)) apply_features(head, scores, k, v);
  apply_band(head, scores);
  tile_product<Op>({scores.nk, vecs, depth, v.data, v.step, 1, tile.dout_t, lanes, dp, lanes,
                    Into::kStore, 1.0f, nullptr});
}

}  // namespace

int64_t query_tile_floats(int d) {
  return int64_t{4} * padded(d) * kQueryTile + 2 * kQueryTile;
}

int64_t bwd_scratch(int d) {
  return int64_t{3} * kKeyTile * kQueryTile + 2 * kKeyTile * packed_step(d);
}

QueryTile query_tile(const GradHead& g, int64_t q0, float* buffer) {
  const int64_t block = int64_t{padded(g.head.d)} * kQueryTile;
  QueryTile tile;
  tile.q0 = q0;
  tile.nq = static_cast<int>(clamp(g.head.sq - q0, 0, kQueryTile));
  tile.lanes = padded(tile.nq);
  tile.q_t = buffer;
  tile.dout_t = buffer + block;
  tile.q_rows = buffer + 2 * block;
  tile.dout_rows = buffer + 3 * block;
  tile.lse = buffer + 4 * block;
  tile.delta = tile.lse + kQueryTile;
  return tile;
}

void prepare_query_tile(const GradHead& g, const QueryTile& tile) {
  const Head& head = g.head;
  const int d = head.d, row = padded(d);
  widen_rows(head.q, head.dtype, tile.q0, tile.nq, d, tile.q_rows, row);
  widen_rows(g.dout, head.dtype, tile.q0, tile.nq, d, tile.dout_rows, row);
  for (int i = 0; i < tile.lanes; ++i) {
    tile.lse[i] = kInfinity;
    tile.delta[i] = 0.0f;
    if (i >= tile.nq) continue;
    float* dout = tile.dout_rows + i * row;
    const float lse = g.lse[tile.q0 + i];
    if (lse < kLeastLse) {  // nothing of it may reach a sum, NaN included
      std::memset(tile.q_rows + i * row, 0, row * sizeof(float));
      std::memset(dout, 0, row * sizeof(float));
      continue;
    }
    const char* out = row_at(g.out, head.dtype, tile.q0 + i);
    const char* lo = g.lo.data == nullptr ? nullptr : row_at(g.lo, head.dtype, tile.q0 + i);
    Vec sum = zero();
    for (int c = 0; c < d; c += kLanes) {
      const int n = d - c < kLanes ? d - c : kLanes;
      Vec whole = load_as(head.dtype, out, c, n);
      if (lo != nullptr) whole = whole + load_as(head.dtype, lo, c, n);
      sum = fma(load(dout + c), whole, sum);
    }
    tile.lse[i] = lse * kLog2E;
    tile.delta[i] = reduce_add(sum) - (g.dlse == nullptr ? 0.0f : g.dlse[tile.q0 + i]);
  }
  if (multiplies_pairs(head)) return pair_query_tile(tile, d);
  const Rows q = {tile.q_rows, row, 0}, dout = {tile.dout_rows, row, 0};
  transpose_rows(q, DType::f32, 0, tile.nq, d, tile.q_t, tile.lanes);
  transpose_rows(dout, DType::f32, 0, tile.nq, d, tile.dout_t, tile.lanes);
}

TileGradient score_gradient(const GradHead& g, const QueryTile& tile, KeyRange keys, float outer,
                            float* scratch) {
  const Head& head = g.head;
  const int d = head.d, lanes = tile.lanes;
  const int nk = static_cast<int>(keys.end - keys.begin);
  float* p = scratch;
  float* ds = p + kKeyTile * kQueryTile;
  float* factor = ds + kKeyTile * kQueryTile;
  float* k_copy = factor + kKeyTile * kQueryTile;
  float* v_copy = k_copy + kKeyTile * packed_step(d);
  const ScoreTile scores = {p, lanes, tile.q0, tile.nq, keys.begin, nk};
  const FloatRows k = key_rows(head, head.k, keys.begin, nk, k_copy);
  const FloatRows v = key_rows(head, head.v, keys.begin, nk, v_copy);

  multiplies_pairs(head) ? score_products<Pairs>(g, tile, scores, ds, k, v)
                         : score_products<Floats>(g, tile, scores, ds, k, v);
  if (head.dropout.on) dropout_factors(head, scores, head.dropout.scale, factor);
  differentiate(p, ds, head.dropout.on ? factor : nullptr, nk, tile, outer);
  return TileGradient{p, ds, k};
}

void backward_tile(const GradHead& g, const QueryTile& tile, KeyRange keys, float* dk, float* dv,
                   float* dq_t, float* scratch) {
  const int d = g.head.d, row = padded(d), lanes = tile.lanes;
  const int nk = static_cast<int>(keys.end - keys.begin);
  const TileGradient t = score_gradient(g, tile, keys, g.head.scale, scratch);
  if (multiplies_pairs(g.head)) {
    float* ds_pairs = scratch + 2 * kKeyTile * kQueryTile;  // the dropout factors are used up
    if (dq_t != nullptr) {
      round_row_pairs(t.ds, nk / 2, lanes, ds_pairs);
      const Rows& k = g.head.k_pairs;
      const float* at = static_cast<const float*>(k.data) + keys.begin / 2 * k.stride;
      tile_product<Pairs>({d, lanes / kLanes, nk / 2, at, 1, k.stride, ds_pairs, lanes, dq_t, lanes,
                           Into::kAdd, 1.0f, nullptr});
    }
    if (dk != nullptr) {
      round_column_pairs(t.p, nk, lanes, t.p);
      round_column_pairs(t.ds, nk, lanes, t.ds);
      tile_product<Pairs>({nk, row / kLanes, pairs_of(tile.nq), t.p, lanes / 2, 1, tile.dout_rows,
                           row, dv, row, Into::kAdd, 1.0f, nullptr});
      tile_product<Pairs>({nk, row / kLanes, pairs_of(tile.nq), t.ds, lanes / 2, 1, tile.q_rows,
                           row, dk, row, Into::kAdd, 1.0f, nullptr});
    }
    return;
  }
  if (dk != nullptr) {
    tile_product<Floats>({nk, row / kLanes, tile.nq, t.p, lanes, 1, tile.dout_rows, row, dv, row,
                          Into::kAdd, 1.0f, nullptr});
    tile_product<Floats>({nk, row / kLanes, tile.nq, t.ds, lanes, 1, tile.q_rows, row, dk, row,
                          Into::kAdd, 1.0f, nullptr});
  }
  if (dq_t != nullptr) {
    tile_product<Floats>({d, lanes / kLanes, nk, t.k.data, 1, t.k.step, t.ds, lanes, dq_t, lanes,
                          Into::kAdd, 1.0f, nullptr});
  }
}

KeyRange tile_keys(const Head& head, KeyRange keys) {
  return multiplies_pairs(head) ? whole_pairs(keys) : keys;
}

void pack_unit(const Head& head, KeyRange keys, const UnitKeys& to) {
  const int64_t step = packed_step(head.d), at = keys.begin * step;
  if (!uses_pairs(head)) {
    const int n = static_cast<int>(keys.end - keys.begin);
    pack_keys(head, head.k, keys.begin, n, to.k + at);
    pack_keys(head, head.v, keys.begin, n, to.v + at);
    return;
  }
  const KeyRange whole = whole_pairs(keys);
  pack_key_row_pairs(head, head.k, whole, keys, to.k + at, step);
  pack_key_row_pairs(head, head.v, whole, keys, to.v + at, step);
  interleave_rows({to.k + at, 2 * step, 0}, 0, static_cast<int>(whole.end - whole.begin), head.d,
                  to.k_pairs + at / 2, step);
}

void use_packed(Head& head, const UnitKeys& keys) {
  head.packed = true;
  head.kv_dtype = DType::f32;
  head.k = Rows{keys.k, packed_step(head.d), 0};
  head.v = Rows{keys.v, packed_step(head.d), 0};
  head.k_pairs = Rows{keys.k_pairs, packed_step(head.d), 0};
}

void store_dq(const GradHead& g, const QueryTile& tile, const float* dq_t) {
  float ones[kQueryTile];
  for (int i = 0; i < tile.lanes; ++i) ones[i] = 1.0f;
  untranspose_rows(dq_t, tile.lanes, ones, g.dq, Rows{}, g.head.dtype, tile.q0, tile.nq, g.head.d);
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
