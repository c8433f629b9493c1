// One row of a softmax in blocks that fit into L1: memory is read once, exp taken once per entry.
#pragma once

#include "csrc/common/math.h"
#include "csrc/cpu/rows.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {

constexpr int64_t kRowBlock = 2048;

inline int64_t row_blocks(int64_t n) {
  return (n + kRowBlock - 1) / kRowBlock;
}

// exp(x) for x <= 0: an error of about |x| eps exp(x), at most a third of eps; no subnormals.
FASTGPT_INLINE Vec exp_below(Vec x) {
  return exp2_flushed(x * set1(kLog2E));
}

inline float exp_below(float x) {
  return exp_below(set1(x)).v[0];
}

// y = softmax(scale * x). e holds n floats, tops one per block. A row of nothing but -inf is all
// `empty`. Asks for the row `next` (n) of the input while it works in L1.
template <typename T, typename Y>
void softmax_row(const T* x, int64_t n, float scale, float empty, const T* next, bool streaming,
                 Y* y, float* e, float* tops) {
  constexpr bool kSplit = kSplits<T, Y>;
  const Vec factor = set1(scale);
  float top = -kInfinity, sum = 0.0f;
  for (int64_t first = 0; first < n; first += kRowBlock) {
    const int64_t size = n - first < kRowBlock ? n - first : kRowBlock;
    const float block_top =
        max_vectors<kSplit>(size, [&](int64_t, int, Vec at) { return at * factor; }, x + first);
    if (block_top > top) {
      sum *= exp_below(top - block_top);
      top = block_top;
    }
    // -inf - -inf would be NaN; against 0 such entries count as 0
    const float offset = top == -kInfinity ? 0.0f : top;
    tops[first / kRowBlock] = offset;
    const Vec shift = set1(-offset);
    sum += sum_vectors<kSplit>(
        size,
        [&](int64_t i, int lanes, Vec at) {
          const Vec power = exp_below(fma(at, factor, shift));
          store_lanes(e + first + i, power, lanes);
          return power;
        },
        [&](int64_t i) { prefetch_chunk(next + first + i); }, x + first);
  }
  const bool hidden = sum == 0.0f;
  const float inverse = hidden ? 0.0f : 1.0f / sum;
  const Vec floor = set1(hidden ? empty : 0.0f);
  for (int64_t first = 0; first < n; first += kRowBlock) {
    const int64_t size = n - first < kRowBlock ? n - first : kRowBlock;
    const float correction = tops[first / kRowBlock] - (hidden ? 0.0f : top);
    const Vec share = set1(inverse * exp_below(correction));
    map_vectors<kSplit>(
        size, y + first, streaming,
        [&](int64_t, int, Vec power) { return fma(power, share, floor); }, NothingAhead{},
        static_cast<const float*>(e + first));
  }
}

// dx = scale * y * (dy - sum(dy * y)). Asks for the rows next_dy and next_y (n) meanwhile.
template <typename Y, typename X>
void softmax_row_bwd(const Y* dy, const Y* y, int64_t n, float scale, const Y* next_dy,
                     const Y* next_y, bool streaming, X* dx) {
  constexpr bool kSplit = kSplits<Y, X>;
  const Vec dot = set1(sum_vectors<kSplit>(
      n, [](int64_t, int, Vec dy_at, Vec y_at) { return dy_at * y_at; }, NothingAhead{}, dy, y));
  const Vec factor = set1(scale);
  map_vectors<kSplit>(
      n, dx, streaming,
      [&](int64_t, int, Vec dy_at, Vec y_at) { return (y_at * factor) * (dy_at - dot); },
      [&](int64_t i) {
        prefetch_chunk(next_dy + i);
        prefetch_chunk(next_y + i);
      },
      dy, y);
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
