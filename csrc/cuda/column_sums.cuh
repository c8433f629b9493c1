// Sums over rows: each chunk of rows leaves a float row of partial sums, and a second kernel adds
// the chunks in ascending order, so that no bit depends on the GPU.
#pragma once

#include "csrc/cuda/launch.cuh"

namespace fastgpt::cuda {

constexpr int64_t kMaxChunks = 512;

// The rows of a chunk, a function of r alone.
static inline int64_t chunk_rows_of(int64_t r) {
  return (r + kMaxChunks - 1) / kMaxChunks;
}

static inline int64_t chunks_of(int64_t r) {
  return (r + chunk_rows_of(r) - 1) / chunk_rows_of(r);
}

// g_sum (n) = the partial sums of the chunks, `step` floats apart, or gains them.
static __global__ void sum_chunks_kernel(const float* g_partial, int64_t chunks, int64_t step,
                                         int64_t n, bool add, float* g_sum) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i >= n) return;
  float sum = add ? g_sum[i] : 0.0f;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += g_partial[chunk * step + i];
  g_sum[i] = sum;
}

static inline void sum_chunks(const float* g_partial, int64_t chunks, int64_t step, int64_t n,
                              void* g_sum, void* stream, bool add = false) {
  if (g_sum == nullptr) return;
  constexpr int kThreads = 128;
  launch(sum_chunks_kernel, dim3(grid_size((n + kThreads - 1) / kThreads)), dim3(kThreads), 0,
         stream, g_partial, chunks, step, n, add, static_cast<float*>(g_sum));
}

}  // namespace fastgpt::cuda
