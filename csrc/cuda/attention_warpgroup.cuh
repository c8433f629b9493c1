// What the attention kernels for warpgroups (sm_90a) do with a tile: rows of a head in panels of 64
// columns, as wgmma.cuh wants them, and products on them. A warpgroup computes 64 rows, each of its
// warps 16: accumulators r[n][e] as in attention_tile.cuh with kM = 1.
#pragma once

#include "csrc/cuda/attention_tile.cuh"
#include "csrc/cuda/wgmma.cuh"

namespace fastgpt::cuda {

constexpr int kGroupRows = 64;

// Whether so many blocks share the 228 KiB of a multiprocessor of sm_90, each with 1 KiB more.
constexpr bool fits(int blocks, int shared_bytes) {
  return blocks * (shared_bytes + 1024) <= 228 * 1024;
}

// A tile of kRows rows of kD elements of 16 bits.
template <int kRows, int kD>
struct PanelTile {
  static_assert(kD % 16 == 0 && kRows % 16 == 0, "a product takes 16 columns or rows at once");
  static constexpr int kPanels = (kD + kPanelColumns - 1) / kPanelColumns;
  static constexpr int kPanelElements = kRows * kPanelColumns;
  static constexpr int kElements = kPanels * kPanelElements;
  static constexpr int kBytes = 2 * kElements;

  template <typename T>
  __device__ static T* chunk(T* s_tile, int row, int chunk) {
    return s_tile + chunk / 8 * kPanelElements + swizzled<8>(row, chunk % 8) * 8;
  }
  // A factor whose rows are those of the tile, and the bytes to its columns 16 step on.
  template <typename T>
  __device__ static SharedMatrix by_columns(const T* s_tile) {
    return shared_matrix(s_tile, kChunkBytes);
  }
  __device__ static constexpr int column_bytes(int step) {
    return step / 4 * kPanelElements * 2 + step % 4 * 2 * kChunkBytes;
  }
  // A factor whose columns are those of the tile; its rows 16 step on are 16 rows of a panel away.
  template <typename T>
  __device__ static SharedMatrix by_rows(const T* s_tile) {
    return shared_matrix(s_tile, 2 * kPanelElements);
  }

  // By a warpgroup, the whole block; what is copied and when as in load_rows(). `whole`: all rows
  // are alive. A running pointer: addresses that are kept for the next tile would take registers.
  template <typename T, typename F>
  __device__ static void load(T* s_tile, const T* g_rows, int64_t stride, int d, bool direct,
                              bool whole, const F& alive) {
    if constexpr (kD <= 128) {
      load_columns(s_tile, g_rows, stride, 0, d, direct, whole, alive);
    } else {
#pragma unroll 1
      for (int first = 0; first < kD; first += 128) {
        load_columns(s_tile, g_rows, stride, first, d, direct, whole, alive);
      }
    }
  }
  // The 16 rows of a warp, from `row` on, as first factors in registers.
  template <typename T>
  __device__ static void factors(uint32_t (&r_a)[kD / 16][4], const T* s_tile, int row) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
    for (int step = 0; step < kD / 16; ++step) {
      load_matrices<4>(r_a[step], chunk(s_tile, row + lane % 16, 2 * step + lane / 16));
    }
  }

 private:
  // Up to 128 columns, from `first` on.
  template <typename T, typename F>
  __device__ static void load_columns(T* s_tile, const T* g_rows, int64_t stride, int first, int d,
                                      bool direct, bool whole, const F& alive) {
    constexpr int kLanes = kD <= kPanelColumns ? 8 : 16;  // of a row
    constexpr int kStep = kWarpgroup / kLanes;
    static_assert(kStep % 8 == 0 && kRows % kStep == 0, "rows so far apart are swizzled alike");
    const int lane = static_cast<int>(threadIdx.x) % kLanes, column = first + lane * 8;
    if (column >= kD) return;
    const int row = static_cast<int>(threadIdx.x) / kLanes;
    const T* g_from = g_rows + row * stride + column;
    T* s_to = chunk(s_tile, row, first / 8 + lane);
    const int there = min(max(d - column, 0), 8);
    if (direct && whole && there == 8) {
#pragma unroll
      for (int i = 0; i < kRows / kStep; ++i) {
        copy_chunk_async(s_to + i * kStep * kPanelColumns, g_from);
        g_from += kStep * stride;
      }
      return;
    }
#pragma unroll 1
    for (int i = 0; i < kRows / kStep; ++i) {
      const int count = alive(row + i * kStep) ? there : 0;
      if (direct) {
        copy_chunk_async(s_to, count > 0 ? g_from : g_rows, 2 * count);
      } else {
        Pack<T, 8> pack;
#pragma unroll
        for (int e = 0; e < 8; ++e) pack.value[e] = e < count ? g_from[e] : from_float<T>(0.0f);
        *reinterpret_cast<Pack<T, 8>*>(s_to) = pack;
      }
      g_from += kStep * stride;
      s_to += kStep * kPanelColumns;
    }
  }
};

// r = a b^T: a in registers, b the kRows rows of a tile.
template <int kRows, int kD, typename T>
__device__ inline void issue_transposed(float (&r)[kRows / 8][4], const uint32_t (&r_a)[kD / 16][4],
                                        const T* s_b) {
  using Tile = PanelTile<kRows, kD>;
  const SharedMatrix b = Tile::by_columns(s_b);
#pragma unroll
  for (int step = 0; step < kD / 16; ++step) {
    wgmma_rs<T, kRows, true>(r, r_a[step], advanced(b, Tile::column_bytes(step)), step > 0);
  }
}

// r = a b^T: a the warpgroup's 64 rows, from `row` on, of a tile of kOwnRows rows.
template <int kOwnRows, int kRows, int kD, typename T>
__device__ inline void issue_transposed(float (&r)[kRows / 8][4], const T* s_a, int row,
                                        const T* s_b) {
  using Own = PanelTile<kOwnRows, kD>;
  using Tile = PanelTile<kRows, kD>;
  const SharedMatrix a = Own::by_columns(s_a + row * kPanelColumns), b = Tile::by_columns(s_b);
#pragma unroll
  for (int step = 0; step < kD / 16; ++step) {
    wgmma_ss<T, kRows>(r, advanced(a, Own::column_bytes(step)),
                       advanced(b, Tile::column_bytes(step)), step > 0);
  }
}

// r += p b: p in registers, b a tile of kRows rows.
template <int kRows, int kD, typename T>
__device__ inline void issue(float (&r)[kD / 8][4], const uint32_t (&r_p)[kRows / 16][4],
                             const T* s_b) {
  using Tile = PanelTile<kRows, kD>;
  constexpr int kColumns = kD < 128 ? kD : 128;  // of a product
  static_assert(kD % kColumns == 0, "products of equal width");
  const SharedMatrix b = Tile::by_rows(s_b);
#pragma unroll
  for (int step = 0; step < kRows / 16; ++step) {
#pragma unroll
    for (int first = 0; first < kD; first += kColumns) {
      wgmma_rs<T, kColumns>(reinterpret_cast<float (&)[kColumns / 8][4]>(r[first / 8]), r_p[step],
                            advanced(b, first / kPanelColumns * 2 * Tile::kPanelElements +
                                            step * 16 * kPanelRowBytes),
                            true);
    }
  }
}

// Accumulators, rounded to T, as first factors.
template <typename T, int kN>
__device__ inline void round_to_factors(uint32_t (&r_a)[kN / 2][4], const float (&r)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    r_a[n / 2][n % 2 * 2] = pack_pair<T>(r[n][0], r[n][1]);
    r_a[n / 2][n % 2 * 2 + 1] = pack_pair<T>(r[n][2], r[n][3]);
  }
}

// Scores of the lane's row i (of two) are hidden outside of columns low to high, counted from the
// lane's first.
template <int kN>
__device__ inline void hide_outside(float (&r_s)[kN][4], int i, int low, int high) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (8 * n + j < low || 8 * n + j > high) r_s[n][2 * i + j] = -INFINITY;
    }
  }
}

// dp = 0 where a key is hidden, p being 0: it may have overflowed.
template <int kN>
__device__ inline void clear_hidden(float (&r_dp)[kN][4], const float (&r_p)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (r_p[n][e] == 0.0f) r_dp[n][e] = 0.0f;
    }
  }
}

// f(Type<T>) with the type of the elements, which has 16 bits.
template <typename F>
void visit_warpgroup_type(const AttentionProblem& problem, const F& f) {
  problem.in.q.dtype == DType::bf16 ? f(Type<__nv_bfloat16>{}) : f(Type<__half>{});
}

// Whether a block walks so many of `rows` that it does well to take more of them at once; of a band
// much of a large tile would lie outside. The bits of a packed document must not depend on the
// longest beside it.
static inline bool has_long_walks(const AttentionProblem& problem, int rows) {
  return problem.window == 0 && problem.g_cu_seqlens_q == nullptr && rows > 1024;
}

// f(Constant<width>) with the width of the tiles for heads of d elements.
template <typename F>
void visit_warpgroup_width(int d, const F& f) {
  if (d <= 64) return f(Constant<64>{});
  if (d <= 80) return f(Constant<80>{});
  if (d <= 96) return f(Constant<96>{});
  if (d <= 128) return f(Constant<128>{});
  f(Constant<256>{});
}

}  // namespace fastgpt::cuda
