// Rows to tile operands and back, and what else than q k^T goes into a score. Costs per tile of
// nq x nk: O(nq d) to transpose, O(nk d) to widen a narrow K or V for all tiles of an item, against
// nq nk d multiply-adds a product; the rare features cost a pass over the tile each.
#include "csrc/cpu/attention_head.h"

#include "csrc/common/math.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {
namespace {

// One butterfly of a transposition: exchanges the odd groups of S lanes of a with the even of b.
template <int S>
FASTGPT_INLINE void exchange(NativeFloat& a, NativeFloat& b) {
#define FASTGPT_LOW(c) (((c) & S) ? kLanes + (c) - S : (c))
#define FASTGPT_HIGH(c) (((c) & S) ? kLanes + (c) : (c) + S)
#define FASTGPT_FOUR(f, c) f(c), f(c + 1), f(c + 2), f(c + 3)
#if defined(__AVX512F__)
#define FASTGPT_ALL(f) \
  FASTGPT_FOUR(f, 0), FASTGPT_FOUR(f, 4), FASTGPT_FOUR(f, 8), FASTGPT_FOUR(f, 12)
#elif defined(__AVX2__)
#define FASTGPT_ALL(f) FASTGPT_FOUR(f, 0), FASTGPT_FOUR(f, 4)
#else
#define FASTGPT_ALL(f) FASTGPT_FOUR(f, 0)
#endif
#if __has_builtin(__builtin_shufflevector)
#define FASTGPT_PICK(f) __builtin_shufflevector(a, b, FASTGPT_ALL(f))
#else  // GCC before 12
#define FASTGPT_PICK(f) __builtin_shuffle(a, b, NativeInt{FASTGPT_ALL(f)})
#endif
  const NativeFloat low = FASTGPT_PICK(FASTGPT_LOW);
  b = FASTGPT_PICK(FASTGPT_HIGH);
  a = low;
#undef FASTGPT_PICK
#undef FASTGPT_ALL
#undef FASTGPT_FOUR
#undef FASTGPT_HIGH
#undef FASTGPT_LOW
}

template <int S>
FASTGPT_INLINE void exchange_all(NativeFloat (&x)[kLanes]) {
  if constexpr (S < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if ((i & S) == 0) exchange<S>(x[i], x[i + S]);
    }
    exchange_all<2 * S>(x);
  }
}

constexpr int kAhead = 8;  // rows

// Asks for a row ahead of its use: rows are often pages apart, where the hardware does not look.
template <bool write>
FASTGPT_INLINE void prefetch_row(const char* row, int bytes) {
  for (int at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, write ? 1 : 0);
}

FASTGPT_INLINE int at_most_lanes(int n) {
  return n < kLanes ? n : kLanes;
}

}  // namespace

void widen_rows(const Rows& rows, DType dtype, int64_t first, int n, int d, float* out,
                int64_t step) {
  const int bytes = d * element_size(dtype);
  for (int i = 0; i < n; ++i) {
    if (i + kAhead < n) prefetch_row<false>(row_at(rows, dtype, first + i + kAhead), bytes);
    const char* row = row_at(rows, dtype, first + i);
    float* to = out + i * step;
    int c = 0;
    for (; c + kLanes <= d; c += kLanes) store(to + c, load_as(dtype, row, c));
    if (c < d) {
      const Vec rest = load_as(dtype, row, c, d - c);
      step >= padded(d) ? store(to + c, rest) : store(to + c, rest, d - c);
    }
  }
}

void transpose_rows(const Rows& rows, DType dtype, int64_t first, int n, int d, float* out,
                    int lanes) {
  for (int i = 0; i < lanes; i += kLanes) {
    for (int c = 0; c < d; c += kLanes) {
      const int columns = at_most_lanes(d - c);
      NativeFloat x[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        x[r] = zero().v;
        if (i + r < n) {
          const char* row = row_at(rows, dtype, first + i + r);
          x[r] = (columns == kLanes ? load_as(dtype, row, c) : load_as(dtype, row, c, columns)).v;
        }
      }
      exchange_all<1>(x);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        if (r < columns) store(out + (c + r) * lanes + i, Vec{x[r]});
      }
    }
  }
}

void untranspose_rows(const float* in, int lanes, const float* factor, const Rows& rows,
                      const Rows& lo, DType dtype, int64_t first, int n, int d) {
  for (int i = 0; i < n; ++i) {
    prefetch_row<true>(row_at(rows, dtype, first + i), d * element_size(dtype));
  }
  for (int i = 0; i < n; i += kLanes) {
    const Vec scale = load(factor + i);
    for (int c = 0; c < d; c += kLanes) {
      const int columns = at_most_lanes(d - c);
      NativeFloat x[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        x[r] = (r < columns ? load(in + (c + r) * lanes + i) * scale : zero()).v;
      }
      exchange_all<1>(x);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        if (i + r >= n) break;
        char* row = row_at(rows, dtype, first + i + r);
        store_as(dtype, row, c, Vec{x[r]}, columns);
        if (lo.data != nullptr) {
          const Vec kept = load_as(dtype, row, c, columns);
          store_as(dtype, row_at(lo, dtype, first + i + r), c, Vec{x[r]} - kept, columns);
        }
      }
    }
  }
}

void narrow_rows(const float* in, int64_t step, const Rows& rows, DType dtype, int64_t first, int n,
                 int d) {
  for (int i = 0; i < n; ++i) {
    char* row = row_at(rows, dtype, first + i);
    for (int c = 0; c < d; c += kLanes) {
      store_as(dtype, row, c, load(in + i * step + c), at_most_lanes(d - c));
    }
  }
}

void pack_keys(const Head& head, const Rows& rows, int64_t first, int n, float* out) {
  const int64_t step = packed_step(head.d);
  widen_rows(rows, head.kv_dtype, first, n, head.d, out, step);
  if (head.key_visible == nullptr) return;
  for (int j = 0; j < n; ++j) {
    if (head.key_visible[(first + j) * head.key_visible_stride] == 0) {
      std::memset(out + j * step, 0, head.d * sizeof(float));
    }
  }
}

FloatRows key_rows(const Head& head, const Rows& rows, int64_t first, int n, float* copy) {
  // Rows that share a power of two of cache lines compete for a few sets of the cache.
  const bool harmless = head.kv_dtype == DType::f32 && head.key_visible == nullptr &&
                        rows.ring == 0 && rows.stride % 128 != 0;
  if (head.mask.data == nullptr && (head.packed || harmless)) {
    return FloatRows{static_cast<float*>(rows.data) + first * rows.stride, rows.stride};
  }
  pack_keys(head, rows, first, n, copy);
  return FloatRows{copy, packed_step(head.d)};
}

void apply_band(const Head& head, const ScoreTile& tile) {
  const int64_t last = tile.q0 + tile.nq - 1;
  // Keys [inside.begin, inside.end) are seen by every query of the tile.
  const KeyRange inside = {keys_of_query(head, last).begin, keys_of_query(head, tile.q0).end};
  if (inside.begin <= tile.k0 && tile.k0 + tile.nk <= inside.end) return;

  float low[kQueryTile], high[kQueryTile];  // bounds of each lane, counted from k0
  for (int i = 0; i < tile.lanes; ++i) {
    const KeyRange seen = keys_of_query(head, clamp(tile.q0 + i, 0, last));
    low[i] = static_cast<float>(clamp(seen.begin - tile.k0, 0, tile.nk));
    high[i] = static_cast<float>(clamp(seen.end - tile.k0, 0, tile.nk));
  }
  const Vec hidden = set1(-kInfinity);
  for (int j = 0; j < tile.nk; ++j) {
    if (inside.begin <= tile.k0 + j && tile.k0 + j < inside.end) continue;
    const Vec at = set1(static_cast<float>(j));
    float* row = tile.scores + j * tile.lanes;
    for (int i = 0; i < tile.lanes; i += kLanes) {
      const Mask seen = (load(low + i) <= at) & (at < load(high + i));
      store(row + i, select(seen, load(row + i), hidden));
    }
  }
}

void apply_features(const Head& head, const ScoreTile& tile, const FloatRows& k,
                    const FloatRows& v) {
  // Whole pairs of keys may reach one past the last key, where there is no mask to read.
  const int64_t real = clamp(head.sk - tile.k0, 0, tile.nk);
  for (int j = 0; j < real; ++j) {
    float* row = tile.scores + j * tile.lanes;
    const int64_t key = tile.k0 + j;
    if (head.key_visible != nullptr && head.key_visible[key * head.key_visible_stride] == 0) {
      for (int i = 0; i < tile.lanes; ++i) row[i] = -kInfinity;
      continue;
    }
    if (head.bias.data != nullptr) {
      for (int i = 0; i < tile.nq; ++i) {
        const int64_t at = (tile.q0 + i) * head.bias.row + key * head.bias.column;
        row[i] += bias_log2(element_as(head.bias.dtype, head.bias.data, at));
      }
    }
    if (head.alibi) {
      const float slope = head.slope * kLog2E;
      for (int i = 0; i < tile.nq; ++i) {
        const int64_t distance = tile.q0 + i + head.offset - key;
        row[i] -= slope * static_cast<float>(distance < 0 ? -distance : distance);
      }
    }
    if (head.mask.data != nullptr) {
      const uint8_t* mask = static_cast<const uint8_t*>(head.mask.data) + key * head.mask.column;
      bool seen = false;
      for (int i = 0; i < tile.nq; ++i) {
        if (mask[(tile.q0 + i) * head.mask.row] == 0) {
          row[i] = -kInfinity;
        } else {
          seen = true;
        }
      }
      if (!seen) {
        std::memset(k.data + j * k.step, 0, head.d * sizeof(float));
        std::memset(v.data + j * v.step, 0, head.d * sizeof(float));
      }
    }
  }
}

void dropout_factors(const Head& head, const ScoreTile& tile, float kept, float* factor) {
  const Dropout& dropout = head.dropout;
  for (int64_t group = tile.k0 / 4; group * 4 < tile.k0 + tile.nk; ++group) {
    for (int i = 0; i < tile.lanes; ++i) {
      const Philox4 random =
          philox_4x32(static_cast<uint32_t>(group), static_cast<uint32_t>(tile.q0 + i),
                      dropout.head, 0, dropout.key[0], dropout.key[1]);
      for (int lane = 0; lane < 4; ++lane) {
        const int64_t j = group * 4 + lane - tile.k0;
        if (j < 0 || j >= tile.nk) continue;
        factor[j * tile.lanes + i] = random.word[lane] >= dropout.threshold ? kept : 0.0f;
      }
    }
  }
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
