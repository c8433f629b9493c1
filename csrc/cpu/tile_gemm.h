// The tile product behind all of attention: C (rows, 16 x vecs) = A (rows, depth) B (depth, ...).
// A block of R rows by C vectors stays in registers for the whole depth; each step broadcasts R
// elements of A and multiplies them with C vectors of B. R x C accumulators hide the latency of the
// FMA units and need (R + C) / (R x C) loads per FMA. Elements of A and B are 32 bits wide: a
// float, or a pair of bf16 along the depth (Pairs, VDPBF16PS). Either stride of A is free, so A may
// be read as stored or transposed; a row of B is contiguous and padded to whole vectors.
// Each product sums over its own tile before it joins C, and the order over the depth does not
// depend on how rows and columns are blocked: equal tiles have equal bits wherever they run.
#pragma once

#include "csrc/cpu/simd.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {

struct Floats {
  static constexpr bool kPaired = false;
  static FASTGPT_INLINE Vec mac(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
};

#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr bool kPaired = true;
  static FASTGPT_INLINE Vec mac(Vec a, Vec b, Vec sum) {
    return Vec{_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
  }
};
constexpr bool kHasPairs = true;
#else
using Pairs = Floats;
constexpr bool kHasPairs = false;
#endif

// What happens to the sums of a tile.
enum class Into {
  kStore,    // C = scale * sum
  kAdd,      // C += sum
  kRescale,  // C = C * column[j] + sum
};

struct TileProduct {
  int rows;
  int vecs;
  int depth;
  const float* a;  // A(i, p) = a[i * a_row + p * a_step]
  int64_t a_row;
  int64_t a_step;
  const float* b;  // B(p, j) = b[p * b_step + j]
  int64_t b_step;
  float* c;  // C(i, j) = c[i * c_row + j]
  int64_t c_row;
  Into into;
  float scale;
  const float* column;
};

constexpr int kBlockRows = kLanes == 16 ? 8 : 6;  // 8 x 3 of 32 registers, 6 x 2 of 16
constexpr int kBlockVecs = kLanes == 16 ? 3 : 2;

template <class Op, int R, int C>
__attribute__((noinline)) void tile_block(const TileProduct& t, int row, int vec) {
  const float* a[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) a[r] = t.a + (row + r) * t.a_row;
  const float* b = t.b + vec * kLanes;
  const int64_t a_step = t.a_step;
  const int64_t b_step = t.b_step;

  Vec sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
    for (int c = 0; c < C; ++c) sum[r][c] = zero();
  }
  int64_t at = 0;
  const auto step = [&] {
    Vec bv[C];
#pragma GCC unroll 3
    for (int c = 0; c < C; ++c) bv[c] = load(b + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec av = broadcast(a[r] + at);
#pragma GCC unroll 3
      for (int c = 0; c < C; ++c) sum[r][c] = Op::mac(av, bv[c], sum[r][c]);
    }
    at += a_step;
    b += b_step;
  };
  int p = 0;
  for (; p + 2 <= t.depth; p += 2) {
    step();
    step();
  }
  if (p < t.depth) step();

  float* out = t.c + row * t.c_row + vec * kLanes;
  if (t.into == Into::kStore) {
    const Vec scale = set1(t.scale);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
      for (int c = 0; c < C; ++c) store(out + c * kLanes, sum[r][c] * scale);
      out += t.c_row;
    }
  } else if (t.into == Into::kAdd) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
      for (int c = 0; c < C; ++c) store(out + c * kLanes, load(out + c * kLanes) + sum[r][c]);
      out += t.c_row;
    }
  } else {
    const float* column = t.column + vec * kLanes;
    Vec factor[C];
#pragma GCC unroll 3
    for (int c = 0; c < C; ++c) factor[c] = load(column + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
      for (int c = 0; c < C; ++c) {
        store(out + c * kLanes, fma(load(out + c * kLanes), factor[c], sum[r][c]));
      }
      out += t.c_row;
    }
  }
}

template <class Op, int R>
FASTGPT_INLINE void tile_rows(const TileProduct& t, int row) {
  for (int vec = 0; vec < t.vecs;) {
    const int left = t.vecs - vec;
    if (left == 1) {
      tile_block<Op, R, 1>(t, row, vec);
      vec += 1;
    } else if (kBlockVecs == 2 || left == 2 || left == 4) {
      tile_block<Op, R, 2>(t, row, vec);
      vec += 2;
    } else {
      tile_block<Op, R, kBlockVecs>(t, row, vec);
      vec += kBlockVecs;
    }
  }
}

template <class Op>
void tile_product(const TileProduct& t) {
  int row = 0;
  for (; row + kBlockRows <= t.rows; row += kBlockRows) tile_rows<Op, kBlockRows>(t, row);
  if (row + 4 <= t.rows) {
    tile_rows<Op, 4>(t, row);
    row += 4;
  }
  if (row + 2 <= t.rows) {
    tile_rows<Op, 2>(t, row);
    row += 2;
  }
  if (row < t.rows) tile_rows<Op, 1>(t, row);
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
