// c = a b, c += a b or c = a b + bias, over any mixture of float32, bfloat16 and float16 factors.
//
// Plan: an item is up to 256 rows by 192 columns of c, less where that would leave threads idle; it
// walks k in blocks, packs b's block as (depth, panel) floats, which stay in L1 and L2, and takes a
// in place where it is float32 rows, else packed. Sums run over k in ascending blocks, so that no
// bit depends on how c is cut. bf16 times bf16 goes through VDPBF16PS where the level has it, in
// pairs along k: read in place, or made of two rows by packing (but b's columns, if they are not
// pairs as they lie, go the way of floats). Products are exact, but that VDPBF16PS takes subnormals
// as 0.
// Flops: 2 m n k. Bytes: a once for 192 columns, b once for 256 rows, c once a block.
// Source: Goto, van de Geijn 2008, https://doi.org/10.1145/1356052.1356053
#include "csrc/cpu/attention_pairs.h"
#include "csrc/cpu/kernels.h"
#include "csrc/cpu/parallel.h"
#include "csrc/cpu/rows.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {
namespace {

constexpr int kPanel = kBlockVecs * kLanes;
constexpr int kPanels = 192 / kPanel;
constexpr int kDepth = kLanes == 16 ? 96 : 256;  // a panel of b: 16 to 18 KiB
constexpr int kRows = 64;                        // of a at a time
constexpr int kItemRows = 256;
constexpr int kPadding = 16;  // keeps packed rows off the same sets of the cache
constexpr int kCopyStep = (kRows > kDepth ? kRows : kDepth) + kPadding;
constexpr int64_t kCopyFloats = int64_t{kRows > kDepth ? kRows : kDepth} * kCopyStep;
constexpr int64_t kScratchFloats = kPanels * kDepth * kPanel + kCopyFloats + kRows * kPanel;

// Matrix `t` from element (row, column) on, as rows of its contiguous axis.
Rows rows_from(const TensorRef& t, int64_t row, int64_t column) {
  const int64_t at = row * t.stride[0] + column * t.stride[1];
  return Rows{static_cast<char*>(t.data) + at * element_size(t.dtype),
              t.stride[1] == 1 ? t.stride[0] : t.stride[1], 0};
}

// Whether packing is to make the pairs that Op multiplies.
template <typename Op>
bool lacks_pairs(const TensorRef& t) {
  return Op::kPaired && t.dtype == DType::bf16;
}

// How many bf16 of an axis stand behind `depth` pairs from pair p0 on.
int halves_of(int64_t size, int64_t p0, int depth) {
  return static_cast<int>(clamp(size - 2 * p0, 0, 2 * depth));
}

// b (depth, columns) -> panels of (depth, kPanel); what lies past the last column is 0.
template <typename Op>
void pack_panels(const TensorRef& b, int64_t p0, int depth, int64_t j0, int columns, float* out) {
  const bool pair = lacks_pairs<Op>(b);
  for (int j = 0; j < columns; j += kPanel, out += kDepth * kPanel) {
    const int n = columns - j < kPanel ? columns - j : kPanel;
    const Rows rows = rows_from(b, pair ? 2 * p0 : p0, j0 + j);
    if (b.stride[1] != 1) {
      transpose_rows(rows, b.dtype, 0, n, depth, out, kPanel);
      continue;
    }
    if (n < kPanel) std::memset(out, 0, sizeof(float) * depth * kPanel);
    if (pair) {
      interleave_rows(rows, 0, halves_of(b.size[0], p0, depth), n, out, kPanel);
    } else {
      widen_rows(rows, b.dtype, 0, depth, n, out, kPanel);
    }
  }
}

// Where the tile product finds the elements of a block of a.
struct Factor {
  const float* data;
  int64_t row;
  int64_t step;
};

template <typename Op>
Factor factor_block(const TensorRef& a, int64_t i0, int rows, int64_t p0, int depth, float* copy) {
  const bool pair = lacks_pairs<Op>(a);
  const int halves = halves_of(a.size[1], p0, depth);
  const Rows from = rows_from(a, i0, pair ? 2 * p0 : p0);
  if (a.stride[1] == 1) {
    if (a.dtype == DType::f32) {
      return Factor{static_cast<const float*>(from.data), from.stride, 1};
    }
    pair ? pack_row_pairs(from, 0, rows, halves, copy, kCopyStep)
         : widen_rows(from, a.dtype, 0, rows, depth, copy, kCopyStep);
    return Factor{copy, kCopyStep, 1};
  }
  pair ? interleave_rows(from, 0, halves, rows, copy, kCopyStep)
       : widen_rows(from, a.dtype, 0, depth, rows, copy, kCopyStep);
  return Factor{copy, 1, kCopyStep};
}

// Adds a tile (rows, columns) of sums, kPanel apart, to c, or stores it.
void join_tile(const float* tile, int rows, int columns, bool add, float* c, int64_t c_row) {
  for (int i = 0; i < rows; ++i) {
    const float* from = tile + i * kPanel;
    float* to = c + i * c_row;
    for_vectors(columns, [&](int64_t j, int lanes) {
      const Vec sum = load_lanes(from + j, lanes);
      store_lanes(to + j, add ? load_lanes(to + j, lanes) + sum : sum, lanes);
    });
  }
}

// k: the depth in elements of Op.
template <typename Op>
void multiply_item(const MatrixProduct& p, int64_t k, int64_t i0, int rows, int64_t j0, int columns,
                   float* scratch) {
  float* panels = scratch;
  float* copy = panels + kPanels * kDepth * kPanel;
  float* tile = copy + kCopyFloats;
  const int64_t c_row = p.c.stride[0];
  float* c = static_cast<float*>(p.c.data) + i0 * c_row + j0;
  if (p.bias) {
    const float* bias = static_cast<const float*>(p.bias.data) + j0;
    for (int i = 0; i < rows; ++i) std::memcpy(c + i * c_row, bias, columns * sizeof(float));
  } else if (k == 0 && !p.add) {
    for (int i = 0; i < rows; ++i) std::memset(c + i * c_row, 0, columns * sizeof(float));
  }
  for (int64_t p0 = 0; p0 < k; p0 += kDepth) {
    const int depth = k - p0 < kDepth ? static_cast<int>(k - p0) : kDepth;
    const bool add = p.add || p.bias || p0 > 0;
    pack_panels<Op>(p.b, p0, depth, j0, columns, panels);
    for (int i = 0; i < rows; i += kRows) {
      const int m = rows - i < kRows ? rows - i : kRows;
      const Factor a = factor_block<Op>(p.a, i0 + i, m, p0, depth, copy);
      for (int j = 0; j < columns; j += kPanel) {
        const int n = columns - j < kPanel ? columns - j : kPanel;
        float* to = c + i * c_row + j;
        TileProduct t = {m,
                         whole_vectors(n),
                         depth,
                         a.data,
                         a.row,
                         a.step,
                         panels + j / kPanel * kDepth * kPanel,
                         kPanel,
                         to,
                         c_row,
                         add ? Into::kAdd : Into::kStore,
                         1.0f,
                         nullptr};
        const bool whole = n % kLanes == 0;
        if (!whole) {
          t.c = tile;
          t.c_row = kPanel;
          t.into = Into::kStore;
        }
        tile_product<Op>(t);
        if (!whole) join_tile(tile, m, n, add, to, c_row);
      }
    }
  }
}

// Whether pairs of bf16 along k lie in memory as 32-bit elements.
bool holds_pairs(const TensorRef& t, int axis) {
  return t.stride[axis] == 1 && t.size[axis] % 2 == 0 && t.stride[1 - axis] % 2 == 0 &&
         reinterpret_cast<uintptr_t>(t.data) % 4 == 0;
}

// These pairs as elements, where there are any.
TensorRef as_pairs(TensorRef t, int axis) {
  if (!holds_pairs(t, axis)) return t;
  t.dtype = DType::f32;
  t.size[axis] /= 2;
  t.stride[1 - axis] /= 2;
  return t;
}

template <typename Op>
void multiply(const MatrixProduct& p, int64_t k) {
  const int64_t m = p.c.size[0], n = p.c.size[1];
  constexpr int kColumns = kPanels * kPanel, kItemsPerThread = 8;
  const int64_t across = ceil_div(n, kColumns);
  int item_rows = kItemRows;
  while (item_rows > kRows && ceil_div(m, item_rows) * across < kItemsPerThread * max_threads()) {
    item_rows /= 2;
  }
  const int64_t items = ceil_div(m, item_rows) * across;
  const int workers = worker_count(items);
  const WorkerScratch scratch(workers, kScratchFloats * sizeof(float));
  parallel_items(items, workers, [&](int64_t item, int worker) {
    const int64_t i0 = item / across * item_rows, j0 = item % across * kColumns;
    multiply_item<Op>(p, k, i0, static_cast<int>(clamp(m - i0, 0, item_rows)), j0,
                      static_cast<int>(clamp(n - j0, 0, kColumns)), scratch.of(worker));
  });
}

}  // namespace

void matrix_product_kernel(const MatrixProduct& p) {
  const int64_t k = p.a.size[1];
  const bool pairs = kHasPairs && p.a.dtype == DType::bf16 && p.b.dtype == DType::bf16 &&
                     (p.b.stride[1] == 1 || holds_pairs(p.b, 0));
  if (!pairs) return multiply<Floats>(p, k);
  multiply<Pairs>({as_pairs(p.a, 1), as_pairs(p.b, 0), p.bias, p.c, p.add}, (k + 1) / 2);
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
