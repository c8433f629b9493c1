// Rows that begin at any element's address, as those of an odd length do: 16 bytes are read at
// addresses that 16 divides, and shifted in the registers. So which thread takes which columns,
// and with it the order of a sum, does not depend on where a row lies. Nothing outside the row is
// read.
#pragma once

#include "csrc/common/dispatch.h"
#include "csrc/cuda/copy.cuh"

namespace fastgpt::cuda {

// The columns between the last address that a pack (or 16 bytes, if fewer) divides and g_row.
template <int kPack, typename T>
__device__ inline int columns_before(const T* g_row) {
  constexpr unsigned kBytes = sizeof(T) * kPack < kChunkBytes ? sizeof(T) * kPack : kChunkBytes;
  return static_cast<int>(reinterpret_cast<uintptr_t>(g_row) % kBytes / sizeof(T));
}

// 32 bytes less the first `shift` elements, which are fewer than 16.
template <typename T>
__device__ inline Pack<T, kChunkBytes / sizeof(T)> shifted(const uint4 (&r_chunks)[2], int shift) {
  const int bytes = shift * static_cast<int>(sizeof(T));
  uint32_t r_words[8];
  memcpy(r_words, r_chunks, sizeof r_words);
  // Ascending: each word comes from a later one.
#pragma unroll
  for (int w = 0; w < 6; ++w) r_words[w] = bytes & 8 ? r_words[w + 2] : r_words[w];
#pragma unroll
  for (int w = 0; w < 5; ++w) r_words[w] = bytes & 4 ? r_words[w + 1] : r_words[w];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const uint64_t two = static_cast<uint64_t>(r_words[w + 1]) << 32 | r_words[w];
    r_words[w] = static_cast<uint32_t>(two >> (bytes % 4 * 8));
  }
  Pack<T, kChunkBytes / sizeof(T)> r_pack;
  memcpy(&r_pack, r_words, sizeof r_pack);
  return r_pack;
}

// f(first column, r_x, Constant<end>) for this thread's packs of 16 bytes of rows [0, n), r_x[k] of
// row k. Packs begin at column `begin` (not after 0) and go round the threads along x; kGroup of
// them are under way before the first is used. Only a pack at an end (end: true) may have columns
// outside of the row, as zeros. kBack: the last groups first, which caches have that have seen the
// row.
template <int kGroup, bool kBack, int kRows, typename T, typename F>
__device__ inline void for_packs_anywhere(const T* const (&g_rows)[kRows], int begin, int n,
                                          const F& f) {
  constexpr int kPack = kChunkBytes / sizeof(T);
  const int threads = blockDim.x, thread = threadIdx.x;
  const auto use = [&](const Pack<T, kPack>(&r_packs)[kRows], int q, auto end) {
    float r_x[kRows][kPack];
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
#pragma unroll
      for (int e = 0; e < kPack; ++e) r_x[k][e] = to_float(r_packs[k].value[e]);
    }
    f(begin + q * kPack, r_x, end);
  };
  const auto by_element = [&](int q) {
    Pack<T, kPack> r_packs[kRows] = {};
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      const int column = begin + q * kPack + e;
      if (column < 0 || column >= n) continue;
#pragma unroll
      for (int k = 0; k < kRows; ++k) r_packs[k].value[e] = g_rows[k][column];
    }
    use(r_packs, q, Constant<true>{});
  };
  int shift[kRows];
  const T* g_chunks[kRows];
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    shift[k] = columns_before<kPack>(g_rows[k] + begin);
    g_chunks[k] = g_rows[k] + (begin - shift[k]);
  }
  // The chunks of packs [2, last) are inside the rows, however those lie; the others, no more than
  // there are threads, are read element by element.
  const int packs = (n - begin + kPack - 1) / kPack, whole = (n - begin) / kPack;
  const int last = whole < 3 ? 2 : whole - 1;
  if (thread < 2 && thread < packs) by_element(thread);
  const int start = thread < 2 ? thread + threads : thread, step = kGroup * threads;
  const int back = start < last ? (last - 1 - start) / step * step : -step;  // to the last group
  for (int q = kBack ? start + back : start; kBack ? q >= start : q < last;
       q += kBack ? -step : step) {
    uint4 r_chunks[kGroup][kRows][2];
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      if (q + g * threads >= last) break;
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        const T* g_from = g_chunks[k] + (q + g * threads) * kPack;
        r_chunks[g][k][0] = load_chunk(g_from);
        // That of the next thread; its line is on its way to L1.
        if (shift[k] != 0) r_chunks[g][k][1] = load_chunk(g_from + kPack);
      }
    }
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      if (q + g * threads >= last) break;
      Pack<T, kPack> r_packs[kRows];
#pragma unroll
      for (int k = 0; k < kRows; ++k) r_packs[k] = shifted<T>(r_chunks[g][k], shift[k]);
      use(r_packs, q + g * threads, Constant<false>{});
    }
  }
  const int rest = last + (thread + threads - last % threads) % threads;
  if (rest < packs) by_element(rest);
}

// The same; without kAnywhere, packs lie at addresses that they divide, and there are no ends.
template <bool kAnywhere, int kGroup, bool kBack, int kRows, typename T, typename F>
__device__ inline void for_groups(const T* const (&g_rows)[kRows], int begin, int n, const F& f) {
  if constexpr (kAnywhere) return for_packs_anywhere<kGroup, kBack>(g_rows, begin, n, f);
  constexpr int kPack = kChunkBytes / sizeof(T);
  const int step = blockDim.x * kPack;
  const int groups = (n + step * kGroup - 1) / (step * kGroup);
  for (int group = 0; group < groups; ++group) {
    const int first = (kBack ? groups - 1 - group : group) * step * kGroup +
                      static_cast<int>(threadIdx.x) * kPack;
    Pack<T, kPack> r_group[kGroup][kRows];
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      const int i = first + g * step;
      if (i >= n) break;
#pragma unroll
      for (int k = 0; k < kRows; ++k) r_group[g][k] = load_pack<kPack>(g_rows[k] + i);
    }
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      const int i = first + g * step;
      if (i >= n) break;
      float r_x[kRows][kPack];
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
#pragma unroll
        for (int e = 0; e < kPack; ++e) r_x[k][e] = to_float(r_group[g][k].value[e]);
      }
      f(i, r_x, Constant<false>{});
    }
  }
}

// To columns i to i + kPack - 1 of the row [0, n), as far as they are in it.
template <int kPack, typename T>
__device__ inline void store_within(T* g_row, int i, int n, const float (&r_from)[kPack]) {
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    if (i + e >= 0 && i + e < n) g_row[i + e] = from_float<T>(r_from[e]);
  }
}

}  // namespace fastgpt::cuda
