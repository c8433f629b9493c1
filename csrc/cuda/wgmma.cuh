// Products of a warpgroup (wgmma, sm_90a): four warps multiply 64 rows, asynchronously, by operands
// in shared memory; the first may be in registers. Compiled for sm_90a alone.
//
// A matrix in shared memory lies in panels of 64 elements of 16 bits: a panel is its rows of 128
// bytes one after another, the chunks of a row where swizzled<8>() puts them, and begins at a
// multiple of 1024 bytes. Accumulators r_d[n][e] are those of mma.cuh, of the 16 rows of each warp;
// so is a in registers. Whoever wrote the shared memory calls fence_shared() before the barrier
// after which it is multiplied. Accumulators, and a in registers, are not touched from
// wgmma_begin() to the wait for the group that they are in.
// Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".
#pragma once

#include <type_traits>

#include "csrc/cuda/mma.cuh"

namespace fastgpt::cuda {

constexpr int kWarpgroup = 4 * kWarp;
constexpr int kPanelColumns = 64;
constexpr int kPanelRowBytes = 128;
constexpr int kPanelAlignment = 8 * kPanelRowBytes;

// 16 columns (of a and of the first b) or 16 rows (of the second b) of a matrix, where a product
// finds them: the address of their first element in memory, and the bytes from panel to panel.
#if defined(FASTGPT_EMULATED)
using emulator::SharedMatrix;
#else
// The low half of a matrix descriptor. The high half: 128-byte swizzle, and 8 rows to the next 8.
struct SharedMatrix {
  uint32_t low;
  __device__ uint64_t bits() const {
    constexpr uint64_t kHigh = uint64_t{1} << 30 | kPanelAlignment >> 4;
    return kHigh << 32 | low;
  }
};
#endif

__device__ inline SharedMatrix shared_matrix(const void* s_first, int panel_bytes) {
#if defined(FASTGPT_EMULATED)
  return {s_first, panel_bytes};
#else
  return {static_cast<uint32_t>(panel_bytes >> 4) << 16 | (shared_address(s_first) >> 4 & 0x3fff)};
#endif
}

// The matrix that begins `bytes` (a multiple of 16) further.
__device__ inline SharedMatrix advanced(SharedMatrix m, int bytes) {
#if defined(FASTGPT_EMULATED)
  return {static_cast<const unsigned char*>(m.s_first) + bytes, m.panel_bytes};
#else
  return {m.low + static_cast<uint32_t>(bytes >> 4)};
#endif
}

// Before the first product, and after every wait, when registers of the next may have been written.
__device__ inline void wgmma_begin() {
#if defined(FASTGPT_EMULATED)
  emulator::wgmma_begin();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// The products since the last commit become a group.
__device__ inline void wgmma_commit() {
#if defined(FASTGPT_EMULATED)
  emulator::wgmma_commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Until all but the newest kGroups groups have been computed.
template <int kGroups>
__device__ inline void wgmma_wait() {
#if defined(FASTGPT_EMULATED)
  emulator::wgmma_wait(kGroups);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
#endif
}

// What this thread wrote to shared memory, its copies that it waited for included, is seen by
// products that are issued after the next barrier.
__device__ inline void fence_shared() {
#if defined(FASTGPT_EMULATED)
  emulator::fence_shared();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Keeps the compiler from moving accumulators while products are under way.
template <int kN>
__device__ inline void hold(float (&r)[kN][4]) {
#if !defined(FASTGPT_EMULATED)
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(r[n][e])::"memory");
  }
#else
  static_cast<void>(r);
#endif
}

#if !defined(FASTGPT_EMULATED)
// The accumulators of kN columns as operands 0 to kN / 2 - 1: their names, and what they are.
#define FASTGPT_D48                                                                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23"
#define FASTGPT_D64 \
  FASTGPT_D48       \
  ", %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTGPT_D80 \
  FASTGPT_D64       \
  ", %32, %33, %34, %35, %36, %37, %38, %39"
#define FASTGPT_D96 \
  FASTGPT_D80       \
  ", %40, %41, %42, %43, %44, %45, %46, %47"
#define FASTGPT_D112 \
  FASTGPT_D96        \
  ", %48, %49, %50, %51, %52, %53, %54, %55"
#define FASTGPT_D128 \
  FASTGPT_D112       \
  ", %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTGPT_R1(i) "+f"(r_d[i][0]), "+f"(r_d[i][1]), "+f"(r_d[i][2]), "+f"(r_d[i][3])
#define FASTGPT_R2(i) FASTGPT_R1(i), FASTGPT_R1((i) + 1)
#define FASTGPT_R4(i) FASTGPT_R2(i), FASTGPT_R2((i) + 2)
#define FASTGPT_R48 FASTGPT_R4(0), FASTGPT_R2(4)
#define FASTGPT_R64 FASTGPT_R48, FASTGPT_R2(6)
#define FASTGPT_R80 FASTGPT_R64, FASTGPT_R2(8)
#define FASTGPT_R96 FASTGPT_R80, FASTGPT_R2(10)
#define FASTGPT_R112 FASTGPT_R96, FASTGPT_R2(12)
#define FASTGPT_R128 FASTGPT_R112, FASTGPT_R2(14)
#define FASTGPT_SS_48 "%24, %25"
#define FASTGPT_SS_48_ADD "%26"
#define FASTGPT_RS_48 "{%24, %25, %26, %27}, %28"
#define FASTGPT_RS_48_ADD "%29"
#define FASTGPT_SS_64 "%32, %33"
#define FASTGPT_SS_64_ADD "%34"
#define FASTGPT_RS_64 "{%32, %33, %34, %35}, %36"
#define FASTGPT_RS_64_ADD "%37"
#define FASTGPT_SS_80 "%40, %41"
#define FASTGPT_SS_80_ADD "%42"
#define FASTGPT_RS_80 "{%40, %41, %42, %43}, %44"
#define FASTGPT_RS_80_ADD "%45"
#define FASTGPT_SS_96 "%48, %49"
#define FASTGPT_SS_96_ADD "%50"
#define FASTGPT_RS_96 "{%48, %49, %50, %51}, %52"
#define FASTGPT_RS_96_ADD "%53"
#define FASTGPT_SS_112 "%56, %57"
#define FASTGPT_SS_112_ADD "%58"
#define FASTGPT_RS_112 "{%56, %57, %58, %59}, %60"
#define FASTGPT_RS_112_ADD "%61"
#define FASTGPT_SS_128 "%64, %65"
#define FASTGPT_SS_128_ADD "%66"
#define FASTGPT_RS_128 "{%64, %65, %66, %67}, %68"
#define FASTGPT_RS_128_ADD "%69"
#define FASTGPT_WGMMA(n, type, operands, adds, layout)                              \
  "{.reg .pred p; setp.ne.b32 p, " adds ", 0; wgmma.mma_async.sync.aligned.m64n" #n \
  "k16.f32." type "." type " {" FASTGPT_D##n "}, " operands ", p, 1, 1, " layout ";}"
#define FASTGPT_WGMMA_SS(n, type, layout)                                           \
  asm volatile(FASTGPT_WGMMA(n, type, FASTGPT_SS_##n, FASTGPT_SS_##n##_ADD, layout) \
               : FASTGPT_R##n                                                       \
               : "l"(a.bits()), "l"(b.bits()), "r"(static_cast<int>(add)))
#define FASTGPT_WGMMA_RS(n, type, layout)                                           \
  asm volatile(FASTGPT_WGMMA(n, type, FASTGPT_RS_##n, FASTGPT_RS_##n##_ADD, layout) \
               : FASTGPT_R##n                                                       \
               : "r"(r_a[0]), "r"(r_a[1]), "r"(r_a[2]), "r"(r_a[3]), "l"(b.bits()), \
                 "r"(static_cast<int>(add)))
// For the kN and the type of the function that it stands in.
#define FASTGPT_WGMMA_OF(f, layout) \
  if constexpr (kN == 48) {         \
    if constexpr (kBf16)            \
      f(48, "bf16", layout);        \
    else                            \
      f(48, "f16", layout);         \
  } else if constexpr (kN == 64) {  \
    if constexpr (kBf16)            \
      f(64, "bf16", layout);        \
    else                            \
      f(64, "f16", layout);         \
  } else if constexpr (kN == 80) {  \
    if constexpr (kBf16)            \
      f(80, "bf16", layout);        \
    else                            \
      f(80, "f16", layout);         \
  } else if constexpr (kN == 96) {  \
    if constexpr (kBf16)            \
      f(96, "bf16", layout);        \
    else                            \
      f(96, "f16", layout);         \
  } else if constexpr (kN == 112) { \
    if constexpr (kBf16)            \
      f(112, "bf16", layout);       \
    else                            \
      f(112, "f16", layout);        \
  } else {                          \
    if constexpr (kBf16)            \
      f(128, "bf16", layout);       \
    else                            \
      f(128, "f16", layout);        \
  }
#endif

template <typename T, int kN>
constexpr bool kMultiplies =
    (std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>) &&
    (kN == 48 || kN == 64 || kN == 80 || kN == 96 || kN == 112 || kN == 128);

// d (64 x kN) = a (64 x 16) b^T, or gains it: a and b, kN rows, in shared memory.
template <typename T, int kN>
__device__ inline void wgmma_ss(float (&r_d)[kN / 8][4], SharedMatrix a, SharedMatrix b, bool add) {
  static_assert(kMultiplies<T, kN>, "wgmma of bfloat16 or float16 and so many columns");
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
#if defined(FASTGPT_EMULATED)
  emulator::wgmma_ss(&r_d[0][0], kN, a, b, add, kBf16);
#else
  FASTGPT_WGMMA_OF(FASTGPT_WGMMA_SS, "0, 0")
#endif
}

// d (64 x kN) = a (64 x 16) b, or gains it: a in registers, b, 16 rows of kN columns, in shared
// memory; kTransposed: a b^T, b kN rows.
template <typename T, int kN, bool kTransposed = false>
__device__ inline void wgmma_rs(float (&r_d)[kN / 8][4], const uint32_t (&r_a)[4], SharedMatrix b,
                                bool add) {
  static_assert(kMultiplies<T, kN>, "wgmma of bfloat16 or float16 and so many columns");
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
#if defined(FASTGPT_EMULATED)
  emulator::wgmma_rs(&r_d[0][0], kN, r_a, b, kTransposed, add, kBf16);
#else
  if constexpr (kTransposed) {
    FASTGPT_WGMMA_OF(FASTGPT_WGMMA_RS, "0")
  } else {
    FASTGPT_WGMMA_OF(FASTGPT_WGMMA_RS, "1")
  }
#endif
}

}  // namespace fastgpt::cuda
