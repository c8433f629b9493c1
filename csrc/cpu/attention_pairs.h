// Operands of the tile product in pairs of bf16 (Pairs of tile_gemm.h), where the level has it: two
// neighbours along the depth of a product share a 32-bit element. A pair along d is a row of bf16
// as it is stored; a pair along keys or queries interleaves two rows.
#pragma once

#include "csrc/cpu/attention_head.h"
#include "csrc/cpu/tile_gemm.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {

// A mask zeroes keys of float copies, the gradient of a bias is float32, and a short d gains
// nothing while its few terms average less of the rounding of p and ds out: these keep to float
// products.
FASTGPT_INLINE bool uses_pairs(const Head& head) {
  return kHasPairs && head.dtype == DType::bf16 && head.d >= 16 && head.mask.data == nullptr &&
         head.bias.data == nullptr;
}

FASTGPT_INLINE int pairs_of(int n) {
  return (n + 1) / 2;
}

// A range of keys widened to whole pairs; the band hides what that adds.
FASTGPT_INLINE KeyRange whole_pairs(KeyRange keys) {
  return KeyRange{keys.begin & ~int64_t{1}, (keys.end + 1) & ~int64_t{1}};
}

// bf16 rows (n, d) -> out (n, pairs_of(d)), rows `step` elements apart, an odd d padded with 0.
void pack_row_pairs(const Rows& rows, int64_t first, int n, int d, float* out, int64_t step);

// Keys `keys`, whole pairs of which only those in `real` are read, in pairs along d, hidden ones 0.
void pack_key_row_pairs(const Head& head, const Rows& rows, KeyRange keys, KeyRange real,
                        float* out, int64_t step);

// bf16 rows (n, d) -> out (pairs_of(n), d) in pairs of rows, an odd n padded with a row of 0.
void interleave_rows(const Rows& rows, int64_t first, int n, int d, float* out, int64_t step);

// x (n, columns) floats, an even number of them, rounded to bf16 -> out (n, columns / 2) in pairs
// along the row; out may be x.
void round_column_pairs(const float* x, int n, int columns, float* out);

// x (2 n, lanes) floats, rounded to bf16 -> out (n, lanes) in pairs of rows; out may be x.
void round_row_pairs(const float* x, int n, int lanes, float* out);

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
