// y = exp(x - max x) / sum(exp(x - max x)) over the last axis; dx = y * (dy - sum(dy * y)).
//
// Plan: one block a row (four rows a block where a warp suffices), the row in registers up to 16384
// elements, in packs of 16 bytes of the narrower type. Longer rows, and those whose packs do not
// lie at addresses that they divide, are read twice, the second time mostly from L1 and L2; in the
// forward a long one waits in shared memory instead. Bytes: forward reads x and writes y (r n
// each), backward reads dy and y and writes dx: memory-bound.
// Source: Milakov, Gimelshein 2018, https://arxiv.org/abs/1805.02867
#include "csrc/ops/softmax.h"

#include "csrc/cuda/softmax_row.cuh"

namespace fastgpt::cuda {
namespace {

template <typename T, typename Y, int kPack, bool kCached, bool kAnywhere>
__global__ void __launch_bounds__(kMaxRowThreads, kCached ? 1 : 2)
    softmax_fwd_kernel(SoftmaxFwd p, int bytes) {
  FASTGPT_SHARED(float, s_reduce, kWarp);
  FASTGPT_DYNAMIC_SHARED(s_row);
  const int64_t row = blockIdx.x * static_cast<int64_t>(blockDim.y) + threadIdx.y;
  if (row >= p.x.size[0]) return;  // a whole warp, and no other waits for it
  const Span<kPack, true> all(0, static_cast<int>(p.x.size[1]), static_cast<int>(p.x.size[1]));
  softmax_row<kCached, kAnywhere>(row_of<const T>(p.x, row), all, 1.0f, NAN, row_of<Y>(p.y, row),
                                  s_row, bytes, s_reduce);
}

template <typename Y, typename X, int kPack, bool kCached, bool kAnywhere>
__global__ void __launch_bounds__(kMaxRowThreads, kCached ? 1 : 2)
    softmax_bwd_kernel(SoftmaxBwd p) {
  FASTGPT_SHARED(float, s_reduce, kWarp);
  const int64_t row = blockIdx.x * static_cast<int64_t>(blockDim.y) + threadIdx.y;
  if (row >= p.y.size[0]) return;
  const Span<kPack, true> all(0, static_cast<int>(p.y.size[1]), static_cast<int>(p.y.size[1]));
  softmax_row_bwd<kCached, kAnywhere>(row_of<const Y>(p.dy, row), row_of<const Y>(p.y, row), all,
                                      1.0f, row_of<X>(p.dx, row), s_reduce);
}

}  // namespace

void softmax_fwd(const SoftmaxFwd& p, void* stream) {
  const RowPlan plan = plan_rows(p.x.size[1], pack_of(p.x), {p.x, p.y}, true);
  visit_softmax(
      plan, p.x.dtype, p.y.dtype, [&](auto tx, auto ty, auto pack, auto cached, auto anywhere) {
        using T = typename decltype(tx)::type;
        using Y = typename decltype(ty)::type;
        constexpr bool kCached = decltype(cached)::kValue;
        const int bytes = kCached ? 0 : staged_bytes<T>(p.x.size[1]);
        launch(
            softmax_fwd_kernel<T, Y, decltype(pack)::kValue, kCached, decltype(anywhere)::kValue>,
            grid_of_rows(plan, p.x.size[0]), block_of_rows(plan), bytes, stream, p, bytes);
      });
}

void softmax_bwd(const SoftmaxBwd& p, void* stream) {
  const RowPlan plan = plan_rows(p.y.size[1], pack_of(p.dx), {p.dy, p.y, p.dx}, true);
  visit_softmax(plan, p.dx.dtype, p.y.dtype,
                [&](auto tx, auto ty, auto pack, auto cached, auto anywhere) {
                  using X = typename decltype(tx)::type;
                  using Y = typename decltype(ty)::type;
                  launch(softmax_bwd_kernel<Y, X, decltype(pack)::kValue, decltype(cached)::kValue,
                                            decltype(anywhere)::kValue>,
                         grid_of_rows(plan, p.y.size[0]), block_of_rows(plan), 0, stream, p);
                });
}

}  // namespace fastgpt::cuda
