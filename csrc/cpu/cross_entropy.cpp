// Forward, per row: lse = log(sum_j exp(x_j)), online over blocks that stay in L1, and the loss
// from x_t, the sum and (under label smoothing) sum_j w_j x_j. Backward, with p_j = exp(x_j - lse):
// dx_j = g ((1 - e) w_t (p_j - [j = t]) + e / v (p_j sum(w) - w_j)), g the row's dloss.
//
// Plan: threads over rows; each row on its own. The loss is summed over rows in ascending order in
// double. Rows of ignore_index are skipped.
// Bytes: forward reads x (r v), backward reads x and writes dx. Flops: about 20 per logit (one exp)
// each way: memory-bound.
// Source: Milakov, Gimelshein 2018, https://arxiv.org/abs/1805.02867 (the online sum)
#include "csrc/ops/cross_entropy.h"

#include "csrc/common/dispatch.h"
#include "csrc/cpu/kernels.h"
#include "csrc/cpu/parallel.h"
#include "csrc/cpu/softmax_row.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {
namespace {

constexpr int64_t kGrainElements = 16384;  // below this a second thread costs more than it saves

int64_t target_of(const TensorRef& target, int64_t row) {
  return static_cast<const int64_t*>(target.data)[row];
}

float weight_of(const TensorRef& weight, int64_t j) {
  return weight ? static_cast<const float*>(weight.data)[j] : 1.0f;
}

// The sum of the class weights, v without weights.
double total_weight(const TensorRef& weight, int64_t classes) {
  if (!weight) return static_cast<double>(classes);
  double sum = 0.0;
  for (int64_t j = 0; j < classes; ++j) sum += weight_of(weight, j);
  return sum;
}

// weight (n) of these classes, or nullptr for weights of 1.
template <typename T>
void absorb_row(const T* x, int64_t n, bool smooth, const float* weight, CrossEntropyRow& row) {
  for (int64_t first = 0; first < n; first += kRowBlock) {
    const int64_t size = n - first < kRowBlock ? n - first : kRowBlock;
    const T* block = x + first;
    const float block_top =
        max_vectors<kSplits<T>>(size, [](int64_t, int, Vec x_at) { return x_at; }, block);
    if (block_top > row.top) {
      row.sum *= exp_below(row.top - block_top);
      row.top = block_top;
    }
    // -inf - -inf would be NaN; against 0 such logits count as 0
    const float offset = row.top == -kInfinity ? 0.0f : row.top;
    const Vec shift = set1(offset);
    row.sum += sum_vectors<kSplits<T>>(
        size, [&](int64_t, int, Vec x_at) { return exp_below(x_at - shift); }, NothingAhead{},
        block);
    if (!smooth) continue;
    // relative to the offset, so that logits far from 0 lose no digits
    double total = static_cast<double>(size);
    if (weight != nullptr) {
      total = sum_vectors<false>(
          size, [](int64_t, int, Vec weight_at) { return weight_at; }, NothingAhead{},
          weight + first);
    }
    const double relative = sum_vectors<false>(
        size,
        [&](int64_t i, int lanes, Vec x_at) {
          const Vec distance = x_at - shift;
          return weight == nullptr ? distance : distance * load_lanes(weight + first + i, lanes);
        },
        NothingAhead{}, block);
    row.weighted += relative + total * offset;
  }
}

template <typename T>
void absorb(const CrossEntropyAbsorb& p) {
  const int64_t r = p.x.size[0], n = p.x.size[1];
  const bool smooth = p.options.label_smoothing > 0.0;
  const float* weight =
      p.weight ? static_cast<const float*>(p.weight.data) + p.first_class : nullptr;
  parallel_for(r, kGrainElements / n + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      CrossEntropyRow row = p.rows[i];
      if (p.first_class == 0) row = CrossEntropyRow{0.0, -kInfinity, 0.0f, 0.0f};
      const int64_t target = target_of(p.target, i);
      if (target != p.options.ignore_index) {
        const T* x = row_of<T>(p.x, i);
        const int64_t j = target - p.first_class;
        if (j >= 0 && j < n) row.picked = to_float(x[j]);
        absorb_row(x, n, smooth, weight, row);
      }
      p.rows[i] = row;
    }
  });
}

// lse in two floats: what x is near to, and the rest.
struct SplitLse {
  float high, low;
  explicit SplitLse(double lse)
      : high(static_cast<float>(lse)), low(static_cast<float>(lse - high)) {}
};

// dx may be where x is.
template <typename T, typename X, bool kSmooth>
void backward_row(const T* x, int64_t n, SplitLse lse, float of_p, float of_weight,
                  const float* weight, bool streaming, X* dx) {
  const Vec high = set1(lse.high), low = set1(lse.low);
  const Vec factor = set1(of_p), constant = set1(-of_weight);
  const auto gradient = [&](int64_t i, int lanes, Vec x_at) {
    const Vec d = exp_below((x_at - high) - low) * factor;
    if (!kSmooth) return d;
    return fma(weight == nullptr ? set1(1.0f) : load_lanes(weight + i, lanes), constant, d);
  };
  constexpr bool kSplit = kSplits<T, X> && !kSmooth;  // the weights are in order
  map_vectors<kSplit>(n, dx, streaming, gradient, NothingAhead{}, x);
}

template <typename T, typename X, bool kSmooth>
void backward(const CrossEntropyBwd& p) {
  const int64_t r = p.x.size[0], n = p.x.size[1];
  const CrossEntropyOptions& o = p.options;
  const double hard = 1.0 - o.label_smoothing;
  const double soft = o.label_smoothing / static_cast<double>(o.classes);
  const double all = kSmooth ? total_weight(p.weight, o.classes) : 0.0;
  const float* weight =
      p.weight ? static_cast<const float*>(p.weight.data) + p.first_class : nullptr;
  const bool streaming = streams(p.dx, 2);
  parallel_for(r, kGrainElements / n + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* x = row_of<T>(p.x, i);
      X* dx = row_of<X>(p.dx, i);
      const int64_t target = target_of(p.target, i);
      if (target == o.ignore_index) {
        std::memset(dx, 0, n * sizeof(X));
        continue;
      }
      double g = 1.0;
      if (p.dloss) {
        g = static_cast<const float*>(p.dloss.data)[o.reduction == Reduction::none ? i : 0];
      }
      if (o.reduction == Reduction::mean) g /= static_cast<const float*>(p.weight_sum.data)[0];
      const SplitLse lse(static_cast<const double*>(p.lse.data)[i]);
      const double picked_weight = hard * weight_of(p.weight, target);
      float of_p = static_cast<float>(g * (picked_weight + soft * all));
      if (of_p != of_p) of_p = __builtin_nanf("");  // one that store_split takes
      const float of_weight = static_cast<float>(g * soft);
      const int64_t j = target - p.first_class;
      const bool here = j >= 0 && j < n;
      const float picked = here ? to_float(x[j]) : 0.0f;  // before dx, which may be x, is written
      backward_row<T, X, kSmooth>(x, n, lse, of_p, of_weight, weight, streaming, dx);
      if (here) {
        const float others = exp_below((picked - lse.high) - lse.low) * of_p -
                             of_weight * weight_of(p.weight, target);
        dx[j] = from_float<X>(others - static_cast<float>(g * picked_weight));
      }
    }
    stream_fence();
  });
}

}  // namespace

void cross_entropy_absorb_kernel(const CrossEntropyAbsorb& p) {
  visit_dtype<bf16, f16>(p.x.dtype, [&](auto x) { absorb<typename decltype(x)::type>(p); });
}

void cross_entropy_finish_kernel(const CrossEntropyFinish& p) {
  const CrossEntropyOptions& o = p.options;
  const int64_t r = p.target.size[0];
  const double soft = o.label_smoothing / static_cast<double>(o.classes);
  const double all = soft > 0.0 ? total_weight(p.weight, o.classes) : 0.0;
  float* row_loss = static_cast<float*>(p.row_loss.data);
  double* lse = static_cast<double*>(p.lse.data);
  parallel_for(r, kGrainElements / 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      row_loss[i] = 0.0f;
      lse[i] = 0.0;
      const int64_t target = target_of(p.target, i);
      if (target == o.ignore_index) continue;
      const CrossEntropyRow& row = p.rows[i];
      const double log_sum = __builtin_log(row.sum);
      const double top = row.top;
      double loss = (top - row.picked + log_sum) * weight_of(p.weight, target);
      if (soft > 0.0) {
        loss = (1.0 - o.label_smoothing) * loss + soft * (all * (top + log_sum) - row.weighted);
      }
      row_loss[i] = static_cast<float>(loss);
      lse[i] = top + log_sum;
    }
  });
  double loss = 0.0, weight_sum = 0.0;
  for (int64_t i = 0; i < r; ++i) {
    const int64_t target = target_of(p.target, i);
    if (target == o.ignore_index) continue;
    loss += row_loss[i];
    weight_sum += weight_of(p.weight, target);
  }
  static_cast<float*>(p.weight_sum.data)[0] = static_cast<float>(weight_sum);
  if (o.reduction == Reduction::none) return;
  if (o.reduction == Reduction::mean) loss /= weight_sum;
  static_cast<float*>(p.loss.data)[0] = static_cast<float>(loss);
}

void cross_entropy_bwd_kernel(const CrossEntropyBwd& p) {
  visit_dtype<bf16, f16>(p.x.dtype, [&](auto x) {
    using T = typename decltype(x)::type;
    const bool smooth = p.options.label_smoothing > 0.0;
    if (p.dx.dtype == p.x.dtype) {
      return smooth ? backward<T, T, true>(p) : backward<T, T, false>(p);
    }
    return smooth ? backward<float, bf16, true>(p) : backward<float, bf16, false>(p);
  });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
