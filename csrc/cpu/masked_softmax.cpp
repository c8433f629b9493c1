// y = softmax(scale * scores) over the keys that each query sees, 0 elsewhere;
// dscores = scale * y * (dy - sum(dy * y)) over the same keys.
//
// Plan: items of a few query rows handed to the threads; of each row only the band is read, the
// rest of the output is filled with zeros. A row is walked in blocks that stay in L1
// (softmax_row.h). Bytes: forward reads the band of scores and writes y (r sq sk); backward reads
// the band of dy and y and writes dscores. Flops: about 20 per visible entry forward, 5 backward:
// memory-bound.
#include "csrc/ops/masked_softmax.h"

#include "csrc/common/dispatch.h"
#include "csrc/cpu/kernels.h"
#include "csrc/cpu/parallel.h"
#include "csrc/cpu/softmax_row.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {
namespace {

constexpr int64_t kItemElements = 16384;  // below this a second thread costs more than it saves

struct Keys {
  int64_t begin, end;
};

// The keys that query i sees.
Keys visible_keys(int64_t i, int64_t sq, int64_t sk, const Band& band) {
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
  return end > begin ? Keys{begin, end} : Keys{0, 0};
}

template <typename T>
T* query_row(const TensorRef& t, int64_t row) {
  const int64_t matrix = row / t.size[1], i = row % t.size[1];
  return static_cast<T*>(t.data) + matrix * t.stride[0] + i * t.stride[1];
}

// The zeros around the band. All float formats share the all-zero bit pattern.
template <typename T>
void clear_hidden(T* row, Keys keys, int64_t sk) {
  std::memset(row, 0, keys.begin * sizeof(T));
  std::memset(row + keys.end, 0, (sk - keys.end) * sizeof(T));
}

template <typename T, typename Y>
void forward(const MaskedSoftmaxFwd& p) {
  const int64_t sq = p.scores.size[1], sk = p.scores.size[2], rows = p.scores.size[0] * sq;
  const int64_t item_rows = kItemElements / sk + 1;
  const int64_t items = (rows + item_rows - 1) / item_rows;
  const int workers = worker_count(items);
  const WorkerScratch scratch(workers, (sk + row_blocks(sk)) * sizeof(float));
  parallel_items(items, workers, [&](int64_t item, int worker) {
    float* e = scratch.of(worker);
    const int64_t end = (item + 1) * item_rows < rows ? (item + 1) * item_rows : rows;
    for (int64_t row = item * item_rows; row < end; ++row) {
      const Keys keys = visible_keys(row % sq, sq, sk, p.band);
      Y* y = query_row<Y>(p.y, row);
      clear_hidden(y, keys, sk);
      const T* scores = query_row<T>(p.scores, row) + keys.begin;
      softmax_row(scores, keys.end - keys.begin, p.scale, 0.0f, scores + p.scores.stride[1], false,
                  y + keys.begin, e, e + sk);
    }
  });
}

template <typename Y, typename X>
void backward(const MaskedSoftmaxBwd& p) {
  const int64_t sq = p.y.size[1], sk = p.y.size[2], rows = p.y.size[0] * sq;
  parallel_for(rows, kItemElements / sk + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Keys keys = visible_keys(row % sq, sq, sk, p.band);
      X* dscores = query_row<X>(p.dscores, row);
      clear_hidden(dscores, keys, sk);
      const Y* dy = query_row<Y>(p.dy, row) + keys.begin;
      const Y* y = query_row<Y>(p.y, row) + keys.begin;
      softmax_row_bwd(dy, y, keys.end - keys.begin, p.scale, dy + p.dy.stride[1], y + p.y.stride[1],
                      false, dscores + keys.begin);
    }
  });
}

}  // namespace

void masked_softmax_fwd_kernel(const MaskedSoftmaxFwd& p) {
  visit_dtype<bf16, f16>(p.scores.dtype, [&](auto scores) {
    using T = typename decltype(scores)::type;
    p.y.dtype == p.scores.dtype ? forward<T, T>(p) : forward<T, float>(p);
  });
}

void masked_softmax_bwd_kernel(const MaskedSoftmaxBwd& p) {
  visit_dtype<bf16, f16>(p.dscores.dtype, [&](auto dscores) {
    using X = typename decltype(dscores)::type;
    p.y.dtype == p.dscores.dtype ? backward<X, X>(p) : backward<float, X>(p);
  });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
