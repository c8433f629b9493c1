// exp2, exp and erf on the float vector of simd.h, float32 throughout.
// Largest errors over all float32: exp2 and exp 1 ulp (2 where the level has no FMA), erf 2. Limits
// are those of the functions: exp2(-inf) = 0, exp2(129) = inf, NaN stays NaN.
// Polynomials are minimax fits (Lawson's iteration); erf splits at 0.9277 as in N. Juffa's fit.
#pragma once

#include "csrc/cpu/simd.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {

FASTGPT_INLINE float log(float x) {
  return __builtin_logf(x);
}

// Nearest integer for |x| < 2^22, ties to even.
FASTGPT_INLINE Vec round_nearest(Vec x) {
#if defined(__AVX512F__)
  return Vec{_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
#elif defined(__AVX2__)
  return Vec{_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
#else
  const Vec magic = set1(0x1.8p23f);
  return (x + magic) - magic;
#endif
}

// p * 2^n for an integer-valued n in [-160, 160] and p near 1; subnormal results are rounded once.
FASTGPT_INLINE Vec scale_by_power(Vec p, Vec n) {
#if defined(__AVX512F__)
  return Vec{_mm512_scalef_ps(p.v, n.v)};
#else
  const NativeInt whole = __builtin_convertvector(n.v, NativeInt);
  const NativeInt half = whole >> 1;
  const Vec first = from_bits((NativeUint)((half + 127) << 23));
  const Vec second = from_bits((NativeUint)((whole - half + 127) << 23));
  return (p * first) * second;
#endif
}

// 2^f on [-0.5, 0.5].
FASTGPT_INLINE Vec exp2_fraction(Vec f) {
  Vec p = set1(1.5345812e-4f);
  p = fma(p, f, set1(1.3399931e-3f));
  p = fma(p, f, set1(9.6184891e-3f));
  p = fma(p, f, set1(5.5503286e-2f));
  p = fma(p, f, set1(2.4022646e-1f));
  p = fma(p, f, set1(6.9314718e-1f));
  return fma(p, f, set1(1.0f));
}

FASTGPT_INLINE Vec exp2(Vec x) {
#if defined(__AVX512F__)
  // VREDUCEPS gives x - round(x), and 0 for an infinity, so no clamp is needed.
  const Vec f = Vec{_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  const Vec n = x - f;
#else
  x = min(set1(129.0f), max(set1(-160.0f), x));
  const Vec n = round_nearest(x);
  const Vec f = x - n;
#endif
  return scale_by_power(exp2_fraction(f), n);
}

// exp2 for x < 127.5 with 0 for all below -126.5, as arithmetic on subnormal numbers is up to 30
// times slower, here and in what comes after. Half the instructions of exp2 without AVX-512.
FASTGPT_INLINE Vec exp2_flushed(Vec x) {
#if defined(__AVX512F__)
  const Vec f = Vec{_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  const Vec n = x - f;
  // Not below -126, so that NaN passes.
  const __mmask16 kept = _mm512_cmp_ps_mask(n.v, set1(-126.0f).v, _CMP_NLT_UQ);
  return Vec{_mm512_maskz_scalef_ps(kept, exp2_fraction(f).v, n.v)};
#else
  // Adding the constant leaves round(x) + 127 in the low bits: the exponent of the power of two.
  const Vec magic = set1(0x1.8p23f + 127.0f);
  x = max(set1(-127.0f), x);
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);
  return exp2_fraction(f) * from_bits(bits_of(shifted) << 23);
#endif
}

FASTGPT_INLINE Vec exp(Vec x) {
  x = min(set1(89.5f), max(set1(-110.0f), x));
  const Vec n = round_nearest(x * set1(1.44269504f));
  // log(2) in two parts, the first short enough for n times it to be exact.
  const Vec f = fma(n, set1(-1.42860677e-6f), fma(n, set1(-0.693145752f), x));
  Vec p = set1(1.3836846e-3f);
  p = fma(p, f, set1(8.3748158e-3f));
  p = fma(p, f, set1(4.1668225e-2f));
  p = fma(p, f, set1(1.6666420e-1f));
  p = fma(p, f, set1(4.9999991e-1f));
  p = fma(p, f, set1(1.0f));
  p = fma(p, f, set1(1.0f));
  return scale_by_power(p, n);
}

FASTGPT_INLINE Vec erf(Vec x) {
  const Vec t = min(set1(4.0f), abs(x));
  const Vec s = x * x;
  Vec q = set1(-5.96761703e-4f);
  q = fma(q, s, set1(4.99119423e-3f));
  q = fma(q, s, set1(-2.67681349e-2f));
  q = fma(q, s, set1(1.12819925e-1f));
  q = fma(q, s, set1(-3.76125336e-1f));
  q = fma(q, s, set1(1.28379166e-1f));
  const Vec near_zero = fma(q, x, x);

  Vec r = set1(-1.72853470e-5f);
  r = fma(r, t, set1(3.83197126e-4f));
  r = fma(r, t, set1(-3.88396438e-3f));
  r = fma(r, t, set1(2.42546219e-2f));
  r = fma(r, t, set1(-1.06777877e-1f));
  r = fma(r, t, set1(-6.34846687e-1f));
  r = fma(r, t, set1(-1.28717512e-1f));
  r = fma(r, t, -t);
  const Vec far = select(x == x, copysign(set1(1.0f) - exp(r), x), x);
  return select(abs(x) < set1(0.927734375f), near_zero, far);
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
