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

// f(first column, r_x, Constant<end>) for this thread's packs of 16 bytes of the row [0, n), which
// begin at column `begin` (not after 0) and go round the threads along x. kGroup packs are under
// way before the first is used. Only a pack at an end (end: true) may have columns outside of the
// row, as zeros.
template <int kGroup, typename T, typename F>
__device__ inline void for_packs_anywhere(const T* g_row, int begin, int n, const F& f) {
  constexpr int kPack = kChunkBytes / sizeof(T);
  const int threads = blockDim.x, thread = threadIdx.x;
  const int shift = columns_before<kPack>(g_row + begin);
  const auto whole = [&](const Pack<T, kPack>& r_pack, int q, auto end) {
    float r_x[kPack];
#pragma unroll
    for (int e = 0; e < kPack; ++e) r_x[e] = to_float(r_pack.value[e]);
    f(begin + q * kPack, r_x, end);
  };
  const auto by_element = [&](int q) {
    if (q % threads != thread) return;
    Pack<T, kPack> r_pack = {};
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      const int column = begin + q * kPack + e;
      if (column >= 0 && column < n) r_pack.value[e] = g_row[column];
    }
    whole(r_pack, q, Constant<true>{});
  };
  // Packs [first, last) are those whose chunks are inside the row.
  const int packs = (n - begin + kPack - 1) / kPack;
  const int reach = shift == 0 ? kPack : 2 * kPack - shift;
  const int first = begin < shift ? 1 : 0;
  const int inside = n - begin < reach ? 0 : (n - begin - reach) / kPack + 1;
  const int last = inside < first ? first : inside;
  if (first == 1) by_element(0);
  const T* g_chunks = g_row + (begin - shift);
  for (int q = thread < first ? thread + threads : thread; q < last; q += kGroup * threads) {
    uint4 r_chunks[kGroup][2];
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (q + k * threads >= last) break;
      const T* g_from = g_chunks + (q + k * threads) * kPack;
      r_chunks[k][0] = load_chunk(g_from);
      // That of the next thread; its line is on its way to L1.
      if (shift != 0) r_chunks[k][1] = load_chunk(g_from + kPack);
    }
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      if (q + k * threads >= last) break;
      whole(shifted<T>(r_chunks[k], shift), q + k * threads, Constant<false>{});
    }
  }
  for (int q = last; q < packs; ++q) by_element(q);
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
