// Memory in and out: up to 16 bytes at a time, converted from and to float; chunks of 16 bytes as
// they are, to shared memory also asynchronously (cp.async).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "csrc/cuda/arch.h"
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

// A pack as it lies in memory, in whole registers: the compiler takes a Pack apart at once, and so
// waits for the load.
template <typename T, int kCount>
struct RawPack {
  static constexpr int kBytes = sizeof(T) * kCount;
  uint32_t word[(kBytes + 3) / 4];

  __device__ void load(const T* g_from) {
    if constexpr (kBytes % 4 == 0) {
      const Pack<uint32_t, kBytes / 4> pack =
          *reinterpret_cast<const Pack<uint32_t, kBytes / 4>*>(g_from);
#pragma unroll
      for (int i = 0; i < kBytes / 4; ++i) word[i] = pack.value[i];
    } else {
      static_assert(kBytes == 2, "a pack is one element, or whole registers");
      word[0] = *reinterpret_cast<const uint16_t*>(g_from);
    }
  }
  __device__ void floats(float (&r_to)[kCount]) const {
    T r_value[kCount];
    memcpy(r_value, word, sizeof r_value);
#pragma unroll
    for (int i = 0; i < kCount; ++i) r_to[i] = to_float(r_value[i]);
  }
};

// To global memory. In PTX: in a loop the compiler may take the store of a struct apart, element by
// element.
template <int kCount, typename T>
__device__ inline void store_pack(T* g_to, const Pack<T, kCount>& pack) {
#if defined(FASTGPT_EMULATED)
  emulator::require_global(g_to);
  *reinterpret_cast<Pack<T, kCount>*>(g_to) = pack;
#else
  constexpr int kBytes = sizeof(pack);
  if constexpr (kBytes % 16 == 0) {
    uint4 r_words[kBytes / 16];
    memcpy(r_words, &pack, kBytes);
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      const uint4& w = r_words[i];
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(
                       __cvta_generic_to_global(reinterpret_cast<uint4*>(g_to) + i)),
                   "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w)
                   : "memory");
    }
  } else if constexpr (kBytes == 8) {
    uint2 w;
    memcpy(&w, &pack, kBytes);
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(g_to)), "r"(w.x),
                 "r"(w.y)
                 : "memory");
  } else {
    *reinterpret_cast<Pack<T, kCount>*>(g_to) = pack;
  }
#endif
}

template <int kCount, typename T>
__device__ inline void store(T* g_to, const float (&r_from)[kCount]) {
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < kCount; ++i) pack.value[i] = from_float<T>(r_from[i]);
  store_pack<kCount>(g_to, pack);
}

// Elements i to i + kCount - 1 of a parameter vector, i a multiple of kCount.
template <int kCount, typename T>
__device__ inline void load_parameters(const T* g_from, int64_t i, float (&r_to)[kCount]) {
  if (reinterpret_cast<uintptr_t>(g_from) % 16 == 0) return load<kCount>(g_from + i, r_to);
#pragma unroll
  for (int e = 0; e < kCount; ++e) r_to[e] = to_float(g_from[i + e]);
}

// Likewise of one of any float dtype; `fallback` where there is none.
template <int kCount>
__device__ inline void parameters(const TensorRef& t, int64_t i, float fallback,
                                  float (&r_to)[kCount]) {
  if (t.data == nullptr) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) r_to[e] = fallback;
  } else if (t.dtype == DType::f32) {
    load_parameters(static_cast<const float*>(t.data), i, r_to);
  } else if (t.dtype == DType::bf16) {
    load_parameters(static_cast<const __nv_bfloat16*>(t.data), i, r_to);
  } else {
    load_parameters(static_cast<const __half*>(t.data), i, r_to);
  }
}

// ---- chunks of 16 bytes, at addresses that 16 divides ----

constexpr int kChunkBytes = 16;

__device__ inline uint4 load_chunk(const void* from) {
  return *static_cast<const uint4*>(from);
}

__device__ inline void store_chunk(void* to, const uint4& chunk) {
  *static_cast<uint4*>(to) = chunk;
}

// Where a tile with rows of kChunks chunks keeps a chunk, counted in chunks. Shared memory serves
// eight chunks at once if they differ modulo 8: the chunks of a row, and also one column of eight
// consecutive rows (which start at a multiple of 8), as ldmatrix reads them.
template <int kChunks>
__host__ __device__ constexpr int swizzled(int row, int chunk) {
  constexpr int kPower = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : kChunks % 2 == 0 ? 2 : 1;
  return row * kChunks + (chunk ^ (row / (8 / kPower) % kPower));
}

// ---- cp.async: from global to shared memory past the registers and past L1 ----

#if !defined(FASTGPT_EMULATED)
__device__ inline unsigned shared_address(const void* s_address) {
  return static_cast<unsigned>(__cvta_generic_to_shared(s_address));
}
#endif

// One chunk. It may arrive at any time until a wait of this thread for its group; other threads see
// it after a barrier.
__device__ inline void copy_chunk_async(void* s_to, const void* g_from) {
#if defined(FASTGPT_EMULATED)
  emulator::copy_async(s_to, g_from, kChunkBytes);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(s_to)),
               "l"(__cvta_generic_to_global(g_from))
               : "memory");
#endif
}

// Likewise one of which the first `bytes` (0 to 16) are read and the others become zero.
__device__ inline void copy_chunk_async(void* s_to, const void* g_from, int bytes) {
#if defined(FASTGPT_EMULATED)
  emulator::copy_async(s_to, g_from, bytes);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(s_to)),
               "l"(__cvta_generic_to_global(g_from)), "r"(bytes)
               : "memory");
#endif
}

// This thread's copies since its last commit become a group.
__device__ inline void commit_copies() {
#if defined(FASTGPT_EMULATED)
  emulator::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all but the newest kGroups groups of this thread have arrived.
template <int kGroups>
__device__ inline void wait_copies() {
#if defined(FASTGPT_EMULATED)
  emulator::wait_copies(kGroups);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

}  // namespace fastgpt::cuda
