// bfloat16 and float16 as storage, and their scalar conversions: round to nearest even, NaN kept.
// Hardware conversions where the ISA level being compiled has them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own _mm512_undefined_ps() initialises a variable with itself.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#endif

#ifndef FASTGPT_ISA
#error "compile CPU kernels with -DFASTGPT_ISA=<level>"
#endif

#define FASTGPT_INLINE inline __attribute__((always_inline))

namespace fastgpt {
inline namespace FASTGPT_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

FASTGPT_INLINE uint32_t float_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

FASTGPT_INLINE float bits_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

FASTGPT_INLINE float to_float(float x) {
  return x;
}
FASTGPT_INLINE float to_float(bf16 x) {
  return bits_float(uint32_t{x.bits} << 16);
}
FASTGPT_INLINE float to_float(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Shifting into a float's exponent field leaves a factor 2^-112, subnormals included.
  return bits_float(float_bits(bits_float(magnitude << 13) * 0x1p112f) | sign);
#endif
}

template <typename T>
T from_float(float x);

template <>
FASTGPT_INLINE float from_float<float>(float x) {
  return x;
}

template <>
FASTGPT_INLINE bf16 from_float<bf16>(float x) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<uint16_t>((u >> 16) | 0x40u)};
  return bf16{static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

template <>
FASTGPT_INLINE f16 from_float<f16>(float x) {
#if defined(__F16C__)
  return f16{_cvtss_sh(x, 0)};
#else
  const uint32_t u = float_bits(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: the sum with 0.5 rounds at 2^-24
    half = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return f16{static_cast<uint16_t>(sign | half)};
#endif
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
