// One row of a softmax over its columns [begin, end), by the threads along x of a block: read once
// where it fits the registers or the shared memory, else twice, with a running maximum and sum
// (online softmax).
#pragma once

#include "csrc/common/math.h"
#include "csrc/cuda/anywhere.cuh"
#include "csrc/cuda/reduce.cuh"
#include "csrc/cuda/rows.cuh"
#include "csrc/cuda/staged_row.cuh"

namespace fastgpt::cuda {

// 2^(x log2 e), of x <= 0.
__device__ inline float exp_below(float x) {
  return exp2_approx(x * kLog2E);
}

// The columns of a row of n that are seen, [begin, end), in [first, first + size): whole packs, but
// for the end of the row. kAll: all of them.
template <int kPack, bool kAll = false>
struct Span {
  int begin, end, first, size;
  __device__ Span(int from, int to, int n) : begin(from), end(to) {
    first = begin / kPack * kPack;
    size = (end - first + kPack - 1) / kPack * kPack;
    size = size < n - first ? size : n - first;
  }
  // Whether a column is seen that is in the row, or (kOutside) may be outside of it.
  template <bool kOutside = false>
  __device__ bool sees(int column) const {
    return (kAll && !kOutside) || (column >= begin && column < end);
  }
};

// y = softmax(scale * x) on the span, of a row in the registers; a row that sees nothing but -inf
// is all `empty`. s_reduce: kWarp floats.
template <int kPack, bool kAll, typename T, typename Y>
__device__ void softmax_short_row(const T* g_x, Span<kPack, kAll> span, float scale, float empty,
                                  Y* g_y, float* s_reduce) {
  float r_x[kCachedPacks][kPack];
  float top = -INFINITY, sum[1] = {0.0f};
  for_packs<kPack, true>(span.size, [&](int c, int i) {
    load<kPack>(g_x + span.first + i, r_x[c]);
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      r_x[c][e] = span.sees(span.first + i + e) ? r_x[c][e] * scale : -INFINITY;
      top = fmaxf(top, r_x[c][e]);
    }
  });
  const float row_top = block_max(top, s_reduce);
  const float center = row_top == -INFINITY ? 0.0f : row_top;
  for_packs<kPack, true>(span.size, [&](int c, int) {
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      r_x[c][e] = exp_below(r_x[c][e] - center);
      sum[0] += r_x[c][e];
    }
  });
  block_sum(sum, s_reduce);
  const bool hidden = sum[0] == 0.0f;
  const float inverse = hidden ? 0.0f : 1.0f / sum[0], floor = hidden ? empty : 0.0f;
  for_packs<kPack, true>(span.size, [&](int c, int i) {
    float r_y[kPack];
#pragma unroll
    for (int e = 0; e < kPack; ++e) r_y[e] = fmaf(r_x[c][e], inverse, floor);
    store<kPack>(g_y + span.first + i, r_y);
  });
}

// The same with a running maximum and sum, of a row that is kept in shared memory, or (bytes == 0)
// read twice, the second time from its end on, which L1 and L2 still have; then each thread takes
// the columns that it can store at once.
template <bool kAnywhere, int kPack, bool kAll, typename T, typename Y>
__device__ void softmax_long_row(const T* g_x, Span<kPack, kAll> span, float scale, float empty,
                                 Y* g_y, unsigned char* s_row, int bytes, float* s_reduce) {
  constexpr int kGroup = kAnywhere ? 2 : 4;  // two blocks a multiprocessor
  g_x += span.first;
  g_y += span.first;
  const StagedRow<T> staged(g_x, span.size, s_row, bytes);
  const auto see = [&](int i, float (&r_x)[kPack], auto end) {
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      const bool seen = span.template sees<decltype(end)::kValue>(span.first + i + e);
      r_x[e] = seen ? r_x[e] * scale : -INFINITY;
    }
  };
  float top = -INFINITY, sum[1] = {0.0f};
  staged.first([&](const T* row) {
    for_groups<kAnywhere, kGroup, false>({row}, 0, span.size, [&](int i, auto& r_rows, auto end) {
      float (&r_x)[kPack] = r_rows[0];
      see(i, r_x, end);
      float higher = top;
#pragma unroll
      for (int e = 0; e < kPack; ++e) higher = fmaxf(higher, r_x[e]);
      const float center = higher == -INFINITY ? 0.0f : higher;
      sum[0] *= exp_below(top - center);
#pragma unroll
      for (int e = 0; e < kPack; ++e) sum[0] += exp_below(r_x[e] - center);
      top = higher;
    });
  });
  const float row_top = block_max(top, s_reduce);
  const float center = row_top == -INFINITY ? 0.0f : row_top;
  sum[0] *= exp_below(top - center);
  block_sum(sum, s_reduce);
  const bool hidden = sum[0] == 0.0f;
  const float inverse = hidden ? 0.0f : 1.0f / sum[0], floor = hidden ? empty : 0.0f;
  const int begin = kAnywhere ? -columns_before<kPack>(g_y) : 0;
  staged.second([&](const T* row) {
    for_groups<kAnywhere, kGroup, true>(
        {row}, begin, span.size, [&](int i, auto& r_rows, auto end) {
          float (&r_x)[kPack] = r_rows[0];
          see(i, r_x, end);
#pragma unroll
          for (int e = 0; e < kPack; ++e) r_x[e] = fmaf(exp_below(r_x[e] - center), inverse, floor);
          decltype(end)::kValue ? store_within(g_y, i, span.size, r_x) : store<kPack>(g_y + i, r_x);
        });
  });
}

// dx = scale * y * (dy - sum(dy * y)) on the span, 0 in the rest of its packs.
template <int kPack, bool kAll, typename Y, typename X>
__device__ void softmax_short_row_bwd(const Y* g_dy, const Y* g_y, Span<kPack, kAll> span,
                                      float scale, X* g_dx, float* s_reduce) {
  // As stored, or a block of 512 threads would not fit the register file twice.
  Pack<Y, kPack> r_dy[kCachedPacks], r_y[kCachedPacks];
  const auto at = [&](const Pack<Y, kPack>& pack, int i, int e) {
    return span.sees(span.first + i + e) ? to_float(pack.value[e]) : 0.0f;
  };
  float sum[1] = {0.0f};
  for_packs<kPack, true>(span.size, [&](int c, int i) {
    r_dy[c] = load_pack<kPack>(g_dy + span.first + i);
    r_y[c] = load_pack<kPack>(g_y + span.first + i);
  });
  for_packs<kPack, true>(span.size, [&](int c, int i) {
#pragma unroll
    for (int e = 0; e < kPack; ++e) sum[0] += at(r_dy[c], i, e) * at(r_y[c], i, e);
  });
  block_sum(sum, s_reduce);
  for_packs<kPack, true>(span.size, [&](int c, int i) {
    float r_dx[kPack];
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      r_dx[e] = scale * at(r_y[c], i, e) * (at(r_dy[c], i, e) - sum[0]);
    }
    store<kPack>(g_dx + span.first + i, r_dx);
  });
}

template <bool kAnywhere, int kSpanPack, bool kAll, typename Y, typename X>
__device__ void softmax_long_row_bwd(const Y* g_dy, const Y* g_y, Span<kSpanPack, kAll> span,
                                     float scale, X* g_dx, float* s_reduce) {
  constexpr int kGroup = kAnywhere ? 1 : 2, kPack = kChunkBytes / sizeof(Y);
  g_dy += span.first;
  g_y += span.first;
  g_dx += span.first;
  const auto sees = [&](int i, auto end) {
    return span.template sees<decltype(end)::kValue>(span.first + i);
  };
  float sum[1] = {0.0f};
  for_groups<kAnywhere, kGroup, false>(
      {g_dy, g_y}, 0, span.size, [&](int i, auto& r_rows, auto end) {
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          sum[0] += sees(i + e, end) ? r_rows[0][e] * r_rows[1][e] : 0.0f;
        }
      });
  block_sum(sum, s_reduce);
  const int begin = kAnywhere ? -columns_before<kPack>(g_dx) : 0;
  for_groups<kAnywhere, kGroup, true>(
      {g_dy, g_y}, begin, span.size, [&](int i, auto& r_rows, auto end) {
        float r_dx[kPack];
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          r_dx[e] = sees(i + e, end) ? scale * r_rows[1][e] * (r_rows[0][e] - sum[0]) : 0.0f;
        }
        decltype(end)::kValue ? store_within(g_dx, i, span.size, r_dx)
                              : store<kPack>(g_dx + i, r_dx);
      });
}

// s_row: `bytes` to keep a row that does not fit the registers; none if it is not to be kept.
template <bool kCached, bool kAnywhere, int kPack, bool kAll, typename T, typename Y>
__device__ void softmax_row(const T* g_x, Span<kPack, kAll> span, float scale, float empty, Y* g_y,
                            unsigned char* s_row, int bytes, float* s_reduce) {
  if constexpr (kCached) {
    softmax_short_row(g_x, span, scale, empty, g_y, s_reduce);
  } else {
    softmax_long_row<kAnywhere>(g_x, span, scale, empty, g_y, s_row, bytes, s_reduce);
  }
}

template <bool kCached, bool kAnywhere, int kPack, bool kAll, typename Y, typename X>
__device__ void softmax_row_bwd(const Y* g_dy, const Y* g_y, Span<kPack, kAll> span, float scale,
                                X* g_dx, float* s_reduce) {
  if constexpr (kCached) {
    softmax_short_row_bwd(g_dy, g_y, span, scale, g_dx, s_reduce);
  } else {
    softmax_long_row_bwd<kAnywhere>(g_dy, g_y, span, scale, g_dx, s_reduce);
  }
}

// f(Type<T>, Type<Y>, Constant<pack>, Constant<cached>, Constant<anywhere>): T of `dtype`, in packs
// of 16 bytes, Y the same or float. Of a plan that may shift.
template <typename F>
void visit_softmax(const RowPlan& plan, DType dtype, DType other, const F& f) {
  visit_dtype<__nv_bfloat16, __half>(dtype, [&](auto type) {
    constexpr Constant<int{16 / sizeof(typename decltype(type)::type)}> pack;
    const auto with_other = [&](auto y) {
      if (plan.cached) return f(type, y, pack, Constant<true>{}, Constant<false>{});
      visit_bool(plan.anywhere,
                 [&](auto anywhere) { f(type, y, pack, Constant<false>{}, anywhere); });
    };
    other == dtype ? with_other(type) : with_other(Type<float>{});
  });
}

}  // namespace fastgpt::cuda
