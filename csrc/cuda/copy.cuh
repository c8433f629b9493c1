// Global memory in and out: up to 16 bytes at a time, converted from and to float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "csrc/ops/tensor_ref.h"

namespace fastgpt::cuda {

__device__ inline float to_float(float x) {
  return x;
}
__device__ inline float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ inline float to_float(__half x) {
  return __half2float(x);
}

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount <= 16 ? sizeof(T) * kCount : 16) Pack {
  T value[kCount];
};

template <int kCount, typename T>
__device__ inline Pack<T, kCount> load_pack(const T* g_from) {
  return *reinterpret_cast<const Pack<T, kCount>*>(g_from);
}

template <int kCount, typename T>
__device__ inline void load(const T* g_from, float (&r_to)[kCount]) {
  const Pack<T, kCount> pack = load_pack<kCount>(g_from);
#pragma unroll
  for (int i = 0; i < kCount; ++i) r_to[i] = to_float(pack.value[i]);
}

template <int kCount, typename T>
__device__ inline void store(T* g_to, const float (&r_from)[kCount]) {
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < kCount; ++i) pack.value[i] = from_float<T>(r_from[i]);
  *reinterpret_cast<Pack<T, kCount>*>(g_to) = pack;
}

// Element i of a parameter vector of any float dtype; fallback where there is none.
__device__ inline float parameter(const TensorRef& t, int64_t i, float fallback) {
  if (t.data == nullptr) return fallback;
  if (t.dtype == DType::bf16) return to_float(static_cast<const __nv_bfloat16*>(t.data)[i]);
  if (t.dtype == DType::f16) return to_float(static_cast<const __half*>(t.data)[i]);
  return static_cast<const float*>(t.data)[i];
}

}  // namespace fastgpt::cuda
