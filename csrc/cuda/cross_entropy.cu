// Forward, per row: lse = log(sum_j exp(x_j)), and the loss from x_t, the sum and (under label
// smoothing) sum_j w_j x_j. Backward, with p_j = exp(x_j - lse): dx_j = g ((1 - e) w_t (p_j -
// [j = t]) + e / v (p_j sum(w) - w_j)), g the row's dloss.
//
// Plan: one block a row, in packs of 16 bytes, four of a thread under way; which thread sums a
// column depends on v alone, so that a row has the same bits wherever it lies (v = 50257 is odd: no
// two rows are aligned alike, and anywhere.cuh shifts). The loss is summed in a fixed order in
// double.
// Bytes: forward reads x (r v), backward reads x and writes dx: memory-bound.
// Source: Milakov, Gimelshein 2018, https://arxiv.org/abs/1805.02867 (the online sum)
#include "csrc/ops/cross_entropy.h"

#include <type_traits>

#include "csrc/cuda/anywhere.cuh"
#include "csrc/cuda/softmax_row.cuh"

namespace fastgpt::cuda {
namespace {

constexpr int kThreads = 256;  // of a row
template <bool kAnywhere>
constexpr int kGroup = kAnywhere ? 3 : 4;  // packs of a thread under way, by its registers
constexpr int kFinishThreads = 512;

__device__ float weight_of(const TensorRef& weight, int64_t j) {
  return weight.data == nullptr ? 1.0f : static_cast<const float*>(weight.data)[j];
}

// The target of a row; anything but a class or ignore_index ends the kernel, as in torch.
__device__ int64_t target_of(const TensorRef& target, int64_t row, const CrossEntropyOptions& o) {
  const int64_t t = static_cast<const int64_t*>(target.data)[row];
  if (t != o.ignore_index && (t < 0 || t >= o.classes)) __trap();
  return t;
}

// As exp_below; results below the normal numbers, which a sum of at least 1 does not feel, are 0.
__device__ float power(float x) {
  return exp2_approx(x * kLog2E);
}

template <typename T, int kPack, bool kAnywhere>
__global__ void __launch_bounds__(kThreads, 4) absorb_kernel(CrossEntropyAbsorb p) {
  FASTGPT_SHARED(float, s_reduce, 3 * kWarp);
  const int64_t row = blockIdx.x;
  const int n = static_cast<int>(p.x.size[1]);
  CrossEntropyRow state{0.0, -INFINITY, 0.0f, 0.0f};
  if (p.first_class > 0) state = p.rows[row];
  const int64_t target = target_of(p.target, row, p.options);
  if (target == p.options.ignore_index) {
    if (threadIdx.x == 0) p.rows[row] = state;
    return;
  }
  const T* g_x = row_of<const T>(p.x, row);
  const int64_t picked = target - p.first_class;
  if (threadIdx.x == 0 && picked >= 0 && picked < n) state.picked = to_float(g_x[picked]);
  const bool smooth = p.options.label_smoothing > 0.0;
  // Distances from a logit near the others lose no digits, however far all of them are from 0.
  const float begin = smooth ? to_float(g_x[0]) : 0.0f;
  const float origin = isfinite(begin) ? begin : 0.0f;
  float top = -INFINITY, sum = 0.0f, sums[3] = {0.0f, 0.0f, 0.0f};  // of exp, w (x - origin), w
  for_groups<kAnywhere, kGroup<kAnywhere>, false>(
      {g_x}, 0, n, [&](int i, float (&r_row)[1][kPack], auto end) {
        float (&r_x)[kPack] = r_row[0];
        if (decltype(end)::kValue) {
#pragma unroll
          for (int e = 0; e < kPack; ++e) r_x[e] = i + e < n ? r_x[e] : -INFINITY;
        }
        float pack_top = r_x[0];
#pragma unroll
        for (int e = 1; e < kPack; ++e) pack_top = fmaxf(pack_top, r_x[e]);
        const float higher = fmaxf(top, pack_top);
        // -inf - -inf would be NaN; against 0 such logits count as 0.
        const float center = higher == -INFINITY ? 0.0f : higher;
        sum *= power(top - center);
        top = higher;
#pragma unroll
        for (int e = 0; e < kPack; ++e) sum += power(r_x[e] - center);
        if (!smooth) return;
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          if (decltype(end)::kValue && i + e >= n) break;
          const float w = weight_of(p.weight, p.first_class + i + e);
          sums[1] = fmaf(w, r_x[e] - origin, sums[1]);
          sums[2] += w;
        }
      });
  const float row_top = fmaxf(state.top, block_max(top, s_reduce));
  const float center = row_top == -INFINITY ? 0.0f : row_top;
  sums[0] = sum * power(top - center);
  __syncthreads();  // the maximum has been read
  block_sum(sums, s_reduce);
  if (threadIdx.x != 0) return;
  state.sum = state.sum * exp_below(state.top - center) + sums[0];
  state.top = row_top;
  state.weighted += static_cast<double>(sums[1]) + static_cast<double>(sums[2]) * origin;
  p.rows[row] = state;
}

// Sums of the threads of a block in a fixed order, known to thread 0. s_sums: kFinishThreads.
__device__ double sum_of_block(double x, double* s_sums) {
  s_sums[threadIdx.x] = x;
  for (int half = kFinishThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) s_sums[threadIdx.x] += s_sums[threadIdx.x + half];
  }
  __syncthreads();
  const double sum = s_sums[0];
  __syncthreads();
  return sum;
}

// The sum of all class weights, v without weights. Known to all threads.
__device__ double total_weight(const TensorRef& weight, int64_t classes, double* s_sums) {
  if (weight.data == nullptr) return static_cast<double>(classes);
  double sum = 0.0;
#pragma unroll 8
  for (int64_t j = threadIdx.x; j < classes; j += kFinishThreads) sum += weight_of(weight, j);
  return sum_of_block(sum, s_sums);
}

// The losses of the rows, one a thread.
__global__ void __launch_bounds__(kFinishThreads) finish_rows_kernel(CrossEntropyFinish p) {
  FASTGPT_SHARED(double, s_sums, kFinishThreads);
  const CrossEntropyOptions& o = p.options;
  const double soft = o.label_smoothing / static_cast<double>(o.classes);
  const double all = soft > 0.0 ? total_weight(p.weight, o.classes, s_sums) : 0.0;
  const int64_t i = blockIdx.x * static_cast<int64_t>(kFinishThreads) + threadIdx.x;
  if (i >= p.target.size[0]) return;
  const int64_t target = target_of(p.target, i, o);
  double loss = 0.0, lse = 0.0;
  if (target != o.ignore_index) {
    const CrossEntropyRow row = p.rows[i];
    const double w = weight_of(p.weight, target), top = row.top;
    const double log_sum = log(static_cast<double>(row.sum));
    lse = top + log_sum;
    loss = (top - row.picked + log_sum) * w;
    if (soft > 0.0) loss = (1.0 - o.label_smoothing) * loss + soft * (all * lse - row.weighted);
  }
  static_cast<float*>(p.row_loss.data)[i] = static_cast<float>(loss);
  static_cast<double*>(p.lse.data)[i] = lse;
}

// One block: the sum of the rows' losses.
__global__ void __launch_bounds__(kFinishThreads) finish_sum_kernel(CrossEntropyFinish p) {
  FASTGPT_SHARED(double, s_sums, kFinishThreads);
  const CrossEntropyOptions& o = p.options;
  const auto* g_target = static_cast<const int64_t*>(p.target.data);
  const auto* g_loss = static_cast<const float*>(p.row_loss.data);
  double loss_sum = 0.0, weight_sum = 0.0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < p.target.size[0]; i += kFinishThreads) {
    const int64_t target = g_target[i];
    if (target != o.ignore_index) weight_sum += weight_of(p.weight, target);
    loss_sum += g_loss[i];
  }
  loss_sum = sum_of_block(loss_sum, s_sums);
  weight_sum = sum_of_block(weight_sum, s_sums);
  if (threadIdx.x != 0) return;
  static_cast<float*>(p.weight_sum.data)[0] = static_cast<float>(weight_sum);
  if (o.reduction == Reduction::none) return;
  if (o.reduction == Reduction::mean) loss_sum /= weight_sum;
  static_cast<float*>(p.loss.data)[0] = static_cast<float>(loss_sum);
}

__global__ void __launch_bounds__(kFinishThreads)
    total_weight_kernel(TensorRef weight, int64_t classes, double* g_total) {
  FASTGPT_SHARED(double, s_sums, kFinishThreads);
  const double total = total_weight(weight, classes, s_sums);
  if (threadIdx.x == 0) *g_total = total;
}

// g_total: the sum of the class weights, read under label smoothing alone.
template <typename T, typename Y, int kPack, bool kAnywhere>
__global__ void __launch_bounds__(kThreads, 4)
    cross_entropy_bwd_kernel(CrossEntropyBwd p, const double* g_total) {
  const int64_t row = blockIdx.x;
  const int n = static_cast<int>(p.x.size[1]);
  const CrossEntropyOptions& o = p.options;
  const T* g_x = row_of<const T>(p.x, row);
  Y* g_dx = row_of<Y>(p.dx, row);
  const int64_t target = target_of(p.target, row, o);
  // No column knows of another: each thread takes those that it can store at once.
  const int begin = kAnywhere ? -columns_before<kPack>(g_dx) : 0;
  if (target == o.ignore_index) {
    const float r_zero[kPack] = {};
    for_packs<kPack, false>(n - begin, [&](int, int i) {
      i += begin;
      const bool whole = !kAnywhere || (i >= 0 && i + kPack <= n);
      whole ? store<kPack>(g_dx + i, r_zero) : store_within(g_dx, i, n, r_zero);
    });
    return;
  }
  const float* g_dloss = static_cast<const float*>(p.dloss.data);
  double g = 1.0;
  if (g_dloss != nullptr) g = o.reduction == Reduction::none ? g_dloss[row] : g_dloss[0];
  if (o.reduction == Reduction::mean) g /= static_cast<const float*>(p.weight_sum.data)[0];
  const double picked_weight = (1.0 - o.label_smoothing) * weight_of(p.weight, target);
  const double soft = o.label_smoothing / static_cast<double>(o.classes);
  const bool smooth = soft > 0.0;
  const float of_p = static_cast<float>(g * (picked_weight + (smooth ? soft * *g_total : 0.0)));
  const float of_weight = static_cast<float>(g * soft);
  const float of_target = static_cast<float>(g * picked_weight);
  // lse in two floats: what x is near to, and the rest.
  const double lse = static_cast<const double*>(p.lse.data)[row];
  const float high = static_cast<float>(lse), low = static_cast<float>(lse - high);
  const int64_t picked = target - p.first_class;
  for_groups<kAnywhere, kGroup<kAnywhere>, false>(
      {g_x}, begin, n, [&](int i, float (&r_row)[1][kPack], auto end) {
        const float (&r_x)[kPack] = r_row[0];
        float r_dx[kPack];
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          r_dx[e] = exp_below((r_x[e] - high) - low) * of_p;
        }
        if (smooth) {
#pragma unroll
          for (int e = 0; e < kPack; ++e) {
            if (decltype(end)::kValue && (i + e < 0 || i + e >= n)) continue;
            r_dx[e] -= of_weight * weight_of(p.weight, p.first_class + i + e);
          }
        }
        if (picked >= i && picked < i + kPack) {
#pragma unroll
          for (int e = 0; e < kPack; ++e) r_dx[e] -= i + e == picked ? of_target : 0.0f;
        }
        decltype(end)::kValue ? store_within(g_dx, i, n, r_dx) : store<kPack>(g_dx + i, r_dx);
      });
}

// f(Type<T>, Constant<pack>, Constant<anywhere>): in packs of 16 bytes of x.
template <typename F>
void for_rows(const TensorRef& x, std::initializer_list<TensorRef> tensors, const F& f) {
  const RowPlan plan = plan_rows(x.size[1], pack_of(x), tensors, true);
  visit_dtype<__nv_bfloat16, __half>(x.dtype, [&](auto type) {
    constexpr int kPack = 16 / sizeof(typename decltype(type)::type);
    visit_bool(plan.anywhere, [&](auto anywhere) { f(type, Constant<kPack>{}, anywhere); });
  });
}

}  // namespace

void cross_entropy_absorb(const CrossEntropyAbsorb& p, void* stream) {
  for_rows(p.x, {p.x}, [&](auto type, auto pack, auto anywhere) {
    using T = typename decltype(type)::type;
    launch(absorb_kernel<T, decltype(pack)::kValue, decltype(anywhere)::kValue>,
           dim3(grid_size(p.x.size[0])), dim3(kThreads), 0, stream, p);
  });
}

void cross_entropy_finish(const CrossEntropyFinish& p, void* stream) {
  const int64_t blocks = (p.target.size[0] + kFinishThreads - 1) / kFinishThreads;
  if (blocks > 0) {
    launch(finish_rows_kernel, dim3(grid_size(blocks)), dim3(kFinishThreads), 0, stream, p);
  }
  launch(finish_sum_kernel, dim3(1), dim3(kFinishThreads), 0, stream, p);
}

void cross_entropy_bwd(const CrossEntropyBwd& p, double* workspace, void* stream) {
  if (p.options.label_smoothing > 0.0) {
    launch(total_weight_kernel, dim3(1), dim3(kFinishThreads), 0, stream, p.weight,
           p.options.classes, workspace);
  }
  for_rows(p.x, {p.x, p.dx}, [&](auto type, auto pack, auto anywhere) {
    using T = typename decltype(type)::type;
    const auto run = [&](auto result) {
      using Y = typename decltype(result)::type;
      launch(cross_entropy_bwd_kernel<T, Y, decltype(pack)::kValue, decltype(anywhere)::kValue>,
             dim3(grid_size(p.x.size[0])), dim3(kThreads), 0, stream, p, workspace);
    };
    if constexpr (std::is_same_v<T, float>) {
      visit_dtype<__nv_bfloat16, __half>(p.dx.dtype, run);
    } else {
      run(type);
    }
  });
}

}  // namespace fastgpt::cuda
