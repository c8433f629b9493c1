// What csrc/cuda sees in place of the CUDA runtime when it is compiled for the CPU: the built-in
// variables, the macros of arch.h and those intrinsics that the kernels use.
#pragma once

// In this order: the last two rely on the first ones where there is no CUDA compiler.
#include <vector_types.h>
//
#include <vector_functions.h>
//
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>

#include "tests/emulator/emulator.h"

#define threadIdx (::fastgpt::emulator::thread_index())
#define blockIdx (::fastgpt::emulator::block_index())
#define blockDim (::fastgpt::emulator::block_size())
#define gridDim (::fastgpt::emulator::grid_dimensions())

// The CUDA headers make these empty: shared arrays would be local ones, without a word.
#undef __shared__
#define __shared__ _Pragma("GCC error \"shared memory by FASTGPT_SHARED, FASTGPT_DYNAMIC_SHARED\"")
#undef __constant__
#define __constant__ _Pragma("GCC error \"the emulator has no constant memory\"")
#undef __launch_bounds__
#define __launch_bounds__(...)

#define FASTGPT_SHARED(type, name, count)                                               \
  type(&name)[count] = *static_cast<type(*)[count]>(::fastgpt::emulator::static_shared( \
      [] {                                                                              \
        static char tag;                                                                \
        return &tag;                                                                    \
      }(),                                                                              \
      sizeof(type[count])))
#define FASTGPT_DYNAMIC_SHARED(name) \
  unsigned char* const name = ::fastgpt::emulator::dynamic_shared()

// The place of the call of an intrinsic, as its last parameters.
#define FASTGPT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(FASTGPT_SITE) {
  fastgpt::emulator::sync_threads(fastgpt::emulator::Vote::count, false, {file, line});
}
inline int __syncthreads_or(int predicate, FASTGPT_SITE) {
  return fastgpt::emulator::sync_threads(fastgpt::emulator::Vote::any, predicate, {file, line});
}
inline int __syncthreads_and(int predicate, FASTGPT_SITE) {
  return fastgpt::emulator::sync_threads(fastgpt::emulator::Vote::all, predicate, {file, line});
}
inline int __syncthreads_count(int predicate, FASTGPT_SITE) {
  return fastgpt::emulator::sync_threads(fastgpt::emulator::Vote::count, predicate, {file, line});
}
inline void __syncwarp(unsigned mask = 0xffffffffu, FASTGPT_SITE) {
  fastgpt::emulator::sync_warp(mask, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, FASTGPT_SITE) {
  return fastgpt::emulator::ballot(mask, predicate, {file, line});
}
inline int __any_sync(unsigned mask, int predicate, FASTGPT_SITE) {
  return fastgpt::emulator::ballot(mask, predicate, {file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, FASTGPT_SITE) {
  return fastgpt::emulator::ballot(mask, predicate, {file, line}) == mask;
}

namespace fastgpt::emulator {

template <typename T>
T shuffled(Shuffle kind, unsigned mask, T value, int operand, int width, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles move up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(kind, mask, bits, operand, width, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace fastgpt::emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, FASTGPT_SITE) {
  return fastgpt::emulator::shuffled(fastgpt::emulator::Shuffle::index, mask, value, lane, width,
                                     {file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, FASTGPT_SITE) {
  return fastgpt::emulator::shuffled(fastgpt::emulator::Shuffle::up, mask, value,
                                     static_cast<int>(delta), width, {file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, FASTGPT_SITE) {
  return fastgpt::emulator::shuffled(fastgpt::emulator::Shuffle::down, mask, value,
                                     static_cast<int>(delta), width, {file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, FASTGPT_SITE) {
  return fastgpt::emulator::shuffled(fastgpt::emulator::Shuffle::exclusive_or, mask, value,
                                     lane_mask, width, {file, line});
}
#undef FASTGPT_SITE

[[noreturn]] inline void __trap() {
  fastgpt::emulator::trap();
}

// ---- arithmetic that CUDA has as built-in functions ----

using std::isfinite;
using std::isinf;
using std::isnan;

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline int __float_as_int(float x) {
  return static_cast<int>(__float_as_uint(x));
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline float __int_as_float(int bits) {
  return __uint_as_float(static_cast<unsigned>(bits));
}
inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __clz(int x) {
  return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x));
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}
inline float rsqrtf(float x) {
  return 1.0f / sqrtf(x);
}
inline float __expf(float x) {
  return expf(x);
}
inline float __logf(float x) {
  return logf(x);
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline float __frcp_rn(float x) {
  return 1.0f / x;
}
template <typename T>
T __ldg(const T* g_from) {
  fastgpt::emulator::require_global(g_from);
  return *g_from;
}

#define FASTGPT_MIN_MAX(type)                 \
  inline constexpr type min(type a, type b) { \
    return b < a ? b : a;                     \
  }                                           \
  inline constexpr type max(type a, type b) { \
    return a < b ? b : a;                     \
  }
FASTGPT_MIN_MAX(int)
FASTGPT_MIN_MAX(unsigned)
FASTGPT_MIN_MAX(long)
FASTGPT_MIN_MAX(unsigned long)
FASTGPT_MIN_MAX(long long)
FASTGPT_MIN_MAX(unsigned long long)
#undef FASTGPT_MIN_MAX
inline float min(float a, float b) {
  return fminf(a, b);
}
inline float max(float a, float b) {
  return fmaxf(a, b);
}
