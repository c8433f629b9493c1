// out = softmax(scale * q k^T + ..., visible keys) v with the online softmax, a tile of 48 queries
// against tiles of 64 keys: m = max(m, s), p = 2^(s - m), l = l 2^(m' - m) + sum(p),
// o = o 2^(m' - m) + p v, and at the end out = o / l, lse = m + log(l).
//
// Plan: a dynamic queue over (batch, head, query tile), long rows first; one tile is one thread's,
// key tiles start at its first visible key and are visited in ascending order, so no bit depends
// on the batch or on threads. Memory: O(d) tiles a thread, nothing of size sk.
// Flops: 4 sq sk d a head, half of it causal, 4 sq window d banded. Bytes: k and v once a tile.
// Source: Dao et al. 2022, https://arxiv.org/abs/2205.14135; Dao 2023, arXiv:2307.08691.
#include "csrc/cpu/attention_fwd.h"

#include "csrc/common/math.h"
#include "csrc/cpu/attention_dense.h"
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
    center[c] = select(highest[c] == set1(-__builtin_inff()), zero(), highest[c]);
  }
  for (int j = 0; j < nk; ++j) {
    float* row = scores + j * lanes + at;
    for (int c = 0; c < C; ++c) {
      const Vec p = exp2(load(row + c * kLanes) - center[c]);
      total[c] = total[c] + p;
      store(row + c * kLanes, p);
    }
  }
  for (int c = 0; c < C; ++c) {
    const int i = at + c * kLanes;
    const Vec rescale = exp2(old_max[c] - center[c]);
    store(state.rescale + i, rescale);
    store(state.sum + i, fma(load(state.sum + i), rescale, total[c]));
    store(state.max + i, highest[c]);
  }
}

void softmax_tile(const ScoreTile& tile, Lanes& state) {
  int at = 0;
  for (; at + 3 * kLanes <= tile.lanes; at += 3 * kLanes) {
    softmax_lanes<3>(tile.scores, tile.nk, tile.lanes, state, at);
  }
  for (; at < tile.lanes; at += kLanes) {
    softmax_lanes<1>(tile.scores, tile.nk, tile.lanes, state, at);
  }
}

void multiply(float* x, const float* factor, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(x + i, load(x + i) * load(factor + i));
}

}  // namespace

int64_t attend_scratch(int d) {
  return int64_t{2} * padded(d) * kQueryTile + 2 * kKeyTile * kQueryTile +
         int64_t{2} * kKeyTile * padded(d);
}

void attend_tile(const Head& head, const HeadOut& to, int64_t q0, float* scratch) {
  const int d = head.d;
  const int nq = static_cast<int>(clamp(head.sq - q0, 0, kQueryTile));
  const int lanes = padded(nq);
  float* q = scratch;                          // (d, lanes)
  float* out = q + padded(d) * kQueryTile;     // (d, lanes)
  float* scores = out + padded(d) * kQueryTile;  // (keys, lanes)
  float* factor = scores + kKeyTile * kQueryTile;
  float* k_copy = factor + kKeyTile * kQueryTile;
  float* v_copy = k_copy + kKeyTile * padded(d);

  Lanes state;
  for (int i = 0; i < lanes; i += kLanes) {
    store(state.max + i, set1(-__builtin_inff()));
    store(state.sum + i, zero());
  }
  transpose_rows(head.q, head.dtype, q0, nq, d, q, lanes);

  const KeyRange keys = keys_of_queries(head, q0, q0 + nq - 1);
  for (int64_t k0 = keys.begin; k0 < keys.end; k0 += kKeyTile) {
    const int nk = static_cast<int>(clamp(keys.end - k0, 0, kKeyTile));
    const ScoreTile tile = {scores, lanes, q0, nq, k0, nk};
    const FloatRows k = key_rows(head, head.k, k0, nk, k_copy);
    const FloatRows v = key_rows(head, head.v, k0, nk, v_copy);
    tile_product<Floats>({nk, lanes / kLanes, d, k.data, k.step, 1, q, lanes, scores, lanes,
                          Into::kStore, head.scale * kLog2E, nullptr});
    if (has_features(head)) apply_features(head, tile, k_copy, v_copy);
    apply_band(head, tile);
    softmax_tile(tile, state);
    if (head.dropout.on) {
      dropout_factors(head, tile, factor);
      multiply(scores, factor, int64_t{nk} * lanes);
    }
    const Into into = k0 == keys.begin ? Into::kStore : Into::kRescale;
    tile_product<Floats>({d, lanes / kLanes, nk, v.data, 1, v.step, scores, lanes, out, lanes, into,
                          1.0f, state.rescale});
  }
  if (keys.begin == keys.end) std::memset(out, 0, sizeof(float) * d * lanes);

  float inverse[kQueryTile];
  for (int i = 0; i < lanes; ++i) {
    const bool empty = state.sum[i] == 0.0f;
    inverse[i] = empty ? 0.0f : 1.0f / state.sum[i];
    if (i < nq) {
      to.lse[q0 + i] = empty ? -__builtin_inff() : state.max[i] * kLn2 + log(state.sum[i]);
    }
  }
  untranspose_rows(out, lanes, inverse, to.out, to.lo, head.dtype, q0, nq, d);
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
        [&](int64_t unit, int64_t g) {
          return dense_head(p.in, unit / hk, unit % hk * group + g);
        },
        [&](int64_t unit, int64_t g) { return out_of(unit / hk, unit % hk * group + g); });
    return;
  }
  const int64_t tiles = ceil_div(sq, kQueryTile);
  const int workers = worker_count(heads * tiles);
  const int d = static_cast<int>(q.size[3]);
  const Scratch scratch(workers * attend_scratch(d) * sizeof(float));
  parallel_items(heads * tiles, workers, [&](int64_t item, int worker) {
    const int64_t b = item / tiles / q.size[1], h = item / tiles % q.size[1];
    attend_tile(dense_head(p.in, b, h), out_of(b, h), (tiles - 1 - item % tiles) * kQueryTile,
                scratch.at() + worker * attend_scratch(d));
  });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
