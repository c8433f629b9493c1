// One head of attention as the tile code sees it, and how its rows become operands of the tile
// product. Scores are held transposed, (keys, queries): the queries of a tile lie along the vector
// lanes, so that the softmax needs no step across lanes, K and V are read as they are stored
// (broadcast element by element), and only Q, dO and the outputs are transposed, once per tile.
#pragma once

#include "csrc/cpu/simd.h"
#include "csrc/ops/attention.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {

// Queries: as wide as a block of the tile product. Keys: as many as leave the scores room in L1.
constexpr int kQueryTile = kLanes == 16 ? 48 : 16;
constexpr int kKeyTile = kLanes == 16 ? 64 : 128;

// Rows of d elements, `stride` elements apart; rows in a ring of `ring` slots when that is not 0.
struct Rows {
  void* data = nullptr;
  int64_t stride = 0;
  int64_t ring = 0;
};

// A (sq, sk) plane; a stride of 0 broadcasts.
struct Plane {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t row = 0;
  int64_t column = 0;
};

struct Dropout {
  bool on = false;
  uint32_t key[2] = {};
  uint32_t head = 0;       // batch * h + head
  uint64_t threshold = 0;  // words below it are dropped
  float scale = 1.0f;      // 1 / (1 - p)
};

struct Head {
  DType dtype = DType::f32;
  DType kv_dtype = DType::f32;  // f32 where k and v were packed, else dtype
  int d = 0;
  int64_t sq = 0;
  int64_t sk = 0;
  int64_t offset = 0;     // query i stands at i + offset
  int64_t first_key = 0;  // keys before it are hidden
  bool causal = false;
  int64_t window = 0;  // 0: none
  float scale = 1.0f;
  Rows q, k, v;

  Rows k_pairs;         // where uses_pairs: k in pairs of rows, packed_step(d) apart
  bool packed = false;  // k and v come from pack_keys
  const uint8_t* key_visible = nullptr;  // (sk), 0 = hidden padding
  int64_t key_visible_stride = 0;
  Plane bias;
  Plane mask;
  bool alibi = false;
  float slope = 0.0f;
  Dropout dropout;
};

struct KeyRange {
  int64_t begin;
  int64_t end;
};

FASTGPT_INLINE int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

FASTGPT_INLINE int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
FASTGPT_INLINE int whole_vectors(int n) {
  return (n + kLanes - 1) / kLanes;
}
FASTGPT_INLINE int padded(int n) {
  return whole_vectors(n) * kLanes;
}

// The keys that one query sees by the causal and band rule, as a range cut to [first_key, sk).
FASTGPT_INLINE KeyRange keys_of_query(const Head& head, int64_t query) {
  const int64_t at = query + head.offset;
  const int64_t begin = head.window != 0 ? at - head.window + 1 : 0;
  const int64_t end = head.causal ? at + 1 : head.window != 0 ? at + head.window : head.sk;
  const int64_t first = clamp(begin, head.first_key, head.sk);
  return KeyRange{first, clamp(end, first, head.sk)};
}

// The keys that any of the queries [first, last] sees.
FASTGPT_INLINE KeyRange keys_of_queries(const Head& head, int64_t first, int64_t last) {
  const int64_t begin = keys_of_query(head, first).begin;
  return KeyRange{begin, clamp(keys_of_query(head, last).end, begin, head.sk)};
}

// The part of key tile `block` that the queries [q0, q0 + nq) see; may be empty.
FASTGPT_INLINE KeyRange keys_of_block(const Head& head, int64_t q0, int nq, int64_t block) {
  const KeyRange seen = keys_of_queries(head, q0, q0 + nq - 1);
  const int64_t begin = block * kKeyTile, end = begin + kKeyTile;
  return KeyRange{begin > seen.begin ? begin : seen.begin, end < seen.end ? end : seen.end};
}

// The queries that may see any of the keys [begin, end).
FASTGPT_INLINE KeyRange queries_of_keys(const Head& head, int64_t begin, int64_t end) {
  const int64_t first = head.causal        ? begin - head.offset
                        : head.window != 0 ? begin - head.offset - head.window + 1
                                           : 0;
  const int64_t past = head.window != 0 ? end - 1 + head.window - head.offset : head.sq;
  const int64_t low = clamp(first, 0, head.sq);
  return KeyRange{low, clamp(past, low, head.sq)};
}

// Which owner has `item`, where owner u has the items [first[u], first[u + 1]).
inline int64_t owner_of(const int64_t* first, int64_t owners, int64_t item) {
  int64_t low = 0, high = owners;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (first[middle] <= item ? low : high) = middle;
  }
  return low;
}

FASTGPT_INLINE int element_size(DType dtype) {
  return dtype == DType::f32 ? 4 : 2;
}

FASTGPT_INLINE char* row_at(const Rows& rows, DType dtype, int64_t i) {
  const int64_t slot = rows.ring == 0 ? i : i % rows.ring;
  return static_cast<char*>(rows.data) + slot * rows.stride * element_size(dtype);
}

FASTGPT_INLINE Vec load_as(DType dtype, const void* row, int at) {
  if (dtype == DType::f32) return load(static_cast<const float*>(row) + at);
  if (dtype == DType::bf16) return load(static_cast<const bf16*>(row) + at);
  return load(static_cast<const f16*>(row) + at);
}

FASTGPT_INLINE Vec load_as(DType dtype, const void* row, int at, int n) {
  if (dtype == DType::f32) return load(static_cast<const float*>(row) + at, n);
  if (dtype == DType::bf16) return load(static_cast<const bf16*>(row) + at, n);
  return load(static_cast<const f16*>(row) + at, n);
}

FASTGPT_INLINE void store_as(DType dtype, void* row, int at, Vec x, int n) {
  if (dtype == DType::f32) {
    float* p = static_cast<float*>(row) + at;
    n == kLanes ? store(p, x) : store(p, x, n);
  } else if (dtype == DType::bf16) {
    bf16* p = static_cast<bf16*>(row) + at;
    n == kLanes ? store(p, x) : store(p, x, n);
  } else {
    f16* p = static_cast<f16*>(row) + at;
    n == kLanes ? store(p, x) : store(p, x, n);
  }
}

FASTGPT_INLINE float element_as(DType dtype, const void* data, int64_t at) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[at];
  if (dtype == DType::bf16) return to_float(static_cast<const bf16*>(data)[at]);
  return to_float(static_cast<const f16*>(data)[at]);
}

// rows (n, d) -> out (n, d) floats, `step` >= padded(d) apart or equal to d; padding is 0.
void widen_rows(const Rows& rows, DType dtype, int64_t first, int n, int d, float* out,
                int64_t step);

// rows (n, d) -> out (d, lanes): element c of row i at out[c * lanes + i], 0 for i >= n.
void transpose_rows(const Rows& rows, DType dtype, int64_t first, int n, int d, float* out,
                    int lanes);

// in (d, lanes), times factor (lanes) -> rows (n, d) rounded to dtype; lo, unless its data is null,
// gets what the rounding lost.
void untranspose_rows(const float* in, int lanes, const float* factor, const Rows& rows,
                      const Rows& lo, DType dtype, int64_t first, int n, int d);

// in (n, step) floats -> rows (n, d) rounded to dtype.
void narrow_rows(const float* in, int64_t step, const Rows& rows, DType dtype, int64_t first, int n,
                 int d);

// Floats from one packed key to the next: an odd number of cache lines, so that the keys of a tile
// spread over all sets of the cache, whatever the head's own strides.
FASTGPT_INLINE int64_t packed_step(int d) {
  return (ceil_div(d, 16) | 1) * 16;
}

// Keys [first, first + n) as floats, packed_step(d) apart, with hidden padding zeroed, so that what
// it holds cannot leak.
void pack_keys(const Head& head, const Rows& rows, int64_t first, int n, float* out);

// Keys [first, first + n) as the tile product reads them: in place where they are packed (no mask
// may zero some then) or float32 rows at a harmless stride, else packed into `copy`.
struct FloatRows {
  float* data;
  int64_t step;
};
FloatRows key_rows(const Head& head, const Rows& rows, int64_t first, int n, float* copy);

// Whether a tile needs apply_features.
FASTGPT_INLINE bool has_features(const Head& head) {
  return head.key_visible != nullptr || head.bias.data != nullptr || head.mask.data != nullptr ||
         head.alibi;
}

// The tile (queries [q0, q0 + nq)) x (keys [k0, k0 + nk)) of scores in units of log 2, (nk, lanes).
struct ScoreTile {
  float* scores;
  int lanes;
  int64_t q0;
  int nq;
  int64_t k0;
  int nk;
};

// Hides what the causal and band rule hides; free where the tile lies wholly inside.
void apply_band(const Head& head, const ScoreTile& tile);

// Bias, ALiBi, mask and padding. Keys that the mask hides from every query of the tile are zeroed
// in k and v, which are copies of this tile's own whenever the head has a mask.
void apply_features(const Head& head, const ScoreTile& tile, const FloatRows& k,
                    const FloatRows& v);

// factor (nk, lanes): `kept` where dropout keeps, else 0.
void dropout_factors(const Head& head, const ScoreTile& tile, float kept, float* factor);

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
