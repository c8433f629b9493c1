// Copies, interleavings and roundings that make pairs of bf16; O(rows d) against O(rows rows d) of
// the products they feed.
#include "csrc/cpu/attention_pairs.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {
namespace {

// Elements of buffers that the tile product reads as floats.
typedef uint16_t __attribute__((may_alias)) Half;
typedef uint32_t __attribute__((may_alias)) Pair;

}  // namespace

void pack_row_pairs(const Rows& rows, int64_t first, int n, int d, float* out, int64_t step) {
  for (int i = 0; i < n; ++i) {
    float* to = out + i * step;
    to[pairs_of(d) - 1] = 0.0f;
    std::memcpy(to, row_at(rows, DType::bf16, first + i), d * sizeof(bf16));
  }
}

void pack_key_row_pairs(const Head& head, const Rows& rows, KeyRange keys, KeyRange real,
                        float* out, int64_t step) {
  for (int64_t key = keys.begin; key < keys.end; ++key) {
    float* to = out + (key - keys.begin) * step;
    const bool hidden =
        key < real.begin || key >= real.end ||
        (head.key_visible != nullptr && head.key_visible[key * head.key_visible_stride] == 0);
    if (hidden) {
      std::memset(to, 0, pairs_of(head.d) * sizeof(float));
    } else {
      pack_row_pairs(rows, key, 1, head.d, to, step);
    }
  }
}

void interleave_rows(const Rows& rows, int64_t first, int n, int d, float* out, int64_t step) {
  const auto row = [&](int i) {
    return reinterpret_cast<const Half*>(row_at(rows, DType::bf16, first + i));
  };
  for (int p = 0; p < n / 2; ++p) {
    const Half* __restrict low = row(2 * p);
    const Half* __restrict high = row(2 * p + 1);
    Pair* __restrict to = reinterpret_cast<Pair*>(out + p * step);
    for (int c = 0; c < d; ++c) to[c] = low[c] | uint32_t{high[c]} << 16;
  }
  if (n % 2 == 0) return;
  const Half* __restrict last = row(n - 1);
  Pair* __restrict to = reinterpret_cast<Pair*>(out + n / 2 * step);
  for (int c = 0; c < d; ++c) to[c] = last[c];
}

void round_column_pairs(const float* x, int n, int columns, float* out) {
  bf16* to = reinterpret_cast<bf16*>(out);
  for (int64_t i = 0; i < int64_t{n} * columns; i += kLanes) store(to + i, load(x + i));
}

void round_row_pairs(const float* x, int n, int lanes, float* out) {
  for (int p = 0; p < n; ++p) {
    const float* low = x + 2 * p * lanes;
    for (int i = 0; i < lanes; i += kLanes) {
      const NativeUint pair = bf16_bits(load(low + i)) | (bf16_bits(load(low + lanes + i)) << 16);
      store(out + p * lanes + i, from_bits(pair));
    }
  }
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
