// The float vector of the ISA level being compiled: 16 lanes (AVX-512), 8 (AVX2 + FMA + F16C) or
// 4 (any x86-64, or the compiler's generic vectors elsewhere). Loads and stores convert from and
// to float32, bfloat16 and float16; arithmetic is float32. Partial forms touch the first n lanes
// of memory only and read the others as 0. Every level lives in its own inline namespace and
// everything is inlined, so no symbol is shared between levels.
#pragma once

#include "csrc/cpu/half.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr float kInfinity = __builtin_inff();

typedef float NativeFloat __attribute__((vector_size(4 * kLanes)));
typedef int32_t NativeInt __attribute__((vector_size(4 * kLanes)));
typedef uint32_t NativeUint __attribute__((vector_size(4 * kLanes)));

struct Vec {
  static constexpr int width = kLanes;
  NativeFloat v;
};

#if defined(__AVX512F__)
struct Mask {
  __mmask16 m;
};
#else
struct Mask {
  NativeInt m;
};
#endif

// ---- arithmetic --------------------------------------------------------------------------------

FASTGPT_INLINE Vec zero() {
  return Vec{NativeFloat{}};
}
FASTGPT_INLINE Vec set1(float x) {
#if defined(__AVX512F__)
  return Vec{_mm512_set1_ps(x)};
#elif defined(__AVX2__)
  return Vec{_mm256_set1_ps(x)};
#else
  return Vec{NativeFloat{x, x, x, x}};
#endif
}
FASTGPT_INLINE Vec broadcast(const float* p) {
  return set1(*p);
}

FASTGPT_INLINE Vec operator+(Vec a, Vec b) {
  return Vec{a.v + b.v};
}
FASTGPT_INLINE Vec operator-(Vec a, Vec b) {
  return Vec{a.v - b.v};
}
FASTGPT_INLINE Vec operator*(Vec a, Vec b) {
  return Vec{a.v * b.v};
}
FASTGPT_INLINE Vec operator/(Vec a, Vec b) {
  return Vec{a.v / b.v};
}
FASTGPT_INLINE Vec operator-(Vec a) {
  return Vec{-a.v};
}

// a * b + c, in one rounding where the level has FMA.
FASTGPT_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return Vec{_mm512_fmadd_ps(a.v, b.v, c.v)};
#elif defined(__AVX2__)
  return Vec{_mm256_fmadd_ps(a.v, b.v, c.v)};
#else
  return Vec{a.v * b.v + c.v};
#endif
}

// max and min return b where either is NaN, so max(bound, x) keeps a NaN in x.
FASTGPT_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return Vec{_mm512_max_ps(a.v, b.v)};
#elif defined(__AVX2__)
  return Vec{_mm256_max_ps(a.v, b.v)};
#elif defined(__SSE2__)
  return Vec{_mm_max_ps(a.v, b.v)};
#else
  return Vec{a.v > b.v ? a.v : b.v};
#endif
}

FASTGPT_INLINE Vec min(Vec a, Vec b) {
#if defined(__AVX512F__)
  return Vec{_mm512_min_ps(a.v, b.v)};
#elif defined(__AVX2__)
  return Vec{_mm256_min_ps(a.v, b.v)};
#elif defined(__SSE2__)
  return Vec{_mm_min_ps(a.v, b.v)};
#else
  return Vec{a.v < b.v ? a.v : b.v};
#endif
}

FASTGPT_INLINE NativeUint bits_of(Vec a) {
  return (NativeUint)a.v;
}
FASTGPT_INLINE Vec from_bits(NativeUint u) {
  return Vec{(NativeFloat)u};
}
FASTGPT_INLINE Vec abs(Vec a) {
  return from_bits(bits_of(a) & 0x7fffffffu);
}
FASTGPT_INLINE Vec copysign(Vec magnitude, Vec sign) {
  return from_bits((bits_of(magnitude) & 0x7fffffffu) | (bits_of(sign) & 0x80000000u));
}

// ---- masks -------------------------------------------------------------------------------------

FASTGPT_INLINE NativeInt lane_index() {
#if defined(__AVX512F__)
  return NativeInt{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX2__)
  return NativeInt{0, 1, 2, 3, 4, 5, 6, 7};
#else
  return NativeInt{0, 1, 2, 3};
#endif
}

#if defined(__AVX512F__)
FASTGPT_INLINE Mask first_lanes(int n) {
  return Mask{static_cast<__mmask16>(n >= 16 ? 0xffffu : n <= 0 ? 0u : (1u << n) - 1u)};
}
FASTGPT_INLINE Mask operator<(Vec a, Vec b) {
  return Mask{_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)};
}
FASTGPT_INLINE Mask operator<=(Vec a, Vec b) {
  return Mask{_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)};
}
FASTGPT_INLINE Mask operator==(Vec a, Vec b) {
  return Mask{_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)};
}
FASTGPT_INLINE Mask operator&(Mask a, Mask b) {
  return Mask{static_cast<__mmask16>(a.m & b.m)};
}
FASTGPT_INLINE Vec select(Mask m, Vec a, Vec b) {
  return Vec{_mm512_mask_blend_ps(m.m, b.v, a.v)};
}
#else
FASTGPT_INLINE Mask first_lanes(int n) {
  return Mask{lane_index() < n};
}
FASTGPT_INLINE Mask operator<(Vec a, Vec b) {
  return Mask{a.v < b.v};
}
FASTGPT_INLINE Mask operator<=(Vec a, Vec b) {
  return Mask{a.v <= b.v};
}
FASTGPT_INLINE Mask operator==(Vec a, Vec b) {
  return Mask{a.v == b.v};
}
FASTGPT_INLINE Mask operator&(Mask a, Mask b) {
  return Mask{a.m & b.m};
}
FASTGPT_INLINE Vec select(Mask m, Vec a, Vec b) {
  return Vec{(NativeFloat)(((NativeInt)a.v & m.m) | ((NativeInt)b.v & ~m.m))};
}
#endif

// ---- loads -------------------------------------------------------------------------------------

FASTGPT_INLINE Vec load(const float* p) {
  Vec r;
  std::memcpy(&r.v, p, sizeof(r.v));
  return r;
}

FASTGPT_INLINE Vec load(const float* p, int n) {
#if defined(__AVX512F__)
  return Vec{_mm512_maskz_loadu_ps(first_lanes(n).m, p)};
#elif defined(__AVX2__)
  return Vec{_mm256_maskload_ps(p, (__m256i)first_lanes(n).m)};
#else
  float lanes[kLanes] = {};
  for (int i = 0; i < kLanes && i < n; ++i) lanes[i] = p[i];
  return load(lanes);
#endif
}

FASTGPT_INLINE Vec load(const bf16* p) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return Vec{_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return Vec{_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
#elif defined(__SSE2__)
  const __m128i narrow = _mm_loadl_epi64((const __m128i*)p);
  return Vec{_mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), narrow))};
#else
  return Vec{{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
#endif
}

FASTGPT_INLINE Vec load(const f16* p) {
#if defined(__AVX512F__)
  return Vec{_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
#elif defined(__AVX2__)
  return Vec{_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))};
#else
  return Vec{NativeFloat{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
#endif
}

template <typename Half>
FASTGPT_INLINE Vec load(const Half* p, int n) {
#if defined(__AVX512F__)
  const __m256i narrow = _mm256_maskz_loadu_epi16(first_lanes(n).m, p);
  return load(reinterpret_cast<const Half*>(&narrow));
#else
  Half lanes[kLanes] = {};
  for (int i = 0; i < kLanes && i < n; ++i) lanes[i] = p[i];
  return load(lanes);
#endif
}

// ---- stores: round to nearest even, NaN kept ---------------------------------------------------

FASTGPT_INLINE void store(float* p, Vec a) {
  std::memcpy(p, &a.v, sizeof(a.v));
}

FASTGPT_INLINE void store(float* p, Vec a, int n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, first_lanes(n).m, a.v);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(p, (__m256i)first_lanes(n).m, a.v);
#else
  for (int i = 0; i < kLanes && i < n; ++i) p[i] = a.v[i];
#endif
}

// The bf16 pattern of each lane in its high 16 bits, over low bits of any kind. Not VCVTNEPS2BF16:
// it flushes subnormals. A NaN must have no bit among the low 16, where rounding would carry it
// away: one that comes from bf16 or from arithmetic has none.
FASTGPT_INLINE NativeUint bf16_high_of_plain(Vec a) {
  const NativeUint u = bits_of(a);
  return u + 0x7fffu + ((u >> 16) & 1u);
}

// The same of any NaN.
FASTGPT_INLINE NativeUint bf16_high(Vec a) {
  const NativeUint rounded = bf16_high_of_plain(a);
  const NativeUint quiet = bits_of(a) | 0x400000u;
#if defined(__AVX512F__)
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return (NativeUint)_mm512_mask_blend_epi32(nan, (__m512i)rounded, (__m512i)quiet);
#elif defined(__AVX2__)
  const __m256 nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
  return (NativeUint)_mm256_blendv_ps((__m256)rounded, (__m256)quiet, nan);
#else
  const NativeUint ordered = (NativeUint)(a.v == a.v);
  return (rounded & ordered) | (quiet & ~ordered);
#endif
}

// The bf16 pattern of each lane in its low 16 bits.
FASTGPT_INLINE NativeUint bf16_bits(Vec a) {
  return bf16_high(a) >> 16;
}

FASTGPT_INLINE void store(bf16* p, Vec a) {
  const NativeUint u = bf16_bits(a);
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)u));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)u, (__m256i)u);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = bf16{static_cast<uint16_t>(u[i])};
#endif
}

FASTGPT_INLINE void store(f16* p, Vec a) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<f16>(a.v[i]);
#endif
}

// a as the type of the first argument keeps it.
FASTGPT_INLINE Vec rounded_to(float, Vec a) {
  return a;
}
FASTGPT_INLINE Vec rounded_to(bf16, Vec a) {
  return from_bits(bf16_high(a) & 0xffff0000u);
}
FASTGPT_INLINE Vec rounded_to(f16, Vec a) {
  f16 lanes[kLanes];
  store(lanes, a);
  return load(lanes);
}

template <typename Half>
FASTGPT_INLINE void store(Half* p, Vec a, int n) {
  Half lanes[kLanes];
  store(lanes, a);
#if defined(__AVX512F__)
  _mm256_mask_storeu_epi16(p, first_lanes(n).m, _mm256_loadu_si256((const __m256i*)lanes));
#else
  for (int i = 0; i < kLanes && i < n; ++i) p[i] = lanes[i];
#endif
}

// ---- stores past the cache, to addresses aligned to the size of what is stored ------------------

FASTGPT_INLINE void stream(float* p, Vec a) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, a.v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, a.v);
#elif defined(__SSE2__)
  _mm_stream_ps(p, a.v);
#else
  store(p, a);
#endif
}

// Two vectors of neighbouring bf16, split into the even and the odd ones: half the instructions of
// two loads or stores in order.
FASTGPT_INLINE void load_split(const bf16* p, Vec& even, Vec& odd) {
  NativeUint u;
  std::memcpy(&u, p, sizeof(u));
  even = from_bits(u << 16);
  odd = from_bits(u & 0xffff0000u);
}

// Of the high 16 bits of each lane; past the cache where `streaming`.
FASTGPT_INLINE void store_high_split(bf16* p, NativeUint even, NativeUint odd, bool streaming) {
#if defined(__AVX512F__)
  const NativeUint both =
      (NativeUint)_mm512_mask_blend_epi16(0xaaaaaaaau, (__m512i)(even >> 16), (__m512i)odd);
#elif defined(__AVX2__)
  const NativeUint both = (NativeUint)_mm256_blend_epi16((__m256i)(even >> 16), (__m256i)odd, 0xaa);
#else
  const NativeUint both = (even >> 16) | (odd & 0xffff0000u);
#endif
  if (streaming) return stream(reinterpret_cast<float*>(p), from_bits(both));
  std::memcpy(p, &both, sizeof(both));
}

// Rounded as bf16_high_of_plain rounds.
FASTGPT_INLINE void store_split(bf16* p, Vec even, Vec odd, bool streaming) {
  store_high_split(p, bf16_high_of_plain(even), bf16_high_of_plain(odd), streaming);
}

// Makes what was streamed visible to other threads in order with later stores.
FASTGPT_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// ---- reductions: halves added pairwise, the same order on every call ---------------------------

#if defined(__SSE2__)
FASTGPT_INLINE float reduce_add(__m128 x) {
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
FASTGPT_INLINE float reduce_max(__m128 x) {
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
#endif
#if defined(__AVX2__)
FASTGPT_INLINE float reduce_add(__m256 x) {
  return reduce_add(_mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}
FASTGPT_INLINE float reduce_max(__m256 x) {
  return reduce_max(_mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}
#endif
#if defined(__AVX512F__)
FASTGPT_INLINE float reduce_add(__m512 x) {
  return reduce_add(_mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)));
}
FASTGPT_INLINE float reduce_max(__m512 x) {
  return reduce_max(_mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)));
}
#endif

#if defined(__SSE2__)
FASTGPT_INLINE float reduce_add(Vec a) {
  return reduce_add(a.v);
}
FASTGPT_INLINE float reduce_max(Vec a) {
  return reduce_max(a.v);
}
#else
FASTGPT_INLINE float reduce_add(Vec a) {
  return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]);
}
FASTGPT_INLINE float reduce_max(Vec a) {
  const float x = a.v[0] > a.v[2] ? a.v[0] : a.v[2];
  const float y = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return x > y ? x : y;
}
#endif

// Eight sums at once: out[i] is the sum of the lanes of a[i].
FASTGPT_INLINE void reduce_add_8(const Vec (&a)[8], float* out) {
#if defined(__AVX2__)
  __m256 x[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
#if defined(__AVX512F__)
    x[i] = _mm256_add_ps(_mm512_castps512_ps256(a[i].v), _mm512_extractf32x8_ps(a[i].v, 1));
#else
    x[i] = a[i].v;
#endif
  }
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(x[0], x[1]), _mm256_hadd_ps(x[2], x[3]));
  const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(x[4], x[5]), _mm256_hadd_ps(x[6], x[7]));
  _mm256_storeu_ps(out, _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20),
                                      _mm256_permute2f128_ps(low, high, 0x31)));
#else
  for (int i = 0; i < 8; ++i) out[i] = reduce_add(a[i]);
#endif
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt

#include "csrc/cpu/simd_math.h"
