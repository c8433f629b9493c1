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

#include "csrc/common/dispatch.h"
#include "csrc/cuda/copy.cuh"
#include "csrc/cuda/launch.cuh"
#include "csrc/cuda/reduce.cuh"

namespace fastgpt::cuda {
namespace {

constexpr int kCachedPacks = 4;  // packs of a row that one thread keeps in registers

template <typename T>
__device__ T* row_of(const TensorRef& t, int64_t row) {
  return static_cast<T*>(t.data) + row * t.stride[0];
}

// f(index of the pack among this thread's, first element) for each of the thread's packs of a row.
template <int kPack, bool kCached, typename F>
__device__ void for_packs(int n, const F& f) {
  const int step = blockDim.x * kPack;
  if constexpr (kCached) {
#pragma unroll
    for (int c = 0; c < kCachedPacks; ++c) {
      const int i = c * step + static_cast<int>(threadIdx.x) * kPack;
      if (i < n) f(c, i);
    }
  } else {
    for (int i = threadIdx.x * kPack; i < n; i += step) f(0, i);
  }
}

template <typename T, typename Y, int kPack, bool kCached>
__global__ void layer_norm_fwd_kernel(LayerNormFwd p) {
  FASTGPT_SHARED(float, s_sums, kWarp);
  const int64_t row = blockIdx.x;
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
    float r_y[kPack];
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      const float xhat = (r_x[c][e] - mean) * rstd;
      r_y[e] = fmaf(xhat, parameter(p.weight, i + e, 1.0f), parameter(p.bias, i + e, 0.0f));
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
__global__ void layer_norm_bwd_kernel(LayerNormBwd p, int64_t chunk_rows, float* g_sums) {
  FASTGPT_SHARED(float, s_sums, 2 * kWarp);
  const int64_t r = p.x.size[0];
  const int n = static_cast<int>(p.x.size[1]);
  float* g_dweight = g_sums + blockIdx.x * 2 * static_cast<int64_t>(n);
  float* g_dbias = g_dweight + n;
  constexpr int kPacks = kCached ? kCachedPacks : 1;
  float r_dweight[kPacks][kPack] = {}, r_dbias[kPacks][kPack] = {};
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
    };
    float sums[2] = {0.0f, 0.0f};  // of g, of g * xhat
    for_packs<kPack, kCached>(n, [&](int c, int i) {
      read(c, i);
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        const float g = r_dy[c][e] * parameter(p.weight, i + e, 1.0f);
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
        const float g = r_dy[c][e] * parameter(p.weight, i + e, 1.0f);
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

__global__ void layer_norm_bwd_sum_kernel(const float* g_sums, int64_t chunks, int64_t n,
                                          float* g_dweight, float* g_dbias) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i >= n) return;
  float dweight = 0.0f, dbias = 0.0f;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    dweight += g_sums[chunk * 2 * n + i];
    dbias += g_sums[(chunk * 2 + 1) * n + i];
  }
  if (g_dweight != nullptr) g_dweight[i] = dweight;
  if (g_dbias != nullptr) g_dbias[i] = dbias;
}

constexpr int64_t kMaxChunks = 512;

int64_t chunk_rows_of(int64_t r) {
  return (r + kMaxChunks - 1) / kMaxChunks;
}

// Also asked of a single row's stride, so that a row has the same bits alone as among others.
bool aligned(const TensorRef& t, int pack, int element_bytes) {
  if (t.data == nullptr) return true;
  const bool start = reinterpret_cast<uintptr_t>(t.data) % (pack * element_bytes) == 0;
  return start && t.stride[0] % pack == 0;
}

int element_bytes(const TensorRef& t) {
  return t.dtype == DType::f32 ? 4 : 2;
}

// f(Type<T>, Type<Y>, pack size, whether a row fits the registers, threads of a block).
template <typename F>
void specialize(const TensorRef& x, const TensorRef& y, std::initializer_list<TensorRef> rows,
                const F& f) {
  check_at_most(x.size[1], int64_t{1} << 30, "elements of a row");  // the kernels count in int
  const int n = static_cast<int>(x.size[1]);
  bool vector = n % 4 == 0;
  for (const TensorRef& t : rows) vector = vector && aligned(t, 4, element_bytes(t));
  const int pack = vector ? 4 : 1;
  const int threads_wanted = (n + pack - 1) / pack;
  const int rounded = (threads_wanted + kWarp - 1) / kWarp * kWarp;
  const int threads = rounded < 256                   ? rounded
                      : rounded <= 256 * kCachedPacks ? 256
                                                      : kMaxBlockThreads;
  const bool cached = threads_wanted <= threads * kCachedPacks;
  visit_dtype<__nv_bfloat16, __half>(x.dtype, [&](auto tx) {
    using T = typename decltype(tx)::type;
    const auto with_y = [&](auto ty) {
      visit_bool(vector, [&](auto v) {
        visit_bool(cached,
                   [&](auto c) { f(tx, ty, Constant<decltype(v)::kValue ? 4 : 1>{}, c, threads); });
      });
    };
    y.dtype == x.dtype ? with_y(Type<T>{}) : with_y(Type<float>{});
  });
}

}  // namespace

void layer_norm_fwd(const LayerNormFwd& p, void* stream) {
  specialize(p.x, p.y, {p.x, p.residual, p.s, p.y},
             [&](auto tx, auto ty, auto pack, auto cached, int threads) {
               using T = typename decltype(tx)::type;
               using Y = typename decltype(ty)::type;
               launch(layer_norm_fwd_kernel<T, Y, decltype(pack)::kValue, decltype(cached)::kValue>,
                      dim3(grid_size(p.x.size[0])), dim3(threads), 0, stream, p);
             });
}

int64_t layer_norm_bwd_workspace(int64_t r, int64_t n) {
  return (r + chunk_rows_of(r) - 1) / chunk_rows_of(r) * 2 * n;
}

void layer_norm_bwd(const LayerNormBwd& p, float* workspace, void* stream) {
  const int64_t r = p.x.size[0], n = p.x.size[1];
  const int64_t chunk_rows = chunk_rows_of(r), chunks = (r + chunk_rows - 1) / chunk_rows;
  specialize(p.x, p.dy, {p.x, p.dy, p.ds, p.dx},
             [&](auto tx, auto ty, auto pack, auto cached, int threads) {
               using T = typename decltype(tx)::type;
               using Y = typename decltype(ty)::type;
               launch(layer_norm_bwd_kernel<T, Y, decltype(pack)::kValue, decltype(cached)::kValue>,
                      dim3(grid_size(chunks)), dim3(threads), 0, stream, p, chunk_rows, workspace);
             });
  if (!p.dweight && !p.dbias) return;
  constexpr int kThreads = 128;
  launch(layer_norm_bwd_sum_kernel, dim3(grid_size((n + kThreads - 1) / kThreads)), dim3(kThreads),
         0, stream, workspace, chunks, n, static_cast<float*>(p.dweight.data),
         static_cast<float*>(p.dbias.data));
}

}  // namespace fastgpt::cuda
