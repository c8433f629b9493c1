// y = (x - mean) * rstd * weight + bias, rstd = (var + eps)^-1/2, exact two-pass variance.
// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + ds with g = dy * weight, xhat the normalized
// x.
//
// Plan: one block a row, as wide as n needs, the row in registers (a long row is read again, from
// L2). Backward: one block a chunk of rows, dweight and dbias in a float row of the workspace per
// chunk; a second kernel adds the chunks in ascending order. Chunks depend on r alone.
// Bytes: forward reads x and writes y (r n each); backward reads dy, x and writes dx: memory-bound.
// Source: Ba, Kiros, Hinton 2016, https://arxiv.org/abs/1607.06450
#include "csrc/ops/layer_norm.h"

#include "csrc/cuda/column_sums.cuh"
#include "csrc/cuda/reduce.cuh"
#include "csrc/cuda/rows.cuh"

namespace fastgpt::cuda {
namespace {

template <typename T, typename Y, int kPack, bool kCached>
__global__ void __launch_bounds__(kMaxRowThreads) layer_norm_fwd_kernel(LayerNormFwd p) {
  FASTGPT_SHARED(float, s_sums, kWarp);
  const int64_t row = blockIdx.x * static_cast<int64_t>(blockDim.y) + threadIdx.y;
  if (row >= p.x.size[0]) return;  // a whole warp, and no other waits for it
  const int n = static_cast<int>(p.x.size[1]);
  const T* g_x = row_of<const T>(p.x, row);
  float r_x[kCached ? kCachedPacks : 1][kPack];
  if (p.residual.data != nullptr) {
    const T* g_residual = row_of<const T>(p.residual, row);
    T* g_s = row_of<T>(p.s, row);
    for_packs<kPack, kCached>(n, [&](int c, int i) {
      float r_residual[kPack];
      load<kPack>(g_x + i, r_x[c]);
      load<kPack>(g_residual + i, r_residual);
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        r_x[c][e] = to_float(from_float<T>(r_x[c][e] + r_residual[e]));
      }
      store<kPack>(g_s + i, r_x[c]);
    });
    g_x = g_s;  // each thread reads back only what it wrote itself
  } else if (kCached) {
    for_packs<kPack, kCached>(n, [&](int c, int i) { load<kPack>(g_x + i, r_x[c]); });
  }
  float sum[1] = {0.0f};
  for_packs<kPack, kCached>(n, [&](int c, int i) {
    if (!kCached) load<kPack>(g_x + i, r_x[c]);
#pragma unroll
    for (int e = 0; e < kPack; ++e) sum[0] += r_x[c][e];
  });
  block_sum(sum, s_sums);
  const float mean = sum[0] / n;
  float square[1] = {0.0f};
  for_packs<kPack, kCached>(n, [&](int c, int i) {
    if (!kCached) load<kPack>(g_x + i, r_x[c]);
#pragma unroll
    for (int e = 0; e < kPack; ++e) square[0] += (r_x[c][e] - mean) * (r_x[c][e] - mean);
  });
  block_sum(square, s_sums);
  const float rstd = 1.0f / sqrtf(square[0] / n + p.eps);
  Y* g_y = row_of<Y>(p.y, row);
  for_packs<kPack, kCached>(n, [&](int c, int i) {
    if (!kCached) load<kPack>(g_x + i, r_x[c]);
    float r_y[kPack], r_weight[kPack], r_bias[kPack];
    parameters(p.weight, i, 1.0f, r_weight);
    parameters(p.bias, i, 0.0f, r_bias);
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      r_y[e] = fmaf((r_x[c][e] - mean) * rstd, r_weight[e], r_bias[e]);
    }
    store<kPack>(g_y + i, r_y);
  });
  if (threadIdx.x == 0) {
    static_cast<float*>(p.mean.data)[row] = mean;
    static_cast<float*>(p.rstd.data)[row] = rstd;
  }
}

// g_sums: per chunk a row of n partial sums of dweight, then one of dbias.
template <typename T, typename Y, int kPack, bool kCached>
__global__ void __launch_bounds__(kMaxRowThreads)
    layer_norm_bwd_kernel(LayerNormBwd p, int64_t chunk_rows, float* g_sums) {
  FASTGPT_SHARED(float, s_sums, 2 * kWarp);
  const int64_t r = p.x.size[0];
  const int n = static_cast<int>(p.x.size[1]);
  float* g_dweight = g_sums + blockIdx.x * 2 * static_cast<int64_t>(n);
  float* g_dbias = g_dweight + n;
  constexpr int kPacks = kCached ? kCachedPacks : 1;
  float r_dweight[kPacks][kPack] = {}, r_dbias[kPacks][kPack] = {};
  float r_weight[kPacks][kPack];
  const auto read_weight = [&](int c, int i) { parameters(p.weight, i, 1.0f, r_weight[c]); };
  if (kCached) for_packs<kPack, kCached>(n, read_weight);
  const int64_t first = blockIdx.x * chunk_rows;
  const int64_t last = first + chunk_rows < r ? first + chunk_rows : r;
  for (int64_t row = first; row < last; ++row) {
    const T* g_x = row_of<const T>(p.x, row);
    const Y* g_dy = row_of<const Y>(p.dy, row);
    const T* g_ds = p.ds.data == nullptr ? nullptr : row_of<const T>(p.ds, row);
    T* g_dx = row_of<T>(p.dx, row);
    const float mean = static_cast<const float*>(p.mean.data)[row];
    const float rstd = static_cast<const float*>(p.rstd.data)[row];
    float r_xhat[kPacks][kPack], r_dy[kPacks][kPack];
    const auto read = [&](int c, int i) {
      load<kPack>(g_x + i, r_xhat[c]);
      load<kPack>(g_dy + i, r_dy[c]);
#pragma unroll
      for (int e = 0; e < kPack; ++e) r_xhat[c][e] = (r_xhat[c][e] - mean) * rstd;
      if (!kCached) read_weight(c, i);
    };
    float sums[2] = {0.0f, 0.0f};  // of g, of g * xhat
    for_packs<kPack, kCached>(n, [&](int c, int i) {
      read(c, i);
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        const float g = r_dy[c][e] * r_weight[c][e];
        sums[0] += g;
        sums[1] += g * r_xhat[c][e];
      }
    });
    block_sum(sums, s_sums);
    const float mean_g = sums[0] / n, mean_gx = sums[1] / n;
    for_packs<kPack, kCached>(n, [&](int c, int i) {
      if (!kCached) read(c, i);
      float r_dx[kPack], r_ds[kPack] = {};
      if (g_ds != nullptr) load<kPack>(g_ds + i, r_ds);
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        const float g = r_dy[c][e] * r_weight[c][e];
        r_dx[e] = rstd * ((g - mean_g) - r_xhat[c][e] * mean_gx) + r_ds[e];
        if (kCached) {
          r_dweight[c][e] += r_dy[c][e] * r_xhat[c][e];
          r_dbias[c][e] += r_dy[c][e];
        } else {
          const bool start = row == first;
          g_dweight[i + e] = (start ? 0.0f : g_dweight[i + e]) + r_dy[c][e] * r_xhat[c][e];
          g_dbias[i + e] = (start ? 0.0f : g_dbias[i + e]) + r_dy[c][e];
        }
      }
      store<kPack>(g_dx + i, r_dx);
    });
  }
  if (kCached) {
    for_packs<kPack, kCached>(n, [&](int c, int i) {
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        g_dweight[i + e] = r_dweight[c][e];
        g_dbias[i + e] = r_dbias[c][e];
      }
    });
  }
}

constexpr int kBackwardPack = 4;  // with 8 the sums of dweight and dbias would spill

}  // namespace

void layer_norm_fwd(const LayerNormFwd& p, void* stream) {
  const RowPlan plan = plan_rows(p.x.size[1], pack_of(p.x), {p.x, p.residual, p.s, p.y});
  visit_rows(plan, p.x.dtype, p.y.dtype, [&](auto tx, auto ty, auto pack, auto cached) {
    using T = typename decltype(tx)::type;
    using Y = typename decltype(ty)::type;
    launch(layer_norm_fwd_kernel<T, Y, decltype(pack)::kValue, decltype(cached)::kValue>,
           grid_of_rows(plan, p.x.size[0]), block_of_rows(plan), 0, stream, p);
  });
}

int64_t layer_norm_bwd_workspace(int64_t r, int64_t n) {
  return chunks_of(r) * 2 * n;
}

void layer_norm_bwd(const LayerNormBwd& p, float* workspace, void* stream) {
  const int64_t r = p.x.size[0], n = p.x.size[1], chunks = chunks_of(r);
  const RowPlan plan = plan_rows(n, pack_of(p.x, kBackwardPack), {p.x, p.dy, p.ds, p.dx});
  visit_rows<kBackwardPack>(
      plan, p.x.dtype, p.dy.dtype, [&](auto tx, auto ty, auto pack, auto cached) {
        using T = typename decltype(tx)::type;
        using Y = typename decltype(ty)::type;
        launch(layer_norm_bwd_kernel<T, Y, decltype(pack)::kValue, decltype(cached)::kValue>,
               dim3(grid_size(chunks)), dim3(plan.threads), 0, stream, p, chunk_rows_of(r),
               workspace);
      });
  sum_chunks(workspace, chunks, 2 * n, n, p.dweight.data, stream);
  sum_chunks(workspace + n, chunks, 2 * n, n, p.dbias.data, stream);
}

}  // namespace fastgpt::cuda
