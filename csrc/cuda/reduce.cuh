// Sums and maxima over the threads of a warp and of a block, in an order that only the block size
// decides. With several rows in a block, along y, each row is one warp.
#pragma once

#include "csrc/cuda/arch.h"

namespace fastgpt::cuda {

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, offset);
  }
  return x;
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  }
  return x;
}

// The largest x of the block, NaN aside, returned to every thread. s_max: kWarp floats.
__device__ inline float block_max(float x, float* s_max) {
  const int warps = (blockDim.x + kWarp - 1) / kWarp;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  x = warp_max(x);
  if (warps == 1) return x;
  __syncthreads();  // the previous call's values have been read
  if (lane == 0) s_max[warp] = x;
  __syncthreads();
  return warp_max(lane < warps ? s_max[lane] : -INFINITY);
}

// Sums of kCount values over the block, returned to every thread. s_sums: kCount * kWarp floats.
template <int kCount>
__device__ inline void block_sum(float (&x)[kCount], float* s_sums) {
  const int warps = (blockDim.x + kWarp - 1) / kWarp;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < kCount; ++k) x[k] = warp_sum(x[k]);
  if (warps == 1) return;
  __syncthreads();  // the previous call's sums have been read
  if (lane == 0) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) s_sums[k * kWarp + warp] = x[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kCount; ++k) x[k] = warp_sum(lane < warps ? s_sums[k * kWarp + lane] : 0.0f);
}

}  // namespace fastgpt::cuda
