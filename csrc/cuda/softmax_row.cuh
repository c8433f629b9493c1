// One row of a softmax over its columns [begin, end), by the threads along x of a block: read once
// where it fits the registers, else twice, with a running maximum and sum (online softmax).
#pragma once

#include "csrc/common/math.h"
#include "csrc/cuda/reduce.cuh"
#include "csrc/cuda/rows.cuh"

namespace fastgpt::cuda {

// 2^(x log2 e), of x <= 0.
__device__ inline float exp_below(float x) {
  return exp2f(x * kLog2E);
}

// The columns of a row that are seen, cut to whole packs: [first, first + size) holds [begin, end).
template <int kPack>
struct Span {
  int begin, end, first, size;
  __device__ Span(int from, int to) : begin(from), end(to) {
    first = begin / kPack * kPack;
    size = (end - first + kPack - 1) / kPack * kPack;
  }
  __device__ bool sees(int column) const { return column >= begin && column < end; }
};

// y = softmax(scale * x) on the span; a row that sees nothing but -inf is all `empty`.
// s_reduce: kWarp floats.
template <int kPack, bool kCached, typename T, typename Y>
__device__ void softmax_row(const T* g_x, Span<kPack> span, float scale, float empty, Y* g_y,
                            float* s_reduce) {
  float r_x[kCached ? kCachedPacks : 1][kPack];
  const auto read = [&](int c, int i) {
    load<kPack>(g_x + span.first + i, r_x[c]);
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      r_x[c][e] = span.sees(span.first + i + e) ? r_x[c][e] * scale : -INFINITY;
    }
  };
  float top = -INFINITY, sum[1] = {0.0f};
  for_packs<kPack, kCached>(span.size, [&](int c, int i) {
    read(c, i);
    float pack_top = r_x[c][0];
#pragma unroll
    for (int e = 1; e < kPack; ++e) pack_top = fmaxf(pack_top, r_x[c][e]);
    if (kCached) {
      top = fmaxf(top, pack_top);
      return;
    }
    const float higher = fmaxf(top, pack_top);
    const float center = higher == -INFINITY ? 0.0f : higher;
    sum[0] *= exp_below(top - center);
#pragma unroll
    for (int e = 0; e < kPack; ++e) sum[0] += exp_below(r_x[c][e] - center);
    top = higher;
  });
  const float row_top = block_max(top, s_reduce);
  const float center = row_top == -INFINITY ? 0.0f : row_top;
  if (kCached) {
    for_packs<kPack, kCached>(span.size, [&](int c, int) {
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        r_x[c][e] = exp_below(r_x[c][e] - center);
        sum[0] += r_x[c][e];
      }
    });
  } else {
    sum[0] *= exp_below(top - center);
  }
  block_sum(sum, s_reduce);
  const bool hidden = sum[0] == 0.0f;
  const float inverse = hidden ? 0.0f : 1.0f / sum[0], floor = hidden ? empty : 0.0f;
  for_packs<kPack, kCached>(span.size, [&](int c, int i) {
    if (!kCached) read(c, i);
    float r_y[kPack];
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      const float power = kCached ? r_x[c][e] : exp_below(r_x[c][e] - center);
      r_y[e] = fmaf(power, inverse, floor);
    }
    store<kPack>(g_y + span.first + i, r_y);
  });
}

// dx = scale * y * (dy - sum(dy * y)) on the span, 0 in the rest of its packs.
template <int kPack, bool kCached, typename Y, typename X>
__device__ void softmax_row_bwd(const Y* g_dy, const Y* g_y, Span<kPack> span, float scale, X* g_dx,
                                float* s_reduce) {
  // As stored, or a block of 1024 threads would not fit the register file.
  constexpr int kPacks = kCached ? kCachedPacks : 1;
  Pack<Y, kPack> r_dy[kPacks], r_y[kPacks];
  const auto read = [&](int c, int i) {
    r_dy[c] = load_pack<kPack>(g_dy + span.first + i);
    r_y[c] = load_pack<kPack>(g_y + span.first + i);
  };
  const auto at = [&](const Pack<Y, kPack>& pack, int i, int e) {
    return span.sees(span.first + i + e) ? to_float(pack.value[e]) : 0.0f;
  };
  float sum[1] = {0.0f};
  for_packs<kPack, kCached>(span.size, [&](int c, int i) {
    read(c, i);
#pragma unroll
    for (int e = 0; e < kPack; ++e) sum[0] += at(r_dy[c], i, e) * at(r_y[c], i, e);
  });
  block_sum(sum, s_reduce);
  for_packs<kPack, kCached>(span.size, [&](int c, int i) {
    if (!kCached) read(c, i);
    float r_dx[kPack];
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      r_dx[e] = scale * at(r_y[c], i, e) * (at(r_dy[c], i, e) - sum[0]);
    }
    store<kPack>(g_dx + span.first + i, r_dx);
  });
}

}  // namespace fastgpt::cuda
