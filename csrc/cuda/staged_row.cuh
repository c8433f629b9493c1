// A row that is needed twice, kept in shared memory from the first time to the second.
#pragma once

#include "csrc/cuda/anywhere.cuh"
#include "csrc/cuda/launch.cuh"

namespace fastgpt::cuda {

// A row of n elements, by all threads of a block. It keeps its place within 16 bytes, wherever that
// is. Without bytes of shared memory it is not kept.
template <typename T>
class StagedRow {
 public:
  static constexpr int kPack = kChunkBytes / sizeof(T);

  // The copies are under way afterwards.
  __device__ StagedRow(const T* g_row, int n, unsigned char* s_chunks, int bytes)
      : kept_(bytes != 0), g_row_(g_row) {
    if (!kept_) return;
    const int shift = columns_before<kPack>(g_row);
    T* s_from = reinterpret_cast<T*>(s_chunks);
    s_row_ = s_from + shift;
    for (int c = threadIdx.x; c * kPack < shift + n; c += blockDim.x) {
      const int column = c * kPack - shift;
      if (column >= 0 && column + kPack <= n) {
        copy_chunk_async(s_from + c * kPack, g_row + column);
        continue;
      }
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        if (column + e >= 0 && column + e < n) s_from[c * kPack + e] = g_row[column + e];
      }
    }
    commit_copies();
  }
  // f(row), the first time and the second.
  template <typename F>
  __device__ void first(const F& f) const {
    if (!kept_) return f(g_row_);
    wait_copies<0>();
    __syncthreads();
    f(s_row_);
  }
  template <typename F>
  __device__ void second(const F& f) const {
    kept_ ? f(s_row_) : f(g_row_);
  }

 private:
  bool kept_;
  const T *g_row_, *s_row_ = nullptr;
};

// The bytes of shared memory that keep a row of n elements, wherever it lies; 0 where they do not
// pay, as measured on an H200: where L1 holds it, and where there is no room for all of it.
template <typename T>
int staged_bytes(int64_t n) {
  constexpr int64_t kPack = StagedRow<T>::kPack, kLeast = 16 << 10;
  const int64_t bytes = (n + 2 * kPack - 2) / kPack * kChunkBytes;
  const auto room = static_cast<int64_t>(most_shared_bytes());
  return bytes < kLeast || bytes > room ? 0 : static_cast<int>(bytes);
}

}  // namespace fastgpt::cuda
