// y = (x - mean) * rstd * weight + bias, rstd = (var + eps)^-1/2, exact two-pass variance.
// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + ds with g = dy * weight, xhat the normalized
// x.
//
// Plan: as many warps a row as keep it in registers, four packs a thread (a longer row is read
// again, from L2). Backward: one block a chunk of rows, several rows at a time where they are
// short; while the threads work on a row, their next one is on its way. Their sums of dweight and
// dbias stay in shared memory, which has room beside the rows in the registers; a second kernel
// adds the chunks. Chunks depend on r alone. Bytes: forward reads x and writes y (r n each);
// backward reads dy, x and writes dx: memory-bound. Source: Ba, Kiros, Hinton 2016,
// https://arxiv.org/abs/1607.06450
#include "csrc/ops/layer_norm.h"

#include <algorithm>

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

// ---- backward: g_sums gets, per chunk, a row of n partial sums of dweight, then one of dbias ----

constexpr int kBackwardThreads = 256;  // of a block, where one row has fewer

// What one thread holds of a row, as stored.
template <typename T, typename Y, int kPack>
struct RowPacks {
  RawPack<T, kPack> x[kCachedPacks];
  RawPack<Y, kPack> dy[kCachedPacks];
  float mean, rstd;
};

// A float for each column of a thread's packs, in shared memory, in groups of four, so that a
// warp's accesses lie side by side.
template <int kPack>
struct PackFloats {
  static constexpr int kGroup = kPack < 4 ? kPack : 4;
  float* s_first;  // of this thread
  // Of all threads of a row.
  __device__ static int size() { return blockDim.x * kCachedPacks * kPack; }
  __device__ PackFloats(float* s_row) : s_first(s_row + threadIdx.x * kGroup) {}
  __device__ float* group(int c, int e) const {
    return s_first + (c * kPack + e) / kGroup * kGroup * blockDim.x;
  }
  __device__ void clear() const {
    const float r_zero[kGroup] = {};
#pragma unroll
    for (int e = 0; e < kCachedPacks * kPack; e += kGroup) put(group(0, e), r_zero);
  }
  __device__ void set(int c, const float (&r_x)[kPack]) const {
#pragma unroll
    for (int e = 0; e < kPack; e += kGroup) {
      float r_group[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) r_group[i] = r_x[e + i];
      put(group(c, e), r_group);
    }
  }
  __device__ void get(int c, float (&r_x)[kPack]) const {
#pragma unroll
    for (int e = 0; e < kPack; e += kGroup) {
      float r_group[kGroup];
      load<kGroup>(group(c, e), r_group);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) r_x[e + i] = r_group[i];
    }
  }
  // sums += r_x for the columns of pack c, or r_x += sums.
  __device__ void add(int c, const float (&r_x)[kPack]) const {
#pragma unroll
    for (int e = 0; e < kPack; e += kGroup) {
      float r_sum[kGroup];
      load<kGroup>(group(c, e), r_sum);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) r_sum[i] += r_x[e + i];
      put(group(c, e), r_sum);
    }
  }
  __device__ void add_to(int c, float (&r_x)[kPack]) const {
#pragma unroll
    for (int e = 0; e < kPack; e += kGroup) {
      float r_sum[kGroup];
      load<kGroup>(group(c, e), r_sum);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) r_x[e + i] += r_sum[i];
    }
  }
  __device__ static void put(float* s_to, const float (&r_from)[kGroup]) {
    Pack<float, kGroup> r_pack;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) r_pack.value[i] = r_from[i];
    *reinterpret_cast<Pack<float, kGroup>*>(s_to) = r_pack;
  }
};

template <typename T, typename Y, int kPack>
__global__ void __launch_bounds__(kMaxRowThreads)
    layer_norm_bwd_kernel(LayerNormBwd p, int64_t chunk_rows, float* g_sums) {
  FASTGPT_SHARED(float, s_reduce, 4 * kWarp);
  FASTGPT_DYNAMIC_SHARED(s_dynamic);
  const int64_t r = p.x.size[0];
  const int n = static_cast<int>(p.x.size[1]);
  using Floats = PackFloats<kPack>;
  float* s_sums = reinterpret_cast<float*>(s_dynamic);
  const Floats dweight(s_sums + (2 * threadIdx.y) * Floats::size());
  const Floats dbias(s_sums + (2 * threadIdx.y + 1) * Floats::size());
  const Floats weight(s_sums + 2 * blockDim.y * Floats::size());
  dweight.clear();
  dbias.clear();
  if (threadIdx.y == 0) {
    for_packs<kPack, true>(n, [&](int c, int i) {
      float r_weight[kPack];
      parameters(p.weight, i, 1.0f, r_weight);
      weight.set(c, r_weight);
    });
  }
  __syncthreads();
  const auto read = [&](int64_t row, RowPacks<T, Y, kPack>& r_row) {
    const T* g_x = row_of<const T>(p.x, row);
    const Y* g_dy = row_of<const Y>(p.dy, row);
    for_packs<kPack, true>(n, [&](int c, int i) {
      r_row.x[c].load(g_x + i);
      r_row.dy[c].load(g_dy + i);
    });
    r_row.mean = static_cast<const float*>(p.mean.data)[row];
    r_row.rstd = static_cast<const float*>(p.rstd.data)[row];
  };
  const int64_t first = blockIdx.x * chunk_rows;
  const int64_t last = first + chunk_rows < r ? first + chunk_rows : r;
  RowPacks<T, Y, kPack> r_next;
  if (first + threadIdx.y < last) read(first + threadIdx.y, r_next);
  int turn = 0;
  for (int64_t begin = first; begin < last; begin += blockDim.y, turn ^= 1) {
    const int64_t row = begin + threadIdx.y;
    const bool exists = row < last;
    const RowPacks<T, Y, kPack> r_row = r_next;
    if (row + blockDim.y < last) read(row + blockDim.y, r_next);  // on its way during this row
    // Of pack c: xhat, dy and the weights.
    const auto unpack = [&](int c, float (&r_xhat)[kPack], float (&r_dy)[kPack],
                            float (&r_weight)[kPack]) {
      r_row.x[c].floats(r_xhat);
      r_row.dy[c].floats(r_dy);
      weight.get(c, r_weight);
#pragma unroll
      for (int e = 0; e < kPack; ++e) r_xhat[e] = (r_xhat[e] - r_row.mean) * r_row.rstd;
    };
    float sums[2] = {0.0f, 0.0f};  // of g, of g * xhat
    if (exists) {
      for_packs<kPack, true>(n, [&](int c, int) {
        float r_xhat[kPack], r_weight[kPack], r_dy[kPack], r_dweight[kPack];
        unpack(c, r_xhat, r_dy, r_weight);
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          r_dweight[e] = r_dy[e] * r_xhat[e];
          sums[0] += r_dy[e] * r_weight[e];
          sums[1] += r_dweight[e] * r_weight[e];
        }
        dweight.add(c, r_dweight);
        dbias.add(c, r_dy);
      });
    }
    RawPack<T, kPack> r_ds[kCachedPacks] = {};
    const auto read_ds = [&](int c, int i) {
      if (p.ds.data != nullptr) r_ds[c].load(row_of<const T>(p.ds, row) + i);
    };
    constexpr bool kEarly = kPack > 1;  // on its way during the sum; else it would spill
    if (kEarly && exists) for_packs<kPack, true>(n, read_ds);
    row_sum(sums, s_reduce + turn * 2 * kWarp);
    if (!exists) continue;
    const float mean_g = sums[0] / n, mean_gx = sums[1] / n;
    T* g_dx = row_of<T>(p.dx, row);
    for_packs<kPack, true>(n, [&](int c, int i) {
      float r_xhat[kPack], r_weight[kPack], r_dy[kPack], r_dx[kPack], r_add[kPack];
      unpack(c, r_xhat, r_dy, r_weight);
      if (!kEarly) read_ds(c, i);
      r_ds[c].floats(r_add);
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        const float g = r_dy[e] * r_weight[e];
        r_dx[e] = r_row.rstd * ((g - mean_g) - r_xhat[e] * mean_gx) + r_add[e];
      }
      store<kPack>(g_dx + i, r_dx);
    });
  }
  __syncthreads();
  if (threadIdx.y != 0) return;
  float* g_dweight = g_sums + blockIdx.x * 2 * static_cast<int64_t>(n);
  const auto write = [&](int kind, float* g_to) {
    for_packs<kPack, true>(n, [&](int c, int i) {
      float r_sum[kPack] = {};
      for (int y = 0; y < static_cast<int>(blockDim.y); ++y) {
        Floats(s_sums + (2 * y + kind) * Floats::size()).add_to(c, r_sum);
      }
      store<kPack>(g_to + i, r_sum);
    });
  };
  write(0, g_dweight);
  write(1, g_dweight + n);
}

// Rows that do not fit the registers, or their sums the shared memory: read twice. The sums of a
// chunk are in shared memory where they fit that, else where they are to be left.
template <typename T, typename Y, int kPack>
__global__ void __launch_bounds__(kMaxRowThreads)
    layer_norm_bwd_long_kernel(LayerNormBwd p, int64_t chunk_rows, bool shared, float* g_sums) {
  FASTGPT_SHARED(float, s_reduce, 4 * kWarp);
  FASTGPT_DYNAMIC_SHARED(s_dynamic);
  const int64_t r = p.x.size[0];
  const int n = static_cast<int>(p.x.size[1]);
  g_sums += blockIdx.x * 2 * static_cast<int64_t>(n);
  float* dweight = shared ? reinterpret_cast<float*>(s_dynamic) : g_sums;
  float* dbias = dweight + n;
  const int64_t first = blockIdx.x * chunk_rows;
  const int64_t last = first + chunk_rows < r ? first + chunk_rows : r;
  for (int64_t row = first; row < last; ++row) {
    const T* g_x = row_of<const T>(p.x, row);
    const Y* g_dy = row_of<const Y>(p.dy, row);
    const float mean = static_cast<const float*>(p.mean.data)[row];
    const float rstd = static_cast<const float*>(p.rstd.data)[row];
    float r_xhat[kPack], r_dy[kPack], r_weight[kPack];
    const auto read = [&](int i) {
      load<kPack>(g_x + i, r_xhat);
      load<kPack>(g_dy + i, r_dy);
      parameters(p.weight, i, 1.0f, r_weight);
#pragma unroll
      for (int e = 0; e < kPack; ++e) r_xhat[e] = (r_xhat[e] - mean) * rstd;
    };
    float sums[2] = {0.0f, 0.0f};
    for_packs<kPack, false>(n, [&](int, int i) {
      read(i);
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        const float g = r_dy[e] * r_weight[e];
        sums[0] += g;
        sums[1] += g * r_xhat[e];
        dweight[i + e] = (row == first ? 0.0f : dweight[i + e]) + r_dy[e] * r_xhat[e];
        dbias[i + e] = (row == first ? 0.0f : dbias[i + e]) + r_dy[e];
      }
    });
    row_sum(sums, s_reduce + (row - first) % 2 * 2 * kWarp);
    const float mean_g = sums[0] / n, mean_gx = sums[1] / n;
    const T* g_ds = p.ds.data == nullptr ? nullptr : row_of<const T>(p.ds, row);
    T* g_dx = row_of<T>(p.dx, row);
    for_packs<kPack, false>(n, [&](int, int i) {
      read(i);
      float r_dx[kPack], r_ds[kPack] = {};
      if (g_ds != nullptr) load<kPack>(g_ds + i, r_ds);
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        const float g = r_dy[e] * r_weight[e];
        r_dx[e] = rstd * ((g - mean_g) - r_xhat[e] * mean_gx) + r_ds[e];
      }
      store<kPack>(g_dx + i, r_dx);
    });
  }
  if (!shared) return;
  for_packs<kPack, false>(n, [&](int, int i) {  // each thread its own sums
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      g_sums[i + e] = dweight[i + e];
      g_sums[n + i + e] = dbias[i + e];
    }
  });
}

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
  const int widest = std::min(pack_of(p.x), pack_of(p.dy));  // or float32 dy would spill
  const RowPlan plan = plan_rows(n, widest, {p.x, p.dy, p.ds, p.dx});
  const dim3 grid(grid_size(chunks));
  const size_t room = most_shared_bytes();
  visit_rows(plan, p.x.dtype, p.dy.dtype, [&](auto tx, auto ty, auto pack, auto cached) {
    using T = typename decltype(tx)::type;
    using Y = typename decltype(ty)::type;
    constexpr int kWidest = 16 / sizeof(Y);
    constexpr int kPack = decltype(pack)::kValue < kWidest ? decltype(pack)::kValue : kWidest;
    if constexpr (decltype(cached)::kValue) {
      const int rows = std::max(1, kBackwardThreads / plan.threads);
      const size_t floats = (size_t{2} * rows + 1) * plan.threads * kCachedPacks * kPack;
      if (floats * sizeof(float) <= room) {
        launch(layer_norm_bwd_kernel<T, Y, kPack>, grid, dim3(plan.threads, rows),
               floats * sizeof(float), stream, p, chunk_rows_of(r), workspace);
        return;
      }
    }
    const size_t sums = 2 * sizeof(float) * n;
    const bool shared = sums <= room;
    launch(layer_norm_bwd_long_kernel<T, Y, kPack>, grid, dim3(plan.threads), shared ? sums : 0,
           stream, p, chunk_rows_of(r), shared, workspace);
  });
  float *dweight = static_cast<float*>(p.dweight.data), *dbias = static_cast<float*>(p.dbias.data);
  sum_chunks(workspace, chunks, 2 * n, n, {dweight, dbias}, stream);
}

}  // namespace fastgpt::cuda
