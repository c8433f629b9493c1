// y = softmax(scale * scores) over the keys that each query sees, 0 elsewhere;
// dscores = scale * y * (dy - sum(dy * y)) over the same keys.
//
// Plan: one block a query row (four where a warp suffices); of each row only the packs of the band
// are read, the rest of the result is filled with zeros. Bytes: forward reads the band of scores
// and writes y (r sq sk); backward reads the band of dy and y and writes dscores: memory-bound.
#include "csrc/ops/masked_softmax.h"

#include "csrc/cuda/softmax_row.cuh"

namespace fastgpt::cuda {
namespace {

template <typename T>
__device__ T* query_row(const TensorRef& t, int64_t row) {
  const int64_t matrix = row / t.size[1], i = row % t.size[1];
  return static_cast<T*>(t.data) + matrix * t.stride[0] + i * t.stride[1];
}

// The keys that query i sees.
template <int kPack>
__device__ Span<kPack> visible_keys(int64_t i, int64_t sq, int64_t sk, const Band& band) {
  const int64_t position = i + sk - sq;
  int64_t begin = 0, end = sk;
  if (band.window > 0) {
    const int64_t window = band.window < sq + sk ? band.window : sq + sk;
    begin = position - window + 1;
    end = position + window;
  }
  if (band.causal && end > position + 1) end = position + 1;
  begin = begin < 0 ? 0 : begin;
  end = end > sk ? sk : end;
  if (end <= begin) begin = end = 0;
  return Span<kPack>(static_cast<int>(begin), static_cast<int>(end), static_cast<int>(sk));
}

// Zeros in the columns [from, to).
template <int kPack, typename T>
__device__ void clear(T* g_row, int from, int to) {
  const float r_zero[kPack] = {};
  const int begin = -columns_before<kPack>(g_row + from), n = to - from;
  for_packs<kPack, false>(n - begin, [&](int, int i) {
    i += begin;
    const bool whole = i >= 0 && i + kPack <= n;
    whole ? store<kPack>(g_row + from + i, r_zero) : store_within(g_row + from, i, n, r_zero);
  });
}

// Zeros around the packs of the span.
template <int kPack, typename T>
__device__ void clear_hidden(T* g_row, Span<kPack> span, int sk) {
  clear<kPack>(g_row, 0, span.first);
  clear<kPack>(g_row, span.first + span.size, sk);
}

template <typename T, typename Y, int kPack, bool kCached, bool kAnywhere>
__global__ void __launch_bounds__(kMaxRowThreads, kCached ? 1 : 2)
    masked_softmax_fwd_kernel(MaskedSoftmaxFwd p) {
  FASTGPT_SHARED(float, s_reduce, kWarp);
  const int64_t row = blockIdx.x * static_cast<int64_t>(blockDim.y) + threadIdx.y;
  const int64_t sq = p.scores.size[1], sk = p.scores.size[2];
  if (row >= p.scores.size[0] * sq) return;  // a whole warp, and no other waits for it
  const Span<kPack> keys = visible_keys<kPack>(row % sq, sq, sk, p.band);
  Y* g_y = query_row<Y>(p.y, row);
  clear_hidden(g_y, keys, static_cast<int>(sk));
  softmax_row<kCached, kAnywhere>(query_row<const T>(p.scores, row), keys, p.scale, 0.0f, g_y,
                                  nullptr, 0, s_reduce);
}

template <typename Y, typename X, int kPack, bool kCached, bool kAnywhere>
__global__ void __launch_bounds__(kMaxRowThreads, kCached ? 1 : 2)
    masked_softmax_bwd_kernel(MaskedSoftmaxBwd p) {
  FASTGPT_SHARED(float, s_reduce, kWarp);
  const int64_t row = blockIdx.x * static_cast<int64_t>(blockDim.y) + threadIdx.y;
  const int64_t sq = p.y.size[1], sk = p.y.size[2];
  if (row >= p.y.size[0] * sq) return;
  const Span<kPack> keys = visible_keys<kPack>(row % sq, sq, sk, p.band);
  X* g_dscores = query_row<X>(p.dscores, row);
  clear_hidden(g_dscores, keys, static_cast<int>(sk));
  softmax_row_bwd<kCached, kAnywhere>(query_row<const Y>(p.dy, row), query_row<const Y>(p.y, row),
                                      keys, p.scale, g_dscores, s_reduce);
}

// A matrix of rows for the plan: its rows must be aligned, and so must the step between matrices.
TensorRef rows_of(const TensorRef& t, int pack) {
  TensorRef rows = t;
  const bool whole = t.stride[0] % pack == 0;
  rows.stride[0] = whole ? t.stride[1] : 1;
  return rows;
}

}  // namespace

void masked_softmax_fwd(const MaskedSoftmaxFwd& p, void* stream) {
  const int pack = pack_of(p.scores);
  const RowPlan plan =
      plan_rows(p.scores.size[2], pack, {rows_of(p.scores, pack), rows_of(p.y, pack)}, true);
  visit_softmax(
      plan, p.scores.dtype, p.y.dtype,
      [&](auto tx, auto ty, auto packs, auto cached, auto anywhere) {
        using T = typename decltype(tx)::type;
        using Y = typename decltype(ty)::type;
        launch(masked_softmax_fwd_kernel<T, Y, decltype(packs)::kValue, decltype(cached)::kValue,
                                         decltype(anywhere)::kValue>,
               grid_of_rows(plan, p.scores.size[0] * p.scores.size[1]), block_of_rows(plan), 0,
               stream, p);
      });
}

void masked_softmax_bwd(const MaskedSoftmaxBwd& p, void* stream) {
  const int pack = pack_of(p.dscores);
  const RowPlan plan = plan_rows(
      p.y.size[2], pack, {rows_of(p.dy, pack), rows_of(p.y, pack), rows_of(p.dscores, pack)}, true);
  visit_softmax(
      plan, p.dscores.dtype, p.y.dtype,
      [&](auto tx, auto ty, auto packs, auto cached, auto anywhere) {
        using X = typename decltype(tx)::type;
        using Y = typename decltype(ty)::type;
        launch(masked_softmax_bwd_kernel<Y, X, decltype(packs)::kValue, decltype(cached)::kValue,
                                         decltype(anywhere)::kValue>,
               grid_of_rows(plan, p.y.size[0] * p.y.size[1]), block_of_rows(plan), 0, stream, p);
      });
}

}  // namespace fastgpt::cuda
