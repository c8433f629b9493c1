// Pieces that the kernels over rows share: loops over a row in whole vectors and one partial one.
#pragma once

#include "csrc/cpu/parallel.h"
#include "csrc/cpu/simd.h"
#include "csrc/ops/tensor_ref.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {

template <typename T>
FASTGPT_INLINE T* row_of(const TensorRef& t, int64_t row) {
  return static_cast<T*>(t.data) + row * t.stride[0];
}

// Loops over a row go in chunks of a few vectors, with one call of ahead(first element) a chunk:
// what fetches the memory that the next loop needs.
constexpr int kChunk = 4 * Vec::width;

struct NothingAhead {
  FASTGPT_INLINE void operator()(int64_t) const {}
};

// Asks for a chunk of a row.
template <typename T>
FASTGPT_INLINE void prefetch_chunk(const T* p, bool to_write = false) {
  constexpr int kLine = 64 / static_cast<int>(sizeof(T));
  for (int i = 0; i < kChunk; i += kLine) {
    to_write ? __builtin_prefetch(p + i, 1) : __builtin_prefetch(p + i);
  }
}

// body(first element, lanes) over [0, n): whole vectors with lanes == Vec::width, then the rest.
template <typename F, typename Ahead = NothingAhead>
FASTGPT_INLINE void for_vectors(int64_t n, const F& body, const Ahead& ahead = {}) {
  int64_t i = 0;
  for (; i + kChunk <= n; i += kChunk) {
    ahead(i);
    for (int c = 0; c < kChunk; c += Vec::width) body(i + c, Vec::width);
  }
  for (; i + Vec::width <= n; i += Vec::width) body(i, Vec::width);
  if (i < n) body(i, static_cast<int>(n - i));
}

template <typename T>
FASTGPT_INLINE Vec load_lanes(const T* p, int lanes) {
  return lanes == Vec::width ? load(p) : load(p, lanes);
}

template <typename T>
FASTGPT_INLINE void store_lanes(T* p, Vec v, int lanes) {
  lanes == Vec::width ? store(p, v) : store(p, v, lanes);
}

// Whether the rows (r, n) of a result are streamed to memory, whole vectors of float32 and pairs of
// bf16 on their own alignment: where the op, which moves `tensors` of this size, drives its first
// rows out of the caches before it ends. A plain store would first read the line that it replaces.
// Learnt, at 24 MiB of 32 that the caches have: streamed, a row op is faster, and a chain of two; a
// sum of the result loses in a quiet hour what it gains in a loud one, a product is as fast.
inline bool streams(const TensorRef& out, int tensors) {
  constexpr int64_t kCacheBytes = int64_t{20} << 20;
  if (out.dtype != DType::f32 && out.dtype != DType::bf16) return false;
  const int64_t bytes = out.dtype == DType::f32 ? 4 : 2;
  return tensors * out.size[0] * out.size[1] * bytes > kCacheBytes &&
         out.stride[0] * bytes % 64 == 0 && reinterpret_cast<uintptr_t>(out.data) % 64 == 0;
}

template <typename T>
FASTGPT_INLINE void store_lanes(T* p, Vec v, int lanes, bool streaming) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (streaming && lanes == Vec::width) return stream(p, v);
  }
  store_lanes(p, v, lanes);
}

// Pairs of vectors of a row. bf16 comes split into the even and the odd elements of a pair, where
// kSplits says so of what a loop reads and writes; floats that such a loop reads or writes beside
// are in that order themselves (reorder_pairs), or of nobody else.
constexpr int kTwo = 2 * Vec::width;

struct Two {
  Vec a, b;
};

template <typename... T>
constexpr bool kSplits = (kSplits<T> && ...);
template <typename T>
constexpr bool kSplits<T> = false;
template <>
inline constexpr bool kSplits<bf16> = true;

template <bool kSplit, typename T>
FASTGPT_INLINE Two load_two(const T* p) {
  Two v;
  if constexpr (kSplit && kSplits<T>) {
    load_split(p, v.a, v.b);
  } else {
    v = {load(p), load(p + Vec::width)};
  }
  return v;
}

template <bool kSplit, typename T>
FASTGPT_INLINE void store_two(T* p, Vec a, Vec b, bool streaming) {
  if constexpr (kSplit && kSplits<T>) return store_split(p, a, b, streaming);
  store_lanes(p, a, Vec::width, streaming);
  store_lanes(p + Vec::width, b, Vec::width, streaming);
}

// out[i] = f(first element, lanes, the vectors of in at it ...), the first element as split floats
// count it.
template <bool kSplit, typename Out, typename F, typename Ahead, typename... In>
FASTGPT_INLINE void map_vectors(int64_t n, Out* out, bool streaming, const F& f, const Ahead& ahead,
                                const In*... in) {
  const auto map_two = [&](int64_t i, auto... x) {
    const Vec a = f(i, Vec::width, x.a...), b = f(i + Vec::width, Vec::width, x.b...);
    store_two<kSplit>(out + i, a, b, streaming);
  };
  int64_t i = 0;
  for (; i + kChunk <= n; i += kChunk) {
    ahead(i);
    map_two(i, load_two<kSplit>(in + i)...);
    map_two(i + kTwo, load_two<kSplit>(in + i + kTwo)...);
  }
  for (; i + kTwo <= n; i += kTwo) map_two(i, load_two<kSplit>(in + i)...);
  for (; i < n; i += Vec::width) {
    const int lanes = n - i < Vec::width ? static_cast<int>(n - i) : Vec::width;
    store_lanes(out + i, f(i, lanes, load_lanes(in + i, lanes)...), lanes, streaming);
  }
}

// fold(sum, term) over term(first element, lanes, the vectors of in at it ...) of [0, n), lanes
// beyond n standing at fill, in four independent chains.
template <bool kSplit, typename Fold, typename Term, typename Ahead, typename... In>
FASTGPT_INLINE Vec fold_vectors(int64_t n, float fill, const Fold& fold, const Term& term,
                                const Ahead& ahead, const In*... in) {
  const Vec start = set1(fill);
  Vec chain[4] = {start, start, start, start};
  const auto fold_two = [&](int64_t i, Vec& a, Vec& b, auto... x) {
    a = fold(a, term(i, Vec::width, x.a...));
    b = fold(b, term(i + Vec::width, Vec::width, x.b...));
  };
  int64_t i = 0;
  for (; i + kChunk <= n; i += kChunk) {
    ahead(i);
    fold_two(i, chain[0], chain[1], load_two<kSplit>(in + i)...);
    fold_two(i + kTwo, chain[2], chain[3], load_two<kSplit>(in + i + kTwo)...);
  }
  if (i + kTwo <= n) {
    fold_two(i, chain[0], chain[1], load_two<kSplit>(in + i)...);
    i += kTwo;
  }
  for (; i < n; i += Vec::width) {
    const int lanes = n - i < Vec::width ? static_cast<int>(n - i) : Vec::width;
    const Vec last = term(i, lanes, load_lanes(in + i, lanes)...);
    chain[0] = fold(chain[0], select(first_lanes(lanes), last, start));
  }
  return fold(fold(chain[0], chain[1]), fold(chain[2], chain[3]));
}

template <bool kSplit, typename Term, typename... In>
FASTGPT_INLINE float max_vectors(int64_t n, const Term& term, const In*... in) {
  const auto larger = [](Vec a, Vec b) { return max(a, b); };
  return reduce_max(fold_vectors<kSplit>(n, -kInfinity, larger, term, NothingAhead{}, in...));
}

template <bool kSplit, typename Term, typename Ahead, typename... In>
FASTGPT_INLINE float sum_vectors(int64_t n, const Term& term, const Ahead& ahead, const In*... in) {
  const auto add = [](Vec a, Vec b) { return a + b; };
  return reduce_add(fold_vectors<kSplit>(n, 0.0f, add, term, ahead, in...));
}

// The part of a row of n that comes in whole pairs of vectors.
FASTGPT_INLINE int64_t split_part(int64_t n) {
  return n - n % kTwo;
}

// Orders the pairs of vectors in split_part(n) as load_split orders them, or back.
inline void reorder_pairs(float* p, int64_t n, bool split) {
  for (int64_t first = 0; first < split_part(n); first += kTwo) {
    float pair[kTwo];
    store(pair, load(p + first));
    store(pair + Vec::width, load(p + first + Vec::width));
    for (int i = 0; i < kTwo; ++i) {
      const int ordered = i, halves = i % 2 * Vec::width + i / 2;
      p[first + (split ? halves : ordered)] = pair[split ? ordered : halves];
    }
  }
}

// A parameter vector (n) of any float dtype as floats: in place where it is stored so, else a copy;
// absent: all equal to fallback. With `split` every pair of vectors in split_part(n) is ordered as
// load_split orders it, and a NaN is one that store_split takes.
class FloatParameter {
 public:
  FloatParameter(const TensorRef& parameter, float fallback, int64_t n, bool split = false)
      : in_place_(parameter && parameter.dtype == DType::f32 && !split
                      ? static_cast<const float*>(parameter.data)
                      : nullptr),
        copy_(in_place_ == nullptr ? n * sizeof(float) : 0) {
    if (in_place_ != nullptr) return;
    float* copy = copy_.at();
    for_vectors(n, [&](int64_t i, int lanes) {
      const Vec v = widened(parameter, fallback, i, lanes);
      store_lanes(copy + i, split ? select(v == v, v, set1(__builtin_nanf(""))) : v, lanes);
    });
    if (split) reorder_pairs(copy, n, true);
  }
  const float* data() const { return in_place_ == nullptr ? copy_.at() : in_place_; }

 private:
  static Vec widened(const TensorRef& parameter, float fallback, int64_t i, int lanes) {
    if (!parameter) return set1(fallback);
    if (parameter.dtype == DType::f32) {
      return load_lanes(static_cast<const float*>(parameter.data) + i, lanes);
    }
    if (parameter.dtype == DType::bf16) {
      return load_lanes(static_cast<const bf16*>(parameter.data) + i, lanes);
    }
    return load_lanes(static_cast<const f16*>(parameter.data) + i, lanes);
  }

  const float* in_place_;
  Scratch copy_;
};

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
