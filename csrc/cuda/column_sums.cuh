// Sums over rows: each chunk of rows leaves a float row of partial sums, and a second kernel adds
// the chunks in an order that only their number decides, so that no bit depends on the GPU.
#pragma once

#include "csrc/cuda/launch.cuh"

namespace fastgpt::cuda {

constexpr int64_t kMaxChunks = 264;  // two blocks for each multiprocessor of an H100

// The rows of a chunk, a function of r alone.
static inline int64_t chunk_rows_of(int64_t r) {
  return (r + kMaxChunks - 1) / kMaxChunks;
}

static inline int64_t chunks_of(int64_t r) {
  return (r + chunk_rows_of(r) - 1) / chunk_rows_of(r);
}

// Each takes n columns of every chunk, the second those behind the first's. nullptr: nobody asks.
struct ColumnSums {
  float* first;
  float* second;
};

constexpr int kSumColumns = kWarp;  // of a block, along x
constexpr int kSumLanes = 16;       // of a block, along y: each takes every sixteenth chunk

// g_sums = the partial sums of the chunks, `columns` (n or 2 n) floats each, or gains them.
static __global__ void __launch_bounds__(kSumColumns* kSumLanes)
    sum_chunks_kernel(const float* g_partial, int64_t chunks, int64_t columns, int64_t n, bool add,
                      ColumnSums g_sums) {
  FASTGPT_SHARED(float, s_sums, (kSumLanes * kSumColumns));
  const int64_t i = blockIdx.x * static_cast<int64_t>(kSumColumns) + threadIdx.x;
  float sum = 0.0f;
  if (i < columns) {
#pragma unroll 8
    for (int64_t chunk = threadIdx.y; chunk < chunks; chunk += kSumLanes) {
      sum += g_partial[chunk * columns + i];
    }
  }
  s_sums[threadIdx.y * kSumColumns + threadIdx.x] = sum;
  __syncthreads();
  float* g_sum = i < n ? g_sums.first : g_sums.second;
  if (threadIdx.y != 0 || i >= columns || g_sum == nullptr) return;
  g_sum += i < n ? i : i - n;
  sum = add ? *g_sum : 0.0f;
#pragma unroll
  for (int lane = 0; lane < kSumLanes; ++lane) sum += s_sums[lane * kSumColumns + threadIdx.x];
  *g_sum = sum;
}

static inline void sum_chunks(const float* g_partial, int64_t chunks, int64_t columns, int64_t n,
                              ColumnSums g_sums, void* stream, bool add = false) {
  if (g_sums.first == nullptr && g_sums.second == nullptr) return;
  launch(sum_chunks_kernel, dim3(grid_size((columns + kSumColumns - 1) / kSumColumns)),
         dim3(kSumColumns, kSumLanes), 0, stream, g_partial, chunks, columns, n, add, g_sums);
}

}  // namespace fastgpt::cuda
