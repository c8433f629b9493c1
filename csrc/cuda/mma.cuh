// Tensor cores: matrices of 8 x 16 bytes from shared memory into registers (ldmatrix), and products
// of a warp (mma.sync) with float accumulators. Every function is called by all lanes of a warp.
//
// Layouts, with group = lane / 4 and pair = lane % 4, two elements of 16 bits in a register:
//   accumulator (16 x 8)   r[0, 1]: row group, columns 2 pair + 0, 1; r[2, 3]: row group + 8
//   a (16 x 16)            r[0]: row group, columns 2 pair + 0, 1; r[1]: row group + 8;
//                          r[2], r[3]: the same rows, columns 8 further
//   b (16 x 8)             r[0]: rows 2 pair + 0, 1 of column group; r[1]: rows 8 further
// So two accumulators side by side, packed, are an a; and an 8 x 8 matrix as ldmatrix gives it is a
// quarter of a, or, where memory holds the columns of b as rows, half of b.
// Source: PTX ISA, "Warp Level Matrix Multiply-Accumulate Instructions".
#pragma once

#include <type_traits>

#include "csrc/cuda/arch.h"
#include "csrc/cuda/copy.cuh"

namespace fastgpt::cuda {

// Two floats as the two elements of a register, the first in its low half.
template <typename T>
__device__ inline uint32_t pack_pair(float low, float high);
template <>
__device__ inline uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return __bfloat16_as_ushort(pair.x) | static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16;
}
template <>
__device__ inline uint32_t pack_pair<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return __half_as_ushort(pair.x) | static_cast<uint32_t>(__half_as_ushort(pair.y)) << 16;
}

// kCount (1, 2 or 4) matrices of 8 rows of one chunk. Lane i holds the address of row i % 8 of
// matrix i / 8; those of lanes beyond 8 kCount are not looked at. r[m] gets elements 2 pair + 0, 1
// of row `group` of matrix m; transposed, elements `group` of rows 2 pair + 0, 1.
template <int kCount, bool kTransposed = false>
__device__ inline void load_matrices(uint32_t (&r)[kCount], const void* s_row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "ldmatrix loads 1, 2 or 4 matrices");
#if defined(FASTGPT_EMULATED)
  emulator::load_matrices(r, kCount, kTransposed, s_row);
#else
  const unsigned address = shared_address(s_row);
  if constexpr (kCount == 1 && !kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kCount == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kCount == 2 && !kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kCount == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (!kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
#endif
}

// d (16 x 8) += a (16 x 16) b (16 x 8), of __nv_bfloat16 or __half.
template <typename T>
__device__ inline void mma_16x8x16(float (&r_d)[4], const uint32_t (&r_a)[4],
                                   const uint32_t (&r_b)[2]) {
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  static_assert(kBf16 || std::is_same_v<T, __half>, "mma of bfloat16 or float16");
#if defined(FASTGPT_EMULATED)
  emulator::mma_16x8x16(r_d, r_a, r_b, kBf16);
#else
  if constexpr (kBf16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(r_d[0]), "+f"(r_d[1]), "+f"(r_d[2]), "+f"(r_d[3])
        : "r"(r_a[0]), "r"(r_a[1]), "r"(r_a[2]), "r"(r_a[3]), "r"(r_b[0]), "r"(r_b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(r_d[0]), "+f"(r_d[1]), "+f"(r_d[2]), "+f"(r_d[3])
        : "r"(r_a[0]), "r"(r_a[1]), "r"(r_a[2]), "r"(r_a[3]), "r"(r_b[0]), "r"(r_b[1]));
  }
#endif
}

// x rounded to TF32, which has float's exponent and 10 bits of mantissa: to nearest, ties away.
__device__ inline uint32_t to_tf32(float x) {
  uint32_t bits;
#if defined(FASTGPT_EMULATED)
  bits = emulator::to_tf32(x);
#else
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#endif
  return bits;
}

// d (16 x 8) += a (16 x 8) b (8 x 8) of TF32, one element in a register. a: r[0], r[1]: rows group
// and group + 8 of column pair; r[2], r[3]: of column pair + 4. b: r[0], r[1]: rows pair and
// pair + 4 of column group. Memory's float tiles load as matrices of 8 rows of 4 elements do.
__device__ inline void mma_16x8x8_tf32(float (&r_d)[4], const uint32_t (&r_a)[4],
                                       const uint32_t (&r_b)[2]) {
#if defined(FASTGPT_EMULATED)
  emulator::mma_16x8x8_tf32(r_d, r_a, r_b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(r_d[0]), "+f"(r_d[1]), "+f"(r_d[2]), "+f"(r_d[3])
      : "r"(r_a[0]), "r"(r_a[1]), "r"(r_a[2]), "r"(r_a[3]), "r"(r_b[0]), "r"(r_b[1]));
#endif
}

}  // namespace fastgpt::cuda
