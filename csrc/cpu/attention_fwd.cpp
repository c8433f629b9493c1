// out = softmax(scale * q k^T + ..., visible keys) v with the online softmax, a tile of queries
// against tiles of keys: m = max(m, s), p = 2^(s - m), l = l 2^(m' - m) + sum(p),
// o = o 2^(m' - m) + p v, and at the end out = o / l, lse = m + log(l).
// What dropout keeps is scaled there: 1 / (1 - dropout_p) p, rounded, is not the backward's.
//
// Plan: a dynamic queue over (batch, head, some 200 queries), long rows first; the tiles of an item
// share each load of k and v. Key tiles lie at multiples of their size, cut to what a query tile
// sees, and are visited in ascending order, so no bit depends on the batch, on threads or on the
// grouping. Memory: a few tiles a thread, nothing of size sk.
// Flops: 4 sq sk d a head, half of it causal, 4 sq window d banded. Bytes: k and v once an item.
// Source: Dao et al. 2022, https://arxiv.org/abs/2205.14135; Dao 2023, arXiv:2307.08691.
#include "csrc/cpu/attention_fwd.h"

#include "csrc/common/math.h"
#include "csrc/cpu/attention_dense.h"
#include "csrc/cpu/attention_pairs.h"
#include "csrc/cpu/kernels.h"
#include "csrc/cpu/parallel.h"
#include "csrc/cpu/split_attention.h"
#include "csrc/cpu/tile_gemm.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {
namespace {

// The running state of each lane.
struct Lanes {
  float max[kQueryTile];
  float sum[kQueryTile];
  float rescale[kQueryTile];  // 2^(old max - new max)
};

// Turns C vectors of lanes of a tile of scores into p in place and updates the state.
template <int C>
void softmax_lanes(float* scores, int nk, int lanes, Lanes& state, int at) {
  Vec highest[C], total[C], old_max[C];
  for (int c = 0; c < C; ++c) {
    highest[c] = old_max[c] = load(state.max + at + c * kLanes);
    total[c] = zero();
  }
  for (int j = 0; j < nk; ++j) {
    const float* row = scores + j * lanes + at;
    for (int c = 0; c < C; ++c) highest[c] = max(load(row + c * kLanes), highest[c]);
  }
  Vec center[C];
  for (int c = 0; c < C; ++c) {
    // Where nothing is visible yet, any finite center gives p = 0.
    center[c] = select(highest[c] == set1(-kInfinity), zero(), highest[c]);
  }
  for (int j = 0; j < nk; ++j) {
    float* row = scores + j * lanes + at;
    for (int c = 0; c < C; ++c) {
      const Vec p = exp2_flushed(load(row + c * kLanes) - center[c]);
      total[c] = total[c] + p;
      store(row + c * kLanes, p);
    }
  }
  for (int c = 0; c < C; ++c) {
    const int i = at + c * kLanes;
    const Vec rescale = exp2_flushed(old_max[c] - center[c]);
    store(state.rescale + i, rescale);
    store(state.sum + i, fma(load(state.sum + i), rescale, total[c]));
    store(state.max + i, highest[c]);
  }
}

void softmax_tile(const ScoreTile& tile, Lanes& state) {
  int at = 0;
  for (; at + kBlockVecs * kLanes <= tile.lanes; at += kBlockVecs * kLanes) {
    softmax_lanes<kBlockVecs>(tile.scores, tile.nk, tile.lanes, state, at);
  }
  for (; at < tile.lanes; at += kLanes) {
    softmax_lanes<1>(tile.scores, tile.nk, tile.lanes, state, at);
  }
}

void multiply(float* x, const float* factor, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(x + i, load(x + i) * load(factor + i));
}

// Floats for one tile of queries: q and out, (d, lanes) each, and its state.
int64_t tile_floats(int d) {
  return int64_t{2} * padded(d) * kQueryTile;
}

// One tile of queries on its way through the keys.
struct Running {
  int64_t q0;
  int nq;
  int lanes;
  bool started;
  float* q;    // (d, lanes)
  float* out;  // (d, lanes)
  Lanes state;
};

void begin_tile(const Head& head, int64_t q0, float* buffer, Running& tile) {
  tile.q0 = q0;
  tile.nq = static_cast<int>(clamp(head.sq - q0, 0, kQueryTile));
  tile.lanes = padded(tile.nq);
  tile.started = false;
  tile.q = buffer;
  tile.out = buffer + int64_t{padded(head.d)} * kQueryTile;
  for (int i = 0; i < tile.lanes; i += kLanes) {
    store(tile.state.max + i, set1(-kInfinity));
    store(tile.state.sum + i, zero());
  }
  if (!uses_pairs(head)) {
    transpose_rows(head.q, head.dtype, q0, tile.nq, head.d, tile.q, tile.lanes);
    return;
  }
  // A pair is one 32-bit element to the transposition; out is free until the first product.
  const int pairs = pairs_of(head.d);
  pack_row_pairs(head.q, q0, tile.nq, head.d, tile.out, pairs);
  transpose_rows(Rows{tile.out, pairs, 0}, DType::f32, 0, tile.nq, pairs, tile.q, tile.lanes);
}

// k: the keys in rows; v: in rows, or in pairs of rows. Op is Floats or Pairs.
template <typename Op>
void absorb_keys(const Head& head, Running& tile, KeyRange keys, const FloatRows& k,
                 const FloatRows& v, float* scores, float* factor) {
  constexpr bool paired = Op::kPaired;
  const int nk = static_cast<int>(keys.end - keys.begin), lanes = tile.lanes;
  const ScoreTile part = {scores, lanes, tile.q0, tile.nq, keys.begin, nk};
  tile_product<Op>({nk, lanes / kLanes, paired ? pairs_of(head.d) : head.d, k.data, k.step, 1,
                    tile.q, lanes, scores, lanes, Into::kStore, head.scale * kLog2E, nullptr});
  if (has_features(head)) apply_features(head, part, k, v);
  apply_band(head, part);
  softmax_tile(part, tile.state);
  if (head.dropout.on) {
    dropout_factors(head, part, 1.0f, factor);
    multiply(scores, factor, int64_t{nk} * lanes);
  }
  if (paired) round_row_pairs(scores, nk / 2, lanes, scores);
  tile_product<Op>({head.d, lanes / kLanes, paired ? nk / 2 : nk, v.data, 1, v.step, scores, lanes,
                    tile.out, lanes, tile.started ? Into::kRescale : Into::kStore, 1.0f,
                    tile.state.rescale});
  tile.started = true;
}

void finish_tile(const Head& head, const Running& tile, const HeadOut& to) {
  const Lanes& state = tile.state;
  if (!tile.started) std::memset(tile.out, 0, sizeof(float) * head.d * tile.lanes);
  const float kept = head.dropout.on ? head.dropout.scale : 1.0f;
  float inverse[kQueryTile];
  for (int i = 0; i < tile.lanes; ++i) {
    const bool empty = state.sum[i] == 0.0f;
    inverse[i] = empty ? 0.0f : kept / state.sum[i];
    if (i < tile.nq) {
      to.lse[tile.q0 + i] = empty ? -kInfinity : state.max[i] * kLn2 + log(state.sum[i]);
    }
  }
  untranspose_rows(tile.out, tile.lanes, inverse, to.out, to.lo, head.dtype, tile.q0, tile.nq,
                   head.d);
}

}  // namespace

int64_t attend_scratch(int d) {
  return kGroupTiles * tile_floats(d) + 2 * kKeyTile * kQueryTile + 3 * kKeyTile * packed_step(d);
}

void attend_tiles(const Head& head, const HeadOut& to, int64_t q0, int tiles, float* scratch) {
  float* scores = scratch + kGroupTiles * tile_floats(head.d);  // (keys, lanes)
  float* factor = scores + kKeyTile * kQueryTile;
  float* k_copy = factor + kKeyTile * kQueryTile;
  float* v_copy = k_copy + kKeyTile * packed_step(head.d);
  float* v_rows = v_copy + kKeyTile * packed_step(head.d);
  const int64_t step = packed_step(head.d);

  Running group[kGroupTiles];
  int n = 0;
  for (; n < tiles && q0 + n * kQueryTile < head.sq; ++n) {
    begin_tile(head, q0 + n * kQueryTile, scratch + n * tile_floats(head.d), group[n]);
  }
  const int64_t last = group[n - 1].q0 + group[n - 1].nq - 1;
  const KeyRange seen = keys_of_queries(head, q0, last);
  for (int64_t block = seen.begin / kKeyTile; block * kKeyTile < seen.end; ++block) {
    const KeyRange all = keys_of_block(head, q0, static_cast<int>(last - q0 + 1), block);
    if (all.begin >= all.end) continue;
    if (uses_pairs(head)) {
      const KeyRange whole = whole_pairs(all);
      pack_key_row_pairs(head, head.k, whole, all, k_copy, step);
      pack_key_row_pairs(head, head.v, whole, all, v_rows, step);
      interleave_rows({v_rows, 2 * step, 0}, 0, static_cast<int>(whole.end - whole.begin), head.d,
                      v_copy, step);
      for (int t = 0; t < n; ++t) {
        const KeyRange keys = keys_of_block(head, group[t].q0, group[t].nq, block);
        if (keys.begin >= keys.end) continue;
        const KeyRange part = whole_pairs(keys);
        const int64_t skip = part.begin - whole.begin;
        absorb_keys<Pairs>(head, group[t], part, {k_copy + skip * step, step},
                           {v_copy + skip / 2 * step, step}, scores, factor);
      }
      continue;
    }
    const int count = static_cast<int>(all.end - all.begin);
    const FloatRows k = key_rows(head, head.k, all.begin, count, k_copy);
    const FloatRows v = key_rows(head, head.v, all.begin, count, v_copy);
    for (int t = 0; t < n; ++t) {
      const KeyRange keys = keys_of_block(head, group[t].q0, group[t].nq, block);
      if (keys.begin >= keys.end) continue;
      const int64_t skip = keys.begin - all.begin;
      absorb_keys<Floats>(head, group[t], keys, {k.data + skip * k.step, k.step},
                          {v.data + skip * v.step, v.step}, scores, factor);
    }
  }
  for (int t = 0; t < n; ++t) finish_tile(head, group[t], to);
}

int group_tiles(const Head& any, int64_t tiles) {
  // A mask zeroes keys of the shared copy for one tile at a time.
  if (any.mask.data != nullptr) return 1;
  int group = kGroupTiles;
  while (group > 1 && tiles / group < 4 * int64_t{max_threads()}) group /= 2;
  return group;
}

void attention_fwd_kernel(const AttentionFwd& p) {
  const TensorRef& q = p.in.q;
  const int64_t heads = q.size[0] * q.size[1], sq = q.size[2];
  const auto out_of = [&](int64_t b, int64_t h) {
    return HeadOut{head_rows(p.out, b, h), head_rows(p.out_lo, b, h),
                   static_cast<float*>(p.lse.data) + (b * q.size[1] + h) * sq};
  };
  const Head any = dense_head(p.in, 0, 0);
  if (sq <= kSplitQueries && !has_features(any) && !any.dropout.on) {
    const int64_t hk = p.in.k.size[1], group = q.size[1] / hk;
    split_attention(
        q.size[0] * hk, group, sq, any.sk, any.d,
        [&](int64_t unit, int64_t g) { return dense_head(p.in, unit / hk, unit % hk * group + g); },
        [&](int64_t unit, int64_t g) { return out_of(unit / hk, unit % hk * group + g); });
    return;
  }
  const int group = group_tiles(any, heads * ceil_div(sq, kQueryTile));
  const int64_t groups = ceil_div(sq, group * kQueryTile);
  const int workers = worker_count(heads * groups);
  const WorkerScratch scratch(workers, attend_scratch(any.d) * sizeof(float));
  parallel_items(heads * groups, workers, [&](int64_t item, int worker) {
    const int64_t b = item / groups / q.size[1], h = item / groups % q.size[1];
    const int64_t q0 = (groups - 1 - item % groups) * group * kQueryTile;
    attend_tiles(dense_head(p.in, b, h), out_of(b, h), q0, group, scratch.of(worker));
  });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
