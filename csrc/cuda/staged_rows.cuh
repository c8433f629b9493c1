// Rows that are needed twice, kept in shared memory from the first time to the second.
#pragma once

#include "csrc/cuda/anywhere.cuh"
#include "csrc/cuda/launch.cuh"

namespace fastgpt::cuda {

// kRows rows of n elements, by all threads of a block. A row keeps its place within 16 bytes,
// wherever that is. Without bytes of shared memory nothing is kept.
template <int kRows, typename T>
class StagedRows {
 public:
  static constexpr int kPack = kChunkBytes / sizeof(T);

  // What a row of n elements takes, wherever it lies.
  __host__ __device__ static int64_t bytes_for(int64_t n) {
    return (n + 2 * kPack - 2) / kPack * kChunkBytes;
  }

  // Each row takes so many bytes of s_rows. The copies are under way afterwards.
  __device__ StagedRows(const T* const (&g_rows)[kRows], int n, unsigned char* s_rows, int bytes)
      : kept_(bytes != 0) {
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      g_rows_[k] = g_rows[k];
      if (!kept_) continue;
      const int shift = columns_before<kPack>(g_rows[k]);
      T* s_chunks = reinterpret_cast<T*>(s_rows + k * bytes);
      s_rows_[k] = s_chunks + shift;
      for (int c = threadIdx.x; c * kPack < shift + n; c += blockDim.x) {
        const int column = c * kPack - shift;
        if (column >= 0 && column + kPack <= n) {
          copy_chunk_async(s_chunks + c * kPack, g_rows[k] + column);
          continue;
        }
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          if (column + e >= 0 && column + e < n) s_chunks[c * kPack + e] = g_rows[k][column + e];
        }
      }
    }
    if (kept_) commit_copies();
  }
  // f(rows), the first time and the second.
  template <typename F>
  __device__ void first(const F& f) const {
    if (!kept_) return f(g_rows_);
    wait_copies<0>();
    __syncthreads();
    f(s_rows_);
  }
  template <typename F>
  __device__ void second(const F& f) const {
    kept_ ? f(s_rows_) : f(g_rows_);
  }

 private:
  bool kept_;
  const T *g_rows_[kRows], *s_rows_[kRows];
};

// The bytes of shared memory for each of kRows rows of n elements; 0 where it does not pay, as
// measured on an H200: in rows that L1 holds, and where one block would fill a multiprocessor (but
// for one row, which L2 would give a second time).
template <int kRows, typename T>
int staged_bytes(int64_t n) {
  constexpr int64_t kLeast = 16 << 10, kStaticBytes = 1024;
  const int64_t bytes = StagedRows<kRows, T>::bytes_for(n), all = kRows * bytes;
  const int64_t room = static_cast<int64_t>(most_shared_bytes()) - kStaticBytes;
  return all < kLeast || all > room / kRows ? 0 : static_cast<int>(bytes);
}

}  // namespace fastgpt::cuda
