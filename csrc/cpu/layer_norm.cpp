// y = (x - mean) * rstd * weight + bias, rstd = (var + eps)^-1/2, exact two-pass variance.
// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) + ds with g = dy * weight, xhat the normalized
// x.
//
// Plan: items of a few rows; a row is brought to float once and stays in L1 between its passes.
// dweight and dbias: one partial sum per chunk of rows (a function of r alone), added in ascending
// order. Results larger than the caches are streamed past them.
// Bytes: forward reads x and writes y (r n each); add_layer_norm reads two and writes two; backward
// reads dy, x (and ds) and writes dx. Flops: about 8 n a row forward, 14 n backward: memory-bound.
// Source: Ba, Kiros, Hinton 2016, https://arxiv.org/abs/1607.06450
#include "csrc/ops/layer_norm.h"

#include "csrc/common/dispatch.h"
#include "csrc/cpu/kernels.h"
#include "csrc/cpu/parallel.h"
#include "csrc/cpu/rows.h"

namespace fastgpt {
inline namespace FASTGPT_ISA {
namespace {

constexpr int64_t kGrainElements = 16384;  // below this a second thread costs more than it saves

// bf16 rows are split into even and odd elements where input and output both are.
template <typename T, typename Y>
constexpr bool kSplits = false;
template <>
constexpr bool kSplits<bf16, bf16> = true;

// y from the row x (n) and the sum of its elements. Asks for the row of the input that comes next,
// and for the lines of y, while it works in L1. x, weight and bias are split where kSplits says so.
template <typename T, typename Y>
void normalize_row(const float* x, float sum, int64_t n, const float* weight, const float* bias,
                   float eps, bool streaming, const T* next, Y* y, float* mean_out,
                   float* rstd_out) {
  const float mean = sum / static_cast<float>(n);
  const Vec center = set1(mean);
  const float square = sum_vectors(
      n,
      [&](int64_t i, int lanes) {
        const Vec d = load_lanes(x + i, lanes) - center;
        return d * d;
      },
      [&](int64_t i) {
        prefetch_chunk(next + i);
        if (!streaming) prefetch_chunk(y + i, true);
      });
  const float rstd = 1.0f / __builtin_sqrtf(square / static_cast<float>(n) + eps);
  const Vec scale = set1(rstd);
  const auto y_at = [&](int64_t i, int lanes) {
    const Vec xhat = (load_lanes(x + i, lanes) - center) * scale;
    return fma(xhat, load_lanes(weight + i, lanes), load_lanes(bias + i, lanes));
  };
  int64_t first = 0;
  if constexpr (kSplits<T, Y>) {
    for (; first < split_part(n); first += kTwo) {
      store_split(y + first, y_at(first, Vec::width), y_at(first + Vec::width, Vec::width));
    }
  }
  for_vectors(n - first, [&](int64_t i, int lanes) {
    store_lanes(y + first + i, y_at(first + i, lanes), lanes, streaming);
  });
  *mean_out = mean;
  *rstd_out = rstd;
}

// Gathers a row of x, or of x + residual rounded and stored in s, as floats; returns its sum.
template <bool kSplit, typename T>
float gather_row(const T* x, const T* residual, T* s, int64_t n, bool streaming, float* floats) {
  Vec even_sum = zero(), odd_sum = zero();
  int64_t first = 0;
  if constexpr (kSplit) {
    for (; first < split_part(n); first += kTwo) {
      Vec even, odd;
      load_split(x + first, even, odd);
      if (residual != nullptr) {
        Vec even_residual, odd_residual;
        load_split(residual + first, even_residual, odd_residual);
        even = rounded_to(T{}, even + even_residual);
        odd = rounded_to(T{}, odd + odd_residual);
        store_rounded_split(s + first, even, odd);
      }
      store(floats + first, even);
      store(floats + first + Vec::width, odd);
      even_sum = even_sum + even;
      odd_sum = odd_sum + odd;
    }
  }
  const float rest = sum_vectors(n - first, [&](int64_t i, int lanes) {
    const int64_t at = first + i;
    Vec v = load_lanes(x + at, lanes);
    if (residual != nullptr) {
      v = rounded_to(T{}, v + load_lanes(residual + at, lanes));
      store_lanes(s + at, v, lanes, streaming);
    }
    store_lanes(floats + at, v, lanes);
    return v;
  });
  return reduce_add(even_sum + odd_sum) + rest;
}

template <typename T, typename Y>
void forward(const LayerNormFwd& p) {
  constexpr bool kSplit = kSplits<T, Y>;
  const int64_t r = p.x.size[0], n = p.x.size[1];
  const FloatParameter weights(p.weight, 1.0f, n, kSplit), biases(p.bias, 0.0f, n, kSplit);
  const float *weight = weights.data(), *bias = biases.data();
  const bool stream_y = streams(p.y), stream_s = p.s && streams(p.s);
  const bool in_place = sizeof(T) == sizeof(float) && !p.residual;
  const int64_t item_rows = kGrainElements / n + 1;
  const int64_t items = (r + item_rows - 1) / item_rows;
  const int workers = worker_count(items);
  const Scratch scratch(in_place ? 0 : workers * n * sizeof(float));
  parallel_items(items, workers, [&](int64_t item, int worker) {
    const int64_t end = (item + 1) * item_rows < r ? (item + 1) * item_rows : r;
    for (int64_t row = item * item_rows; row < end; ++row) {
      const T* x = row_of<T>(p.x, row);
      const float* floats = reinterpret_cast<const float*>(x);
      float sum;
      if (in_place) {
        sum = sum_vectors(n, [&](int64_t i, int lanes) { return load_lanes(floats + i, lanes); });
      } else {
        float* copy = scratch.at() + worker * n;
        sum = gather_row<kSplit>(x, p.residual ? row_of<T>(p.residual, row) : nullptr,
                                 p.residual ? row_of<T>(p.s, row) : nullptr, n, stream_s, copy);
        floats = copy;
      }
      normalize_row(floats, sum, n, weight, bias, p.eps, stream_y, row_of<T>(p.x, row + 1),
                    row_of<Y>(p.y, row), static_cast<float*>(p.mean.data) + row,
                    static_cast<float*>(p.rstd.data) + row);
    }
    stream_fence();
  });
}

// One row of dx; adds the row's dy * xhat and dy to the partial sums dweight and dbias.
template <typename T, typename Y>
void backward_row(const LayerNormBwd& p, int64_t row, const float* weight, bool streaming,
                  float* dweight, float* dbias) {
  const int64_t n = p.x.size[1];
  const T* x = row_of<T>(p.x, row);
  const Y* dy = row_of<Y>(p.dy, row);
  const T* ds = p.ds ? row_of<T>(p.ds, row) : nullptr;
  T* dx = row_of<T>(p.dx, row);
  const Vec mean = set1(static_cast<const float*>(p.mean.data)[row]);
  const Vec rstd = set1(static_cast<const float*>(p.rstd.data)[row]);
  const auto xhat_at = [&](int64_t i, int lanes) {
    return (load_lanes(x + i, lanes) - mean) * rstd;
  };
  const auto g_at = [&](int64_t i, int lanes) {
    return load_lanes(dy + i, lanes) * load_lanes(weight + i, lanes);
  };
  constexpr int kChains = 2;  // of each sum: as many as the registers of AVX2 hold
  Vec sum_g[kChains] = {zero(), zero()}, sum_gx[kChains] = {zero(), zero()};
  const auto accumulate = [&](int chain, int64_t i, int lanes) {
    const Vec g = g_at(i, lanes);
    const Vec xhat = lanes == Vec::width ? xhat_at(i, lanes)
                                         : select(first_lanes(lanes), xhat_at(i, lanes), zero());
    sum_g[chain] = sum_g[chain] + g;
    sum_gx[chain] = fma(g, xhat, sum_gx[chain]);
  };
  int64_t first = 0;
  for (; first + kTwo <= n; first += kTwo) {
    accumulate(0, first, Vec::width);
    accumulate(1, first + Vec::width, Vec::width);
  }
  for_vectors(n - first, [&](int64_t i, int lanes) { accumulate(0, first + i, lanes); });
  const float inverse_n = 1.0f / static_cast<float>(n);
  const Vec mean_g = set1(reduce_add(sum_g[0] + sum_g[1]) * inverse_n);
  const Vec mean_gx = set1(reduce_add(sum_gx[0] + sum_gx[1]) * inverse_n);
  for_vectors(n, [&](int64_t i, int lanes) {
    const Vec xhat = xhat_at(i, lanes);
    Vec d = rstd * ((g_at(i, lanes) - mean_g) - xhat * mean_gx);
    if (ds != nullptr) d = d + load_lanes(ds + i, lanes);
    store_lanes(dx + i, d, lanes, streaming);
    const Vec upstream = load_lanes(dy + i, lanes);
    if (dweight != nullptr) {
      store_lanes(dweight + i, fma(upstream, xhat, load_lanes(dweight + i, lanes)), lanes);
    }
    if (dbias != nullptr) {
      store_lanes(dbias + i, upstream + load_lanes(dbias + i, lanes), lanes);
    }
  });
}

template <typename T, typename Y>
void backward(const LayerNormBwd& p) {
  const int64_t r = p.x.size[0], n = p.x.size[1];
  constexpr int64_t kMaxChunks = 64, kMinChunkRows = 8;
  const int64_t balanced = (r + kMaxChunks - 1) / kMaxChunks;
  const int64_t chunk_rows = balanced < kMinChunkRows ? kMinChunkRows : balanced;
  const int64_t chunks = (r + chunk_rows - 1) / chunk_rows;
  const int64_t sums = (p.dweight ? 1 : 0) + (p.dbias ? 1 : 0);
  const FloatParameter weights(p.weight, 1.0f, n);
  const float* weight = weights.data();
  const Scratch scratch(chunks * sums * n * sizeof(float));
  float* partial = scratch.at();
  const bool streaming = streams(p.dx);
  parallel_for(chunks, kGrainElements / (n * chunk_rows) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float* mine = partial + chunk * sums * n;
      for (int64_t i = 0; i < sums * n; ++i) mine[i] = 0.0f;
      const int64_t last = (chunk + 1) * chunk_rows < r ? (chunk + 1) * chunk_rows : r;
      for (int64_t row = chunk * chunk_rows; row < last; ++row) {
        backward_row<T, Y>(p, row, weight, streaming, p.dweight ? mine : nullptr,
                           p.dbias ? mine + (sums - 1) * n : nullptr);
      }
    }
    stream_fence();
  });
  const auto gather = [&](const TensorRef& out, const float* first) {
    parallel_for(n, kGrainElements / (chunks + 1) + 1, [&](int64_t begin, int64_t end) {
      for_vectors(end - begin, [&](int64_t i, int lanes) {
        Vec sum = zero();
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          sum = sum + load_lanes(first + chunk * sums * n + begin + i, lanes);
        }
        store_lanes(static_cast<float*>(out.data) + begin + i, sum, lanes);
      });
    });
  };
  if (p.dweight) gather(p.dweight, partial);
  if (p.dbias) gather(p.dbias, partial + (sums - 1) * n);
}

}  // namespace

void layer_norm_fwd_kernel(const LayerNormFwd& p) {
  visit_dtype<bf16, f16>(p.x.dtype, [&](auto x) {
    using T = typename decltype(x)::type;
    p.y.dtype == p.x.dtype ? forward<T, T>(p) : forward<T, float>(p);
  });
}

void layer_norm_bwd_kernel(const LayerNormBwd& p) {
  visit_dtype<bf16, f16>(p.x.dtype, [&](auto x) {
    using T = typename decltype(x)::type;
    p.dy.dtype == p.x.dtype ? backward<T, T>(p) : backward<T, float>(p);
  });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
