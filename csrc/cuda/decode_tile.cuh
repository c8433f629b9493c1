// What a warp of decode makes of a tile of keys in shared memory, for the kRows queries of its
// block: s = scale q k^T, the online softmax, o += p v. 16-bit inputs go to the tensor cores, float
// ones to the vector units. A tile is kKeys rows of k or v of kD columns, q is kRows such rows, all
// in chunks where swizzled() puts them. Query r sees the keys s_bounds[r] up to, not including,
// s_bounds[kRows + r]. Scores are in units of log 2.
#pragma once

#include "csrc/common/math.h"
#include "csrc/cuda/mma.cuh"
#include "csrc/cuda/reduce.cuh"

namespace fastgpt::cuda {

// What to subtract from scores whose maximum is top, so that no exponent is NaN.
__device__ inline float centered(float top) {
  return top == -INFINITY ? 0.0f : top;
}

// Four floats into shared memory, which store() does not reach.
__device__ inline void store_floats(float* s_to, const float (&r_from)[4]) {
  *reinterpret_cast<float4*>(s_to) = make_float4(r_from[0], r_from[1], r_from[2], r_from[3]);
}

// Where a warp leaves what it found: o (kRows, kStep), not normalized; per row the maximum of the
// scores and the sum of 2^(s - maximum).
template <int kD>
struct WarpResult {
  static constexpr int kStep = kD + 4;  // so that neighbouring rows lie in other banks
  float* s_o;
  float* s_state;
};

template <typename T, int kD, int kRows>
class DecodeTile {
 public:
  static constexpr int kKeys = 16;
  static constexpr int kChunks = kD / 8;

  __device__ DecodeTile(const int* s_bounds, float scale) : scale_(scale) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      r_top_[tile] = -INFINITY;
      r_low_[tile] = s_bounds[8 * tile + group()];
      r_high_[tile] = s_bounds[kRows + 8 * tile + group()];
    }
  }

  // The keys first to first + kKeys.
  __device__ void absorb(const uint4* s_q, const uint4* s_k, const uint4* s_v, int first) {
    const int key = lane() % 8 + lane() / 16 * 8, half = lane() / 8 % 2;
    float r_s[2][4] = {};  // of 8 keys each
#pragma unroll
    for (int step = 0; step < kD / 16; ++step) {
      uint32_t r_q[4] = {}, r_k[4];
      load_queries(s_q, step, r_q);
      load_matrices(r_k, s_k + swizzled<kChunks>(key, 2 * step + half));
      mma_16x8x16<T>(r_s[0], r_q, {r_k[0], r_k[1]});
      mma_16x8x16<T>(r_s[1], r_q, {r_k[2], r_k[3]});
    }
    // The scores of 8 rows, packed, are the second factor of o^T += v^T p^T.
    uint32_t r_p[kTiles][2];
    float r_rescale[kTiles][2];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const float rescale = softmax(r_s, tile, first);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        r_p[tile][n] = pack_pair<T>(r_s[n][2 * tile], r_s[n][2 * tile + 1]);
        r_rescale[tile][n] = __shfl_sync(kFullWarp, rescale, 4 * (2 * pair() + n));
      }
    }
#pragma unroll
    for (int m = 0; m < kD / 16; ++m) {
      uint32_t r_v[4];
      load_matrices<4, true>(r_v, s_v + swizzled<kChunks>(key, 2 * m + half));
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int e = 0; e < 4; ++e) r_o_[m][tile][e] *= r_rescale[tile][e % 2];
        mma_16x8x16<T>(r_o_[m][tile], r_v, r_p[tile]);
      }
    }
  }

  // What another warp found of the same queries.
  __device__ void add(const WarpResult<kD>& from) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const float* s_state = from.s_state + 2 * (8 * tile + group());
      const float top = fmaxf(r_top_[tile], s_state[0]), center = centered(top);
      const float ours = exp2_approx(r_top_[tile] - center);
      const float theirs = exp2_approx(s_state[0] - center);
      r_sum_[tile] = fmaf(r_sum_[tile], ours, pair() == 0 ? theirs * s_state[1] : 0.0f);
      r_top_[tile] = top;
      float r_ours[2], r_theirs[2];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        r_ours[n] = __shfl_sync(kFullWarp, ours, 4 * (2 * pair() + n));
        r_theirs[n] = __shfl_sync(kFullWarp, theirs, 4 * (2 * pair() + n));
      }
      for_own(tile, [&](int m, int e, int at) {
        r_o_[m][tile][e] = fmaf(r_theirs[e % 2], from.s_o[at], r_o_[m][tile][e] * r_ours[e % 2]);
      });
    }
  }

  __device__ void save(const WarpResult<kD>& to) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      for_own(tile, [&](int m, int e, int at) { to.s_o[at] = r_o_[m][tile][e]; });
      const float sum = warp_sum<4>(r_sum_[tile]);
      if (pair() == 0) {
        to.s_state[2 * (8 * tile + group())] = r_top_[tile];
        to.s_state[2 * (8 * tile + group()) + 1] = sum;
      }
    }
  }

 private:
  static constexpr int kTiles = kRows / 8;
  static_assert(kRows == 8 || kRows == 16, "a product has 16 rows, of which 8 may idle");
  static_assert(kD % 16 == 0, "a product takes 16 columns at once");

  __device__ static int lane() { return threadIdx.x % kWarp; }
  __device__ static int group() { return lane() / 4; }
  __device__ static int pair() { return lane() % 4; }

  // f(m, e, where r_o_[m][tile][e] has its place in a result).
  template <typename F>
  __device__ static void for_own(int tile, const F& f) {
#pragma unroll
    for (int m = 0; m < kD / 16; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = 8 * tile + 2 * pair() + e % 2, column = 16 * m + group() + e / 2 * 8;
        f(m, e, row * WarpResult<kD>::kStep + column);
      }
    }
  }

  // Columns 16 step to 16 step + 16 of the queries; rows that idle keep their zeros.
  __device__ static void load_queries(const uint4* s_q, int step, uint32_t (&r_q)[4]) {
    if constexpr (kTiles == 2) {
      load_matrices(r_q, s_q + swizzled<kChunks>(lane() % 16, 2 * step + lane() / 16));
    } else {
      uint32_t r_half[2];
      load_matrices(r_half, s_q + swizzled<kChunks>(lane() % 8, 2 * step + lane() / 8 % 2));
      r_q[0] = r_half[0];
      r_q[2] = r_half[1];
    }
  }

  // Turns the scores of 8 rows into p; returns the factor for o.
  __device__ float softmax(float (&r_s)[2][4], int tile, int first) {
    float top = r_top_[tile];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float& s = r_s[e / 2][2 * tile + e % 2];
      const int at = first + 8 * (e / 2) + 2 * pair() + e % 2;
      s = at >= r_low_[tile] && at < r_high_[tile] ? s * scale_ : -INFINITY;
      top = fmaxf(top, s);
    }
    top = warp_max<4>(top);
    const float center = centered(top), rescale = exp2_approx(r_top_[tile] - center);
    float sum = 0.0f;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float& s = r_s[e / 2][2 * tile + e % 2];
      s = exp2_approx(s - center);
      sum += s;
    }
    r_sum_[tile] = fmaf(r_sum_[tile], rescale, sum);
    r_top_[tile] = top;
    return rescale;
  }

  float scale_;
  int r_low_[kTiles], r_high_[kTiles];
  float r_top_[kTiles], r_sum_[kTiles] = {};  // of row group; the sum over the lane's keys alone
  float r_o_[kD / 16][kTiles][4] = {};        // o^T, (16 columns, 8 rows) each
};

// Scores: a lane is one of four to a key and takes every fourth chunk of it. o: a lane takes every
// 32nd chunk of all keys.
template <int kD, int kRows>
class DecodeTile<float, kD, kRows> {
 public:
  static constexpr int kKeys = 8;
  static constexpr int kChunks = kD / 4;

  __device__ DecodeTile(const int* s_bounds, float scale) : s_bounds_(s_bounds), scale_(scale) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) r_top_[row] = -INFINITY;
  }

  __device__ void absorb(const uint4* s_q, const uint4* s_k, const uint4* s_v, int first) {
    float r_s[kRows] = {};
#pragma unroll
    for (int i = 0; i < kChunks / kParts; ++i) {
      const int chunk = i * kParts + lane() / kKeys;
      float r_k[4], r_q[4];
      load_floats(s_k + swizzled<kChunks>(lane() % kKeys, chunk), r_k);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        load_floats(s_q + swizzled<kChunks>(row, chunk), r_q);
#pragma unroll
        for (int e = 0; e < 4; ++e) r_s[row] = fmaf(r_q[e], r_k[e], r_s[row]);
      }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float rescale = softmax(r_s[row], row, first + lane() % kKeys);
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) r_o_[row][i][e] *= rescale;
      }
    }
#pragma unroll
    for (int key = 0; key < kKeys; ++key) {
      float r_p[kRows];
#pragma unroll
      for (int row = 0; row < kRows; ++row) r_p[row] = __shfl_sync(kFullWarp, r_s[row], key);
      for_own_chunks([&](int i, int chunk) {
        float r_v[4];
        load_floats(s_v + swizzled<kChunks>(key, chunk), r_v);
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
#pragma unroll
          for (int e = 0; e < 4; ++e) r_o_[row][i][e] = fmaf(r_p[row], r_v[e], r_o_[row][i][e]);
        }
      });
    }
  }

  // What another warp found of the same queries.
  __device__ void add(const WarpResult<kD>& from) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float* s_state = from.s_state + 2 * row;
      const float top = fmaxf(r_top_[row], s_state[0]), center = centered(top);
      const float ours = exp2_approx(r_top_[row] - center);
      const float theirs = exp2_approx(s_state[0] - center);
      r_sum_[row] = fmaf(r_sum_[row], ours, lane() % kKeys == 0 ? theirs * s_state[1] : 0.0f);
      r_top_[row] = top;
      for_own_chunks([&](int i, int chunk) {
        float r_theirs[4];
        load<4>(from.s_o + row * WarpResult<kD>::kStep + 4 * chunk, r_theirs);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          r_o_[row][i][e] = fmaf(theirs, r_theirs[e], r_o_[row][i][e] * ours);
        }
      });
    }
  }

  __device__ void save(const WarpResult<kD>& to) const {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      for_own_chunks([&](int i, int chunk) {
        store_floats(to.s_o + row * WarpResult<kD>::kStep + 4 * chunk, r_o_[row][i]);
      });
      const float sum = warp_sum<kKeys>(r_sum_[row]);
      if (lane() == 0) {
        to.s_state[2 * row] = r_top_[row];
        to.s_state[2 * row + 1] = sum;
      }
    }
  }

 private:
  static constexpr int kParts = kWarp / kKeys;
  static constexpr int kOwn = (kChunks + kWarp - 1) / kWarp;

  __device__ static int lane() { return threadIdx.x % kWarp; }

  __device__ static void load_floats(const uint4* s_chunk, float (&r_to)[4]) {
    load<4>(reinterpret_cast<const float*>(s_chunk), r_to);
  }

  // f(index among the lane's own, chunk).
  template <typename F>
  __device__ static void for_own_chunks(const F& f) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int chunk = i * kWarp + lane();
      if (chunk < kChunks) f(i, chunk);
    }
  }

  // Turns this lane's part of the score of key `at` into p, the same in all parts; returns the
  // factor for o.
  __device__ float softmax(float& s, int row, int at) {
#pragma unroll
    for (int offset = kKeys; offset < kWarp; offset *= 2) {
      s += __shfl_xor_sync(kFullWarp, s, offset);
    }
    s = at >= s_bounds_[row] && at < s_bounds_[kRows + row] ? s * scale_ : -INFINITY;
    const float top = fmaxf(r_top_[row], warp_max<kKeys>(s));
    const float center = centered(top), rescale = exp2_approx(r_top_[row] - center);
    s = exp2_approx(s - center);
    r_sum_[row] = fmaf(r_sum_[row], rescale, s);
    r_top_[row] = top;
    return rescale;
  }

  const int* s_bounds_;
  float scale_;
  float r_top_[kRows], r_sum_[kRows] = {};  // the sum over the lane's keys alone
  float r_o_[kRows][kOwn][4] = {};
};

}  // namespace fastgpt::cuda
