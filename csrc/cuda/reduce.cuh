// Sums and maxima over the threads of a warp and of a block, in an order that only the block size
// decides (with several rows in a block, along y, each row is one warp), and the exponential that
// the softmax of a warp takes.
#pragma once

#include "csrc/cuda/arch.h"

namespace fastgpt::cuda {

// Over each group of kLanes neighbouring lanes (a power of two); every lane gets its group's.
template <int kLanes = kWarp>
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kFullWarp, x, offset);
  }
  return x;
}

template <int kLanes = kWarp>
__device__ inline float warp_max(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, offset));
  }
  return x;
}

// kCount values over the block, each reduced by warp_reduce (first over warps, then over their
// results; `identity` changes nothing) and returned to every thread. s_partial: kCount * kWarp.
template <int kCount, typename F>
__device__ inline void block_reduce(float (&x)[kCount], float* s_partial, float identity,
                                    const F& warp_reduce) {
  const int warps = (blockDim.x + kWarp - 1) / kWarp;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < kCount; ++k) x[k] = warp_reduce(x[k]);
  if (warps == 1) return;
  __syncthreads();  // the previous call's results have been read
  if (lane == 0) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) s_partial[k * kWarp + warp] = x[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    x[k] = warp_reduce(lane < warps ? s_partial[k * kWarp + lane] : identity);
  }
}

// Sums of kCount values over the block, returned to every thread. s_sums: kCount * kWarp floats.
template <int kCount>
__device__ inline void block_sum(float (&x)[kCount], float* s_sums) {
  block_reduce(x, s_sums, 0.0f, [](float value) { return warp_sum(value); });
}

// Likewise over one row of a block, the threads along x, of any number of rows along y, in one
// barrier of all of them. s_sums: kCount * kWarp floats, not those of the previous call, which
// other warps may still read.
template <int kCount>
__device__ inline void row_sum(float (&x)[kCount], float* s_sums) {
  const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < kCount; ++k) x[k] = warp_sum(x[k]);
  if (warps == 1) return;
  s_sums += threadIdx.y * warps;
  if (lane == 0) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) s_sums[k * kWarp + threadIdx.x / kWarp] = x[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kCount; ++k) x[k] = warp_sum(lane < warps ? s_sums[k * kWarp + lane] : 0.0f);
}

// The largest x of the block, NaN aside, returned to every thread. s_maxima: kWarp floats.
__device__ inline float block_max(float x, float* s_maxima) {
  float r_x[1] = {x};
  block_reduce(r_x, s_maxima, -INFINITY, [](float value) { return warp_max(value); });
  return r_x[0];
}

// 2^x to 2 units in the last place; results below the normal numbers are 0.
__device__ inline float exp2_approx(float x) {
#if defined(FASTGPT_EMULATED)
  return emulator::exp2_approx(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

}  // namespace fastgpt::cuda
