// y = exp(x - max x) / sum(exp(x - max x)) over the last axis; dx = y * (dy - sum(dy * y)).
//
// Plan: a range of rows for each thread; a row is walked in blocks that stay in L1, its running
// maximum and sum corrected whenever a block raises the maximum (online softmax).
// Bytes: forward reads x and writes y, backward reads dy and y and writes dx (r n each). Flops:
// about 20 n a row forward (one exp2 per entry), 4 n backward: memory-bound.
// Source: Milakov, Gimelshein 2018, https://arxiv.org/abs/1805.02867
#include "csrc/ops/softmax.h"

#include "csrc/common/dispatch.h"
#include "csrc/cpu/kernels.h"
#include "csrc/cpu/parallel.h"
#include "csrc/cpu/softmax_row.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {
namespace {

constexpr int64_t kItemElements = 16384;  // below this a second thread costs more than it saves

template <typename T, typename Y>
void forward(const SoftmaxFwd& p) {
  const int64_t r = p.x.size[0], n = p.x.size[1];
  const int workers = worker_count(r, kItemElements / n + 1);
  const bool streaming = streams(p.y, 2);
  const WorkerScratch scratch(workers, (n + row_blocks(n)) * sizeof(float));
  parallel_ranges(r, workers, [&](int64_t begin, int64_t end, int worker) {
    float* e = scratch.of(worker);
    for (int64_t row = begin; row < end; ++row) {
      softmax_row(row_of<T>(p.x, row), n, 1.0f, __builtin_nanf(""), row_of<T>(p.x, row + 1),
                  streaming, row_of<Y>(p.y, row), e, e + n);
    }
    stream_fence();
  });
}

template <typename Y, typename X>
void backward(const SoftmaxBwd& p) {
  const int64_t r = p.y.size[0], n = p.y.size[1];
  const bool streaming = streams(p.dx, 3);
  parallel_for(r, kItemElements / n + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      softmax_row_bwd(row_of<Y>(p.dy, row), row_of<Y>(p.y, row), n, 1.0f, row_of<Y>(p.dy, row + 1),
                      row_of<Y>(p.y, row + 1), streaming, row_of<X>(p.dx, row));
    }
    stream_fence();
  });
}

}  // namespace

void softmax_fwd_kernel(const SoftmaxFwd& p) {
  visit_dtype<bf16, f16>(p.x.dtype, [&](auto x) {
    using T = typename decltype(x)::type;
    p.y.dtype == p.x.dtype ? forward<T, T>(p) : forward<T, float>(p);
  });
}

void softmax_bwd_kernel(const SoftmaxBwd& p) {
  visit_dtype<bf16, f16>(p.dx.dtype, [&](auto dx) {
    using X = typename decltype(dx)::type;
    p.y.dtype == p.dx.dtype ? backward<X, X>(p) : backward<float, X>(p);
  });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
