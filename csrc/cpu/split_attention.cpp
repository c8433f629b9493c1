// A few queries over one split of the keys, d along the vector lanes: s = q k^T key by key, the
// online softmax per block of keys, o += p v; then the merge m = max(m_i), l = sum(l_i 2^(m_i -
// m)), out = sum(o_i 2^(m_i - m)) / l.
//
// Plan: four queries share each load of k and v; eight scores are reduced across the lanes at once;
// rows of v are asked for while k is scored. A block of 64 keys stays in L1 between the products.
// Bytes: k and v once per unit, which bounds the speed. Flops: 4 sk d a query.
// Source: Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html
#include "csrc/cpu/split_attention.h"

#include "csrc/common/dispatch.h"
#include "csrc/common/math.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {
namespace {

constexpr int kRowBlock = 4;

// Rows of consecutive keys; a block never crosses the end of a ring.
template <typename T>
struct Block {
  const T* rows;
  int64_t stride;
  int n;
};

template <typename T>
FASTGPT_INLINE Block<T> block_of(const Rows& rows, KeyRange keys) {
  const int64_t slot = rows.ring == 0 ? keys.begin : keys.begin % rows.ring;
  return Block<T>{static_cast<const T*>(rows.data) + slot * rows.stride, rows.stride,
                  static_cast<int>(keys.end - keys.begin)};
}

// The keys from `begin` on that make the next block before `end`.
FASTGPT_INLINE KeyRange next_block(int64_t begin, int64_t end, int64_t ring) {
  const int64_t wrap = ring == 0 ? end : begin - begin % ring + ring;
  const int64_t last = wrap < end ? wrap : end;
  return KeyRange{begin, last - begin < kBlockKeys ? last : begin + kBlockKeys};
}

// Asks for a row ahead of its use, while another product keeps the memory idle; level 3 is L1. L2
// has more lines on their way: what is needed later comes there, a fifth faster (measured).
template <int level, typename T>
FASTGPT_INLINE void prefetch_row(const T* row, int d) {
  for (int c = 0; c < d; c += 64 / static_cast<int>(sizeof(T))) {
    __builtin_prefetch(row + c, 0, level);
  }
}

constexpr int kSums = 8;  // reduced together

// s (R, kBlockKeys) of a block of keys, times scale; q (R, padded(d)). Asks for the rows of v and
// for the next of k, those of floats twice: what fetches them unasked stops at every page. D: d, or
// 0 for any.
template <typename T, int R, int D>
void score_keys(const float* q, const Block<T>& k, const Block<T>& v, int any_d, float scale,
                float* s) {
  constexpr int kKeys = kSums / R;
  const int d = D == 0 ? any_d : D;
  const int step = padded(d);
  for (int j = 0; j < k.n; j += kKeys) {
    const T* row[kKeys];
#pragma GCC unroll 8
    for (int i = 0; i < kKeys; ++i) {
      const int64_t at = j + i < k.n ? j + i : k.n - 1;
      row[i] = k.rows + at * k.stride;
      prefetch_row<2>(v.rows + at * v.stride, d);
      if (sizeof(T) == sizeof(float)) prefetch_row<2>(row[i] + 2 * kSums * k.stride, d);
      prefetch_row<3>(row[i] + kSums * k.stride, d);
    }
    Vec sum[kSums];
#pragma GCC unroll 8
    for (int i = 0; i < kSums; ++i) sum[i] = zero();
    int c = 0;
    for (; c + kLanes <= d; c += kLanes) {
#pragma GCC unroll 8
      for (int i = 0; i < kKeys; ++i) {
        const Vec kv = load(row[i] + c);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          sum[r * kKeys + i] = fma(load(q + r * step + c), kv, sum[r * kKeys + i]);
        }
      }
    }
    if (c < d) {
#pragma GCC unroll 8
      for (int i = 0; i < kKeys; ++i) {
        const Vec kv = load(row[i] + c, d - c);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          sum[r * kKeys + i] = fma(load(q + r * step + c), kv, sum[r * kKeys + i]);
        }
      }
    }
    float sums[kSums];
    reduce_add_8(sum, sums);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int i = 0; i < kKeys; ++i) s[r * kBlockKeys + j + i] = sums[r * kKeys + i] * scale;
    }
  }
}

// o (R rows, `step` apart) = o * rescale + p v, over V vectors of columns from c on, of which the
// last may be partial.
template <typename T, int R, int V>
void add_values(const float* p, const float* rescale, const Block<T>& v, int d, int c, float* o,
                int64_t step) {
  Vec sum[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) {
      sum[r][i] = load(o + r * step + c + i * kLanes) * set1(rescale[r]);
    }
  }
  const bool whole = c + V * kLanes <= d;
  for (int j = 0; j < v.n; ++j) {
    const T* row = v.rows + j * v.stride + c;
    Vec weight[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) weight[r] = set1(p[r * kBlockKeys + j]);
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) {
      const Vec vv =
          whole || i < V - 1 ? load(row + i * kLanes) : load(row + i * kLanes, d - c - i * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r][i] = fma(weight[r], vv, sum[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) store(o + r * step + c + i * kLanes, sum[r][i]);
  }
}

// Hides the keys outside [low, high) of the block, turns the rest into p, updates m and l and
// returns the factor for o.
float softmax_row(float* s, int low, int high, int nk, float* m, float* l) {
  for (int j = 0; j < low; ++j) s[j] = -kInfinity;
  for (int j = high; j < whole_vectors(nk) * kLanes; ++j) s[j] = -kInfinity;
  Vec highest = set1(*m);
  for (int j = 0; j < nk; j += kLanes) highest = max(load(s + j), highest);
  const float new_max = reduce_max(highest);
  const float center = new_max == -kInfinity ? 0.0f : new_max;
  Vec total = zero();
  for (int j = 0; j < nk; j += kLanes) {
    const Vec p = exp2_flushed(load(s + j) - set1(center));
    total = total + p;
    store(s + j, p);
  }
  float rescale[kLanes];
  store(rescale, exp2(set1(*m - center)));
  *m = new_max;
  *l = *l * rescale[0] + reduce_add(total);
  return rescale[0];
}

// R queries (of one or several heads) over a block of keys.
template <typename T, int R, int D>
void attend_rows(const Head* heads, int64_t row, const float* q, KeyRange keys, float* partial,
                 float* s) {
  const Head& head = heads[0];
  const int d = D == 0 ? head.d : D, row_step = padded(d);
  const int64_t step = partial_floats(d);
  const Block<T> k = block_of<T>(head.k, keys), v = block_of<T>(head.v, keys);
  score_keys<T, R, D>(q + row * row_step, k, v, d, head.scale * kLog2E, s);
  float rescale[R];
  float* o = partial + row * step;
  for (int r = 0; r < R; ++r) {
    const KeyRange seen = keys_of_query(head, (row + r) % head.sq);
    const int low = static_cast<int>(clamp(seen.begin - keys.begin, 0, k.n));
    const int high = static_cast<int>(clamp(seen.end - keys.begin, 0, k.n));
    float* state = o + r * step + row_step;
    rescale[r] = softmax_row(s + r * kBlockKeys, low, high, k.n, state, state + 1);
  }
  // As many accumulators as hide the latency of an FMA and fit into the registers.
  constexpr int kVecs = R == 1 ? 8 : kLanes == 16 ? 4 : 2;
  const auto add = [&](auto vecs, int c) {
    add_values<T, R, decltype(vecs)::kValue>(s, rescale, v, d, c, o, step);
  };
  int c = 0;
  for (; c + kVecs * kLanes <= row_step; c += kVecs * kLanes) add(Constant<kVecs>{}, c);
  if (kVecs > 4 && c + 4 * kLanes <= row_step) {
    add(Constant<4>{}, c);
    c += 4 * kLanes;
  }
  for (; c < row_step; c += kLanes) add(Constant<1>{}, c);
}

template <typename T, int D>
void attend_keys(const Head* heads, int64_t rows, const float* q, KeyRange keys, float* partial,
                 float* s) {
  int64_t row = 0;
  for (; row + kRowBlock <= rows; row += kRowBlock) {
    attend_rows<T, kRowBlock, D>(heads, row, q, keys, partial, s);
  }
  for (; row < rows; ++row) attend_rows<T, 1, D>(heads, row, q, keys, partial, s);
}

}  // namespace

int64_t split_scratch(int d, int64_t rows) {
  return rows * padded(d) + kRowBlock * kBlockKeys;
}

void attend_split(const Head* heads, int64_t group, int64_t split_keys, int64_t split,
                  float* partial, float* scratch) {
  const Head& head = heads[0];
  const int d = head.d;
  const int64_t rows = group * head.sq, step = partial_floats(d);
  float* q = scratch;  // (rows, padded(d))
  float* s = q + rows * padded(d);
  for (int64_t row = 0; row < rows; ++row) {
    float* o = partial + row * step;
    std::memset(o, 0, step * sizeof(float));
    o[padded(d)] = -kInfinity;
  }
  const KeyRange seen = keys_of_queries(head, 0, head.sq - 1);
  const int64_t begin = clamp(seen.begin + split * split_keys, 0, seen.end);
  const int64_t end = clamp(begin + split_keys, begin, seen.end);
  if (begin == end) return;
  for (int64_t g = 0; g < group; ++g) {
    float* to = q + g * head.sq * padded(d);
    widen_rows(heads[g].q, head.dtype, 0, static_cast<int>(head.sq), d, to, padded(d));
  }
  visit_dtype<bf16, f16>(head.dtype, [&](auto type) {
    const auto attend = [&](auto width) {
      for (int64_t k0 = begin; k0 < end;) {
        const KeyRange keys = next_block(k0, end, head.k.ring);
        attend_keys<typename decltype(type)::type, decltype(width)::kValue>(heads, rows, q, keys,
                                                                            partial, s);
        k0 = keys.end;
      }
    };
    d == 64 ? attend(Constant<64>{}) : d == 128 ? attend(Constant<128>{}) : attend(Constant<0>{});
  });
}

void merge_splits(const Head& head, const HeadOut& to, int64_t i, int64_t splits,
                  const float* partial, int64_t step) {
  const int d = head.d, row_step = padded(d);
  float highest = -kInfinity;
  for (int64_t n = 0; n < splits; ++n) {
    const float m = partial[n * step + row_step];
    highest = m > highest ? m : highest;
  }
  const float center = highest == -kInfinity ? 0.0f : highest;
  float l = 0.0f;
  for (int64_t n = 0; n < splits; ++n) {
    const float* state = partial + n * step + row_step;
    float weight[kLanes];
    store(weight, exp2(set1(state[0] - center)));
    l += state[1] * weight[0];
  }
  const bool empty = l == 0.0f;
  to.lse[i] = empty ? -kInfinity : highest * kLn2 + log(l);
  const Vec inverse = set1(empty ? 0.0f : 1.0f / l);
  char* out = row_at(to.out, head.dtype, i);
  for (int c = 0; c < d; c += kLanes) {
    Vec sum = zero();
    for (int64_t n = 0; n < splits; ++n) {
      const float* o = partial + n * step;
      sum = fma(load(o + c), exp2(set1(o[row_step] - center)), sum);
    }
    const int columns = d - c < kLanes ? d - c : kLanes;
    const Vec whole = sum * inverse;
    store_as(head.dtype, out, c, whole, columns);
    if (to.lo.data != nullptr) {
      const Vec kept = load_as(head.dtype, out, c, columns);
      store_as(head.dtype, row_at(to.lo, head.dtype, i), c, whole - kept, columns);
    }
  }
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
