// What the attention kernels do with a tile: rows of a head in shared memory, products of a warp on
// them, and rows of results back to memory.
//
// A tile has rows of kD elements, zero beyond d, as swizzled chunks of 16 bytes. A warp computes
// kM * 16 rows of a product as accumulators r[m][n][e] of mma.cuh: row 16 m + group + (e / 2) * 8,
// column 8 n + 2 pair + e % 2, with group = lane / 4 and pair = lane % 4. Elements of 16 bits are
// multiplied by tensor cores; floats by FMA, each lane the same accumulators.
#pragma once

#include <type_traits>

#include "csrc/common/dispatch.h"
#include "csrc/cuda/attention_heads.cuh"
#include "csrc/cuda/mma.cuh"
#include "csrc/cuda/reduce.cuh"

namespace fastgpt::cuda {

template <typename C>
constexpr int kPerChunk = kChunkBytes / static_cast<int>(sizeof(C));

template <typename C, int kD>
__device__ inline C* chunk_at(C* s_tile, int row, int chunk) {
  return s_tile + swizzled<kD / kPerChunk<C>>(row, chunk) * kPerChunk<C>;
}

// The place of this thread among a warp's accumulators.
struct Lane {
  int lane = threadIdx.x % kWarp;
  int group = lane / 4, pair = lane % 4;
  __device__ int row(int m, int e) const { return 16 * m + group + e / 2 * 8; }
  __device__ int column(int n, int e) const { return 8 * n + 2 * pair + e % 2; }
};

template <int kM, int kN>
__device__ inline void clear(float (&r)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) r[m][n][e] = 0.0f;
    }
  }
}

template <int kM, int kN>
__device__ inline void scale_by(float (&r)[kM][kN][4], float factor) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) r[m][n][e] *= factor;
    }
  }
}

// ---- rows of a head into shared memory ----

// The elements of kCount rows of d in memory of type T, by all kThreads of the block; rows that
// are not alive(row) are not read, and zero. `direct`: T is C and 16 bytes divide every row's
// address, so that the copy is asynchronous.
template <typename C, int kD, int kCount, int kThreads, typename T, typename F>
__device__ inline void load_rows(C* s_tile, const T* g_rows, int64_t stride, int d, bool direct,
                                 const F& alive) {
  constexpr int kChunks = kD / kPerChunk<C>;
  constexpr int kLanes = kChunks <= 8 ? 8 : kChunks <= 16 ? 16 : kChunks <= 32 ? 32 : 64;
  static_assert(kThreads % kLanes == 0 && kChunks <= kLanes, "a row is copied at once");
  const int chunk = static_cast<int>(threadIdx.x) % kLanes;
  if (chunk >= kChunks) return;
  const int column = chunk * kPerChunk<C>;
#pragma unroll
  for (int i = 0; i < (kCount * kLanes + kThreads - 1) / kThreads; ++i) {
    const int row = static_cast<int>(threadIdx.x) / kLanes + i * (kThreads / kLanes);
    if (kCount * kLanes % kThreads != 0 && row >= kCount) return;
    const int count = alive(row) ? min(max(d - column, 0), kPerChunk<C>) : 0;
    const T* g_from = g_rows + row * stride + column;
    C* s_to = chunk_at<C, kD>(s_tile, row, chunk);
    if (std::is_same_v<T, C> && direct) {
      copy_chunk_async(s_to, count > 0 ? g_from : g_rows, count * static_cast<int>(sizeof(C)));
    } else {
      Pack<C, kPerChunk<C>> pack;
#pragma unroll
      for (int e = 0; e < kPerChunk<C>; ++e) {
        const float x = e < count ? to_float(g_from[e]) : 0.0f;
        pack.value[e] = from_float<C>(x);
      }
      *reinterpret_cast<Pack<C, kPerChunk<C>>*>(s_to) = pack;
    }
  }
}

// Whether 16 bytes divide the address of every row of (b, h, s, d).
static inline bool direct_rows(const TensorRef& t, bool packed) {
  const int64_t per_chunk = t.dtype == DType::f32 ? 4 : 8;
  if (reinterpret_cast<uintptr_t>(t.data) % kChunkBytes != 0) return false;
  for (int i = packed ? 1 : 0; i < 3; ++i) {
    if (t.stride[i] % per_chunk != 0) return false;
  }
  return true;
}

// ---- products ----

// Rows of b in a product p b that may hold NaN: none, or those whose column of p no row of the warp
// sees, a bit for each that this lane's accumulators hold.
struct SeesAll {
  static constexpr bool kGuards = false;
  __device__ uint32_t operator()(uint32_t two, int) const { return two; }
};

struct SeesSome {
  static constexpr bool kGuards = true;
  uint32_t seen;  // bit 2 n + e % 2

  // From the bits of the columns that this lane's rows see.
  __device__ explicit SeesSome(uint32_t bits) : seen(bits) {
#pragma unroll
    for (int offset = 4; offset < kWarp; offset *= 2) {
      seen |= __shfl_xor_sync(kFullWarp, seen, offset);
    }
  }
  // Elements of 16 bits of rows 8 n + 2 pair + 0, 1 of b, zero if not seen.
  __device__ uint32_t operator()(uint32_t two, int n) const {
    const uint32_t bits = seen >> (2 * n);
    return two & ((bits & 1 ? 0xffffu : 0u) | (bits & 2 ? 0xffff0000u : 0u));
  }
};

// r += a b^T, of the kM * 16 rows of s_a from a_row on and the 8 kN rows of s_b, which have d
// elements and then zeros. kUnroll: the steps of 16 elements that are in flight at once, as far as
// there are registers.
template <int kD, int kUnroll = kD / 16, typename C, int kM, int kN>
__device__ inline void multiply_transposed(float (&r)[kM][kN][4], const C* s_a, int a_row,
                                           const C* s_b, int d) {
  const Lane at;
  if constexpr (sizeof(C) == 2) {
#pragma unroll kUnroll
    for (int step = 0; step < kD / 16; ++step) {
      uint32_t r_a[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        load_matrices<4>(r_a[m], chunk_at<const C, kD>(s_a, a_row + 16 * m + at.lane % 16,
                                                       2 * step + at.lane / 16));
      }
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t r_b[4];
        load_matrices<4>(r_b, chunk_at<const C, kD>(s_b, 8 * n + at.lane / 16 * 8 + at.lane % 8,
                                                    2 * step + at.lane / 8 % 2));
        const uint32_t left[2] = {r_b[0], r_b[1]}, right[2] = {r_b[2], r_b[3]};
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          mma_16x8x16<C>(r[m][n], r_a[m], left);
          mma_16x8x16<C>(r[m][n + 1], r_a[m], right);
        }
      }
    }
  } else {
    for (int chunk = 0; 4 * chunk < d; ++chunk) {
      float4 a[kM][2];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          a[m][i] = *reinterpret_cast<const float4*>(
              chunk_at<const C, kD>(s_a, a_row + at.row(m, 2 * i), chunk));
        }
      }
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float4 b =
              *reinterpret_cast<const float4*>(chunk_at<const C, kD>(s_b, at.column(n, j), chunk));
#pragma unroll
          for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              float sum = r[m][n][2 * i + j];
              sum = fmaf(a[m][i].x, b.x, sum);
              sum = fmaf(a[m][i].y, b.y, sum);
              sum = fmaf(a[m][i].z, b.z, sum);
              r[m][n][2 * i + j] = fmaf(a[m][i].w, b.w, sum);
            }
          }
        }
      }
    }
  }
}

// Floats of shared memory that a warp needs to multiply its kM * 16 rows of 8 kN floats.
template <typename C, int kM, int kN>
constexpr int kScratchFloats = sizeof(C) == 2 ? 0 : kM * 16 * (8 * kN + 4);

// r += p b, with p as accumulators, rounded to C, and b the 8 kN rows of s_b, of which the columns
// from 8 first on are taken; those from d on are zero. s_scratch: the warp's kScratchFloats.
template <int kD, typename C, int kM, int kN, int kColumns, typename S>
__device__ inline void multiply(float (&r)[kM][kColumns][4], const float (&p)[kM][kN][4],
                                const C* s_b, int first, int d, float* s_scratch, const S& sees) {
  const Lane at;
  if constexpr (sizeof(C) == 2) {
#pragma unroll
    for (int step = 0; step < kN / 2; ++step) {
      uint32_t r_a[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float (&r_p)[4] = p[m][2 * step + i];
          r_a[m][2 * i] = pack_pair<C>(r_p[0], r_p[1]);
          r_a[m][2 * i + 1] = pack_pair<C>(r_p[2], r_p[3]);
        }
      }
#pragma unroll
      for (int n = 0; n < kColumns; n += 2) {
        uint32_t r_b[4];
        load_matrices<4, true>(
            r_b, chunk_at<const C, kD>(s_b, 16 * step + at.lane % 16, first + n + at.lane / 16));
#pragma unroll
        for (int i = 0; i < 4; ++i) r_b[i] = sees(r_b[i], 2 * step + i % 2);
        const uint32_t left[2] = {r_b[0], r_b[1]}, right[2] = {r_b[2], r_b[3]};
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          mma_16x8x16<C>(r[m][n], r_a[m], left);
          mma_16x8x16<C>(r[m][n + 1], r_a[m], right);
        }
      }
    }
  } else {
    constexpr int kPitch = 8 * kN + 4;
    __syncwarp();  // what was there has been read
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          *reinterpret_cast<float2*>(s_scratch + at.row(m, 2 * i) * kPitch + at.column(n, 0)) =
              make_float2(p[m][n][2 * i], p[m][n][2 * i + 1]);
        }
      }
    }
    __syncwarp();
    for (int k = 0; k < 8 * kN; k += 4) {
      float a[kM][2][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float4 four =
              *reinterpret_cast<const float4*>(s_scratch + at.row(m, 2 * i) * kPitch + k);
          a[m][i][0] = four.x;
          a[m][i][1] = four.y;
          a[m][i][2] = four.z;
          a[m][i][3] = four.w;
        }
      }
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        if (8 * (first + n) >= d) break;
        const int column = at.column(first + n, 0);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 b = *reinterpret_cast<const float2*>(
              chunk_at<const C, kD>(s_b, k + j, column / 4) + column % 4);
#pragma unroll
          for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              if (S::kGuards && a[m][i][j] == 0.0f) continue;
              r[m][n][2 * i] = fmaf(a[m][i][j], b.x, r[m][n][2 * i]);
              r[m][n][2 * i + 1] = fmaf(a[m][i][j], b.y, r[m][n][2 * i + 1]);
            }
          }
        }
      }
    }
  }
}

// ---- results ----

// kM * 16 rows of accumulators, from the columns 8 first on, to rows of d elements of T in memory,
// of which `count` exist, through the warp's own rows of a tile that no other warp reads.
template <int kD, typename T, int kM, int kN, typename C>
__device__ inline void store_rows(const float (&r)[kM][kN][4], int first, C* s_own, T* g_rows,
                                  int64_t stride, int count, int d) {
  static_assert(sizeof(T) <= sizeof(C), "the tile has room for the rows");
  const Lane at;
  T* s_rows = reinterpret_cast<T*>(s_own);
  __syncwarp();  // its rows have been read
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = at.column(first + n, 0);
        T* s_pair = chunk_at<T, kD>(s_rows, at.row(m, 2 * i), column / kPerChunk<T>) +
                    column % kPerChunk<T>;
        const float low = r[m][n][2 * i], high = r[m][n][2 * i + 1];
        if constexpr (sizeof(T) == 2) {
          *reinterpret_cast<uint32_t*>(s_pair) = pack_pair<T>(low, high);
        } else {
          *reinterpret_cast<float2*>(s_pair) = make_float2(low, high);
        }
      }
    }
  }
  __syncwarp();
  constexpr int kChunks = kN * 8 / kPerChunk<T>;
  const bool direct = reinterpret_cast<uintptr_t>(g_rows) % kChunkBytes == 0 &&
                      stride % kPerChunk<T> == 0 && d % kPerChunk<T> == 0;
  for (int i = at.lane; i < kM * 16 * kChunks; i += kWarp) {
    const int row = i / kChunks, chunk = i % kChunks + first * 8 / kPerChunk<T>;
    const int column = chunk * kPerChunk<T>;
    if (row >= count || column >= d) continue;
    const T* s_from = chunk_at<T, kD>(s_rows, row, chunk);
    T* g_to = g_rows + row * stride + column;
    if (direct) {
      store_chunk(g_to, load_chunk(s_from));
    } else {
      for (int e = 0; e < min(kPerChunk<T>, d - column); ++e) g_to[e] = s_from[e];
    }
  }
}

// Zeros in rows of d elements, by all threads of the block.
template <typename T>
__device__ inline void clear_rows(T* g_rows, int64_t stride, int count, int d) {
  for (int64_t i = threadIdx.x; i < static_cast<int64_t>(count) * d; i += blockDim.x) {
    g_rows[i / d * stride + i % d] = from_float<T>(0.0f);
  }
}

// ---- which kernel ----

static inline bool for_warpgroups(const AttentionProblem& p) {
#if defined(FASTGPT_SM90)
  return suits_warpgroups(p.in.q.dtype, p.d, has_features(p.in), compute_capability());
#else
  static_cast<void>(p);
  return false;
#endif
}

// Calls f(Constant<width>, Constant<features>) with the width of the tiles that hold heads of d
// elements. Rare kernels are compiled for fewer widths.
template <typename F>
void visit_feature_width(int d, const F& f) {
  if (d <= 64) return f(Constant<64>{}, Constant<true>{});
  if (d <= 128) return f(Constant<128>{}, Constant<true>{});
  f(Constant<256>{}, Constant<true>{});
}

template <typename F>
void visit_width(int d, bool features, const F& f) {
  if (features) return visit_feature_width(d, f);
  if (d <= 64) return f(Constant<64>{}, Constant<false>{});
  if (d <= 80) return f(Constant<80>{}, Constant<false>{});
  if (d <= 96) return f(Constant<96>{}, Constant<false>{});
  if (d <= 128) return f(Constant<128>{}, Constant<false>{});
  f(Constant<256>{}, Constant<false>{});
}

// Likewise for tiles of floats.
template <typename F>
void visit_float_width(int d, bool features, const F& f) {
  if (features) return visit_feature_width(d, f);
  if (d <= 64) return f(Constant<64>{}, Constant<false>{});
  if (d <= 128) return f(Constant<128>{}, Constant<false>{});
  f(Constant<256>{}, Constant<false>{});
}

}  // namespace fastgpt::cuda
