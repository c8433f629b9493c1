// One tile of the backward: with p = 2^(s - lse) and dp = v dout^T (times the dropout factor),
// ds = scale * p (dp - delta), delta = rowsum(dout * out) - dlse:
// dv += p^T dout, dk += ds^T q, dq += ds k. Scores are recomputed, held (keys, queries).
//
// Flops: 10 nq nk d for all three gradients. Bytes: k, v and the accumulators once a tile.
// Source: Dao et al. 2022, https://arxiv.org/abs/2205.14135
#include "csrc/common/math.h"
#include "csrc/cpu/attention_bwd.h"
#include "csrc/cpu/tile_gemm.h"

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
      Vec p = exp2(load(scores + at) - load(tile.lse + i));
      Vec upstream = load(dp + at);
      const Vec weight = p * outer;
      if (factor != nullptr) {
        p = p * load(factor + at);
        upstream = upstream * load(factor + at);
      }
      store(scores + at, p);
      store(dp + at, weight * (upstream - load(tile.delta + i)));
    }
  }
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
    tile.lse[i] = __builtin_inff();
    tile.delta[i] = 0.0f;
    if (i >= tile.nq) continue;
    float* dout = tile.dout_rows + i * row;
    const float lse = g.lse[tile.q0 + i];
    if (lse == -__builtin_inff()) {  // sees no key: nothing of it may reach a sum, NaN included
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

  tile_product<Floats>({nk, lanes / kLanes, d, k.data, k.step, 1, tile.q_t, lanes, p, lanes,
                        Into::kStore, head.scale * kLog2E, nullptr});
  if (has_features(head)) apply_features(head, scores, k, v);
  apply_band(head, scores);
  tile_product<Floats>({nk, lanes / kLanes, d, v.data, v.step, 1, tile.dout_t, lanes, ds, lanes,
                        Into::kStore, 1.0f, nullptr});
  if (head.dropout.on) dropout_factors(head, scores, factor);
  differentiate(p, ds, head.dropout.on ? factor : nullptr, nk, tile, outer);
  return TileGradient{p, ds, k};
}

void backward_tile(const GradHead& g, const QueryTile& tile, KeyRange keys, float* dk, float* dv,
                   float* dq_t, float* scratch) {
  const int d = g.head.d, row = padded(d), lanes = tile.lanes;
  const int nk = static_cast<int>(keys.end - keys.begin);
  const TileGradient t = score_gradient(g, tile, keys, g.head.scale, scratch);
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

void pack_unit(const Head& head, float* k, float* v) {
  pack_keys(head, head.k, 0, static_cast<int>(head.sk), k);
  pack_keys(head, head.v, 0, static_cast<int>(head.sk), v);
}

void use_packed(Head& head, float* k, float* v) {
  head.packed = true;
  head.kv_dtype = DType::f32;
  head.k = Rows{k, packed_step(head.d), 0};
  head.v = Rows{v, packed_step(head.d), 0};
}

void store_dq(const GradHead& g, const QueryTile& tile, const float* dq_t) {
  float ones[kQueryTile];
  for (int i = 0; i < tile.lanes; ++i) ones[i] = 1.0f;
  untranspose_rows(dq_t, tile.lanes, ones, g.dq, Rows{}, g.head.dtype, tile.q0, tile.nq, g.head.d);
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
